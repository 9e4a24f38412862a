//! [`View`]: the log as it will be when everything accepted is flushed. Owns: entries that are accepted but not flushed, the ends.
//! Never: guesses after a refusal; then it falls back to what the store holds.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::log_store::{LogEntry, LogPosition};
use crate::sealed::LogBounds;

#[derive(Debug)]
pub(super) struct View {
    pub(super) bounds: LogBounds,
    /// By index: the ticket of the request, and the entry.
    unflushed: BTreeMap<u64, (u64, Arc<LogEntry>)>,
    newest_ticket: u64,
}

/// What a change means for the view, taken before the change moves into the queue.
pub(super) enum Noted {
    Append(Vec<Arc<LogEntry>>),
    /// The index kept, and its position if only the store knows it.
    TruncateAfter(Option<u64>, Option<LogPosition>),
    PurgeUpto(LogPosition),
    Other,
}

impl View {
    pub(super) fn new(bounds: LogBounds) -> Self {
        Self { bounds, unflushed: BTreeMap::new(), newest_ticket: 0 }
    }

    /// The ticket a request accepted now would have.
    pub(super) fn next_ticket(&self) -> u64 {
        self.newest_ticket.saturating_add(1)
    }

    pub(super) fn accept(&mut self, ticket: u64, noted: Noted) {
        self.newest_ticket = ticket;
        match noted {
            Noted::Append(entries) => {
                for entry in entries {
                    self.bounds.last = Some(entry.position());
                    self.unflushed.insert(entry.index, (ticket, entry));
                }
            }
            Noted::TruncateAfter(kept, stored) => self.truncate_after(kept, stored),
            Noted::PurgeUpto(position) => {
                if self.bounds.purged.is_none_or(|purged| purged.index < position.index) {
                    self.unflushed.retain(|index, _| *index > position.index);
                    self.bounds.purged = Some(position);
                    if self.bounds.last.is_none_or(|last| last.index <= position.index) {
                        self.bounds.last = Some(position);
                    }
                }
            }
            Noted::Other => {}
        }
    }

    /// Whether the position of this entry is known without the store: purged, unflushed, or past the end.
    pub(super) fn knows(&self, index: u64) -> bool {
        self.unflushed.contains_key(&index)
            || self.bounds.purged.is_some_and(|purged| index <= purged.index)
            || self.bounds.last.is_none_or(|last| index >= last.index)
    }

    fn truncate_after(&mut self, kept: Option<u64>, stored: Option<LogPosition>) {
        let (Some(last), purged) = (self.bounds.last, self.bounds.purged) else { return };
        let kept = kept.or(purged.map(|purged| purged.index));
        let Some(kept) = kept else {
            self.unflushed.clear();
            self.bounds.last = None;
            return;
        };
        // What the store will refuse (below the purged end) or ignore (past the last) changes nothing here.
        if kept >= last.index || purged.is_some_and(|purged| kept < purged.index) {
            return;
        }
        self.unflushed.retain(|index, _| *index <= kept);
        self.bounds.last =
            self.unflushed.get(&kept).map(|(_, entry)| entry.position()).or(stored).or(purged.filter(|purged| purged.index == kept));
    }

    /// Everything up to `ticket` was written or refused. After a refusal, or when nothing waits, the store's word counts.
    pub(super) fn settled(&mut self, ticket: u64, refused: bool, stored: LogBounds) {
        self.unflushed.retain(|_, (of, _)| *of > ticket);
        if ticket == self.newest_ticket || (refused && self.unflushed.is_empty()) {
            self.bounds = stored;
        }
    }

    /// Clamps `from..to` to the log and gives the unflushed entries in it.
    pub(super) fn read(&self, from: u64, to: u64) -> (u64, u64, Vec<Arc<LogEntry>>) {
        let first = self.bounds.purged.map_or(0, |purged| purged.index.saturating_add(1));
        let after_last = self.bounds.last.map_or(0, |last| last.index.saturating_add(1));
        let (from, to) = (from.max(first), to.min(after_last));
        if from >= to {
            return (from, from, Vec::new());
        }
        let unflushed = self.unflushed.range(from..to).map(|(_, (_, entry))| Arc::clone(entry)).collect();
        (from, to, unflushed)
    }
}
