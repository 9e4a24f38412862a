//! Raft's log, vote and snapshot in the node's store.
//! Owns: which record goes where, and the newest entries in memory so that replication and apply need not read the disk.
//! Never: an engine; [`dstack_storage`] owns durability, order and authentication.
//! Source: dependencies.md §7 pitfalls 3 to 5; architecture.md §8.

use std::{
    collections::BTreeMap,
    io,
    ops::{Bound, RangeBounds},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use dstack_storage::{LogEntry, LogPosition, LogWriter, StoreError, engine::Page, log_store::Change};
use openraft::{
    LogState, RaftLogReader,
    storage::{IOFlushed, RaftLogStorage},
};
use tokio::sync::{oneshot, watch};
use tracing::{error, warn};

use crate::{
    format::{self, FormatError},
    transport::{APPEND_BYTES_TARGET, SNAPSHOT_BYTES_MAX},
    types::{Entry, LogId, Payload, SnapshotMeta, TypeConfig, Vote},
};

/// Name of the state blob with the ids of the last two purges. The store keeps index and term of a purge; the leader's seat is here.
const PURGED: &str = "raft.purged";
/// Bytes of commands kept in memory behind the newest entry.
const TAIL_BYTES_MAX: usize = 8 << 20;
/// Entries kept in memory behind the newest entry.
const TAIL_ENTRIES_MAX: usize = 2048;
/// The committed position is saved at most this often; a restart re-applies up to the saved one and hears the rest from the leader.
const COMMITTED_PAUSE: Duration = Duration::from_millis(200);
/// Pause when the writer's queue is full: the disk is behind.
const QUEUE_PAUSE: Duration = Duration::from_millis(1);

fn failed(cause: StoreError) -> io::Error {
    io::Error::new(if cause.is_full() { io::ErrorKind::StorageFull } else { io::ErrorKind::Other }, cause)
}

fn damaged(cause: FormatError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, cause)
}

/// One node's Raft records. Clones share everything.
#[derive(Clone)]
pub(crate) struct Disk {
    /// Gone after [`Disk::close`], so that the files can be opened again while tasks of openraft still end.
    writer: Arc<Mutex<Option<Arc<LogWriter>>>>,
    tail: Arc<Mutex<Tail>>,
    /// Whether anything failed for want of space: openraft keeps only the text of an error.
    full: Arc<AtomicBool>,
}

/// What is known without reading the disk.
struct Tail {
    purged: Option<LogId>,
    last: Option<LogId>,
    vote: Option<Vote>,
    committed: Option<LogId>,
    /// Whether a task will save `committed` soon.
    committed_waits: bool,
    /// Newest entries, without a gap up to `last`.
    entries: BTreeMap<u64, Entry>,
    bytes: usize,
}

fn command_bytes(entry: &Entry) -> usize {
    match &entry.payload {
        Payload::Normal(command) => command.0.len(),
        Payload::Blank | Payload::Membership(_) => 0,
    }
}

impl Tail {
    fn push(&mut self, entry: Entry) {
        self.last = Some(entry.log_id);
        self.bytes = self.bytes.saturating_add(command_bytes(&entry));
        self.entries.insert(entry.log_id.index, entry);
        while self.bytes > TAIL_BYTES_MAX || self.entries.len() > TAIL_ENTRIES_MAX {
            let Some((_, oldest)) = self.entries.pop_first() else { break };
            self.bytes = self.bytes.saturating_sub(command_bytes(&oldest));
        }
    }

    fn retain(&mut self, keep: impl Fn(u64) -> bool) {
        self.entries.retain(|index, _| keep(*index));
        self.bytes = self.entries.values().map(command_bytes).sum();
    }

    /// Entries of `from..to`, if all of them are here.
    fn cached(&self, from: u64, to: u64) -> Option<impl Iterator<Item = &Entry>> {
        let first = *self.entries.first_key_value()?.0;
        (first <= from).then(|| self.entries.range(from..to).map(|(_, entry)| entry))
    }

    /// The part of `from..to` that the log has.
    fn clip(&self, from: u64, to: u64) -> (u64, u64) {
        let first = self.purged.map_or(0, |purged| purged.index.saturating_add(1));
        let end = self.last.map_or(0, |last| last.index.saturating_add(1));
        (from.max(first), to.min(end))
    }
}

impl Disk {
    /// Reads the ends of the log, the vote and the committed position.
    pub(crate) fn open(writer: Arc<LogWriter>) -> Result<Self, io::Error> {
        let store = writer.store();
        let bounds = writer.bounds();
        let purged = match bounds.purged {
            None => None,
            Some(position) => {
                let blob = store.load_state(PURGED).map_err(failed)?.unwrap_or_default();
                let ids = blob.chunks(PURGED_ID_BYTES).map(format::decode_log_id).collect::<Result<Vec<_>, _>>().map_err(damaged)?;
                let matches = |id: &LogId| id.index == position.index && id.leader_id.term == position.term;
                let purged = ids.into_iter().find(matches);
                Some(purged.ok_or_else(|| io::Error::other(format!("no record of the purge up to index {}", position.index)))?)
            }
        };
        let last = match bounds.last {
            Some(position) if Some(position) != bounds.purged => {
                let entries = writer.read_range(position.index, position.index.saturating_add(1), Page::entries(1)).map_err(failed)?;
                let entry = entries.first().ok_or_else(|| io::Error::other("the newest log entry is missing"))?;
                Some(decode(entry)?.log_id)
            }
            _ => purged,
        };
        let vote = store.read_vote().map_err(failed)?;
        let committed = store.read_committed().map_err(failed)?;
        let tail = Tail {
            purged,
            last,
            vote: vote.map(|bytes| format::decode_vote(&bytes)).transpose().map_err(damaged)?,
            committed: committed.map(|bytes| format::decode_log_id(&bytes)).transpose().map_err(damaged)?,
            committed_waits: false,
            entries: BTreeMap::new(),
            bytes: 0,
        };
        Ok(Self { writer: Arc::new(Mutex::new(Some(writer))), tail: Arc::new(Mutex::new(tail)), full: Arc::default() })
    }

    /// Saves the committed position and lets go of the store; every later call fails.
    pub(crate) fn close(&self) {
        if let Err(cause) = self.save_committed_now() {
            warn!(%cause, "committed position not saved; a restart hears it from the leader");
        }
        drop(self.writer.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Whether a write failed for want of space.
    pub(crate) fn was_full(&self) -> bool {
        self.full.load(Ordering::SeqCst)
    }

    /// Remembers an error that was for want of space, on its way to openraft.
    pub(crate) fn noted(&self, cause: io::Error) -> io::Error {
        if cause.kind() == io::ErrorKind::StorageFull {
            self.full.store(true, Ordering::SeqCst);
        }
        cause
    }

    fn failed(&self, cause: StoreError) -> io::Error {
        self.noted(failed(cause))
    }

    fn writer(&self) -> Result<Arc<LogWriter>, io::Error> {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        writer.clone().ok_or_else(|| io::Error::other("raft has stopped"))
    }

    /// Not awaited: an older position on disk only makes a restart hear more from the leader.
    fn save_committed_now(&self) -> Result<(), io::Error> {
        let committed = {
            let mut tail = self.tail();
            tail.committed_waits = false;
            tail.committed
        };
        let bytes = committed.map(|committed| format::encode_log_id(&committed)).transpose().map_err(damaged)?;
        self.writer()?.submit(Change::Committed(bytes), |_| {}).map_err(failed)
    }

    fn tail(&self) -> MutexGuard<'_, Tail> {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands `change` to the writer; the answer comes when it is durable. Waits only while the writer's queue is full.
    async fn submit(&self, change: Change) -> Result<oneshot::Receiver<Result<(), StoreError>>, io::Error> {
        loop {
            let (done, durable) = oneshot::channel();
            let asked = self.writer()?.submit(change.clone(), move |result| {
                // Whoever no longer waits does not need the answer.
                let _ = done.send(result);
            });
            match asked {
                Ok(()) => return Ok(durable),
                Err(StoreError::QueueFull { .. }) => tokio::time::sleep(QUEUE_PAUSE).await,
                Err(error) => return Err(self.failed(error)),
            }
        }
    }

    async fn write(&self, change: Change) -> Result<(), io::Error> {
        let durable = self.submit(change).await?;
        durable.await.map_err(|_| io::Error::other("the writer ended"))?.map_err(|cause| self.failed(cause))
    }

    /// Entries of `range` that the log has, without a gap; ends early after `bytes_max` bytes.
    async fn read(&self, from: u64, to: u64, bytes_max: usize) -> Result<Vec<Entry>, io::Error> {
        let (from, to) = {
            let tail = self.tail();
            let (from, to) = tail.clip(from, to);
            if from >= to {
                return Ok(Vec::new());
            }
            if let Some(cached) = tail.cached(from, to) {
                let mut bytes = 0usize;
                let fits = |entry: &&Entry| {
                    let before = bytes;
                    bytes = bytes.saturating_add(command_bytes(entry)).saturating_add(format::ENTRY_OVERHEAD_BYTES);
                    before < bytes_max
                };
                return Ok(cached.take_while(fits).cloned().collect());
            }
            (from, to)
        };
        let writer = self.writer()?;
        let read = tokio::task::spawn_blocking(move || read_blocking(&writer, from, to, bytes_max));
        read.await.map_err(io::Error::other)?
    }

    /// Our log ids from `first` to `last`, both included, as far as they are still kept.
    pub(crate) async fn log_ids(&self, first: u64, last: u64) -> Result<BTreeMap<u64, LogId>, io::Error> {
        let entries = self.read(first, last.saturating_add(1), usize::MAX).await?;
        Ok(entries.into_iter().map(|entry| (entry.log_id.index, entry.log_id)).collect())
    }

    /// Replaces the stored snapshot.
    pub(crate) async fn save_snapshot(&self, meta: &SnapshotMeta, data: Arc<Vec<u8>>) -> Result<(), io::Error> {
        let meta = format::encode_snapshot_meta(meta).map_err(damaged)?;
        let store = Arc::clone(self.writer()?.store());
        let saved = tokio::task::spawn_blocking(move || store.save_snapshot(&meta, &data));
        saved.await.map_err(io::Error::other)?.map_err(|cause| self.failed(cause))?;
        Ok(())
    }

    /// The stored snapshot.
    pub(crate) async fn load_snapshot(&self) -> Result<Option<(SnapshotMeta, Vec<u8>)>, io::Error> {
        let store = Arc::clone(self.writer()?.store());
        let loaded = tokio::task::spawn_blocking(move || store.load_snapshot(SNAPSHOT_BYTES_MAX as u64));
        let Some((record, data)) = loaded.await.map_err(io::Error::other)?.map_err(failed)? else { return Ok(None) };
        Ok(Some((format::decode_snapshot_meta(&record.meta).map_err(damaged)?, data)))
    }

    /// The last entry that the stored snapshot covers.
    pub(crate) async fn snapshot_last(&self) -> Result<Option<LogId>, io::Error> {
        let store = Arc::clone(self.writer()?.store());
        let record = tokio::task::spawn_blocking(move || store.snapshot()).await.map_err(io::Error::other)?.map_err(failed)?;
        let Some(record) = record else { return Ok(None) };
        Ok(format::decode_snapshot_meta(&record.meta).map_err(damaged)?.last_log_id)
    }
}

/// Bytes of one id in the blob [`PURGED`].
const PURGED_ID_BYTES: usize = 19;

fn decode(entry: &LogEntry) -> Result<Entry, io::Error> {
    let decoded = format::decode_entry(&entry.payload).map_err(damaged)?;
    // The place is authenticated by the store, the content by us: they must agree.
    if (decoded.log_id.index, decoded.log_id.leader_id.term) != (entry.index, entry.term) {
        return Err(io::Error::other(format!("log entry {} holds the entry of another place", entry.index)));
    }
    Ok(decoded)
}

fn read_blocking(writer: &LogWriter, from: u64, to: u64, bytes_max: usize) -> Result<Vec<Entry>, io::Error> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut bytes = 0usize;
    let mut next = from;
    while next < to && bytes < bytes_max {
        let page = Page { entries_max: Page::SCAN.entries_max, bytes_max: (bytes_max - bytes).min(Page::SCAN.bytes_max) };
        let read = writer.read_range(next, to, page).map_err(failed)?;
        if read.is_empty() {
            // Purged or truncated since the range was clipped.
            break;
        }
        for entry in &read {
            bytes = bytes.saturating_add(entry.payload.len());
            entries.push(decode(entry)?);
            next = entry.index.saturating_add(1);
        }
    }
    Ok(entries)
}

/// openraft's log storage over [`Disk`].
#[derive(Clone)]
pub(crate) struct LogStorage {
    disk: Disk,
    applied: watch::Receiver<Option<LogId>>,
}

impl LogStorage {
    pub(crate) fn new(disk: Disk, applied: watch::Receiver<Option<LogId>>) -> Self {
        Self { disk, applied }
    }
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let from = match range.start_bound() {
        Bound::Included(from) => *from,
        Bound::Excluded(before) => before.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let to = match range.end_bound() {
        Bound::Included(last) => last.saturating_add(1),
        Bound::Excluded(to) => *to,
        Bound::Unbounded => u64::MAX,
    };
    (from, to)
}

impl RaftLogReader<TypeConfig> for LogStorage {
    async fn try_get_log_entries<R>(&mut self, range: R) -> Result<Vec<Entry>, io::Error>
    where
        R: RangeBounds<u64> + Clone + std::fmt::Debug + Send,
    {
        let (from, to) = bounds(&range);
        self.disk.read(from, to, usize::MAX).await
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.disk.read(start, end, APPEND_BYTES_TARGET).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.disk.tail().vote)
    }
}

impl RaftLogStorage<TypeConfig> for LogStorage {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let tail = self.disk.tail();
        Ok(LogState { last_purged_log_id: tail.purged, last_log_id: tail.last })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        // Durable before it returns (dependencies.md §7 pitfall 5); the writer keeps it in order with appends.
        self.disk.write(Change::Vote(format::encode_vote(vote).map_err(damaged)?)).await?;
        self.disk.tail().vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        let waits = {
            let mut tail = self.disk.tail();
            tail.committed = committed;
            std::mem::replace(&mut tail.committed_waits, true)
        };
        if !waits {
            let disk = self.disk.clone();
            tokio::spawn(async move {
                tokio::time::sleep(COMMITTED_PAUSE).await;
                // Fails only when Raft has stopped or the disk fails, which the next append will tell.
                let _ = disk.save_committed_now();
            });
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.disk.tail().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        let encoded = entries.iter().map(|entry| {
            let payload = format::encode_entry(entry).map_err(damaged)?;
            Ok(LogEntry { index: entry.log_id.index, term: entry.log_id.leader_id.term, payload })
        });
        let change = Change::Append(encoded.collect::<Result<_, io::Error>>()?);
        let slot = Arc::new(Mutex::new(Some(callback)));
        loop {
            let (waiting, disk) = (Arc::clone(&slot), self.disk.clone());
            let asked = self.disk.writer()?.submit(change.clone(), move |result| {
                let callback = waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(callback) = callback {
                    callback.io_completed(result.map_err(|cause| disk.failed(cause)));
                }
            });
            match asked {
                Ok(()) => break,
                Err(StoreError::QueueFull { .. }) => tokio::time::sleep(QUEUE_PAUSE).await,
                Err(cause) => return Err(self.disk.failed(cause)),
            }
        }
        // Readable from here on, before it is durable (pitfall 4).
        let mut tail = self.disk.tail();
        for entry in entries {
            tail.push(entry);
        }
        Ok(())
    }

    async fn truncate_after(&mut self, kept: Option<LogId>) -> Result<(), io::Error> {
        // A node never un-applies (architecture.md §2). The server refuses such a leader first; this is the second line.
        let applied = *self.applied.borrow();
        if applied.is_some_and(|applied| kept.is_none_or(|kept| kept.index < applied.index)) {
            error!(log_index = applied.map_or(0, |applied| applied.index), "refusing to truncate an applied entry");
            return Err(io::Error::other("an applied entry would be removed from the log"));
        }
        let index = kept.map(|kept| kept.index);
        let durable = self.disk.submit(Change::TruncateAfter(index)).await?;
        {
            let mut tail = self.disk.tail();
            tail.retain(|at| index.is_some_and(|kept| at <= kept));
            tail.last = tail.last.min(kept.max(tail.purged));
        }
        durable.await.map_err(|_| io::Error::other("the writer ended"))?.map_err(|cause| self.disk.failed(cause))
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        let before = self.disk.tail().purged;
        if before.is_some_and(|before| before.index >= upto.index) {
            return Ok(());
        }
        let mut blob = format::encode_log_id(&upto).map_err(damaged)?;
        if let Some(before) = before {
            blob.extend(format::encode_log_id(&before).map_err(damaged)?);
        }
        // First the ids, then the purge they describe: after a crash between the two, the older id still matches.
        self.disk.write(Change::State(vec![(PURGED.to_owned(), Some(blob))])).await?;
        let position = LogPosition { index: upto.index, term: upto.leader_id.term };
        let durable = self.disk.submit(Change::PurgeUpto(position)).await?;
        {
            let mut tail = self.disk.tail();
            tail.retain(|at| at > upto.index);
            tail.purged = Some(upto);
            tail.last = tail.last.max(Some(upto));
        }
        durable.await.map_err(|_| io::Error::other("the writer ended"))?.map_err(|cause| self.disk.failed(cause))
    }
}
