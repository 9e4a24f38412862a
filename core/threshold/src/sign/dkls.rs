//! DKLs23 behind [`ThresholdEcdsa`]: the engine is `dkls23-core`, generic over secp256k1 and P-256.
//!
//! Owns: import of shares of our own key generation, the pairwise setup without dealer, signing runs, secrets of pairs at rest.
//! Never: uses the engine's own key generation, refresh or key import; no call here knows more than one share.
//! Source: Doerner, Kondi, Lee, shelat, "Threshold ECDSA in Three Rounds" (DKLs23), Protocol 3.6; threshold.md §5.1; ADR 0017.
//!
//! The engine evaluates polynomials at party numbers of one byte. Ours are node indices of two bytes that are never reused, so a
//! holder's party number is its place among the holders, and each run weighs the share such that the engine's Lagrange coefficient
//! (over places) times the weighed share is our coefficient (over indices) times the share.
//!
//! What wiping does not cover: values inside the engine. It frees buffers with masks of a run, and with scalars of base OTs, unwiped;
//! ADR 0017 lists them.

mod pairwise;
mod setup;
mod signing;
#[cfg(test)]
mod tests;

use std::marker::PhantomData;
use std::sync::Arc;

use dkls23_core::protocols::PartyIndex;
use dstack_protocol::NodeIndex;
use dstack_protocol::limits::NODES_MAX;
use dstack_secret::Locked;

use crate::sign::ecdsa::{EcdsaError, EcdsaGroup, Outgoing, ThresholdEcdsa};
use crate::sign::{Holders, HoldersError, RootShare, Run};

pub use pairwise::Pairwise;
pub use setup::Setup;
pub use signing::Signing;

/// The engine over one group.
#[derive(Debug, Clone, Copy)]
pub struct Dkls23<G>(PhantomData<G>);

impl<G: EcdsaGroup> ThresholdEcdsa for Dkls23<G> {
    type Group = G;
    type Setup = Setup<G>;
    type Pairwise = Pairwise<G>;
    type Signing = Signing<G>;

    fn import_share(index: NodeIndex, holders: Arc<Holders<G>>, share: Locked<32>) -> Result<RootShare<G>, HoldersError> {
        RootShare::new(index, holders, share)
    }

    fn setup(inst: [u8; 32], index: NodeIndex, members: &[NodeIndex]) -> Result<(Setup<G>, Vec<Outgoing>), EcdsaError> {
        Setup::begin(inst, index, members)
    }

    fn sign(share: &RootShare<G>, pairwise: &Pairwise<G>, run: &Run, digest: [u8; 32]) -> Result<(Signing<G>, Vec<Outgoing>), EcdsaError> {
        Signing::begin(share, pairwise, run, digest)
    }
}

/// Members of a setup: 2 to 64 indices of nodes, ascending.
fn check_members(members: &[NodeIndex]) -> Result<(), EcdsaError> {
    let ascending = members.windows(2).all(|pair| pair.first() < pair.last());
    let indices = members.iter().all(|i| (1..0x8000).contains(&i.0));
    if ascending && indices && (2..=NODES_MAX).contains(&members.len()) { Ok(()) } else { Err(EcdsaError::Members) }
}

/// The engine's number of a member: its place, from 1.
fn party(members: &[NodeIndex], index: NodeIndex) -> Result<PartyIndex, EcdsaError> {
    let place = members.iter().position(|i| *i == index).ok_or(EcdsaError::NotAMember(index))?;
    let number = u8::try_from(place.saturating_add(1)).map_err(|_| EcdsaError::Members)?;
    PartyIndex::new(number).map_err(|_| EcdsaError::Members)
}

/// The member of a number of the engine.
fn member(members: &[NodeIndex], party: PartyIndex) -> Option<NodeIndex> {
    members.get(usize::from(party.as_u8()).checked_sub(1)?).copied()
}
