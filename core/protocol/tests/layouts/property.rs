//! What holds for all values and all bytes.

use proptest::collection::vec;
use proptest::prelude::*;

use crate::golden::vector;
use crate::make::Source;
use crate::table::{Through, layouts};

/// Any bytes end in a value or an error, and what decodes has one encoding only.
fn survives(name: &str, through: Through, bytes: &[u8]) {
    if let Ok((_, again)) = through(bytes) {
        assert!(again == bytes, "{name}: two encodings of one value: {} and {}", hex::encode(bytes), hex::encode(again));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn values_come_back_as_they_went(stream in vec(any::<u8>(), 0..6000)) {
        for layout in layouts() {
            (layout.round_trip)(&mut Source(&stream));
        }
    }

    #[test]
    fn decoders_survive_any_bytes(bytes in vec(any::<u8>(), 0..512)) {
        for layout in layouts() {
            survives(layout.name, layout.through, &bytes);
        }
    }

    #[test]
    fn decoders_survive_bytes_after_their_own_label(bytes in vec(any::<u8>(), 0..512)) {
        for layout in layouts() {
            let vector = vector(&layout).unwrap();
            let label = vector.iter().take_while(|byte| byte.is_ascii_graphic()).count();
            survives(layout.name, layout.through, &[&vector[..label], &[1], bytes.as_slice()].concat());
        }
    }

    #[test]
    fn decoders_survive_changed_vectors(changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4), cut in any::<Option<prop::sample::Index>>()) {
        for layout in layouts() {
            let mut bytes = vector(&layout).unwrap();
            for (at, value) in &changes {
                let at = at.index(bytes.len());
                bytes[at] = *value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            survives(layout.name, layout.through, &bytes);
        }
    }
}
