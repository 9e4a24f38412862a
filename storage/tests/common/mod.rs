//! What the integration tests share: stores on any engine, entries, a model of the log.
#![allow(dead_code, clippy::unwrap_used, clippy::indexing_slicing, reason = "tests, each of which uses a part")]

use std::path::Path;

use dstack_secret::Secret;
use dstack_storage::{EngineKind, LogEntry, LogPosition, LogStore, RecordKey, StoreConfig};

/// The record key of all tests.
pub(crate) fn key() -> RecordKey {
    RecordKey::new(Secret::from_fn(|bytes| bytes.fill(0x42)))
}

/// Configuration with a small cache and no reserve.
pub(crate) fn config(engine: EngineKind, dir: &Path) -> StoreConfig {
    StoreConfig { reserve_bytes: 0, cache_bytes: 8 << 20, ..StoreConfig::new(engine, dir) }
}

/// Opens a store.
pub(crate) fn open(engine: EngineKind, dir: &Path) -> LogStore {
    LogStore::open(&config(engine, dir), &key()).unwrap()
}

/// An entry whose bytes follow from its place, so that any reader can tell whether it is right.
pub(crate) fn entry(index: u64, term: u64, bytes: usize) -> LogEntry {
    let mut payload = format!("entry {index} of term {term};").into_bytes();
    let pattern = payload.clone();
    while payload.len() < bytes {
        payload.extend_from_slice(&pattern);
    }
    LogEntry { index, term, payload }
}

pub(crate) fn at(index: u64, term: u64) -> LogPosition {
    LogPosition { index, term }
}

/// SplitMix64: enough randomness for a test, the same from the same seed everywhere.
pub(crate) struct Seeded(pub(crate) u64);

impl Seeded {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}
