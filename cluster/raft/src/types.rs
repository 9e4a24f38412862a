//! The openraft type configuration and its aliases.
//! Owns: which concrete types openraft runs with here. Never: bytes on disk or on a wire; those are [`crate::format`] and
//! [`crate::rpc`], so that no alpha release owns a stored byte.
//! Source: dependencies.md §0 (openraft row), §7.

use std::fmt;

use dstack_protocol::Seat;
use serde::{Deserialize, Serialize};

/// A command as proposed: opaque bytes, read only by the machine.
///
/// The serde derives exist because openraft's trait bounds ask for them; nothing is stored or sent through them.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command(pub Vec<u8>);

/// The machine's answer to one command, given to its proposer.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Response(pub Vec<u8>);

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "command of {} bytes", self.0.len())
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl fmt::Debug for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "response of {} bytes", self.0.len())
    }
}

impl fmt::Display for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

openraft::declare_raft_types!(
    /// Node ids are seats; addresses are none of Raft's business, so a node carries nothing.
    pub TypeConfig:
        D = Command,
        R = Response,
        NodeId = u64,
        Node = (),
);

pub(crate) type LeaderId = openraft::type_config::alias::LeaderIdOf<TypeConfig>;
pub(crate) type LogId = openraft::type_config::alias::LogIdOf<TypeConfig>;
pub(crate) type Vote = openraft::type_config::alias::VoteOf<TypeConfig>;
pub(crate) type Entry = openraft::type_config::alias::EntryOf<TypeConfig>;
pub(crate) type Payload = openraft::type_config::alias::EntryPayloadOf<TypeConfig>;
pub(crate) type Membership = openraft::Membership<u64, ()>;
pub(crate) type StoredMembership = openraft::type_config::alias::StoredMembershipOf<TypeConfig>;
pub(crate) type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<TypeConfig>;

/// The seat that a Raft node id names; `None` when it names none (only hostile or damaged bytes do that).
pub(crate) fn seat_of(node_id: u64) -> Option<Seat> {
    u16::try_from(node_id).ok().map(Seat)
}

/// The Raft node id of a seat.
pub(crate) fn node_id(seat: Seat) -> u64 {
    u64::from(seat.0)
}
