//! Records and anchor of a store whose engine hands out foreign bytes: nobody but the key's owner can make them, so nothing but an empty
//! store opens, and what opens is empty.

use dstack_protocol::DecodeError;
use dstack_protocol::codec::Reader;
use dstack_secret::Secret;
use dstack_storage::engine::MemoryEngine;
use dstack_storage::{Batch, Engine as _, LogStore, RecordKey, Tree};

/// See the module text. Input: one byte whether there is an anchor file, its bytes, then records: tree, key, value.
pub(crate) fn run(data: &[u8]) {
    let _: Result<(), DecodeError> = fill(data);
}

fn fill(data: &[u8]) -> Result<(), DecodeError> {
    let mut r = Reader::new(data);
    let anchor = if r.u8("anchor")? & 1 == 1 { Some(r.lp("anchor file", 1 << 14)?) } else { None };
    let engine = MemoryEngine::new();
    let mut batch = Batch::new();
    let mut records = 0_usize;
    while r.remaining() > 0 {
        let tree = Tree::ALL[usize::from(r.u8("tree")?) % Tree::ALL.len()];
        let key = r.lp("key", 256)?;
        if key.is_empty() {
            continue;
        }
        batch.put(tree, key, r.lp("value", 1 << 14)?);
        records += 1;
    }
    if engine.write(&batch).is_err() {
        return Ok(());
    }
    let dir = tempfile::tempdir().expect("a folder for the anchor");
    let path = dir.path().join("anchor");
    if let Some(bytes) = anchor {
        std::fs::write(&path, bytes).expect("the anchor is written");
    }
    let opened = LogStore::on_engine(Box::new(engine), &RecordKey::new(Secret::from_fn(|key| key.fill(7))), Some(&path));
    if let Ok(store) = opened {
        assert!(records == 0 && anchor.is_none(), "nobody sealed these records");
        assert_eq!(store.last(), None, "an empty store is empty");
    }
    Ok(())
}
