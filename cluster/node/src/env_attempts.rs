//! Env attempts: the leader begins one for each app that has no env public key.
//!
//! Owns: when to propose. Never: decides whether an attempt may begin (`apply` does), computes a key (the node named does).
//! Source: threshold.md §2.5.

use std::sync::Arc;
use std::time::Duration;

use dstack_actors::ports::{Log, read};
use dstack_protocol::command::Command;
use dstack_raft::machine::env::due;
use tracing::{info, warn};

const LOOK_EVERY: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(5);

/// Proposes attempts while this node leads.
pub(crate) async fn run(log: Arc<dyn Log>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        // One after the other: each proposal changes what is due.
        while let Some(attempt) = next(&*log) {
            let (app_id, number) = (attempt.app_id, attempt.attempt);
            match log.propose(Command::Env(attempt), PATIENCE).await {
                Ok(answer) if answer.outcomes.first().is_some_and(|outcome| outcome.code == 0) => {
                    info!(%app_id, attempt = number, "env attempt begun");
                }
                // Another leader was first.
                Ok(_) => break,
                Err(refusal) => {
                    warn!(%app_id, attempt = number, code = %refusal.code, got = refusal.got, "env attempt not begun");
                    break;
                }
            }
        }
    }
}

fn next(log: &dyn Log) -> Option<dstack_protocol::env::EnvAttempt> {
    if !log.leads() {
        return None;
    }
    read(log, due).ok().flatten()
}
