//! What only the leader can do: append a proposal, confirm a read index.
//! Owns: these two steps on this node, each bounded in time. Never: looks for the leader elsewhere; [`crate::handle`] does.
//! Source: dependencies.md §7 pitfalls 8 and 11 (a missing leader is normal and passes).

use std::time::Duration;

use openraft::{
    Raft, ReadPolicy,
    errors::{ClientWriteError, LinearizableReadError, RaftError},
    storage::RaftStateMachine,
};

use crate::types::{Command, TypeConfig, seat_of};
use dstack_protocol::Seat;

/// How a proposal on this node ended.
pub(crate) enum Proposal {
    Applied {
        index: u64,
        term: u64,
        response: Vec<u8>,
    },
    /// Nothing was appended.
    NotLeader(Option<Seat>),
    /// Appended, perhaps; whether it is committed will show.
    Unknown,
    Stopped(String),
}

pub(crate) async fn propose<SM: RaftStateMachine<TypeConfig>>(
    raft: &Raft<TypeConfig, SM>,
    command: Vec<u8>,
    patience: Duration,
) -> Proposal {
    let Ok(result) = tokio::time::timeout(patience, raft.client_write(Command(command))).await else {
        return Proposal::Unknown;
    };
    match result {
        Ok(done) => Proposal::Applied { index: done.log_id.index, term: done.log_id.leader_id.term, response: done.data.0 },
        Err(RaftError::APIError(ClientWriteError::ForwardToLeader(forward))) => Proposal::NotLeader(forward.leader_id.and_then(seat_of)),
        Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_))) => Proposal::Unknown,
        // Neither can come from a command; both say that nothing was appended.
        Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(_) | ClientWriteError::PreconditionFailed(_))) => {
            Proposal::NotLeader(None)
        }
        Err(RaftError::Fatal(fatal)) => Proposal::Stopped(fatal.to_string()),
    }
}

/// How a request for a read index ended.
pub(crate) enum ReadIndex {
    Index(u64),
    NotLeader(Option<Seat>),
    NoQuorum,
    Stopped(String),
}

pub(crate) async fn read_index<SM: RaftStateMachine<TypeConfig>>(raft: &Raft<TypeConfig, SM>, patience: Duration) -> ReadIndex {
    // The quorum round, not the lease: a lease trusts clocks that the host can bend.
    let Ok(result) = tokio::time::timeout(patience, raft.get_read_linearizer(ReadPolicy::ReadIndex)).await else {
        return ReadIndex::NoQuorum;
    };
    match result {
        Ok(linearizer) => ReadIndex::Index(linearizer.read_log_id().index()),
        Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward))) => {
            ReadIndex::NotLeader(forward.leader_id.and_then(seat_of))
        }
        Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_))) => ReadIndex::NoQuorum,
        Err(RaftError::Fatal(fatal)) => ReadIndex::Stopped(fatal.to_string()),
    }
}
