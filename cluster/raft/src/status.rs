//! What a node's Raft looks like at one moment.
//! Owns: the figures for operators, metrics and the recovery protocol. Never: decides anything.

use std::collections::BTreeSet;

use dstack_protocol::Seat;
use openraft::{RaftMetrics, ServerState, errors::Fatal};

use crate::{
    guard::{Fork, Gate},
    types::{TypeConfig, seat_of},
};

/// Who leads, by this node's knowledge.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Leadership {
    /// Current term.
    pub term: u64,
    /// The leader, if known.
    pub leader: Option<Seat>,
    /// Whether this node is it.
    pub is_leader: bool,
}

/// Whether a node votes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Voting {
    /// It lost its votes and asks the others where it must have been.
    AwaitingConfirmation,
    /// The others said where it must have been; it has not come there again.
    CatchingUp {
        /// The entry that it must have applied.
        until_index: u64,
    },
    /// It votes.
    Votes,
}

/// A node's Raft at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RaftStatus {
    /// This node.
    pub seat: Seat,
    /// Term and leader.
    pub leadership: Leadership,
    /// Highest term in which this node voted or follows.
    pub voted_term: u64,
    /// Last entry of the log.
    pub last_index: Option<u64>,
    /// Last entry known to be committed.
    pub committed_index: Option<u64>,
    /// Last entry applied.
    pub applied_index: Option<u64>,
    /// Last entry of the newest stored snapshot.
    pub snapshot_index: Option<u64>,
    /// Last entry removed from the log.
    pub purged_index: Option<u64>,
    /// Voters of the configuration in force.
    pub voters: BTreeSet<Seat>,
    /// Members that do not vote.
    pub learners: BTreeSet<Seat>,
    /// Whether it votes.
    pub voting: Voting,
    /// Whether Raft runs; the reason if it stopped by an error.
    pub running: Result<(), String>,
    /// Set when a leader contradicted an applied entry.
    pub fork: Option<Fork>,
}

/// Why Raft stopped by itself. The process ends and may start again, unless a variant says otherwise.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum Halt {
    /// There was no space for what had to be durable; nothing of it was acknowledged. The operator's to fix: free space.
    #[error("no space for what must be durable: {detail}")]
    DiskFull {
        /// What could not be written.
        detail: String,
    },
    /// The store failed otherwise: after a failed flush nobody knows what the disk holds until it is read anew.
    #[error("the store failed: {detail}")]
    Store {
        /// From the store.
        detail: String,
    },
    /// Our fault.
    #[error("raft panicked")]
    Panicked,
}

/// `None` while Raft runs, and after it was told to stop.
pub(crate) fn halt(metrics: &RaftMetrics<TypeConfig>, disk_was_full: bool) -> Option<Halt> {
    match &metrics.running_state {
        Ok(()) | Err(Fatal::Stopped) => None,
        Err(Fatal::Panicked) => Some(Halt::Panicked),
        Err(Fatal::StorageError(error)) if disk_was_full => Some(Halt::DiskFull { detail: error.to_string() }),
        Err(Fatal::StorageError(error)) => Some(Halt::Store { detail: error.to_string() }),
    }
}

pub(crate) fn leadership(metrics: &RaftMetrics<TypeConfig>) -> Leadership {
    Leadership {
        term: metrics.current_term,
        leader: metrics.current_leader.and_then(seat_of),
        is_leader: metrics.state == ServerState::Leader,
    }
}

pub(crate) fn status(seat: Seat, metrics: &RaftMetrics<TypeConfig>, gate: &Gate) -> RaftStatus {
    let membership = metrics.membership_config.membership();
    RaftStatus {
        seat,
        leadership: leadership(metrics),
        voted_term: metrics.vote.leader_id.term,
        last_index: metrics.last_log_index,
        committed_index: metrics.local_committed.map(|log_id| log_id.index),
        applied_index: metrics.last_applied.map(|log_id| log_id.index),
        snapshot_index: metrics.snapshot.map(|log_id| log_id.index),
        purged_index: metrics.purged.map(|log_id| log_id.index),
        voters: membership.voter_ids().filter_map(seat_of).collect(),
        learners: membership.learner_ids().filter_map(seat_of).collect(),
        voting: gate.voting(metrics.last_applied.map_or(0, |log_id| log_id.index)),
        running: metrics.running_state.clone().map_err(|fatal| fatal.to_string()),
        fork: gate.fork(),
    }
}
