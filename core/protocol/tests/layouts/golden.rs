//! The vectors of `tests/vectors/layouts`: bytes that were once written down and must be read for ever. Owns: comparing both
//! ways. Never: writes a vector; a missing one fails with its bytes in the message.

use std::collections::BTreeSet;
use std::path::PathBuf;

use dstack_protocol::codec::sha256;

use crate::make::Source;
use crate::table::{Layout, layouts};

pub(crate) fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/layouts")
}

/// The committed bytes of a layout.
pub(crate) fn vector(layout: &Layout) -> Option<Vec<u8>> {
    let text = std::fs::read_to_string(folder().join(format!("{}.hex", layout.name))).ok()?;
    Some(hex::decode(text.split_whitespace().collect::<String>()).expect("a vector is hex"))
}

/// What a new layout's first vector is made from: a stream that depends on its name alone.
fn first_stream(name: &str) -> Vec<u8> {
    (0_u32..400).flat_map(|block| sha256(&[b"dstack protocol vector", name.as_bytes(), &block.to_be_bytes()])).collect()
}

#[test]
fn every_layout_reads_and_writes_its_vector() {
    let mut missing = String::new();
    for layout in layouts() {
        let Some(bytes) = vector(&layout) else {
            let made = (layout.make)(&mut Source(&first_stream(layout.name)));
            let shown = (layout.through)(&made).expect("what is made decodes").0;
            missing += &format!("MISSING {} | {} | {shown}\n", layout.name, hex::encode(made));
            continue;
        };
        let (shown, again) = (layout.through)(&bytes).unwrap_or_else(|error| panic!("{}: {error}", layout.name));
        assert!(again == bytes, "{} is written differently than its vector", layout.name);
        let value = std::fs::read_to_string(folder().join(format!("{}.value", layout.name))).expect("each vector has its value beside it");
        assert_eq!(shown, value.trim_end(), "{} is read differently than when it was written down", layout.name);
    }
    assert!(missing.is_empty(), "layouts without a vector; check these by hand, then write them down:\n{missing}");
}

#[test]
fn no_vector_is_left_without_its_layout() {
    let names: BTreeSet<String> = layouts().into_iter().map(|layout| layout.name.to_owned()).collect();
    for entry in std::fs::read_dir(folder()).expect("the vectors are there") {
        let path = entry.expect("readable").path();
        let stem = path.file_stem().and_then(|stem| stem.to_str()).expect("a name").to_owned();
        assert!(stem == "README" || names.contains(&stem), "{} belongs to no layout", path.display());
    }
}
