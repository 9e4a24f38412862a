//! What a lying member does, for tests of nodes that must bear it: forged appends, and silence towards chosen seats.
//! Owns: the lies of one process. Never: part of a build without the feature `insecure-rogue`, which release builds refuse.
//! Source: architecture.md §2 (a self-declared leader), threshold.md §10, 5.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
};

use dstack_protocol::Seat;
use openraft::entry::RaftEntry as _;

use crate::{
    rpc::{self, AppendRequest, RpcFormatError},
    types::{Command, Entry, LeaderId, LogId, Payload, Vote, node_id},
};

static MUTED: Mutex<BTreeSet<Seat>> = Mutex::new(BTreeSet::new());

/// Whether this process neither speaks Raft to that seat nor listens to it.
pub fn is_muted(seat: Seat) -> bool {
    MUTED.lock().unwrap_or_else(PoisonError::into_inner).contains(&seat)
}

/// Begins or ends the silence.
pub fn mute(seat: Seat, muted: bool) {
    let mut seats = MUTED.lock().unwrap_or_else(PoisonError::into_inner);
    if muted {
        seats.insert(seat)
    } else {
        seats.remove(&seat)
    };
}

/// A log position as a liar names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At {
    /// Term of the entry.
    pub term: u64,
    /// Seat of the leader that wrote it.
    pub leader: Seat,
    /// Its index.
    pub index: u64,
}

impl At {
    fn log_id(self) -> LogId {
        LogId::new(LeaderId { term: self.term, node_id: node_id(self.leader) }, self.index)
    }
}

/// An append of a leader that nobody elected: `command` at the position after `prev`, already committed by its word.
///
/// # Errors
/// [`RpcFormatError`] for a position that has no layout.
pub fn forged_append(liar: Seat, term: u64, prev: At, command: Vec<u8>) -> Result<Vec<u8>, RpcFormatError> {
    let leader_id = LeaderId { term, node_id: node_id(liar) };
    let log_id = LogId::new(leader_id, prev.index.saturating_add(1));
    rpc::encode_append(&AppendRequest {
        vote: Vote { leader_id, committed: true },
        prev_log_id: Some(prev.log_id()),
        entries: vec![Entry::new(log_id, Payload::Normal(Command(command)))],
        leader_commit: Some(log_id),
    })
}
