//! Errors of the three stages: [`EngineError`] (key-value engine), [`StoreError`] (authenticated records and log),
//! [`SegmentError`] (audit files). Each variant says whose fault it is and what to do.

use std::io;

use crate::engine::Tree;
use crate::log_store::LogPosition;

/// What can go wrong in a key-value engine.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum EngineError {
    /// The disk is (nearly) full. Nothing was written. Operator's to fix: free space; the same write then succeeds.
    #[error("disk full: {need_bytes} bytes needed including the reserve, {free_bytes} free; free space and retry")]
    Full {
        /// What the batch may take plus the reserve that is kept free.
        need_bytes: u64,
        /// What the file system offers.
        free_bytes: u64,
    },
    /// The file system ran out of space inside a write. Whether the batch is there is known after [`crate::Engine::reopen`].
    /// Operator's to fix: free space.
    #[error("disk full while writing: {detail}; free space, reopen and read before a retry")]
    OutOfSpace {
        /// The engine's own words.
        detail: String,
    },
    /// The file system answered with an error. What was being written is unknown; after a failed sync the page cache cannot be
    /// trusted, so restart the process.
    #[error("input/output error during {during}: {detail}")]
    Io {
        /// What the engine was doing.
        during: &'static str,
        /// Kind of the system's error.
        kind: io::ErrorKind,
        /// The engine's own words.
        detail: String,
    },
    /// The engine's files do not make sense. The disk's fault or an attacker's: do not repair, rejoin with an empty directory.
    #[error("engine files are damaged: {detail}; move the directory away and rejoin the cluster as a new member")]
    Corrupt {
        /// The engine's own words.
        detail: String,
    },
    /// The engine panicked, which only damaged files make it do. As [`EngineError::Corrupt`].
    #[error("engine panicked on its files: {detail}; move the directory away and rejoin the cluster as a new member")]
    Panicked {
        /// The panic's message.
        detail: String,
    },
    /// An earlier error closed the engine. Call [`crate::Engine::reopen`], or restart.
    #[error("engine is closed after an earlier error; reopen it")]
    Closed,
    /// Another process has the files open. Operator's fault: stop it.
    #[error("engine files are in use by another process: {detail}")]
    InUse {
        /// The engine's own words.
        detail: String,
    },
    /// A key or value is larger than any engine takes. Caller's fault.
    #[error("{what} of {bytes} bytes is over the limit of {max_bytes} bytes")]
    TooLarge {
        /// `key` or `value`.
        what: &'static str,
        /// Its size.
        bytes: usize,
        /// The limit.
        max_bytes: usize,
    },
    /// The configuration names an engine that does not exist. Operator's fault.
    #[error("unknown storage engine {name:?}; use sled, redb or memory")]
    UnknownEngine {
        /// What the configuration says.
        name: String,
    },
    /// Opening did not end in time: damaged files can make an engine loop. Restart with a longer limit or rejoin.
    #[error(
        "opening the store took longer than {limit_seconds} s; raise the limit if the store is large, else move the directory away and rejoin"
    )]
    OpenTimedOut {
        /// The limit.
        limit_seconds: u64,
    },
}

impl EngineError {
    /// Whether space on the disk is what is missing, so that the caller may retry later.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. } | Self::OutOfSpace { .. })
    }

    /// Sorts an error of the operating system.
    pub fn from_io(during: &'static str, error: &io::Error) -> Self {
        let detail = error.to_string();
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::OutOfSpace { detail },
            kind => Self::Io { during, kind, detail },
        }
    }
}

/// What can go wrong in the authenticated store.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum StoreError {
    /// The engine failed; see there.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A record does not authenticate at its place: altered, moved, swapped, of another store, or the record key is another.
    /// The disk's fault or an attacker's: rejoin.
    #[error("record {key} in tree {tree} is not the one written there ({detail}); {REJOIN}")]
    Tampered {
        /// The tree.
        tree: Tree,
        /// The key, in hex.
        key: String,
        /// What differs.
        detail: &'static str,
    },
    /// A tree holds other records than after the last commit: one is missing, was replaced by an older one or came back.
    #[error("tree {tree} holds another set of records than after commit {sequence}: one is missing, older or came back; {REJOIN}")]
    TreeChanged {
        /// The tree.
        tree: Tree,
        /// The commit whose set was expected.
        sequence: u64,
    },
    /// The engine went back behind a commit that was acknowledged.
    #[error(
        "the engine's files end at commit {found} (log {found_last:?}), but commit {anchored} (log {anchored_last:?}) was acknowledged; {REJOIN}"
    )]
    SteppedBack {
        /// Newest commit in the engine.
        found: u64,
        /// Last log position of that commit.
        found_last: Option<LogPosition>,
        /// Newest commit in the anchor file.
        anchored: u64,
        /// Last log position of the anchor.
        anchored_last: Option<LogPosition>,
    },
    /// Engine and anchor are at the same commit but disagree about its content: files of two disks are mixed.
    #[error("commit {sequence} in the engine is not the one that was acknowledged; {REJOIN}")]
    Forked {
        /// The commit.
        sequence: u64,
    },
    /// The anchor file is missing, damaged in both halves, or of another store.
    #[error("anchor file {path}: {detail}; {REJOIN}")]
    Anchor {
        /// Its path.
        path: String,
        /// What is wrong.
        detail: &'static str,
    },
    /// The store was written by a newer or unknown version. Operator's fault: use the matching binary.
    #[error("store format version {found} is unknown; this binary reads version {supported}")]
    Version {
        /// What the store says.
        found: u8,
        /// What we read.
        supported: u8,
    },
    /// An entry of the log is missing between two others. See [`StoreError::Tampered`].
    #[error("log entry {expected} is missing, found {found:?}; {REJOIN}")]
    Gap {
        /// The index that should follow.
        expected: u64,
        /// The index found, or none at the end.
        found: Option<u64>,
    },
    /// An append does not follow the last entry. Caller's fault.
    #[error("log entry {got} does not follow: {expected} is next")]
    NotContiguous {
        /// The index that would follow.
        expected: u64,
        /// The index offered.
        got: u64,
    },
    /// Terms may not fall within the log. Caller's fault.
    #[error("log entry {index} has term {term}, but the entry before has term {before}")]
    TermFalls {
        /// The entry.
        index: u64,
        /// Its term.
        term: u64,
        /// The term before.
        before: u64,
    },
    /// A position outside the log was given. Caller's fault.
    #[error("position {index} is outside the log ({first}..={last})")]
    OutsideLog {
        /// The position asked.
        index: u64,
        /// First index held.
        first: u64,
        /// Last index held.
        last: u64,
    },
    /// A name or size is not allowed. Caller's fault.
    #[error("{what} of {bytes} bytes is over the limit of {max_bytes} bytes")]
    TooLarge {
        /// What it is.
        what: &'static str,
        /// Its size.
        bytes: u64,
        /// The limit.
        max_bytes: u64,
    },
    /// The snapshot being written is not the one this call belongs to, or its bytes do not add up. Caller's fault.
    #[error("snapshot: {detail}")]
    Snapshot {
        /// What is wrong.
        detail: &'static str,
    },
    /// An earlier error left the outcome of a write unknown and the store could not be brought back yet; retry when the cause
    /// (a full disk) is gone, else restart.
    #[error("store is down after an earlier error: {cause}")]
    Down {
        /// The earlier error.
        cause: Box<StoreError>,
    },
    /// The writer's queue is full. Retry later.
    #[error("writer queue is full ({capacity} requests waiting)")]
    QueueFull {
        /// Its capacity.
        capacity: usize,
    },
    /// The writer thread has ended.
    #[error("writer thread has ended")]
    WriterGone,
    /// The system gives no random bytes. Restart the machine.
    #[error("no random bytes from the system")]
    NoRandomness,
}

impl StoreError {
    /// Whether space on the disk is what is missing, so that the caller may retry later.
    pub fn is_full(&self) -> bool {
        match self {
            Self::Engine(error) => error.is_full(),
            Self::Down { cause } => cause.is_full(),
            _ => false,
        }
    }
}

/// What can go wrong with audit segment files.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum SegmentError {
    /// The disk is (nearly) full. Nothing was written. Operator's to fix: free space; the same append then succeeds.
    #[error("disk full: {need_bytes} bytes needed including the reserve, {free_bytes} free; free space and retry")]
    Full {
        /// What the batch takes plus the reserve that is kept free.
        need_bytes: u64,
        /// What the file system offers.
        free_bytes: u64,
    },
    /// The file system answered with an error. After a failed sync the page cache cannot be trusted: restart the process.
    #[error("input/output error during {during} of {path}: {detail}")]
    Io {
        /// What was being done.
        during: &'static str,
        /// Which file.
        path: String,
        /// Kind of the system's error.
        kind: io::ErrorKind,
        /// The system's words.
        detail: String,
    },
    /// Bytes before the last whole batch are damaged. The disk's fault or an attacker's; nothing was cut.
    #[error("segment {path} is damaged at byte {offset} ({detail}); positions from {position} are lost: {REJOIN}")]
    Damaged {
        /// The file.
        path: String,
        /// Where.
        offset: u64,
        /// First position that cannot be read.
        position: u64,
        /// What is wrong.
        detail: &'static str,
    },
    /// A segment file is missing between two others, or the first is.
    #[error("audit segment starting at position {position} is missing; {REJOIN}")]
    MissingSegment {
        /// The position that should come next.
        position: u64,
    },
    /// Whole batches at the end are missing that were acknowledged. The disk's fault or an attacker's.
    #[error("audit segments end before position {found_next}, but everything before {acknowledged_next} was acknowledged; {REJOIN}")]
    TailLost {
        /// First position that is not there.
        found_next: u64,
        /// First position not known to be acknowledged.
        acknowledged_next: u64,
    },
    /// Positions must follow without a gap. Caller's fault.
    #[error("audit position {got} does not follow: {expected} is next")]
    NotContiguous {
        /// The position that would follow.
        expected: u64,
        /// The position offered.
        got: u64,
    },
    /// A position was appended before with other bytes. The caller's history differs from what is on disk: stop.
    #[error("audit position {position} is on disk with other bytes")]
    Differs {
        /// The position.
        position: u64,
    },
    /// A batch or entry is too large. Caller's fault.
    #[error("audit {what} of {bytes} bytes is over the limit of {max_bytes} bytes")]
    TooLarge {
        /// `entry` or `batch`.
        what: &'static str,
        /// Its size.
        bytes: u64,
        /// The limit.
        max_bytes: u64,
    },
    /// An earlier error left the file's end unknown. Open the segments anew.
    #[error("audit segments are closed after an earlier error; open them again")]
    Closed,
}

const REJOIN: &str = "the disk was damaged or altered: do not repair it, move the directory away and rejoin the cluster as a new member";
