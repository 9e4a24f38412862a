//! [`Pending`]: checks changes against the log as the changes before them leave it, and collects them into one batch.

use std::collections::BTreeMap;

use super::{Change, ENTRY_BYTES_MAX, KEY_COMMITTED, KEY_VOTE, LogEntry, LogPosition, NAME_BYTES_MAX};
use crate::engine::Tree;
use crate::error::StoreError;
use crate::sealed::{LogBounds, Sealed, SealedBatch, Stamp};

pub(super) struct Pending<'a> {
    sealed: &'a Sealed,
    batch: SealedBatch,
    bounds: LogBounds,
    /// Terms of entries that this batch appends.
    terms: BTreeMap<u64, u64>,
}

impl<'a> Pending<'a> {
    pub(super) fn new(sealed: &'a Sealed) -> Self {
        Self { sealed, batch: SealedBatch::default(), bounds: sealed.bounds(), terms: BTreeMap::new() }
    }

    /// The batch, or none if nothing changes.
    pub(super) fn finish(mut self) -> Option<SealedBatch> {
        if self.batch.is_empty() {
            return None;
        }
        self.batch.set_bounds(self.bounds);
        Some(self.batch)
    }

    /// Adds `change`, or refuses it and leaves the others as they are.
    pub(super) fn add(&mut self, change: &Change) -> Result<(), StoreError> {
        match change {
            Change::Append(entries) => self.append(entries),
            Change::TruncateAfter(index) => self.truncate_after(*index),
            Change::PurgeUpto(position) => {
                self.purge_upto(*position);
                Ok(())
            }
            Change::Vote(vote) => self.put(Tree::Vote, KEY_VOTE, "vote", vote),
            Change::Committed(Some(committed)) => self.put(Tree::Vote, KEY_COMMITTED, "committed position", committed),
            Change::Committed(None) => {
                self.batch.delete(Tree::Vote, KEY_COMMITTED);
                Ok(())
            }
            Change::State(blobs) => {
                for (name, bytes) in blobs {
                    check_size("name", name.len(), NAME_BYTES_MAX)?;
                    check_size("state blob", bytes.as_ref().map_or(0, Vec::len), ENTRY_BYTES_MAX)?;
                }
                for (name, bytes) in blobs {
                    self.put_or_delete(Tree::State, name, "state blob", bytes.as_deref())?;
                }
                Ok(())
            }
            Change::Share { name, bytes } => {
                check_size("name", name.len(), NAME_BYTES_MAX)?;
                self.put_or_delete(Tree::Shares, name, "share", bytes.as_deref())
            }
        }
    }

    fn append(&mut self, entries: &[LogEntry]) -> Result<(), StoreError> {
        let mut before = self.bounds.last;
        for entry in entries {
            check_follows(before, entry.position())?;
            check_size("log entry", entry.payload.len(), ENTRY_BYTES_MAX)?;
            before = Some(entry.position());
        }
        for entry in entries {
            let stamp = Stamp { index: entry.index, term: entry.term };
            self.batch.put(Tree::Log, &entry.index.to_be_bytes(), stamp, &entry.payload);
            self.terms.insert(entry.index, entry.term);
        }
        self.bounds.last = before;
        Ok(())
    }

    fn truncate_after(&mut self, kept: Option<u64>) -> Result<(), StoreError> {
        let Some(last) = self.bounds.last else { return Ok(()) };
        let kept = kept.or(self.bounds.purged.map(|purged| purged.index));
        let Some(kept) = kept else {
            self.batch.delete_range(Tree::Log, &[], None);
            self.terms.clear();
            self.bounds.last = None;
            return Ok(());
        };
        if kept >= last.index {
            return Ok(());
        }
        let new_last = match self.bounds.purged {
            Some(purged) if kept < purged.index => {
                return Err(StoreError::OutsideLog { index: kept, first: purged.index.saturating_add(1), last: last.index });
            }
            Some(purged) if kept == purged.index => purged,
            _ => LogPosition { index: kept, term: self.term_at(kept)? },
        };
        self.batch.delete_range(Tree::Log, &kept.saturating_add(1).to_be_bytes(), None);
        self.terms.retain(|index, _| *index <= kept);
        self.bounds.last = Some(new_last);
        Ok(())
    }

    fn purge_upto(&mut self, position: LogPosition) {
        if self.bounds.purged.is_some_and(|purged| position.index <= purged.index) {
            return;
        }
        let end = position.index.checked_add(1).map(u64::to_be_bytes);
        self.batch.delete_range(Tree::Log, &[], end.as_ref().map(<[u8; 8]>::as_slice));
        self.terms.retain(|index, _| *index > position.index);
        self.bounds.purged = Some(position);
        if self.bounds.last.is_none_or(|last| last.index <= position.index) {
            self.bounds.last = Some(position);
        }
    }

    fn term_at(&self, index: u64) -> Result<u64, StoreError> {
        if let Some(term) = self.terms.get(&index) {
            return Ok(*term);
        }
        match self.sealed.get(Tree::Log, &index.to_be_bytes())? {
            Some(record) => Ok(record.stamp.term),
            None => Err(StoreError::Gap { expected: index, found: None }),
        }
    }

    fn put_or_delete(&mut self, tree: Tree, name: &str, what: &'static str, bytes: Option<&[u8]>) -> Result<(), StoreError> {
        match bytes {
            Some(bytes) => self.put(tree, name.as_bytes(), what, bytes),
            None => {
                self.batch.delete(tree, name.as_bytes());
                Ok(())
            }
        }
    }

    fn put(&mut self, tree: Tree, key: &[u8], what: &'static str, bytes: &[u8]) -> Result<(), StoreError> {
        check_size(what, bytes.len(), ENTRY_BYTES_MAX)?;
        self.batch.put(tree, key, Stamp::default(), bytes);
        Ok(())
    }
}

/// The rule of the log: indexes without a gap, from 0 or 1; terms never fall.
pub(super) fn check_follows(before: Option<LogPosition>, next: LogPosition) -> Result<(), StoreError> {
    match before {
        None if next.index <= 1 => Ok(()),
        None => Err(StoreError::NotContiguous { expected: 0, got: next.index }),
        Some(before) if before.index.checked_add(1) != Some(next.index) => {
            Err(StoreError::NotContiguous { expected: before.index.saturating_add(1), got: next.index })
        }
        Some(before) if next.term < before.term => Err(StoreError::TermFalls { index: next.index, term: next.term, before: before.term }),
        Some(_) => Ok(()),
    }
}

fn check_size(what: &'static str, bytes: usize, max_bytes: usize) -> Result<(), StoreError> {
    if bytes <= max_bytes {
        return Ok(());
    }
    let wide = |size| u64::try_from(size).unwrap_or(u64::MAX);
    Err(StoreError::TooLarge { what, bytes: wide(bytes), max_bytes: wide(max_bytes) })
}
