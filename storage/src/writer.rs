//! [`LogWriter`]: one thread that does all writing to a [`LogStore`], in the order asked, with one flush for all that waits.
//!
//! Owns: the bounded queue, grouping, the answers, and what readers see between acceptance and flush: an entry is readable as soon as
//! [`LogWriter::submit`] returned and durable when its callback runs (what openraft asks of an append; dependencies.md §7.4).
//! Never: reorders a vote, append, truncate or purge; answers before the flush; retries by itself.
//!
//! Full disk: what cannot be written is answered with an error for which [`StoreError::is_full`] holds; each later change is tried
//! anew, so the store comes back by itself when space returns. Any other failed flush is final: every change answers
//! [`StoreError::Down`] until the process restarts, because after a failed sync nobody knows what the disk holds.

mod view;

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use self::view::{Noted, View};
use crate::engine::Page;
use crate::error::{EngineError, StoreError};
use crate::log_store::{Change, LogEntry, LogStore};
use crate::sealed::{LogBounds, Recovered};

/// Runs on the writer thread when the change is durable or refused; must not block.
pub type Done = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// Handle of the writer thread. Dropping it writes what was accepted and ends the thread.
#[derive(Debug)]
pub struct LogWriter {
    store: Arc<LogStore>,
    shared: Arc<Mutex<View>>,
    queue: Option<SyncSender<Request>>,
    capacity: usize,
    thread: Option<JoinHandle<()>>,
}

struct Request {
    /// Its place in the order of acceptance.
    ticket: u64,
    change: Change,
    done: Done,
}

impl LogWriter {
    /// Starts the thread. At most `queue_capacity` requests wait.
    ///
    /// # Errors
    /// The system's, when it gives no thread.
    pub fn start(store: Arc<LogStore>, queue_capacity: usize) -> Result<Self, StoreError> {
        let (queue, requests) = sync_channel(queue_capacity);
        let shared = Arc::new(Mutex::new(View::new(store.bounds())));
        let worker = Worker { store: Arc::clone(&store), shared: Arc::clone(&shared), requests };
        let thread = std::thread::Builder::new()
            .name("storage-writer".to_owned())
            .spawn(move || worker.run())
            .map_err(|error| EngineError::from_io("spawn thread", &error))?;
        Ok(Self { store, shared, queue: Some(queue), capacity: queue_capacity, thread: Some(thread) })
    }

    /// Hands `change` to the thread; `done` runs when it is durable or refused. Does not wait.
    ///
    /// # Errors
    /// [`StoreError::QueueFull`] or [`StoreError::WriterGone`]; `done` is dropped unused.
    pub fn submit(&self, change: Change, done: impl FnOnce(Result<(), StoreError>) + Send + 'static) -> Result<(), StoreError> {
        // The lock is held while sending, so that the order of the queue is the order of the view.
        let mut view = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let ticket = view.next_ticket();
        let noted = self.note(&view, &change)?;
        let request = Request { ticket, change, done: Box::new(done) };
        match self.queue.as_ref().map(|queue| queue.try_send(request)) {
            Some(Ok(())) => {
                view.accept(ticket, noted);
                Ok(())
            }
            Some(Err(TrySendError::Full(_))) => Err(StoreError::QueueFull { capacity: self.capacity }),
            Some(Err(TrySendError::Disconnected(_))) | None => Err(StoreError::WriterGone),
        }
    }

    /// What `change` will mean for readers.
    fn note(&self, view: &View, change: &Change) -> Result<Noted, StoreError> {
        Ok(match change {
            Change::Append(entries) => Noted::Append(entries.iter().cloned().map(Arc::new).collect()),
            Change::TruncateAfter(kept) => match kept.filter(|kept| !view.knows(*kept)) {
                Some(kept) => Noted::TruncateAfter(Some(kept), self.store.position(kept)?),
                None => Noted::TruncateAfter(*kept, None),
            },
            Change::PurgeUpto(position) => Noted::PurgeUpto(*position),
            Change::Vote(_) | Change::Committed(_) | Change::State(_) | Change::Share { .. } => Noted::Other,
        })
    }

    /// Hands `change` over and waits until it is durable or refused. Not for async code.
    ///
    /// # Errors
    /// As [`LogWriter::submit`] and [`LogStore::write`].
    pub fn write(&self, change: Change) -> Result<(), StoreError> {
        let (answer, answered) = sync_channel(1);
        self.submit(change, move |result| {
            let _caller_is_waiting = answer.send(result);
        })?;
        answered.recv().unwrap_or(Err(StoreError::WriterGone))
    }

    /// Entries with `from <= index < to`, those included that were accepted and are not flushed yet.
    ///
    /// # Errors
    /// As [`LogStore::read_range`].
    pub fn read_range(&self, from: u64, to: u64, page: Page) -> Result<Vec<LogEntry>, StoreError> {
        let (from, to, unflushed) = {
            let view = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
            view.read(from, to)
        };
        let split = unflushed.first().map_or(to, |entry| entry.index);
        let mut entries = self.store.read_range(from, split, page)?;
        let mut bytes: usize = entries.iter().map(|entry| entry.payload.len()).sum();
        // A page that ended early must not be followed by later entries.
        if entries.last().map_or(from, |entry| entry.index.saturating_add(1)) != split {
            return Ok(entries);
        }
        for entry in unflushed {
            if entries.len() >= page.entries_max || (bytes >= page.bytes_max && !entries.is_empty()) {
                break;
            }
            bytes = bytes.saturating_add(entry.payload.len());
            entries.push(entry.as_ref().clone());
        }
        Ok(entries)
    }

    /// The log's ends, accepted changes included.
    pub fn bounds(&self) -> LogBounds {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).bounds
    }

    /// The store behind it, for reads of anything but the log, and snapshots.
    pub fn store(&self) -> &Arc<LogStore> {
        &self.store
    }
}

impl Drop for LogWriter {
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("writer thread panicked");
        }
    }
}

struct Worker {
    store: Arc<LogStore>,
    shared: Arc<Mutex<View>>,
    requests: Receiver<Request>,
}

impl Worker {
    fn run(self) {
        let mut next = None;
        while let Some(first) = next.take().or_else(|| self.requests.recv().ok()) {
            let mut group = Group::default();
            group.push(first);
            while group.has_room() {
                match self.requests.try_recv() {
                    Ok(request) => group.push(request),
                    Err(_) => break,
                }
            }
            let answers = self.write(&group.changes);
            self.answer(group, answers);
            match self.requests.recv_timeout(ANCHOR_PAUSE) {
                Ok(request) => next = Some(request),
                // Idle: the anchor may lag no longer (sealed.rs). A failure shows at the next write.
                Err(_) => {
                    if let Err(error) = self.store.sync_anchor() {
                        tracing::warn!(%error, "anchor not synced");
                    }
                }
            }
        }
    }

    fn write(&self, changes: &[Change]) -> Vec<Result<(), StoreError>> {
        if self.store.is_down()
            && let Err(cause) = self.store.recover()
        {
            return changes.iter().map(|_| Err(StoreError::Down { cause: Box::new(cause.clone()) })).collect();
        }
        let answers = self.store.write_each(changes);
        // Refused before anything was written: one large change must not take the small ones (a vote) with it.
        if changes.len() > 1 && answers.iter().any(|answer| matches!(answer, Err(StoreError::Engine(EngineError::Full { .. })))) {
            return changes.iter().map(|change| self.settle(self.store.write(std::slice::from_ref(change)))).collect();
        }
        answers.into_iter().map(|answer| self.settle(answer)).collect()
    }

    /// Turns "unknown, out of space" into "written" or "not written", if the engine comes back.
    fn settle(&self, answer: Result<(), StoreError>) -> Result<(), StoreError> {
        match answer {
            Err(error) if error.is_full() && self.store.is_down() => match self.store.recover() {
                Ok(Recovered::Applied) => Ok(()),
                Ok(Recovered::Absent) => Err(error),
                Err(cause) => Err(StoreError::Down { cause: Box::new(cause) }),
            },
            answer => answer,
        }
    }

    fn answer(&self, group: Group, answers: Vec<Result<(), StoreError>>) {
        {
            let mut view = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
            view.settled(group.newest_ticket, answers.iter().any(Result::is_err), self.store.bounds());
        }
        for (done, answer) in group.done.into_iter().zip(answers) {
            done(answer);
        }
    }
}

/// Requests that share a flush.
#[derive(Default)]
struct Group {
    changes: Vec<Change>,
    done: Vec<Done>,
    newest_ticket: u64,
    bytes: usize,
}

impl Group {
    fn push(&mut self, request: Request) {
        if let Change::Append(entries) = &request.change {
            self.bytes = entries.iter().map(|entry| entry.payload.len()).fold(self.bytes, usize::saturating_add);
        }
        self.newest_ticket = request.ticket;
        self.changes.push(request.change);
        self.done.push(request.done);
    }

    fn has_room(&self) -> bool {
        self.changes.len() < GROUP_CHANGES_MAX && self.bytes < GROUP_BYTES_MAX
    }
}

/// Without a change for so long, the writer is idle: a client that asks again and again leaves shorter pauses, and its commits share a
/// sync of the anchor.
const ANCHOR_PAUSE: Duration = Duration::from_millis(50);
/// Most changes in one flush.
const GROUP_CHANGES_MAX: usize = 256;
/// Payload after which a flush takes no further change.
const GROUP_BYTES_MAX: usize = 4 << 20;
