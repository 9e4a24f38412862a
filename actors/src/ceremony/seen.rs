//! What of the state the ceremony actor needs, taken at one moment.
//!
//! Owns: the copy. Never: replays a run while the state waits; a [`Replay`] is taken along and run outside.

use std::collections::BTreeMap;

use dstack_protocol::genesis::CaAlgorithm;
use dstack_protocol::limits::CEREMONY_ROUND_MS_MAX;
use dstack_protocol::state::{AttemptRow, State};
use dstack_protocol::{Epoch, Generation, NodeIndex, RootTag, Seat};
use dstack_raft::machine::{Replay, epoch_of_new_roots, missing_roots, view};
use dstack_threshold::dkg::PublicSharing;
use dstack_threshold::share::ShareId;

use super::Parts;

/// See the module text.
pub(super) struct Seen {
    /// This node's index, once admitted with its key.
    pub(super) index: Option<NodeIndex>,
    /// The open attempt.
    pub(super) attempt: Option<OpenAttempt>,
    /// Attempts opened so far.
    pub(super) attempts: u32,
    /// Attempts opened since the last one that made roots.
    pub(super) attempts_failed: u32,
    /// Roots in force whose share this node has not in use.
    pub(super) roots: Vec<RootSeen>,
    /// Roots that the cluster is to have and has not.
    pub(super) missing_roots: Vec<RootTag>,
    /// Epoch of roots made now.
    pub(super) new_epoch: Epoch,
    /// The latest beacon.
    pub(super) beacon: Option<(u64, [u8; 32])>,
    /// Indices of all signers in force.
    pub(super) everyone: Vec<NodeIndex>,
    /// Threshold of new roots.
    pub(super) t: u16,
    /// Algorithm of root `ca`.
    pub(super) ca: CaAlgorithm,
    /// Who sits where.
    seats: BTreeMap<NodeIndex, Seat>,
}

impl Seen {
    /// Where these nodes are; one without a seat is left out.
    pub(super) fn seats_of(&self, members: &[NodeIndex]) -> BTreeMap<NodeIndex, Seat> {
        members.iter().filter_map(|index| Some((*index, *self.seats.get(index)?))).collect()
    }
}

/// The open attempt.
pub(super) struct OpenAttempt {
    /// Its row.
    pub(super) row: AttemptRow,
    /// Whether its present round is over its time.
    pub(super) overdue: bool,
    /// What the run of each root is replayed from, in the order of the roots; none while joins are missing.
    pub(super) runs: Option<Vec<Replay>>,
}

/// A root in force of which this node is a holder, without its share in use.
pub(super) struct RootSeen {
    /// Which.
    pub(super) root: RootTag,
    /// This node's share of it.
    pub(super) id: ShareId,
    /// The public side of it.
    pub(super) sharing: PublicSharing,
    /// The name of its run.
    pub(super) inst: [u8; 32],
    /// The attempt it came from.
    pub(super) attempt: u32,
    /// What its run is replayed from.
    pub(super) run: Option<Replay>,
}

pub(super) fn see(parts: &Parts, state: &State) -> Seen {
    let own = state.seats.get(&parts.seat).filter(|row| row.node_key == parts.node_key.public());
    let index = own.map(|row| row.index);
    let lacking = |((generation, root), row): (&(Generation, RootTag), &dstack_protocol::state::RootRow)| {
        let id = ShareId { index: index?, generation: *generation, epoch: row.epoch };
        row.vks.get(&id.index)?;
        if parts.shares.in_use_of(*root) == Some(id) {
            return None;
        }
        let run = state.ceremonies.get(&row.attempt).and_then(|attempt| Replay::of(state, &parts.cluster_id, attempt, *root));
        let sharing = PublicSharing {
            threshold: row.t,
            transcript: row.transcript,
            public_key: row.public_key.0.clone(),
            verification_keys: row.vks.iter().map(|(index, vk)| (*index, vk.0.clone())).collect(),
        };
        Some(RootSeen { root: *root, id, sharing, inst: row.inst, attempt: row.attempt, run })
    };
    let open = state.attempt.as_ref().map(|row| OpenAttempt {
        row: row.clone(),
        overdue: state.log_time.since(row.round_since) > CEREMONY_ROUND_MS_MAX,
        runs: row.open.roots.iter().map(|root| Replay::of(state, &parts.cluster_id, row, *root)).collect(),
    });
    Seen {
        index,
        attempt: open,
        attempts: state.attempts,
        attempts_failed: state.attempts.saturating_sub(state.ceremonies.keys().copied().max().unwrap_or(0)),
        roots: state.roots.iter().filter_map(lacking).collect(),
        missing_roots: missing_roots(state),
        new_epoch: epoch_of_new_roots(state),
        beacon: view::latest_beacon(state).map(|(pos, row)| (pos, row.value)),
        everyone: view::signers(state).map(|signers| signers.keys.into_keys().collect()).unwrap_or_default(),
        t: state.genesis.t,
        ca: state.genesis.ca_algorithm,
        seats: state.seats.iter().map(|(seat, row)| (row.index, *seat)).collect(),
    }
}
