//! Consensus: openraft over our own log format, network and state machine contract.
//!
//! Owns: the Raft node of a seat, its RPCs and what is checked of them, snapshots at checkpoint positions, linearizable reads.
//! Never: shares, sockets, a rule of the KMS outside [`machine`](crate::contract::Machine), or an openraft type in its public face.
//! Source: architecture.md §2 and §7, threshold.md §2.6, dependencies.md §3.1, §6, §7.
//!
//! - [`contract`]: what Raft asks of the machine, the audit store and observers.
//! - [`handle`], [`error`], [`status`], [`config`]: what the node uses.
//! - [`transport`], [`guard`]: what peers may ask, and what is refused.
//! - [`mod@format`], [`rpc`]: bytes on disk and between nodes.
//! - [`peers`]: RPCs over attested connections; [`audit_log`]: leaves in segment files.

#![forbid(unsafe_code)]

mod apply;
pub mod audit_log;
pub mod config;
mod confirm;
pub mod contract;
mod disk;
pub mod error;
mod follow;
pub mod format;
#[doc(hidden)]
pub mod fuzzing;
pub mod guard;
pub mod handle;
mod lead;
pub mod machine;
pub mod metrics;
mod network;
pub mod peers;
mod receive;
#[cfg(feature = "insecure-rogue")]
pub mod rogue;
pub mod rpc;
mod server;
pub mod status;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod toy;
pub mod transport;
mod types;

pub use apply::StateBroken;
pub use config::RaftConfig;
pub use confirm::Confirmation;
pub use contract::{Applied, AppliedAt, AppliedObserver, Leaf, LeafSink, Machine, NoObserver};
pub use error::{MembersError, ProposeError, ReadError, StartError, Stopped};
pub use guard::{Abstention, Fork, Refused};
pub use handle::{AppliedWatch, Committed, Parts, RaftHandle};
pub use status::{Halt, Leadership, RaftStatus, Voting};
pub use transport::{RpcKind, Transport, TransportError};
