//! How this node comes to its seat, and vouches for others.
//!
//! Owns: posting the genesis, its Admit, its Vouches. Never: counts vouches (`apply` does). Source: threshold.md §3 "Admit".

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use dstack_actors::ports::{Evidence, Log, Now, read};
use dstack_protocol::ceremony::{AdmitBody, MessageKind, body_digest};
use dstack_protocol::command::Command;
use dstack_protocol::state::State;
use dstack_protocol::{ClusterId, NodeIndex, Refusal, RefusalCode, Seat, Wire, binding};
use dstack_raft::machine::{Birth, view};
use dstack_threshold::message::NodeKey;
use tracing::{debug, error, info};

use crate::dstack::Permit;
use crate::trust::Trust;

const LOOK_EVERY: Duration = Duration::from_millis(250);
const PATIENCE: Duration = Duration::from_secs(5);

/// See the module text.
pub(crate) struct Admission {
    /// What the cluster is born from.
    pub(crate) birth: Arc<Birth>,
    /// This node's seat.
    pub(crate) seat: Seat,
    /// This node's key.
    pub(crate) node_key: Arc<NodeKey>,
    /// Greater than any before for this seat.
    pub(crate) incarnation: u64,
    /// The log.
    pub(crate) log: Arc<dyn Log>,
    /// This node's device.
    pub(crate) evidence: Arc<dyn Evidence>,
    /// Judges others.
    pub(crate) trust: Trust,
    /// Own clock.
    pub(crate) now: Now,
}

/// An Admit to vouch for.
struct Candidate {
    seat: Seat,
    hash: [u8; 32],
    body: AdmitBody,
}

struct Seen {
    admitted: bool,
    posted: bool,
    voucher: Option<NodeIndex>,
    beacon: (u64, [u8; 32]),
    candidates: Vec<Candidate>,
}

impl Admission {
    fn cluster_id(&self) -> &ClusterId {
        self.birth.cluster_id()
    }

    /// Takes part from the permit on, for as long as the node runs: seats may be filled anew later.
    pub(crate) async fn run(self: Arc<Self>, permit: Permit) {
        permit.given().await;
        let mut rejected: BTreeSet<[u8; 32]> = BTreeSet::new();
        let mut was_admitted = false;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let seen = match read(&*self.log, |state| self.see(state)) {
                Ok(seen) => seen,
                Err(refusal) if refusal.code == RefusalCode::NoGenesis => {
                    if self.log.leads() {
                        self.post(self.birth.command(), "genesis").await;
                    }
                    continue;
                }
                Err(_) => continue,
            };
            if seen.admitted && !was_admitted {
                info!(seat = self.seat.0, "seat filled");
            }
            was_admitted = seen.admitted;
            if !seen.admitted && !seen.posted {
                self.admit(seen.beacon).await;
            }
            for candidate in seen.candidates {
                if rejected.contains(&candidate.hash) {
                    continue;
                }
                match (seen.voucher, self.judge(&candidate).await) {
                    (Some(index), Ok(())) => self.vouch(index, &candidate).await,
                    (None, Ok(())) => {}
                    (_, Err(refusal)) => {
                        error!(peer_id = candidate.seat.0, code = %refusal.code, expected = refusal.expected, got = refusal.got, "no vouch for this node");
                        rejected.insert(candidate.hash);
                    }
                }
            }
        }
    }

    fn see(&self, state: &State) -> Seen {
        let key = self.node_key.public();
        let admitted = state.seats.get(&self.seat).is_some_and(|row| row.node_key == key);
        let own_admit = state.admits.get(&self.seat).and_then(|row| AdmitBody::decode(&row.admit.body).ok());
        let posted = own_admit.is_some_and(|body| body.node_key == key && body.incarnation == self.incarnation);
        // At genesis with the key of its own Admit under the seat's number; later as a signer in force.
        let voucher = match state.members.is_empty() {
            true => (admitted || posted).then_some(NodeIndex(self.seat.0)),
            false => state.seats.get(&self.seat).filter(|row| row.node_key == key).map(|row| row.index),
        };
        let candidates = state
            .admits
            .iter()
            .filter(|(_, row)| voucher.is_some_and(|index| !row.vouches.contains_key(&index)))
            .filter_map(|(seat, row)| {
                let body = AdmitBody::decode(&row.admit.body).ok()?;
                Some(Candidate { seat: *seat, hash: body_digest(&row.admit.body), body })
            })
            .collect();
        let beacon = view::latest_beacon(state).map_or((0, self.cluster_id().0), |(pos, row)| (pos, row.value));
        Seen { admitted, posted, voucher, beacon, candidates }
    }

    async fn admit(&self, (beacon_pos, beacon): (u64, [u8; 32])) {
        let node_key = self.node_key.public();
        let report_data = binding::admit(self.cluster_id(), self.seat, &node_key, self.incarnation, beacon_pos, &beacon);
        let device = Arc::clone(&self.evidence);
        let evidence = match tokio::task::spawn_blocking(move || device.evidence(report_data)).await {
            Ok(Ok(evidence)) => evidence,
            Ok(Err(reason)) => return error!(reason, "no evidence from this node's device"),
            Err(_) => return,
        };
        let body = AdmitBody { seat: self.seat, node_key, incarnation: self.incarnation, beacon_pos, beacon, evidence }.encode();
        let message = self.node_key.sign_message(self.cluster_id(), MessageKind::Admit, NodeIndex(0), [0; 32], body);
        self.post(Command::Ceremony(message), "admit").await;
    }

    /// Verifies evidence, measurement and that seat's platform identity.
    async fn judge(&self, candidate: &Candidate) -> Result<(), Refusal> {
        let body = &candidate.body;
        let report_data = binding::admit(self.cluster_id(), body.seat, &body.node_key, body.incarnation, body.beacon_pos, &body.beacon);
        let (trust, now, seat, evidence) = (self.trust.clone(), (self.now)(), body.seat, body.evidence.clone());
        let judged = tokio::task::spawn_blocking(move || trust.node_evidence(seat, &evidence, &report_data, now)).await;
        judged.map_err(|error| Refusal::new(RefusalCode::Internal, "a judgement", error.to_string()))?
    }

    async fn vouch(&self, index: NodeIndex, candidate: &Candidate) {
        let message = self.node_key.sign_message(self.cluster_id(), MessageKind::Vouch, index, [0; 32], candidate.hash.to_vec());
        self.post(Command::Ceremony(message), "vouch").await;
    }

    async fn post(&self, command: Command, what: &'static str) {
        match self.log.propose(command, PATIENCE).await {
            Ok(answer) => {
                if let Some(code) = answer.outcomes.first().and_then(|outcome| RefusalCode::from_number(outcome.code)) {
                    debug!(what, %code, "not applied");
                }
            }
            Err(refusal) => debug!(what, code = %refusal.code, got = refusal.got, "not proposed"),
        }
    }
}
