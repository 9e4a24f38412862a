//! Taking an app into the state that only the authority knows.
//!
//! Owns: this node's signed word, and the wait until it is applied here. Never: decides whether the app may be adopted (`apply` does), asks
//! the authority (who calls has its yes, or asks for an env key alone). Source: ADR 0024.

use std::sync::Arc;
use std::time::Duration;

use dstack_protocol::adopt::{Adopt, AdoptBasis};
use dstack_protocol::command::Command;
use dstack_protocol::{AppId, ClusterId, Refusal, RefusalCode, Seat};
use dstack_raft::machine::view;
use dstack_threshold::message::NodeKey;
use tracing::info;

use crate::ports::{Log, read};

/// How long a proposal, and then its arrival here, may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// See the module text.
pub struct Adoption {
    /// Cluster.
    pub cluster_id: ClusterId,
    /// This node's seat.
    pub seat: Seat,
    /// What its word is signed by.
    pub node_key: Arc<NodeKey>,
    /// Applied state.
    pub log: Arc<dyn Log>,
}

impl Adoption {
    /// Adopts an app, if it is neither registered nor adopted and the operators have delegated; else nothing is done.
    ///
    /// # Errors
    /// What the log refuses: [`RefusalCode::RateLimited`], [`RefusalCode::AdoptedFull`]; or why it was not reached.
    pub async fn of(&self, app_id: AppId, basis: AdoptBasis) -> Result<(), Refusal> {
        let mut applied = self.log.applied();
        let Some((author, beacon_pos)) = self.due(&app_id, basis)? else { return Ok(()) };
        let mut adopt = Adopt { app_id, basis, author, beacon_pos, sig: [0; 64] };
        adopt.sig = self.node_key.sign(&adopt.signed_bytes(&self.cluster_id));
        let answer = self.log.propose(Command::Adopt(adopt), PATIENCE).await?;
        let outcome = answer.outcomes.first();
        if let Some((code, outcome)) = outcome.and_then(|outcome| Some((RefusalCode::from_number(outcome.code)?, outcome))) {
            let refusal = Refusal::new(code, "an adoption that the log accepts", format!("rejected at position {}", outcome.pos));
            return Err(refusal.retry_after(outcome.retry_after_ms));
        }
        info!(%app_id, basis = ?basis, "app adopted: the authority knows it, no operator registered it");
        let arrived = async {
            while read(&*self.log, |state| state.wants_adoption(&app_id, basis))? {
                applied.changed().await.map_err(|_| crate::mailbox::gone("raft"))?;
            }
            Ok(())
        };
        let late = || Refusal::new(RefusalCode::NotYet, "an adopted app", "this node is behind").retry_after(200);
        tokio::time::timeout(PATIENCE, arrived).await.unwrap_or_else(|_| Err(late()))
    }

    /// Author and beacon of an adoption that is due.
    fn due(&self, app_id: &AppId, basis: AdoptBasis) -> Result<Option<(dstack_protocol::NodeIndex, u64)>, Refusal> {
        let found = read(&*self.log, |state| {
            if !state.wants_adoption(app_id, basis) {
                return Ok(None);
            }
            let own = state.seats.get(&self.seat).filter(|row| row.node_key == self.node_key.public()).map(|row| row.index);
            match (own, view::latest_beacon(state)) {
                (Some(own), Some((pos, _))) => Ok(Some((own, pos))),
                _ => Err(Refusal::new(RefusalCode::NotReady, "a seat of this node and a beacon", "none yet").retry_after(1000)),
            }
        });
        found?
    }
}
