//! How far this node is on its way into the cluster, and what it waits for. Owns: reading that from the applied state, the words for
//! operators. Never: changes it. Source: threshold.md §3 "Admit"; ADR 0026.

use std::collections::BTreeSet;

use dstack_actors::ports::{Log, read};
use dstack_certificates::PublicKey;
use dstack_protocol::genesis::Genesis;
use dstack_protocol::state::State;
use dstack_protocol::{RootTag, Seat};

use super::super::GENERATION;

/// Public keys of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Keys {
    /// SubjectPublicKeyInfo of the root CA.
    pub(super) ca_spki: Vec<u8>,
    /// The identity, SEC1 compressed.
    pub(super) k256: Vec<u8>,
}

/// See the module text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Progress {
    /// Nothing of the log has arrived.
    NoLog,
    /// The cluster is not formed: these seats have not been admitted.
    AwaitingSeats(BTreeSet<Seat>),
    /// The cluster is formed and another key, or none, is in this node's seat.
    AwaitingVouches {
        /// Vouches for this node's Admit; `None` before it is posted.
        vouches: Option<usize>,
        /// How many there must be.
        needed: usize,
    },
    /// In its seat, and the roots are not in force yet.
    AwaitingRoots,
    /// In its seat, and the roots are in force.
    Joined {
        /// Their public keys.
        keys: Keys,
        /// Whether it was there when they were made.
        at_genesis: bool,
    },
}

impl Progress {
    /// By the applied state.
    pub(super) fn of(log: &dyn Log, seat: Seat, node_key: &[u8; 32]) -> Self {
        read(log, |state| Self::in_state(state, seat, node_key)).unwrap_or(Self::NoLog)
    }

    fn in_state(state: &State, seat: Seat, node_key: &[u8; 32]) -> Self {
        let own = state.seats.get(&seat).filter(|row| row.node_key == *node_key);
        match own {
            _ if state.members.is_empty() => {
                let all = state.genesis.seats.iter().map(|grant| grant.seat);
                Self::AwaitingSeats(all.filter(|seat| !state.seats.contains_key(seat)).collect())
            }
            None => {
                let admit = state.admits.get(&seat);
                let needed = Genesis::certificate_quorum(state.seats.len(), state.genesis.f);
                Self::AwaitingVouches { vouches: admit.map(|row| row.vouches.len()), needed }
            }
            Some(row) => match Keys::of(state) {
                None => Self::AwaitingRoots,
                Some(keys) => Self::Joined { keys, at_genesis: row.index.0 == seat.0 },
            },
        }
    }

    /// Whether the cluster was formed before this node came: then nothing is left to bootstrap.
    pub(super) fn is_late(&self) -> bool {
        match self {
            Self::AwaitingVouches { .. } => true,
            Self::Joined { at_genesis, .. } => !at_genesis,
            Self::NoLog | Self::AwaitingSeats(_) | Self::AwaitingRoots => false,
        }
    }

    /// What it waits for, for operators.
    pub(super) fn words(&self) -> String {
        match self {
            Self::NoLog => {
                "no node of the cluster has let this one in: start the others; they refuse a node whose evidence, measurement or \
                            machine they do not know"
                    .to_owned()
            }
            Self::AwaitingSeats(seats) if seats.is_empty() => "the seats are filled, the cluster is about to form".to_owned(),
            Self::AwaitingSeats(seats) => {
                let seats: Vec<String> = seats.iter().map(Seat::to_string).collect();
                format!(
                    "the cluster forms when all its nodes take part: start the nodes of these seats and call Bootstrap there too: {}",
                    seats.join(", ")
                )
            }
            Self::AwaitingVouches { vouches: None, .. } => "this node has the log and has not asked for its seat yet".to_owned(),
            Self::AwaitingVouches { vouches: Some(vouches), needed } => {
                format!("{vouches} of {needed} nodes have vouched for this one; the logs of the others say why they do not")
            }
            Self::AwaitingRoots => "the nodes are making the roots".to_owned(),
            Self::Joined { .. } => "this node is in its seat".to_owned(),
        }
    }
}

impl Keys {
    fn of(state: &State) -> Option<Self> {
        let root = |tag| state.roots.get(&(GENERATION, tag)).map(|root| root.public_key.0.clone());
        let ca = PublicKey::root(state.genesis.ca_algorithm, &root(RootTag::Ca)?).ok()?;
        Some(Self { ca_spki: ca.spki(), k256: root(RootTag::Id)? })
    }
}
