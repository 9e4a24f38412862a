//! Env public keys of apps, where an attempt names this node: mode E once, the public half into the log, the private half forgotten.
//!
//! Owns: when this node looks, and its message. Never: names a node (`apply` does), keeps a key, begins an attempt.
//! Source: threshold.md §2.5.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use dstack_actors::combine::{Combine, Wanted};
use dstack_actors::ports::{Log, read};
use dstack_protocol::ceremony::MessageKind;
use dstack_protocol::command::Command;
use dstack_protocol::env::EnvPubBody;
use dstack_protocol::release::{KeyClass, Wish};
use dstack_protocol::state::EnvRow;
use dstack_protocol::{AppId, Generation, NodeIndex, Refusal, RefusalCode, Seat, Wire};
use dstack_raft::machine::env;
use dstack_threshold::message::NodeKey;
use tracing::{info, warn};

use crate::node::Services;

/// Between two looks, beside every change of the log.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// After a failure: an attempt is open for a minute.
const RETRY_AFTER: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(8);

/// This node's index, and the open attempts that name it.
type Waiting = (NodeIndex, Vec<(Generation, AppId, EnvRow)>);

struct EnvCombiner {
    seat: Seat,
    node_key: Arc<NodeKey>,
    log: Arc<dyn Log>,
    combine: Combine,
}

/// Runs for the life of the node.
pub(crate) async fn run(services: Arc<Services>, node_key: Arc<NodeKey>) {
    let combiner = EnvCombiner { seat: services.seat, node_key, log: Arc::clone(&services.log), combine: services.combine() };
    combiner.run().await;
}

impl EnvCombiner {
    async fn run(self) {
        let mut applied = self.log.applied();
        // Attempts that this node has answered, by position.
        let mut answered = BTreeSet::new();
        loop {
            let (index, named) = self.waiting().unwrap_or_default();
            answered.retain(|pos| named.iter().any(|(_, _, row)| row.attempt_pos == *pos));
            let mut failed = false;
            for (generation, app_id, row) in named {
                if answered.contains(&row.attempt_pos) {
                    continue;
                }
                match self.publish(index, generation, app_id, &row).await {
                    Ok(()) => {
                        answered.insert(row.attempt_pos);
                        info!(%app_id, attempt = row.attempt, "env public key published");
                    }
                    Err(refusal) => {
                        failed = true;
                        warn!(%app_id, attempt = row.attempt, code = %refusal.code, got = refusal.got, "env public key not computed, will retry");
                    }
                }
            }
            if failed {
                tokio::time::sleep(RETRY_AFTER).await;
            }
            // Ends by itself only when the log is gone.
            if matches!(tokio::time::timeout(LOOK_EVERY, applied.changed()).await, Ok(Err(_))) {
                return;
            }
        }
    }

    fn waiting(&self) -> Result<Waiting, Refusal> {
        read(&*self.log, |state| {
            let own = state.seats.get(&self.seat).filter(|row| row.node_key == self.node_key.public());
            own.map(|row| (row.index, env::named(state, row.index))).unwrap_or_default()
        })
    }

    async fn publish(&self, index: NodeIndex, generation: Generation, app_id: AppId, row: &EnvRow) -> Result<(), Refusal> {
        let wanted = Wanted::Env { attempt_pos: row.attempt_pos };
        let served = self.combine.keys(wanted, generation, app_id, vec![Wish::new(KeyClass::Env, Vec::new())?]).await?;
        let public = served.keys.first().and_then(|key| key.public.as_deref()).and_then(|public| <[u8; 32]>::try_from(public).ok());
        // The private half is wiped here, before anything else is done with the public one.
        drop(served);
        let envpub = public.ok_or_else(|| Refusal::new(RefusalCode::Internal, "an X25519 public key", "none"))?;
        let body = EnvPubBody { app_id, generation, attempt: row.attempt, envpub }.encode();
        let message = self.node_key.sign_message(&self.combine.cluster_id, MessageKind::EnvPub, index, [0; 32], body);
        let answer = self.log.propose(Command::Ceremony(message), PATIENCE).await?;
        match answer.outcomes.first().and_then(|outcome| RefusalCode::from_number(outcome.code)) {
            None | Some(RefusalCode::EnvKeyPinned) => Ok(()),
            Some(code) => Err(Refusal::new(code, "a key that the log accepts", "rejected")),
        }
    }
}

#[cfg(test)]
mod tests;
