//! How one node's Raft reaches another's.
//! Owns: the kinds of RPC, their size limits, the trait and its errors. Never: sockets; those are in [`crate::peers`] and in tests.
//! Source: architecture.md §2 (peers are authenticated), dependencies.md §7 pitfall 7 (every call is bounded in time).

use std::{fmt, future::Future, time::Duration};

use dstack_protocol::{
    Seat,
    limits::{COMMAND_BYTES_MAX, FRAME_BYTES_MAX},
};

use crate::{format::ENTRY_OVERHEAD_BYTES, rpc::APPEND_ENTRIES_MAX};

/// What a peer may ask of a node's Raft.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RpcKind {
    /// Log entries from the leader; empty ones are heartbeats.
    Append,
    /// A candidate's request for a vote.
    Vote,
    /// Whether a vote would be granted; changes nothing.
    PreVote,
    /// One chunk of a snapshot from the leader.
    Snapshot,
    /// The leader asks the receiver to take over.
    TransferLeader,
    /// A command for the leader to propose.
    Propose,
    /// The log index that a linearizable read must wait for.
    ReadIndex,
    /// Where the receiver's log and votes are, for a node that lost its own.
    Position,
}

/// An append takes no further entry once it holds this many bytes.
pub const APPEND_BYTES_TARGET: usize = 1 << 20;
/// Bytes of snapshot in one chunk.
pub const SNAPSHOT_CHUNK_BYTES: usize = 1 << 20;
/// Longest snapshot that a node takes from a peer.
pub const SNAPSHOT_BYTES_MAX: usize = 256 << 20;
/// Longest machine response that travels back to a forwarding node.
pub const RESPONSE_BYTES_MAX: usize = 1 << 20;

/// Room for what surrounds entries, chunks, commands and responses.
const ENVELOPE_BYTES: usize = 64 << 10;
const SMALL_BYTES: usize = 4 << 10;

const _: () =
    assert!(APPEND_BYTES_TARGET + COMMAND_BYTES_MAX + APPEND_ENTRIES_MAX * (ENTRY_OVERHEAD_BYTES + 8) + ENVELOPE_BYTES <= FRAME_BYTES_MAX);

impl RpcKind {
    /// All kinds.
    pub const ALL: [Self; 8] =
        [Self::Append, Self::Vote, Self::PreVote, Self::Snapshot, Self::TransferLeader, Self::Propose, Self::ReadIndex, Self::Position];

    /// Its name on the wire: the last segment of the request path.
    pub fn name(self) -> &'static str {
        match self {
            Self::Append => "append",
            Self::Vote => "vote",
            Self::PreVote => "pre-vote",
            Self::Snapshot => "snapshot",
            Self::TransferLeader => "transfer-leader",
            Self::Propose => "propose",
            Self::ReadIndex => "read-index",
            Self::Position => "position",
        }
    }

    /// The kind of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Longest request of this kind; a server reads no more than this.
    pub fn request_bytes_max(self) -> usize {
        match self {
            Self::Append => FRAME_BYTES_MAX,
            Self::Snapshot => SNAPSHOT_CHUNK_BYTES + ENVELOPE_BYTES,
            Self::Propose => COMMAND_BYTES_MAX + ENVELOPE_BYTES,
            Self::Vote | Self::PreVote | Self::TransferLeader | Self::ReadIndex | Self::Position => SMALL_BYTES,
        }
    }

    /// Longest response of this kind; a client reads no more than this.
    pub fn response_bytes_max(self) -> usize {
        match self {
            Self::Propose => RESPONSE_BYTES_MAX + ENVELOPE_BYTES,
            Self::Append | Self::Snapshot | Self::Vote | Self::PreVote | Self::TransferLeader | Self::ReadIndex | Self::Position => {
                SMALL_BYTES
            }
        }
    }
}

impl fmt::Display for RpcKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a call gave no answer.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum TransportError {
    /// No connection: the peer has seen nothing of this call. Retry later.
    #[error("seat {to} is unreachable: {detail}")]
    Unreachable {
        /// The peer.
        to: u16,
        /// For people.
        detail: String,
    },
    /// No answer in time; the peer may or may not have acted.
    #[error("no answer from seat {to} within {timeout_ms} ms")]
    Timeout {
        /// The peer.
        to: u16,
        /// The bound that passed.
        timeout_ms: u64,
    },
    /// The connection broke before the answer; the peer may or may not have acted.
    #[error("connection to seat {to} broke: {detail}")]
    Broken {
        /// The peer.
        to: u16,
        /// For people.
        detail: String,
    },
    /// The peer refused the call and has not acted.
    #[error("seat {to} refused: {code}: {detail}")]
    Refused {
        /// The peer.
        to: u16,
        /// The refusal's stable code, see [`crate::guard::Refused::code`].
        code: String,
        /// For people.
        detail: String,
    },
}

/// A way to call the Raft of another seat. The implementation authenticates the peer as that seat.
pub trait Transport: Send + Sync + 'static {
    /// Sends `body` to `to` and waits at most `timeout` for the answer.
    fn call(
        &self,
        to: Seat,
        kind: RpcKind,
        body: Vec<u8>,
        timeout: Duration,
    ) -> impl Future<Output = Result<Vec<u8>, TransportError>> + Send;
}
