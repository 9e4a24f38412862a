//! What a node keeps on disk: the Raft log and vote, state, snapshots and shares in a key-value engine, audit entries in segment files.
//!
//! Layers, each on top of the one before:
//! * [`engine`]: separate trees, ordered reads, atomic durable batches; sled, redb or memory behind one trait.
//! * [`sealed`]: every record encrypted and bound to its place; what the disk holds as a whole is compared at start with what was
//!   last written, so that an altered, moved, missing, replayed or rolled back record is noticed and named.
//! * [`log_store`]: the Raft log without a gap, vote, committed position, state blobs, snapshot, shares.
//! * [`writer`]: one thread that owns all writing and puts what waits into one flush.
//! * [`segments`]: the append-only audit files, which need no engine.
//!
//! Never: knows what the bytes mean, reads the clock, talks to peers. Outside its reach: an adversary who puts back a whole older
//! disk; that is confirmed with the other nodes at start (architecture.md §7, "Rollback of a disk").
//! Source: architecture.md §8, dependencies.md §0 and §5.

pub mod engine;
pub mod error;
pub mod log_store;
pub mod sealed;
pub mod segments;
pub mod writer;

pub use engine::{Batch, Engine, EngineConfig, EngineKind, Page, Tree, open_engine};
pub use error::{EngineError, SegmentError, StoreError};
pub use log_store::{Change, LogEntry, LogPosition, LogStore, SnapshotRecord, SnapshotWriter, StoreConfig};
pub use sealed::{LogBounds, RecordKey, Recovered};
pub use segments::{SegmentConfig, SegmentReader, Segments};
pub use writer::LogWriter;
