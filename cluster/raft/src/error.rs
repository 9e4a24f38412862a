//! Errors of the handle: starting, proposing, reading, changing members.
//! Owns: what a caller can decide on. Never: an openraft type.
//! Source: style.md §4 (a timed-out write is unknown, not failed).

use dstack_protocol::limits::COMMAND_BYTES_MAX;

use crate::{apply::StateBroken, config::ConfigError, guard::Fork};

/// Raft cannot start on this node.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum StartError {
    /// The configuration cannot work. The operator's to fix.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The stored log, snapshot or vote cannot be used; the text says how to rejoin.
    #[error("raft cannot start from its store: {detail}")]
    Store {
        /// From the store or from the machine.
        detail: String,
    },
}

/// A proposal was not applied, or nobody knows.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum ProposeError {
    /// Longer than any command. The caller's fault.
    #[error("command of {got_bytes} bytes, the limit is {COMMAND_BYTES_MAX}")]
    TooLong {
        /// Its length.
        got_bytes: usize,
    },
    /// No leader was found in time; nothing was appended. Retry later.
    #[error("no leader within {waited_ms} ms")]
    NoLeader {
        /// How long was tried.
        waited_ms: u64,
    },
    /// The command may be applied, now or later. Retry with the same idempotency key, or look.
    #[error("outcome unknown after {waited_ms} ms: {detail}")]
    Unknown {
        /// How long was waited.
        waited_ms: u64,
        /// What happened.
        detail: String,
    },
    /// The leader refused the call itself. Not to be retried.
    #[error("leader refused the proposal: {code}: {detail}")]
    Refused {
        /// Stable code.
        code: String,
        /// For people.
        detail: String,
    },
    /// Raft on this node has stopped.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// A linearizable read cannot be made now. All pass or say that the node stopped.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum ReadError {
    /// No leader with a quorum was found in time.
    #[error("no leader with a quorum within {waited_ms} ms")]
    NoLeader {
        /// How long was tried.
        waited_ms: u64,
    },
    /// The leader answered, but this node did not catch up in time.
    #[error("index {index} not applied within {waited_ms} ms")]
    Behind {
        /// What must be applied first.
        index: u64,
        /// How long was waited.
        waited_ms: u64,
    },
    /// Raft on this node has stopped.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// Raft on this node has stopped for good; the process restarts, or a human looks.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum Stopped {
    /// A leader contradicted an applied entry. A human must look.
    #[error(transparent)]
    Fork(#[from] Fork),
    /// Shut down, or stopped by an error of its store.
    #[error("raft has stopped: {detail}")]
    Raft {
        /// Why.
        detail: String,
    },
    /// The state cannot be trusted any more.
    #[error(transparent)]
    State(#[from] StateBroken),
}

/// Members cannot be changed.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum MembersError {
    /// Seats that may not vote: not admitted in the applied state.
    #[error("seats without admission: {seats:?}")]
    NotAdmitted {
        /// Those seats.
        seats: Vec<u64>,
    },
    /// The cluster exists already; nothing to do.
    #[error("the cluster is already formed")]
    AlreadyFormed,
    /// This node is not among the first members.
    #[error("this node is not among the members it should form a cluster of")]
    NotAmong,
    /// Only the leader can; ask that seat, if one is named.
    #[error("not the leader, which is {leader:?}")]
    NotLeader {
        /// The leader, if known.
        leader: Option<u16>,
    },
    /// Refused by the state of the cluster: a change is under way, or the seat is no learner yet. Retry later.
    #[error("change of members refused: {detail}")]
    Refused {
        /// Why.
        detail: String,
    },
    /// Not finished in time; it may still happen.
    #[error("change of members not finished within {waited_ms} ms")]
    Unknown {
        /// How long was waited.
        waited_ms: u64,
    },
    /// Raft on this node has stopped.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}
