//! [`Engine`]: separate trees, ordered reads, atomic durable batches. Owns: the trait, what may be written ([`Batch`]), the choice by
//! name, the checks that all engines share (sizes, free space, panics turned into errors).
//! Never: interprets, authenticates or encrypts a value ([`crate::sealed`] does).
//! Source: architecture.md §8; dependencies.md §5 and §7.

mod memory;
mod redb;
mod sled;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::str::FromStr;

pub use self::memory::MemoryEngine;
pub use self::redb::RedbEngine;
pub use self::sled::SledEngine;
use crate::error::EngineError;

/// A key-value engine with separate trees. Every call blocks; callers bring their own threads.
///
/// Reads may run beside one write and see a batch in whole or not at all.
pub trait Engine: Send + Sync + fmt::Debug {
    /// Which engine this is.
    fn kind(&self) -> EngineKind;

    /// The value at `key`.
    ///
    /// # Errors
    /// [`EngineError`]; damage that the engine notices is [`EngineError::Corrupt`] or [`EngineError::Panicked`].
    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError>;

    /// Records with `start <= key`, and `key < end` if there is an `end`, in order of key, as many as `page` allows.
    ///
    /// # Errors
    /// As [`Engine::get`].
    fn range(&self, tree: Tree, start: &[u8], end: Option<&[u8]>, page: Page) -> Result<Vec<Record>, EngineError>;

    /// The record with the greatest key.
    ///
    /// # Errors
    /// As [`Engine::get`].
    fn last(&self, tree: Tree) -> Result<Option<Record>, EngineError>;

    /// Applies all of `batch` or nothing, and returns when it is on stable storage. Operations act in the order they were added.
    ///
    /// # Errors
    /// [`EngineError::Full`] and [`EngineError::TooLarge`]: nothing was written. Any other: unknown until [`Engine::reopen`].
    fn write(&self, batch: &Batch) -> Result<(), EngineError>;

    /// Closes the files and opens them again, as a restart would. After a success, what reads show is durable.
    ///
    /// # Errors
    /// The engine stays closed; call again when the cause is gone.
    fn reopen(&self) -> Result<(), EngineError>;
}

/// One key and its value.
pub type Record = (Vec<u8>, Vec<u8>);

/// The separate key spaces of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tree {
    /// The Raft vote and committed position.
    Vote = 1,
    /// The Raft log.
    Log = 2,
    /// State machine blobs.
    State = 3,
    /// The newest snapshot, in pieces.
    Snapshot = 4,
    /// Sealed shares.
    Shares = 5,
    /// What the store keeps about itself.
    Meta = 6,
}

impl Tree {
    /// All trees, in order of their number.
    pub const ALL: [Tree; 6] = [Tree::Vote, Tree::Log, Tree::State, Tree::Snapshot, Tree::Shares, Tree::Meta];

    /// Stable name: table name in the engines, word in errors.
    pub fn as_str(self) -> &'static str {
        match self {
            Tree::Vote => "vote",
            Tree::Log => "log",
            Tree::State => "state",
            Tree::Snapshot => "snapshot",
            Tree::Shares => "shares",
            Tree::Meta => "meta",
        }
    }

    /// Stable number, part of what authenticates a record.
    pub fn number(self) -> u8 {
        self as u8
    }

    /// Position in [`Tree::ALL`].
    pub(crate) fn slot(self) -> usize {
        usize::from(self.number()).saturating_sub(1)
    }
}

impl fmt::Display for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How much one read may return: it stops at `entries_max`, or after the record that reaches `bytes_max`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    /// Most records.
    pub entries_max: usize,
    /// Sum of key and value sizes after which no further record is added.
    pub bytes_max: usize,
}

impl Page {
    /// What scans of whole trees use: bounded memory whatever the tree holds.
    pub const SCAN: Page = Page { entries_max: 1024, bytes_max: 4 << 20 };

    /// `entries_max` records, of [`Page::SCAN`]'s size in bytes.
    pub fn entries(entries_max: usize) -> Self {
        Self { entries_max, ..Self::SCAN }
    }
}

/// Collects records until a [`Page`] is full.
struct PageBuilder {
    page: Page,
    bytes: usize,
    records: Vec<Record>,
}

impl PageBuilder {
    fn new(page: Page) -> Self {
        Self { page, bytes: 0, records: Vec::new() }
    }

    fn is_full(&self) -> bool {
        self.records.len() >= self.page.entries_max || (self.bytes >= self.page.bytes_max && !self.records.is_empty())
    }

    fn push(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.bytes = self.bytes.saturating_add(key.len()).saturating_add(value.len());
        self.records.push((key, value));
    }
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Sets `key`.
    Put {
        /// Tree of the record.
        tree: Tree,
        /// Its key, at most [`KEY_BYTES_MAX`].
        key: Vec<u8>,
        /// Its value, at most [`VALUE_BYTES_MAX`].
        value: Vec<u8>,
    },
    /// Removes `key` if it is there.
    Delete {
        /// Tree of the record.
        tree: Tree,
        /// Its key.
        key: Vec<u8>,
    },
    /// Removes every record with `start <= key`, and `key < end` if there is an `end`.
    DeleteRange {
        /// Tree of the records.
        tree: Tree,
        /// First key removed.
        start: Vec<u8>,
        /// First key kept, or none to the end.
        end: Option<Vec<u8>>,
    },
}

/// Changes in any trees that become durable together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    ops: Vec<Op>,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a put.
    pub fn put(&mut self, tree: Tree, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> &mut Self {
        self.ops.push(Op::Put { tree, key: key.into(), value: value.into() });
        self
    }

    /// Adds a delete.
    pub fn delete(&mut self, tree: Tree, key: impl Into<Vec<u8>>) -> &mut Self {
        self.ops.push(Op::Delete { tree, key: key.into() });
        self
    }

    /// Adds a range delete, `start` inclusive, `end` exclusive.
    pub fn delete_range(&mut self, tree: Tree, start: impl Into<Vec<u8>>, end: Option<Vec<u8>>) -> &mut Self {
        self.ops.push(Op::DeleteRange { tree, start: start.into(), end });
        self
    }

    /// The changes in order.
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Bytes of keys and values to be stored.
    pub fn size_bytes(&self) -> u64 {
        self.ops
            .iter()
            .map(|op| match op {
                Op::Put { key, value, .. } => key.len().saturating_add(value.len()),
                Op::Delete { key, .. } => key.len(),
                Op::DeleteRange { .. } => 0,
            })
            .fold(0, |sum: u64, bytes| sum.saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX)))
    }

    /// Sizes every engine accepts.
    fn check(&self) -> Result<(), EngineError> {
        let too_large = |what, bytes, max_bytes| Err(EngineError::TooLarge { what, bytes, max_bytes });
        for op in &self.ops {
            match op {
                Op::Put { key, value, .. } => {
                    if key.len() > KEY_BYTES_MAX {
                        return too_large("key", key.len(), KEY_BYTES_MAX);
                    }
                    if value.len() > VALUE_BYTES_MAX {
                        return too_large("value", value.len(), VALUE_BYTES_MAX);
                    }
                }
                Op::Delete { .. } | Op::DeleteRange { .. } => {}
            }
        }
        Ok(())
    }
}

/// Which engine; the word used in the configuration. The default is redb: ADR 0001 has the case that sled fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum EngineKind {
    /// sled 0.34.7, hardened. Not for disks that an adversary can write to (ADR 0001).
    Sled,
    /// redb 4.
    #[default]
    Redb,
    /// Nothing durable: tests and trials.
    Memory,
}

impl EngineKind {
    /// The word used in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            EngineKind::Sled => "sled",
            EngineKind::Redb => "redb",
            EngineKind::Memory => "memory",
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for EngineKind {
    type Err = EngineError;

    fn from_str(name: &str) -> Result<Self, EngineError> {
        match name {
            "sled" => Ok(EngineKind::Sled),
            "redb" => Ok(EngineKind::Redb),
            "memory" => Ok(EngineKind::Memory),
            _ => Err(EngineError::UnknownEngine { name: name.to_owned() }),
        }
    }
}

/// Where and how to open an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Which engine.
    pub kind: EngineKind,
    /// Its directory; created if absent.
    pub dir: PathBuf,
    /// Space that writes must leave free: below it they are refused before they touch a file.
    pub reserve_bytes: u64,
    /// Memory for the engine's page cache.
    pub cache_bytes: u64,
}

impl EngineConfig {
    /// `kind` in `dir` with the usual reserve (32 MiB) and cache (64 MiB).
    pub fn new(kind: EngineKind, dir: impl Into<PathBuf>) -> Self {
        Self { kind, dir: dir.into(), reserve_bytes: 32 << 20, cache_bytes: 64 << 20 }
    }
}

/// Opens the engine that `config` names.
///
/// # Errors
/// [`EngineError`], all of which mean: do not start.
pub fn open_engine(config: &EngineConfig) -> Result<Box<dyn Engine>, EngineError> {
    Ok(match config.kind {
        EngineKind::Sled => Box::new(SledEngine::open(config)?),
        EngineKind::Redb => Box::new(RedbEngine::open(config)?),
        EngineKind::Memory => Box::new(MemoryEngine::new()),
    })
}

/// Calls `visit` for every record of `start..end` in order, a page at a time.
///
/// # Errors
/// The engine's, or what `visit` answers, which ends the scan.
pub fn scan<E: From<EngineError>>(
    engine: &dyn Engine,
    tree: Tree,
    start: &[u8],
    end: Option<&[u8]>,
    mut visit: impl FnMut(&[u8], &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut from = start.to_vec();
    loop {
        let records = engine.range(tree, &from, end, Page::SCAN)?;
        let Some((last, _)) = records.last() else { return Ok(()) };
        // The engine read a damaged file if it goes backwards; without this check a scan could go round for ever.
        if last < &from {
            return Err(EngineError::Corrupt { detail: format!("keys of tree {tree} are out of order") }.into());
        }
        let mut next = last.clone();
        next.push(0);
        let mut before: Option<&[u8]> = None;
        for (key, value) in &records {
            if before.is_some_and(|before| before >= key.as_slice()) {
                return Err(EngineError::Corrupt { detail: format!("keys of tree {tree} are out of order") }.into());
            }
            before = Some(key);
            visit(key, value)?;
        }
        from = next;
    }
}

/// Runs an engine's code and turns a panic into an error: both engines panic on some damaged files.
fn guarded<T>(run: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let detail = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_else(|| "panic without a message".to_owned());
        Err(EngineError::Panicked { detail })
    })
}

/// Refuses a write of `bytes` when it could leave less than `reserve_bytes` free.
///
/// An engine writes more than it was given (copied pages, log segments): four times and a fixed part covers what was measured
/// (dependencies.md §5: 34 MB for 18 MB).
pub(crate) fn check_space(dir: &Path, bytes: u64, reserve_bytes: u64) -> Result<(), EngineError> {
    if reserve_bytes == 0 {
        return Ok(());
    }
    let stat = rustix::fs::statvfs(dir).map_err(|error| EngineError::from_io("statvfs", &error.into()))?;
    let free_bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
    let need_bytes = bytes.saturating_mul(4).saturating_add(reserve_bytes);
    if free_bytes < need_bytes {
        return Err(EngineError::Full { need_bytes, free_bytes });
    }
    Ok(())
}

/// Makes the names in `dir` durable.
pub(crate) fn sync_dir(dir: &Path) -> std::io::Result<()> {
    std::fs::File::open(dir)?.sync_all()
}

/// Longest key.
pub const KEY_BYTES_MAX: usize = 256;
/// Largest value.
pub const VALUE_BYTES_MAX: usize = 16 << 20;
