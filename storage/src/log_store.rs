//! [`LogStore`]: the Raft log without a gap, the vote, the committed position, state blobs, the newest snapshot, shares.
//!
//! Owns: keys and layouts inside the trees, contiguity (checked at every write and at start), opening with a time limit.
//! Never: knows what an entry, vote or share means (callers encode); goes past an error at start.
//! Blocking: raft drives it through [`crate::writer::LogWriter`].
//! Source: architecture.md §8; dependencies.md §7, points 3 to 5.

mod pending;
mod snapshot;

use std::path::PathBuf;
use std::sync::mpsc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use self::pending::Pending;
pub use self::snapshot::{CHUNK_BYTES, SnapshotRecord, SnapshotWriter};
use crate::engine::{Engine, EngineConfig, EngineKind, Page, Tree, check_space, open_engine};
use crate::error::{EngineError, StoreError};
use crate::sealed::{LogBounds, Opened, RecordKey, Recovered, Sealed, Stamp};

/// Index and term of a log entry. (Whatever else the consensus library puts into a log id belongs to the payload.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogPosition {
    /// Index, without gaps.
    pub index: u64,
    /// Term, never falling.
    pub term: u64,
}

/// One entry of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// Its index.
    pub index: u64,
    /// Its term.
    pub term: u64,
    /// Its bytes, at most [`ENTRY_BYTES_MAX`].
    pub payload: Vec<u8>,
}

impl LogEntry {
    /// Index and term.
    pub fn position(&self) -> LogPosition {
        LogPosition { index: self.index, term: self.term }
    }
}

/// One change of the store. Changes given together become durable together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Entries that follow the last one. An empty store begins at index 0 or 1.
    Append(Vec<LogEntry>),
    /// Removes all entries after this index; none removes all that were not purged.
    TruncateAfter(Option<u64>),
    /// Removes all entries up to this one, it included. Past the end (a snapshot was installed) the log continues after it.
    PurgeUpto(LogPosition),
    /// Replaces the vote.
    Vote(Vec<u8>),
    /// Replaces or removes the committed position.
    Committed(Option<Vec<u8>>),
    /// Replaces or removes state blobs by name.
    State(Vec<(String, Option<Vec<u8>>)>),
    /// Replaces or removes one sealed share.
    Share {
        /// Its name.
        name: String,
        /// Its bytes, sealed by the caller, or none to remove it.
        bytes: Option<Vec<u8>>,
    },
}

/// Where and how to open a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreConfig {
    /// Directory: engine files and the anchor.
    pub dir: PathBuf,
    /// Which engine.
    pub engine: EngineKind,
    /// Space that writes must leave free.
    pub reserve_bytes: u64,
    /// Memory for the engine's page cache.
    pub cache_bytes: u64,
    /// Longest time an open may take: damaged files can make an engine loop.
    pub open_timeout: Duration,
}

impl StoreConfig {
    /// `engine` in `dir`, usual reserve and cache, ten minutes to open.
    pub fn new(engine: EngineKind, dir: impl Into<PathBuf>) -> Self {
        let EngineConfig { kind, dir, reserve_bytes, cache_bytes } = EngineConfig::new(engine, dir);
        Self { dir, engine: kind, reserve_bytes, cache_bytes, open_timeout: Duration::from_secs(600) }
    }

    /// Refuses a start on a disk that is too full to write to. It asks for a little more than a running store needs, so that a node
    /// which ended on a full disk does not start and end in turns.
    ///
    /// # Errors
    /// [`EngineError::Full`]: free space first. [`EngineError::Io`] when the file system does not answer.
    pub fn check_room(&self) -> Result<(), StoreError> {
        let there = self.dir.ancestors().find(|dir| dir.exists()).unwrap_or(&self.dir);
        Ok(check_space(there, START_BYTES, self.reserve_bytes)?)
    }
}

/// The store of a node.
#[derive(Debug)]
pub struct LogStore {
    sealed: Sealed,
    /// One change at a time is checked against the log's ends and written.
    writing: Mutex<()>,
    /// Number of the newest snapshot writer: older ones may not write any more.
    snapshot_ticket: Mutex<u64>,
}

impl LogStore {
    /// Opens or creates the store in `config.dir`, all records checked.
    ///
    /// # Errors
    /// [`StoreError`]: do not start; it says what is wrong and how to rejoin. After [`EngineError::OpenTimedOut`] the thread that opens
    /// still runs: end the process.
    pub fn open(config: &StoreConfig, key: &RecordKey) -> Result<Self, StoreError> {
        let (key, config) = (key.share(), config.clone());
        let limit = config.open_timeout;
        let (answer, opened) = mpsc::sync_channel(1);
        std::thread::Builder::new()
            .name("guarded-storage-open".to_owned())
            .spawn(move || {
                let _receiver_gone_after_timeout = answer.send(Self::open_here(&config, &key));
            })
            .map_err(|error| EngineError::from_io("spawn thread", &error))?;
        match opened.recv_timeout(limit) {
            Ok(store) => store,
            Err(mpsc::RecvTimeoutError::Timeout) => Err(EngineError::OpenTimedOut { limit_seconds: limit.as_secs() }.into()),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(EngineError::Panicked { detail: "opening thread ended".to_owned() }.into()),
        }
    }

    fn open_here(config: &StoreConfig, key: &RecordKey) -> Result<Self, StoreError> {
        let engine = EngineConfig {
            kind: config.engine,
            dir: config.dir.join("engine"),
            reserve_bytes: config.reserve_bytes,
            cache_bytes: config.cache_bytes,
        };
        std::fs::create_dir_all(&config.dir).map_err(|error| EngineError::from_io("create directory", &error))?;
        let anchor = (config.engine != EngineKind::Memory).then(|| config.dir.join("anchor"));
        let engine = open_engine(&engine)?;
        Self::on_engine(engine, key, anchor.as_deref())
    }

    /// Opens or creates a store on an engine that is open already. `anchor`: see [`Sealed::open`].
    ///
    /// # Errors
    /// As [`LogStore::open`].
    pub fn on_engine(engine: Box<dyn Engine>, key: &RecordKey, anchor: Option<&std::path::Path>) -> Result<Self, StoreError> {
        let sealed = Sealed::open(engine, key, anchor)?;
        let store = Self { sealed, writing: Mutex::new(()), snapshot_ticket: Mutex::new(0) };
        store.check_log()?;
        store.remove_unfinished_snapshots()?;
        Ok(store)
    }

    /// Appends entries durably; see [`Change::Append`].
    ///
    /// # Errors
    /// [`StoreError::NotContiguous`], [`StoreError::TermFalls`], and as [`Sealed::write`].
    pub fn append(&self, entries: &[LogEntry]) -> Result<(), StoreError> {
        self.write(&[Change::Append(entries.to_vec())])
    }

    /// Removes all entries after `index`; see [`Change::TruncateAfter`].
    ///
    /// # Errors
    /// [`StoreError::OutsideLog`] if `index` was purged; as [`Sealed::write`].
    pub fn truncate_after(&self, index: Option<u64>) -> Result<(), StoreError> {
        self.write(&[Change::TruncateAfter(index)])
    }

    /// Removes all entries up to `position`; see [`Change::PurgeUpto`].
    ///
    /// # Errors
    /// As [`Sealed::write`].
    pub fn purge_upto(&self, position: LogPosition) -> Result<(), StoreError> {
        self.write(&[Change::PurgeUpto(position)])
    }

    /// Replaces the vote durably.
    ///
    /// # Errors
    /// As [`Sealed::write`].
    pub fn save_vote(&self, vote: &[u8]) -> Result<(), StoreError> {
        self.write(&[Change::Vote(vote.to_vec())])
    }

    /// Replaces or removes the committed position durably.
    ///
    /// # Errors
    /// As [`Sealed::write`].
    pub fn save_committed(&self, committed: Option<&[u8]>) -> Result<(), StoreError> {
        self.write(&[Change::Committed(committed.map(<[u8]>::to_vec))])
    }

    /// Replaces one state blob durably.
    ///
    /// # Errors
    /// As [`Sealed::write`].
    pub fn save_state(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.write(&[Change::State(vec![(name.to_owned(), Some(bytes.to_vec()))])])
    }

    /// Replaces one sealed share durably.
    ///
    /// # Errors
    /// As [`Sealed::write`].
    pub fn save_share(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.write(&[Change::Share { name: name.to_owned(), bytes: Some(bytes.to_vec()) }])
    }

    /// Removes one sealed share durably.
    ///
    /// # Errors
    /// As [`Sealed::write`].
    pub fn delete_share(&self, name: &str) -> Result<(), StoreError> {
        self.write(&[Change::Share { name: name.to_owned(), bytes: None }])
    }

    /// Applies `changes` in order, durably and all together.
    ///
    /// # Errors
    /// The first change that is refused refuses all; as [`Sealed::write`].
    pub fn write(&self, changes: &[Change]) -> Result<(), StoreError> {
        let writing = self.lock();
        let mut pending = Pending::new(&self.sealed);
        for change in changes {
            pending.add(change)?;
        }
        self.commit(&writing, pending)
    }

    /// Applies the acceptable ones of `changes` in order with one flush, and answers for each.
    pub fn write_each(&self, changes: &[Change]) -> Vec<Result<(), StoreError>> {
        let writing = self.lock();
        let mut pending = Pending::new(&self.sealed);
        let mut answers: Vec<Result<(), StoreError>> = changes.iter().map(|change| pending.add(change)).collect();
        if let Err(error) = self.commit(&writing, pending) {
            for answer in &mut answers {
                if answer.is_ok() {
                    *answer = Err(error.clone());
                }
            }
        }
        answers
    }

    fn commit(&self, _writing: &MutexGuard<'_, ()>, pending: Pending<'_>) -> Result<(), StoreError> {
        match pending.finish() {
            Some(batch) => self.sealed.write(batch),
            None => Ok(()),
        }
    }

    /// Entries with `from <= index < to`, in order and without a gap, as many as `page` allows. Indexes outside the log are left out.
    ///
    /// # Errors
    /// [`StoreError::Gap`], [`StoreError::Tampered`].
    pub fn read_range(&self, from: u64, to: u64, page: Page) -> Result<Vec<LogEntry>, StoreError> {
        if from >= to {
            return Ok(Vec::new());
        }
        let records = self.sealed.range(Tree::Log, &from.to_be_bytes(), Some(&to.to_be_bytes()), page)?;
        let mut entries: Vec<LogEntry> = Vec::with_capacity(records.len());
        for record in records {
            let entry = entry(record)?;
            if let Some(before) = entries.last() {
                let expected = before.index.saturating_add(1);
                if entry.index != expected {
                    return Err(StoreError::Gap { expected, found: Some(entry.index) });
                }
            }
            entries.push(entry);
        }
        Ok(entries)
    }

    /// Index and term of one entry that is still in the log.
    ///
    /// # Errors
    /// As [`Sealed::get`].
    pub fn position(&self, index: u64) -> Result<Option<LogPosition>, StoreError> {
        let record = self.sealed.get(Tree::Log, &index.to_be_bytes())?;
        Ok(record.map(|record| LogPosition { index, term: record.stamp.term }))
    }

    /// The newest position, purged ones included; none in a new store.
    pub fn last(&self) -> Option<LogPosition> {
        self.sealed.bounds().last
    }

    /// The newest purged position.
    pub fn last_purged(&self) -> Option<LogPosition> {
        self.sealed.bounds().purged
    }

    /// Both ends at one moment.
    pub fn bounds(&self) -> LogBounds {
        self.sealed.bounds()
    }

    /// Whether there is neither a log, nor a trace of a purged one, nor a vote: nobody ever took part with this store.
    ///
    /// # Errors
    /// As [`LogStore::read_vote`].
    pub fn is_blank(&self) -> Result<bool, StoreError> {
        let bounds = self.bounds();
        Ok(bounds.last.is_none() && bounds.purged.is_none() && self.read_vote()?.is_none())
    }

    /// The vote, if one was saved.
    ///
    /// # Errors
    /// As [`Sealed::get`], and so the next ones.
    pub fn read_vote(&self) -> Result<Option<Vec<u8>>, StoreError> {
        self.value(Tree::Vote, KEY_VOTE)
    }

    /// The committed position, if one was saved.
    ///
    /// # Errors
    /// As [`Sealed::get`].
    pub fn read_committed(&self) -> Result<Option<Vec<u8>>, StoreError> {
        self.value(Tree::Vote, KEY_COMMITTED)
    }

    /// A state blob.
    ///
    /// # Errors
    /// As [`Sealed::get`].
    pub fn load_state(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.value(Tree::State, name.as_bytes())
    }

    /// A sealed share.
    ///
    /// # Errors
    /// As [`Sealed::get`].
    pub fn load_share(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.value(Tree::Shares, name.as_bytes())
    }

    /// Names of all sealed shares, in order.
    ///
    /// # Errors
    /// As [`Sealed::get`].
    pub fn share_names(&self) -> Result<Vec<String>, StoreError> {
        self.names(Tree::Shares)
    }

    /// Names of all state blobs, in order.
    ///
    /// # Errors
    /// As [`Sealed::get`].
    pub fn state_names(&self) -> Result<Vec<String>, StoreError> {
        self.names(Tree::State)
    }

    /// Whether a failed write awaits [`LogStore::recover`].
    pub fn is_down(&self) -> bool {
        self.sealed.is_down()
    }

    /// After a write that failed for lack of space: reopens the engine and tells whether that write is on disk.
    ///
    /// # Errors
    /// The store stays down; call again when there is space.
    pub fn recover(&self) -> Result<Recovered, StoreError> {
        let _writing = self.lock();
        let outcome = self.sealed.recover()?;
        self.check_log()?;
        Ok(outcome)
    }

    /// Number of the last commit: grows by one with each.
    pub fn sequence(&self) -> u64 {
        self.sealed.sequence()
    }

    /// The engine's kind.
    pub fn engine(&self) -> EngineKind {
        self.sealed.engine()
    }

    /// See [`Sealed::sync_anchor`].
    ///
    /// # Errors
    /// The file system's.
    pub fn sync_anchor(&self) -> Result<(), StoreError> {
        self.sealed.sync_anchor()
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn snapshot_ticket(&self) -> MutexGuard<'_, u64> {
        self.snapshot_ticket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn value(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.sealed.get(tree, key)?.map(|record| record.value))
    }

    fn names(&self, tree: Tree) -> Result<Vec<String>, StoreError> {
        let mut names = Vec::new();
        let mut from = Vec::new();
        loop {
            let records = self.sealed.range(tree, &from, None, Page::SCAN)?;
            let Some(last) = records.last() else { return Ok(names) };
            from.clone_from(&last.key);
            from.push(0);
            names.extend(records.into_iter().map(|record| String::from_utf8_lossy(&record.key).into_owned()));
        }
    }

    /// "No start on a gap": every index from the purged one to the last is there, under its own key, terms never fall.
    fn check_log(&self) -> Result<(), StoreError> {
        let bounds = self.sealed.bounds();
        let mut before = bounds.purged;
        let mut from = 0u64;
        loop {
            let entries = self.read_range(from, u64::MAX, Page::SCAN)?;
            let Some(newest) = entries.last() else { break };
            from = newest.index.saturating_add(1);
            for entry in &entries {
                pending::check_follows(before, entry.position()).map_err(|error| match error {
                    StoreError::NotContiguous { expected, got } => StoreError::Gap { expected, found: Some(got) },
                    error => error,
                })?;
                before = Some(entry.position());
            }
        }
        if before != bounds.last {
            let expected = before.map_or(0, |before| before.index.saturating_add(1));
            return Err(StoreError::Gap { expected, found: None });
        }
        Ok(())
    }
}

fn entry(record: Opened) -> Result<LogEntry, StoreError> {
    let Stamp { index, term } = record.stamp;
    // The stamp is authenticated with the key, so this only fails if we wrote nonsense: asserted all the same (style.md §4).
    if record.key != index.to_be_bytes() {
        return Err(StoreError::Gap { expected: index, found: None });
    }
    Ok(LogEntry { index, term, payload: record.value })
}

const KEY_VOTE: &[u8] = b"vote";
const KEY_COMMITTED: &[u8] = b"committed";
/// What a start wants beyond the reserve; four times this is asked for.
const START_BYTES: u64 = 1 << 20;
/// Largest log entry, vote, state blob or share.
pub const ENTRY_BYTES_MAX: usize = 8 << 20;
/// Longest name of a state blob or share.
pub const NAME_BYTES_MAX: usize = 128;
const _: () = assert!(ENTRY_BYTES_MAX + 64 <= crate::engine::VALUE_BYTES_MAX);
const _: () = assert!(NAME_BYTES_MAX <= crate::engine::KEY_BYTES_MAX);
