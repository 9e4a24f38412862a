//! The tasks beside a running Raft: who leads, whether it failed, when a checkpoint's snapshot is due.
//! Owns: turning openraft's metrics into what a node watches. Never: decides anything; [`crate::handle`] starts and ends them.

use std::time::Duration;

use openraft::{Raft, async_runtime::watch::WatchReceiver as _};
use tokio::sync::watch;
use tracing::warn;

use crate::{
    apply::StateMachine,
    contract::{AppliedObserver, Machine},
    disk::Disk,
    guard::Fork,
    metrics,
    status::{self, Halt, Leadership},
    types::TypeConfig,
};

/// Between two tries to have a checkpoint's snapshot stored.
const SNAPSHOT_PAUSE: Duration = Duration::from_millis(200);

/// Term and leader, as they change.
pub(crate) async fn follow_leadership<M: Machine, O: AppliedObserver<M>>(
    raft: Raft<TypeConfig, StateMachine<M, O>>,
    leadership: watch::Sender<Leadership>,
    term: watch::Sender<u64>,
) {
    let mut watched = raft.metrics();
    loop {
        let (now, applied) = {
            let seen = watched.borrow_watched();
            (status::leadership(&seen), seen.last_applied.map_or(0, |log_id| log_id.index))
        };
        term.send_replace(now.term);
        metrics::leadership(now.term, now.is_leader);
        metrics::applied(applied);
        leadership.send_if_modified(|before| std::mem::replace(before, now) != now);
        if watched.changed().await.is_err() {
            return;
        }
    }
}

/// Raft that fails stays stopped: an append that was refused may not be skipped.
pub(crate) async fn notice_halt<M: Machine, O: AppliedObserver<M>>(
    raft: Raft<TypeConfig, StateMachine<M, O>>,
    disk: Disk,
    halt: watch::Sender<Option<Halt>>,
) {
    let mut watched = raft.metrics();
    loop {
        let stopped = status::halt(&watched.borrow_watched(), disk.was_full());
        if stopped.is_some() {
            halt.send_replace(stopped);
            return;
        }
        if watched.changed().await.is_err() {
            return;
        }
    }
}

/// A node whose leader contradicts an applied entry takes no further part (architecture.md §2).
pub(crate) async fn stop_at_fork<M: Machine, O: AppliedObserver<M>>(
    raft: Raft<TypeConfig, StateMachine<M, O>>,
    mut fork: watch::Receiver<Option<Fork>>,
) {
    if fork.wait_for(Option::is_some).await.is_ok()
        && let Err(error) = raft.shutdown().await
    {
        warn!(%error, "raft core ended by a panic");
    }
}

/// Has each checkpoint's snapshot stored; then the log up to it may go.
pub(crate) async fn store_checkpoints<M: Machine, O: AppliedObserver<M>>(
    raft: Raft<TypeConfig, StateMachine<M, O>>,
    mut checkpoint: watch::Receiver<u64>,
) {
    while checkpoint.changed().await.is_ok() {
        let index = *checkpoint.borrow_and_update();
        // openraft takes one at a time and ignores a trigger while it builds, so ask until this one is stored.
        while raft.metrics().borrow_watched().snapshot.is_none_or(|stored| stored.index < index) {
            if raft.trigger().snapshot().await.is_err() {
                return;
            }
            tokio::time::sleep(SNAPSHOT_PAUSE).await;
        }
    }
}
