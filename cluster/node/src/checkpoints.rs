//! Checkpoints: the leader asks for one when enough log lies behind the last snapshot.
//!
//! Owns: when. Never: takes a snapshot (Raft does, at the position that `apply` marked). Source: threshold.md §2.6.

use std::sync::Arc;
use std::time::Duration;

use dstack_actors::ports::Log;
use dstack_protocol::command::Command;
use tracing::{info, warn};

use crate::ports::Raft;

const LOOK_EVERY: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(5);

/// Proposes checkpoints while this node leads.
pub(crate) async fn run(raft: Raft, log: Arc<dyn Log>, every_entries: u64) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let status = raft.status();
        let applied = status.applied_index.unwrap_or(0);
        let behind = applied.saturating_sub(status.snapshot_index.unwrap_or(0));
        if !status.leadership.is_leader || behind < every_entries {
            continue;
        }
        match log.propose(Command::Checkpoint, PATIENCE).await {
            Ok(answer) => info!(size = answer.size, behind, "checkpoint"),
            Err(refusal) => warn!(code = %refusal.code, got = refusal.got, "checkpoint not made"),
        }
    }
}
