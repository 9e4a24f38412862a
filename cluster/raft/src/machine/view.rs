//! What others read from the state: signers, beacons, formation.
//!
//! Owns: derived views. Never: changes anything.

use std::collections::BTreeMap;

use dstack_protocol::genesis::Genesis;
use dstack_protocol::state::{BeaconRow, State};
use dstack_protocol::{Generation, NodeIndex, RootTag, Seat};

/// The signers in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signers {
    /// Members version.
    pub version: u64,
    /// Node keys by index.
    pub keys: BTreeMap<NodeIndex, [u8; 32]>,
    /// Signatures that make a certificate.
    pub quorum: usize,
}

/// How far a cluster is on its way from an empty log to serving.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Formation {
    /// No genesis applied.
    AwaitingGenesis,
    /// Not every seat is filled.
    AwaitingAdmissions,
    /// No beacon yet.
    AwaitingBeacon,
    /// Root `prf` is not in force.
    AwaitingRoot,
    /// Everything is there. A single node without roots is formed with its first beacon.
    Formed,
}

/// RFC 8032 strict verification with a key that is neither weak nor malformed.
pub(super) fn verifies(key: &[u8; 32], message: &[u8], sig: &[u8; 64]) -> bool {
    ed25519_dalek::VerifyingKey::from_bytes(key)
        .is_ok_and(|key| !key.is_weak() && key.verify_strict(message, &ed25519_dalek::Signature::from_bytes(sig)).is_ok())
}

/// The signers in force; `None` before every seat was filled once.
#[must_use]
pub fn signers(state: &State) -> Option<Signers> {
    let members = state.members.get(&state.members_version)?;
    Some(Signers {
        version: state.members_version,
        keys: members.signers.clone(),
        quorum: Genesis::certificate_quorum(members.signers.len(), state.genesis.f),
    })
}

/// The latest beacon.
#[must_use]
pub fn latest_beacon(state: &State) -> Option<(u64, &BeaconRow)> {
    let pos = state.latest_beacon?;
    state.beacons.get(&pos).map(|row| (pos, row))
}

/// Readings that a beacon needs.
#[must_use]
pub fn beacon_threshold(state: &State) -> usize {
    if state.genesis.n == 1 { 1 } else { usize::from(state.genesis.t) }
}

/// Keys whose monotonic readings end a timelock: holders' of the newest root, before the first root voters'.
#[must_use]
pub fn clock_keys(state: &State) -> BTreeMap<NodeIndex, [u8; 32]> {
    let all = signers(state).map(|signers| signers.keys).unwrap_or_default();
    match state.roots.get(&(Generation(0), RootTag::Prf)) {
        None => all,
        Some(root) => all.into_iter().filter(|(index, _)| root.vks.contains_key(index)).collect(),
    }
}

/// The seat that holds `index`, if any.
#[must_use]
pub fn seat_of(state: &State, index: NodeIndex) -> Option<Seat> {
    state.seats.iter().find(|(_, row)| row.index == index).map(|(seat, _)| *seat)
}

/// How far the cluster is.
#[must_use]
pub fn formation(state: Option<&State>) -> Formation {
    let Some(state) = state else { return Formation::AwaitingGenesis };
    if state.members.is_empty() {
        return Formation::AwaitingAdmissions;
    }
    if state.latest_beacon.is_none() {
        return Formation::AwaitingBeacon;
    }
    if state.genesis.has_roots() && !state.roots.contains_key(&(Generation(0), RootTag::Prf)) {
        return Formation::AwaitingRoot;
    }
    Formation::Formed
}
