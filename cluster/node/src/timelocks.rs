//! Timelocks: each holder counts with its monotonic clock, the leader activates.
//!
//! Owns: when this node applied each approved proposal. Never: decides that a timelock ended (`apply` does). A restart begins the
//! count anew. Source: architecture.md §7, §9.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dstack_actors::ports::{Log, Peers, read};
use dstack_protocol::codec::Reader;
use dstack_protocol::command::Command;
use dstack_protocol::governance::{Entry, Mono};
use dstack_protocol::rpc::PATH_PEER_MONO;
use dstack_protocol::{ClusterId, NodeIndex, Refusal, RefusalCode, Seat};
use dstack_raft::machine::view;
use dstack_threshold::message::{NodeKey, verify};
use tracing::{debug, info};

const LOOK_EVERY: Duration = Duration::from_millis(500);
const READ_TIMEOUT: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(5);

/// See the module text.
pub(crate) struct Timelocks {
    /// Cluster.
    pub(crate) cluster_id: ClusterId,
    /// This node's seat.
    pub(crate) seat: Seat,
    /// This node's key.
    pub(crate) node_key: Arc<NodeKey>,
    /// The log.
    pub(crate) log: Arc<dyn Log>,
    /// Other nodes.
    pub(crate) peers: Arc<dyn Peers>,
    /// Their seats.
    pub(crate) others: Vec<Seat>,
    /// When this node applied the entry that began each timelock.
    pub(crate) began: Mutex<BTreeMap<[u8; 16], Instant>>,
}

/// Encoding of a [`Mono`] on the wire between nodes: `i(2) ‖ elapsed_ms(8) ‖ sig(64)`.
pub(crate) fn encode_mono(mono: &Mono) -> Vec<u8> {
    let mut bytes = mono.index.0.to_be_bytes().to_vec();
    bytes.extend_from_slice(&mono.elapsed_ms.to_be_bytes());
    bytes.extend_from_slice(&mono.sig);
    bytes
}

fn decode_mono(bytes: &[u8]) -> Option<Mono> {
    let mut reader = Reader::new(bytes);
    let mono = Mono { index: NodeIndex(reader.u16("i").ok()?), elapsed_ms: reader.u64("elapsed_ms").ok()?, sig: reader.array("sig").ok()? };
    reader.finish().ok().map(|()| mono)
}

impl Timelocks {
    /// The entry that began a timelock was applied.
    pub(crate) fn started(&self, action_id: [u8; 16]) {
        self.began.lock().unwrap_or_else(PoisonError::into_inner).entry(action_id).or_insert_with(Instant::now);
    }

    /// This node's word on how long ago it applied that entry.
    ///
    /// # Errors
    /// [`RefusalCode::UnknownAction`].
    pub(crate) fn mono(&self, action_id: &[u8; 16]) -> Result<Mono, Refusal> {
        let began = self.began.lock().unwrap_or_else(PoisonError::into_inner).get(action_id).copied();
        let began =
            began.ok_or_else(|| Refusal::new(RefusalCode::UnknownAction, "an action whose timelock runs here", hex::encode(action_id)))?;
        let (key, seat) = (self.node_key.public(), self.seat);
        let index = read(&*self.log, |state| state.seats.get(&seat).filter(|row| row.node_key == key).map(|row| row.index))?;
        let index = index.ok_or_else(|| Refusal::new(RefusalCode::NotAdmitted, "an admitted key", "this node is not admitted"))?;
        let elapsed_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut mono = Mono { index, elapsed_ms, sig: [0; 64] };
        mono.sig = self.node_key.sign(&mono.signed_bytes(&self.cluster_id, action_id));
        Ok(mono)
    }

    /// Activates what is due while this node leads.
    pub(crate) async fn run(self: Arc<Self>) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let rows = read(&*self.log, |state| {
                let timelock_ms = state.governance.timelock_s.saturating_mul(1000);
                let rows = state.governance.pending.iter();
                let rows = rows.filter_map(|(id, row)| Some((*id, state.log_time.since(row.ready_since?) >= timelock_ms)));
                rows.collect::<Vec<_>>()
            });
            let rows = rows.unwrap_or_default();
            // A state that came from a snapshot brings timelocks whose beginning this node did not see: it counts from here.
            rows.iter().for_each(|(action_id, _)| self.started(*action_id));
            self.began.lock().unwrap_or_else(PoisonError::into_inner).retain(|id, _| rows.iter().any(|(pending, _)| pending == id));
            let due: Vec<[u8; 16]> = rows.into_iter().filter(|(_, due)| *due).map(|(id, _)| id).collect();
            if !self.log.leads() {
                continue;
            }
            for action_id in due {
                match self.activate(action_id).await {
                    Ok(()) => info!(action_id = hex::encode(action_id), "action activated"),
                    Err(refusal) => debug!(code = %refusal.code, got = refusal.got, "action not activated yet"),
                }
            }
        }
    }

    async fn activate(&self, action_id: [u8; 16]) -> Result<(), Refusal> {
        let mut monos = vec![self.mono(&action_id)?];
        let clocks = read(&*self.log, view::clock_keys)?;
        // One that `apply` refuses would take the whole activation with it.
        let counts = |mono: &Mono| {
            let bytes = mono.signed_bytes(&self.cluster_id, &action_id);
            clocks.get(&mono.index).is_some_and(|key| verify(key, &bytes, &mono.sig))
        };
        let asked = self.others.iter().map(|seat| self.peers.post(*seat, PATH_PEER_MONO, action_id.to_vec(), READ_TIMEOUT));
        monos.extend(futures::future::join_all(asked).await.into_iter().flatten().filter_map(|bytes| decode_mono(&bytes)).filter(counts));
        let command = Command::Governance(Entry::Activate { action_id, monos });
        let answer = self.log.propose(command, PATIENCE).await?;
        match answer.outcomes.first().and_then(|outcome| RefusalCode::from_number(outcome.code)) {
            None => Ok(()),
            Some(code) => Err(Refusal::new(code, "an activation that the log accepts", "rejected")),
        }
    }
}

#[cfg(test)]
mod tests;
