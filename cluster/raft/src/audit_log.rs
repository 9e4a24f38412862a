//! [`AuditLog`]: the leaves of the audit log in segment files.
//! Owns: the bytes of one leaf in a segment, and the runs of segments that snapshots cut the log into.
//! Never: what a record says; never a leaf twice with different bytes.
//! Source: threshold.md §2.6 (leaves), architecture.md §8 (append-only segment files).
//!
//! A node that installs a snapshot has no leaves for the entries it skipped. Segments hold no gaps, so each snapshot that leaves one
//! begins a new run: a directory named by its first position. What lies between two runs is fetched from other nodes.
//! ```text
//! entry = version(1)=1 ‖ record_len(2) ‖ record ‖ body
//! ```

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use dstack_storage::{RecordKey, SegmentConfig, SegmentError, Segments};
use tracing::warn;

use crate::contract::{Leaf, LeafSink};

const LEAF_VERSION: u8 = 1;
/// Bytes of leaves written with one flush.
const BATCH_BYTES_MAX: usize = 4 << 20;

/// The audit log cannot be read or written.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum AuditLogError {
    /// From the segment files; the text says what to do.
    #[error(transparent)]
    Segments(#[from] SegmentError),
    /// The directory cannot be read or made. The operator's to fix.
    #[error("audit directory {path}: {detail}")]
    Directory {
        /// Which.
        path: String,
        /// The system's reason.
        detail: String,
    },
    /// A stored entry is no leaf of a known version: damaged, or written by a newer build.
    #[error("audit entry {pos} is no leaf of version {LEAF_VERSION}")]
    Entry {
        /// Its position.
        pos: u64,
    },
    /// A record is longer than its length field allows. Our fault.
    #[error("record of {got_bytes} bytes at {pos}")]
    RecordTooLong {
        /// Its position.
        pos: u64,
        /// Its length.
        got_bytes: usize,
    },
}

impl AuditLogError {
    /// Whether space on the disk is what is missing.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Segments(SegmentError::Full { .. }))
    }
}

impl From<AuditLogError> for io::Error {
    fn from(error: AuditLogError) -> Self {
        io::Error::new(if error.is_full() { io::ErrorKind::StorageFull } else { io::ErrorKind::Other }, error)
    }
}

/// The leaves this node has. Clones share the files; every call blocks.
#[derive(Clone)]
pub struct AuditLog {
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    dir: PathBuf,
    key: Option<RecordKey>,
    /// By first position; the last one is written. Never empty.
    runs: BTreeMap<u64, Segments>,
}

fn directory(path: &Path, cause: &std::io::Error) -> AuditLogError {
    AuditLogError::Directory { path: path.display().to_string(), detail: cause.to_string() }
}

pub(crate) fn encode(leaf: &Leaf) -> Result<Vec<u8>, AuditLogError> {
    let got_bytes = leaf.record.len();
    let length = u16::try_from(got_bytes).map_err(|_| AuditLogError::RecordTooLong { pos: leaf.pos, got_bytes })?;
    let mut bytes = Vec::with_capacity(3 + got_bytes + leaf.body.len());
    bytes.push(LEAF_VERSION);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(&leaf.record);
    bytes.extend_from_slice(&leaf.body);
    Ok(bytes)
}

pub(crate) fn decode(pos: u64, bytes: &[u8]) -> Result<Leaf, AuditLogError> {
    let parsed = bytes.split_first_chunk::<3>().and_then(|([version, high, low], rest)| {
        (*version == LEAF_VERSION).then_some(())?;
        rest.split_at_checked(usize::from(u16::from_be_bytes([*high, *low])))
    });
    let (record, body) = parsed.ok_or(AuditLogError::Entry { pos })?;
    Ok(Leaf { pos, record: record.to_vec(), body: body.to_vec() })
}

impl Inner {
    fn run(&self, first: u64) -> Result<Segments, AuditLogError> {
        let config = SegmentConfig { first_position: first, ..SegmentConfig::new(self.dir.join(format!("{first:020}"))) };
        Ok(Segments::open(config, self.key.as_ref())?)
    }

    fn newest(&mut self) -> Option<&mut Segments> {
        self.runs.last_entry().map(|entry| entry.into_mut())
    }
}

impl AuditLog {
    /// Opens or creates the log in `dir`. With `key` the files' checksums are bound to it.
    ///
    /// # Errors
    /// [`AuditLogError`]: do not start; the text says what to do.
    pub fn open(dir: impl Into<PathBuf>, key: Option<RecordKey>) -> Result<Self, AuditLogError> {
        let dir = dir.into();
        std::fs::create_dir_all(&dir).map_err(|cause| directory(&dir, &cause))?;
        let mut firsts = std::collections::BTreeSet::new();
        for entry in std::fs::read_dir(&dir).map_err(|cause| directory(&dir, &cause))? {
            let entry = entry.map_err(|cause| directory(&dir, &cause))?;
            firsts.extend(entry.file_name().to_str().and_then(|name| name.parse::<u64>().ok()));
        }
        if firsts.is_empty() {
            firsts.insert(0);
        }
        let mut inner = Inner { dir, key, runs: BTreeMap::new() };
        for first in firsts {
            let run = inner.run(first)?;
            inner.runs.insert(first, run);
        }
        Ok(Self { inner: Arc::new(Mutex::new(inner)) })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of the next leaf this node will store.
    pub fn next(&self) -> u64 {
        self.lock().newest().map_or(0, |run| run.next_position())
    }

    /// Leaves from `from` on, in order and without a gap, at most `leaves_max` and, after the first, no more than `bytes_max`
    /// together. Empty if this node does not have the leaf at `from`.
    ///
    /// # Errors
    /// [`AuditLogError`].
    pub fn read_range(&self, from: u64, leaves_max: usize, bytes_max: usize) -> Result<Vec<Leaf>, AuditLogError> {
        let inner = self.lock();
        let Some((_, run)) = inner.runs.range(..=from).next_back() else { return Ok(Vec::new()) };
        let entries = run.read_range(from, leaves_max, bytes_max)?;
        entries.into_iter().map(|(pos, bytes)| decode(pos, &bytes)).collect()
    }

    /// Stores `leaves`; see [`LeafSink::append`].
    ///
    /// # Errors
    /// [`AuditLogError`]; [`SegmentError::Differs`] when a stored leaf has other bytes.
    pub fn append(&self, leaves: &[Leaf]) -> Result<(), AuditLogError> {
        let mut inner = self.lock();
        let Some(run) = inner.newest() else { return Ok(()) };
        let mut batch: Vec<(u64, Vec<u8>)> = Vec::new();
        let mut bytes = 0usize;
        for leaf in leaves {
            let entry = encode(leaf)?;
            bytes = bytes.saturating_add(entry.len());
            batch.push((leaf.pos, entry));
            if bytes >= BATCH_BYTES_MAX {
                run.append(&std::mem::take(&mut batch))?;
                bytes = 0;
            }
        }
        if batch.is_empty() { Ok(()) } else { Ok(run.append(&batch)?) }
    }

    /// Goes on at `size`; see [`LeafSink::skip_to`].
    ///
    /// # Errors
    /// [`AuditLogError`].
    pub fn skip_to(&self, size: u64) -> Result<(), AuditLogError> {
        let mut inner = self.lock();
        let next = inner.newest().map_or(0, |run| run.next_position());
        if next >= size {
            return Ok(());
        }
        warn!(first_missing = next, size, "audit leaves below a snapshot are missing here");
        let run = inner.run(size)?;
        inner.runs.insert(size, run);
        Ok(())
    }
}

impl LeafSink for AuditLog {
    fn append(&mut self, leaves: &[Leaf]) -> io::Result<()> {
        Ok(AuditLog::append(self, leaves)?)
    }

    fn skip_to(&mut self, size: u64) -> io::Result<()> {
        Ok(AuditLog::skip_to(self, size)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(pos: u64) -> Leaf {
        Leaf { pos, record: format!("record {pos}").into_bytes(), body: vec![pos as u8; 10] }
    }

    fn leaves(range: std::ops::Range<u64>) -> Vec<Leaf> {
        range.map(leaf).collect()
    }

    #[test]
    fn leaves_survive_a_restart_and_repeats_are_harmless() {
        let dir = tempfile::tempdir().unwrap();
        let log = AuditLog::open(dir.path(), None).unwrap();
        log.append(&leaves(0..5)).unwrap();
        drop(log);
        let log = AuditLog::open(dir.path(), None).unwrap();
        log.append(&leaves(2..8)).unwrap();
        assert_eq!((log.next(), log.read_range(1, 100, 1 << 20).unwrap()), (8, leaves(1..8)));
    }

    #[test]
    fn refuses_to_rewrite_a_leaf() {
        let dir = tempfile::tempdir().unwrap();
        let log = AuditLog::open(dir.path(), None).unwrap();
        log.append(&leaves(0..3)).unwrap();
        let other = Leaf { body: vec![9], ..leaf(1) };
        assert_eq!(log.append(&[other]), Err(AuditLogError::Segments(SegmentError::Differs { position: 1 })));
        assert_eq!(log.read_range(1, 1, 1 << 20).unwrap(), [leaf(1)]);
    }

    #[test]
    fn a_snapshot_begins_a_new_run_and_the_gap_stays_visible() {
        let dir = tempfile::tempdir().unwrap();
        let log = AuditLog::open(dir.path(), None).unwrap();
        log.append(&leaves(0..3)).unwrap();
        log.skip_to(2).unwrap();
        log.skip_to(10).unwrap();
        log.append(&leaves(10..12)).unwrap();
        drop(log);
        let log = AuditLog::open(dir.path(), None).unwrap();
        log.append(&leaves(11..13)).unwrap();
        let read = |from| log.read_range(from, 100, 1 << 20).unwrap();
        assert_eq!((read(1), read(5), read(10)), (leaves(1..3), vec![], leaves(10..13)));
    }

    #[test]
    fn refuses_entries_that_are_no_leaves() {
        assert_eq!(decode(7, &[]), Err(AuditLogError::Entry { pos: 7 }));
        assert_eq!(decode(7, &[2, 0, 0]), Err(AuditLogError::Entry { pos: 7 }));
        assert_eq!(decode(7, &[1, 0, 5, 1]), Err(AuditLogError::Entry { pos: 7 }));
        assert_eq!(decode(7, &encode(&leaf(7)).unwrap()), Ok(leaf(7)));
    }
}
