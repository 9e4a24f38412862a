//! The workload and its oracle. Owns: operation `k` of a seed, which depends on the seed, `k` and the state before only, and what the store
//! must hold after it. Whoever knows how many operations were acknowledged knows everything.

use std::collections::BTreeMap;
use std::path::Path;

use dstack_secret::Secret;
use dstack_storage::{
    Change, EngineKind, LogEntry, LogPosition, LogStore, Page, RecordKey, SegmentConfig, SegmentReader, Segments, StoreConfig,
};

use crate::arguments::Seeded;

/// What the store should hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Model {
    log: BTreeMap<u64, LogEntry>,
    purged: Option<LogPosition>,
    vote: Option<Vec<u8>>,
    state: BTreeMap<String, Vec<u8>>,
    share: Option<Vec<u8>>,
    snapshot: Option<(Vec<u8>, Vec<u8>)>,
}

/// One operation.
#[derive(Debug, Clone)]
pub(crate) enum Operation {
    Change(Change),
    /// Meta and data; not one commit but several.
    Snapshot(Vec<u8>, Vec<u8>),
}

impl Model {
    /// The state after `count` operations.
    pub(crate) fn after(seed: u64, count: u64) -> Self {
        let mut model = Self::default();
        for number in 0..count {
            let operation = model.operation(seed, number);
            model.apply(&operation);
        }
        model
    }

    fn last(&self) -> Option<LogPosition> {
        self.log.last_key_value().map(|(_, entry)| entry.position()).or(self.purged)
    }

    /// Operation `number`, given the state before it.
    pub(crate) fn operation(&self, seed: u64, number: u64) -> Operation {
        let mut seeded = Seeded::new(seed, number);
        let term = number / 50;
        let last = self.last();
        match seeded.below(100) {
            0..=64 => {
                let first = last.map_or(0, |last| last.index.saturating_add(1));
                let count = 1u64.saturating_add(seeded.below(16));
                let entries = (first..first.saturating_add(count)).map(|index| {
                    let size = if seeded.below(40) == 0 { 20_000 } else { seeded.size_below(700) };
                    LogEntry { index, term, payload: seeded.bytes(size) }
                });
                Operation::Change(Change::Append(entries.collect()))
            }
            65..=76 => Operation::Change(Change::Vote(seeded.bytes(32))),
            77..=82 => {
                let kept = self.log.len().saturating_sub(seeded.size_below(12));
                let kept = kept.checked_sub(1).and_then(|place| self.log.keys().nth(place)).copied();
                Operation::Change(Change::TruncateAfter(kept))
            }
            83..=88 => {
                let far = seeded.size_below(60).saturating_add(self.log.len() / 3);
                let position = self.log.values().nth(far).or(self.log.values().last()).map(LogEntry::position);
                Operation::Change(Change::PurgeUpto(position.or(self.purged).unwrap_or(LogPosition { index: 0, term: 0 })))
            }
            89..=94 => {
                let name = format!("row/{}", seeded.below(20));
                let bytes = (seeded.below(3) > 0).then(|| seeded.bytes(900));
                Operation::Change(Change::State(vec![(name, bytes), ("applied".to_owned(), Some(number.to_be_bytes().to_vec()))]))
            }
            95..=97 => Operation::Change(Change::Share { name: "prf".to_owned(), bytes: Some(seeded.bytes(300)) }),
            _ => {
                let size = seeded.size_below(600_000);
                Operation::Snapshot(number.to_be_bytes().to_vec(), seeded.bytes(size))
            }
        }
    }

    pub(crate) fn apply(&mut self, operation: &Operation) {
        match operation {
            Operation::Snapshot(meta, data) => self.snapshot = Some((meta.clone(), data.clone())),
            Operation::Change(change) => match change {
                Change::Append(entries) => self.log.extend(entries.iter().map(|entry| (entry.index, entry.clone()))),
                Change::TruncateAfter(kept) => {
                    let kept = kept.or(self.purged.map(|purged| purged.index));
                    self.log.retain(|index, _| kept.is_some_and(|kept| *index <= kept));
                }
                Change::PurgeUpto(position) => {
                    self.log.retain(|index, _| *index > position.index);
                    if self.purged.is_none_or(|purged| purged.index < position.index) {
                        self.purged = Some(*position);
                    }
                }
                Change::Vote(vote) => self.vote = Some(vote.clone()),
                Change::State(blobs) => {
                    for (name, bytes) in blobs {
                        match bytes {
                            Some(bytes) => self.state.insert(name.clone(), bytes.clone()),
                            None => self.state.remove(name),
                        };
                    }
                }
                Change::Share { bytes, .. } => self.share.clone_from(bytes),
                Change::Committed(_) => {}
            },
        }
    }

    /// What `store` holds.
    pub(crate) fn of(store: &LogStore) -> Result<Self, String> {
        let text = |error: dstack_storage::StoreError| error.to_string();
        let mut model = Self { purged: store.last_purged(), vote: store.read_vote().map_err(text)?, ..Self::default() };
        let mut from = 0;
        loop {
            let entries = store.read_range(from, u64::MAX, Page::SCAN).map_err(text)?;
            let Some(newest) = entries.last() else { break };
            from = newest.index.saturating_add(1);
            model.log.extend(entries.into_iter().map(|entry| (entry.index, entry)));
        }
        if model.last() != store.last() {
            return Err(format!("the store says that its log ends at {:?}, but {:?} is last", store.last(), model.last()));
        }
        for name in store.state_names().map_err(text)? {
            let bytes = store.load_state(&name).map_err(text)?.ok_or("state blob vanished")?;
            model.state.insert(name, bytes);
        }
        model.share = store.load_share("prf").map_err(text)?;
        model.snapshot = store.load_snapshot(1 << 30).map_err(text)?.map(|(record, data)| (record.meta, data));
        Ok(model)
    }
}

/// Runs `operation` on a store.
pub(crate) fn execute(store: &LogStore, operation: &Operation) -> Result<(), String> {
    match operation {
        Operation::Change(change) => store.write(std::slice::from_ref(change)).map_err(|error| error.to_string()),
        Operation::Snapshot(meta, data) => store.save_snapshot(meta, data).map(|_| ()).map_err(|error| error.to_string()),
    }
}

/// The audit entry that goes with operation `number`.
pub(crate) fn audit_entry(seed: u64, number: u64) -> Vec<u8> {
    let mut seeded = Seeded::new(seed ^ 0xa0d1, number);
    let size = seeded.size_below(400);
    seeded.bytes(size)
}

pub(crate) fn open_store(engine: EngineKind, dir: &Path) -> Result<LogStore, String> {
    let config = StoreConfig { reserve_bytes: 0, cache_bytes: 16 << 20, ..StoreConfig::new(engine, dir.join("store")) };
    LogStore::open(&config, &key()).map_err(|error| error.to_string())
}

pub(crate) fn open_segments(dir: &Path) -> Result<Segments, String> {
    let config = SegmentConfig { reserve_bytes: 0, segment_bytes_max: 256 << 10, ..SegmentConfig::new(dir.join("audit")) };
    Segments::open(config, Some(&key())).map_err(|error| error.to_string())
}

pub(crate) fn key() -> RecordKey {
    RecordKey::new(Secret::from_fn(|bytes| bytes.fill(0x5a)))
}

/// Checks a directory after a crash: everything acknowledged is there, and what is there beyond it is one of the next `ahead_max`
/// operations in whole. Answers how many operations the store holds.
pub(crate) fn check(engine: EngineKind, dir: &Path, seed: u64, acknowledged: u64, ahead_max: u64) -> Result<u64, String> {
    let store = open_store(engine, dir)?;
    let found = Model::of(&store)?;
    let mut model = Model::after(seed, acknowledged);
    let mut held = None;
    for ahead in 0..=ahead_max {
        let number = acknowledged.saturating_add(ahead);
        if model == found {
            held = Some(number);
            break;
        }
        let operation = model.operation(seed, number);
        model.apply(&operation);
    }
    let held = held.ok_or_else(|| {
        let expected = Model::after(seed, acknowledged);
        format!(
            "store holds neither the {acknowledged} acknowledged operations nor up to {ahead_max} more: last {:?}, expected {:?}; vote {}, snapshot {}, state {}, log {}",
            found.last(),
            expected.last(),
            found.vote == expected.vote,
            found.snapshot == expected.snapshot,
            found.state == expected.state,
            found.log == expected.log,
        )
    })?;
    check_audit(dir, seed, acknowledged, ahead_max)?;
    Ok(held)
}

fn check_audit(dir: &Path, seed: u64, acknowledged: u64, ahead_max: u64) -> Result<(), String> {
    let next = open_segments(dir)?.next_position();
    if next < acknowledged || next > acknowledged.saturating_add(ahead_max) {
        return Err(format!("audit ends at {next}, acknowledged {acknowledged}"));
    }
    let mut expected = 0;
    for item in SegmentReader::open(&dir.join("audit"), Some(&key())).map_err(|error| error.to_string())? {
        let (position, bytes) = item.map_err(|error| error.to_string())?;
        if position != expected || bytes != audit_entry(seed, position) {
            return Err(format!("audit entry {position} differs"));
        }
        expected = expected.saturating_add(1);
    }
    Ok(())
}
