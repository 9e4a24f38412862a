//! openraft's state machine over a [`Machine`]: applies committed entries, takes and installs snapshots.
//! Owns: the order "state, leaves durable, observer, response", and the applied position. Never: reads a command.
//! Source: architecture.md §7 (snapshots at checkpoint positions only), threshold.md §2.6; openraft's "persistent snapshot" model.
//!
//! The state lives in memory. A start installs the newest stored snapshot and applies the log behind it up to the stored committed
//! position, so leaves and effects come again; both are harmless when repeated. The log is purged only up to a stored snapshot.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use futures::{Stream, StreamExt as _};
use openraft::{
    RaftSnapshotBuilder, Snapshot,
    storage::{EntryResponder, RaftStateMachine},
};
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::{
    contract::{AppliedAt, AppliedObserver, Leaf, LeafSink, Machine},
    disk::Disk,
    types::{LogId, Payload, Response, SnapshotMeta, StoredMembership, TypeConfig},
};

/// Entries applied before their leaves are written out together.
const APPLY_BATCH_MAX: usize = 64;

/// The state as others in this crate see it.
pub(crate) struct State<M> {
    machine: RwLock<M>,
    /// Last applied entry; changes after the leaves of that entry are durable.
    applied: watch::Sender<Option<LogId>>,
    /// Index of the last entry that ended at a checkpoint position.
    checkpoint: watch::Sender<u64>,
    /// False while a start repeats what was applied before the stop.
    live: watch::Sender<bool>,
}

/// The machine panicked while it was changed: its state cannot be trusted any more and the process must restart.
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq, Eq)]
#[error("the replicated state was left half changed by a panic; restart the process")]
pub struct StateBroken;

impl From<StateBroken> for io::Error {
    fn from(broken: StateBroken) -> Self {
        io::Error::other(broken)
    }
}

impl<M: Machine> State<M> {
    pub(crate) fn new(machine: M) -> Self {
        Self {
            machine: RwLock::new(machine),
            applied: watch::Sender::new(None),
            checkpoint: watch::Sender::new(0),
            live: watch::Sender::new(false),
        }
    }

    pub(crate) fn read(&self) -> Result<RwLockReadGuard<'_, M>, StateBroken> {
        self.machine.read().map_err(|_| StateBroken)
    }

    fn write(&self) -> Result<RwLockWriteGuard<'_, M>, StateBroken> {
        self.machine.write().map_err(|_| StateBroken)
    }

    pub(crate) fn applied(&self) -> Option<LogId> {
        *self.applied.borrow()
    }

    pub(crate) fn watch_applied(&self) -> watch::Receiver<Option<LogId>> {
        self.applied.subscribe()
    }

    pub(crate) fn watch_checkpoint(&self) -> watch::Receiver<u64> {
        self.checkpoint.subscribe()
    }

    pub(crate) fn go_live(&self) {
        self.live.send_replace(true);
    }
}

/// A snapshot taken at a checkpoint position and not stored yet.
struct Pending {
    meta: SnapshotMeta,
    data: Arc<Vec<u8>>,
}

/// What openraft drives.
pub(crate) struct StateMachine<M, O> {
    state: Arc<State<M>>,
    disk: Disk,
    sink: Arc<Mutex<dyn LeafSink>>,
    observer: Arc<O>,
    applied: Option<LogId>,
    membership: StoredMembership,
    pending: Option<Pending>,
}

impl<M: Machine, O: AppliedObserver<M>> StateMachine<M, O> {
    pub(crate) fn new(state: Arc<State<M>>, disk: Disk, sink: Arc<Mutex<dyn LeafSink>>, observer: Arc<O>) -> Self {
        Self { state, disk, sink, observer, applied: None, membership: StoredMembership::default(), pending: None }
    }

    fn meta(&self) -> SnapshotMeta {
        SnapshotMeta { last_log_id: self.applied, last_membership: self.membership.clone() }
    }

    /// Applies one batch to the state in memory; nothing is told to anyone yet.
    fn apply_batch(&mut self, batch: Vec<Result<EntryResponder<TypeConfig>, io::Error>>) -> Result<Batch<M>, io::Error> {
        let replayed = !*self.state.live.borrow();
        let state = Arc::clone(&self.state);
        let mut done = Batch { leaves: Vec::new(), told: Vec::new(), answers: Vec::new(), checkpoint: None };
        for item in batch {
            let (entry, responder) = item?;
            let log_id = entry.log_id;
            self.applied = Some(log_id);
            let response = match entry.payload {
                Payload::Blank => Vec::new(),
                Payload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(log_id), membership);
                    Vec::new()
                }
                Payload::Normal(command) => {
                    // Locked for one command at a time: some take milliseconds, and readers wait.
                    let mut machine = state.write()?;
                    let applied = machine.apply(&command.0);
                    done.leaves.extend(applied.leaves);
                    done.told.push((AppliedAt { index: log_id.index, term: log_id.leader_id.term, replayed }, applied.effects));
                    // A snapshot is the state at a checkpoint position and nothing else (threshold.md §2.6).
                    if machine.at_checkpoint() {
                        self.pending = Some(Pending { meta: self.meta(), data: Arc::new(machine.snapshot()) });
                        done.checkpoint = Some(log_id.index);
                    }
                    applied.response
                }
            };
            done.answers.extend(responder.map(|responder| (responder, response)));
        }
        Ok(done)
    }
}

/// What one batch of entries leaves to be done, in this order.
struct Batch<M: Machine> {
    leaves: Vec<Leaf>,
    told: Vec<(AppliedAt, Vec<M::Effect>)>,
    answers: Vec<(openraft::storage::ApplyResponder<TypeConfig>, Vec<u8>)>,
    checkpoint: Option<u64>,
}

/// Runs a blocking call of the audit store on a worker thread.
async fn with_sink(
    sink: &Arc<Mutex<dyn LeafSink>>,
    disk: &Disk,
    call: impl FnOnce(&mut dyn LeafSink) -> io::Result<()> + Send + 'static,
) -> io::Result<()> {
    let sink = Arc::clone(sink);
    let done = tokio::task::spawn_blocking(move || call(&mut *sink.lock().unwrap_or_else(PoisonError::into_inner))).await;
    done.map_err(io::Error::other)?.map_err(|cause| disk.noted(cause))
}

impl<M: Machine, O: AppliedObserver<M>> RaftStateMachine<TypeConfig> for StateMachine<M, O> {
    type SnapshotData = Arc<Vec<u8>>;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<S>(&mut self, entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + Send,
    {
        let mut batches = entries.ready_chunks(APPLY_BATCH_MAX);
        while let Some(batch) = batches.next().await {
            let done = self.apply_batch(batch)?;
            if !done.leaves.is_empty() {
                with_sink(&self.sink, &self.disk, move |sink| sink.append(&done.leaves)).await.inspect_err(|cause| {
                    error!(%cause, "audit leaves cannot be stored");
                })?;
            }
            for (at, effects) in done.told {
                self.observer.applied(at, effects);
            }
            self.state.applied.send_replace(self.applied);
            for (responder, response) in done.answers {
                responder.send(Response(response));
            }
            if let Some(index) = done.checkpoint {
                self.state.checkpoint.send_replace(index);
            }
        }
        Ok(())
    }

    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<Builder> {
        let pending = self.pending.take();
        if pending.is_none() && !force {
            return None;
        }
        Some(match pending {
            Some(pending) => Builder { disk: self.disk.clone(), pending: Ok(pending) },
            None => self.builder_now(),
        })
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        self.builder_now()
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: Arc<Vec<u8>>) -> Result<(), io::Error> {
        // The server checked it on receipt (crate::server); this check also covers what was read from our own disk.
        let restored = self.state.read()?.restored(&snapshot).map_err(io::Error::other)?;
        let stored = self.disk.snapshot_last().await?;
        if stored != meta.last_log_id || stored.is_none() {
            self.disk.save_snapshot(meta, Arc::clone(&snapshot)).await?;
        }
        let size = restored.size();
        with_sink(&self.sink, &self.disk, move |sink| sink.skip_to(size)).await?;
        *self.state.write()? = restored;
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.pending = None;
        let index = meta.last_log_id.map_or(0, |last| last.index);
        self.observer.restored(index);
        self.state.applied.send_replace(self.applied);
        info!(log_index = index, size_bytes = snapshot.len(), "snapshot installed");
        Ok(())
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> Result<Option<openraft::type_config::alias::SnapshotOf<TypeConfig, Arc<Vec<u8>>>>, io::Error> {
        let Some((meta, data)) = self.disk.load_snapshot().await? else { return Ok(None) };
        Ok(Some(Snapshot { meta, snapshot: Arc::new(data) }))
    }
}

impl<M: Machine, O: AppliedObserver<M>> StateMachine<M, O> {
    /// A builder for the state as it is, which must be at a checkpoint position.
    fn builder_now(&self) -> Builder {
        let taken = self.state.read().map_err(io::Error::from).and_then(|machine| {
            if machine.at_checkpoint() {
                Ok(Pending { meta: self.meta(), data: Arc::new(machine.snapshot()) })
            } else {
                Err(io::Error::other("the state is not at a checkpoint position"))
            }
        });
        Builder { disk: self.disk.clone(), pending: taken }
    }
}

/// Stores a snapshot that was taken at a checkpoint position, while the state goes on.
pub(crate) struct Builder {
    disk: Disk,
    pending: Result<Pending, io::Error>,
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    type SnapshotData = Arc<Vec<u8>>;

    async fn build_snapshot(&mut self) -> Result<openraft::type_config::alias::SnapshotOf<TypeConfig, Arc<Vec<u8>>>, io::Error> {
        let Pending { meta, data } = match &self.pending {
            Ok(pending) => pending,
            Err(cause) => return Err(io::Error::other(cause.to_string())),
        };
        self.disk.save_snapshot(meta, Arc::clone(data)).await.inspect_err(|cause| warn!(%cause, "snapshot cannot be stored"))?;
        info!(log_index = meta.last_log_id.map_or(0, |last| last.index), size_bytes = data.len(), "snapshot stored");
        Ok(Snapshot { meta: meta.clone(), snapshot: Arc::clone(data) })
    }
}
