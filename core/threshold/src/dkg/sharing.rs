//! What all deals together commit to: the public key, every holder's verification key, the transcript.
//!
//! Source: threshold.md §3 steps 3 (transcript) and 5.

use std::collections::BTreeMap;

use dstack_protocol::ceremony::ReadyBody;
use dstack_protocol::codec::{Writer, sha256};
use dstack_protocol::{DecodeError, NodeIndex, Wire as _};

use crate::dkg::deal::CheckedDeal;
use crate::dkg::instance::Instance;
use crate::group::Group;
use crate::shamir::Commitment;

/// What is wrong with a Ready. Its author signed it.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadyFault {
    /// The body has not the layout of a Ready.
    #[error("ready: {0}")]
    Malformed(#[from] DecodeError),
    /// The author is no holder.
    #[error("node {0} is no holder")]
    NotAHolder(NodeIndex),
    /// The author saw other deals.
    #[error("transcript differs")]
    Transcript,
    /// The verification key is not the one that the deals give.
    #[error("verification key differs")]
    VerificationKey,
    /// A pairwise setup is named where there is none, or none where there must be one.
    #[error("the digest of the pairwise setup is zero if and only if this root has none")]
    Setup,
}

/// The public result of a run, computed alike by every node.
#[derive(Debug, Clone, PartialEq)]
pub struct Sharing<G: Group> {
    threshold: u16,
    has_pairwise_setup: bool,
    transcript: [u8; 32],
    public_key: G::Element,
    verification_keys: BTreeMap<NodeIndex, G::Element>,
}

impl<G: Group> Sharing<G> {
    /// `PK = Σ_i C_i0`, `VK_j = Σ_k j^k·(Σ_i C_ik)`. `None` if one of them is the identity, which no honest run gives.
    pub(super) fn compute(instance: &Instance<G>, deals: &BTreeMap<NodeIndex, CheckedDeal<G>>) -> Option<Self> {
        let total = Commitment::sum(deals.values().map(|deal| &deal.commitment));
        let verification_keys: BTreeMap<NodeIndex, G::Element> = instance.members().map(|j| (j, total.eval(j))).collect();
        let public_key = total.constant();
        if public_key == G::identity() || verification_keys.values().any(|vk| *vk == G::identity()) {
            return None;
        }
        // transcript = SHA-256("DKMS-V1-TRANS" ‖ inst(32) ‖ count(2) ‖ { i(2) ‖ bd(body_i) }* ascending)
        let mut w = Writer::labelled("DKMS-V1-TRANS");
        w.raw(&instance.inst()).count2(deals.len());
        for (dealer, deal) in deals {
            w.u16(dealer.0).raw(&deal.digest);
        }
        Some(Self {
            threshold: instance.threshold(),
            has_pairwise_setup: instance.has_pairwise_setup(),
            transcript: sha256(&[&w.into_bytes()]),
            public_key,
            verification_keys,
        })
    }

    /// Threshold of the sharing.
    #[must_use]
    pub fn threshold(&self) -> u16 {
        self.threshold
    }

    /// Digest over all deals; the genesis certificate names it.
    #[must_use]
    pub fn transcript(&self) -> [u8; 32] {
        self.transcript
    }

    /// The root's public key `PK`.
    #[must_use]
    pub fn public_key(&self) -> Vec<u8> {
        G::encode(&self.public_key).as_ref().to_vec()
    }

    /// `VK_j` of every holder, ascending.
    #[must_use]
    pub fn verification_keys(&self) -> Vec<(NodeIndex, Vec<u8>)> {
        self.verification_keys.iter().map(|(j, vk)| (*j, G::encode(vk).as_ref().to_vec())).collect()
    }

    /// `PK` and every `VK_j`, decoded.
    pub(crate) fn elements(&self) -> (&G::Element, &BTreeMap<NodeIndex, G::Element>) {
        (&self.public_key, &self.verification_keys)
    }

    pub(super) fn verification_key(&self, holder: NodeIndex) -> Option<&G::Element> {
        self.verification_keys.get(&holder)
    }

    /// The Ready of `holder`; where the root has a pairwise setup, its digest is still to be filled in.
    #[must_use]
    pub fn ready_body(&self, holder: NodeIndex) -> Option<ReadyBody> {
        let vk = self.verification_keys.get(&holder)?;
        Some(ReadyBody { transcript: self.transcript, vk: G::encode(vk).as_ref().to_vec(), setup: [0; 32] })
    }

    /// Checks the body of a Ready of `holder`: equal transcript, `VK_j` as computed, a setup where there is one. Gives the setup's digest.
    ///
    /// # Errors
    /// [`ReadyFault`].
    pub fn check_ready(&self, holder: NodeIndex, body: &[u8]) -> Result<[u8; 32], ReadyFault> {
        let ready = ReadyBody::decode(body)?;
        let expected = self.ready_body(holder).ok_or(ReadyFault::NotAHolder(holder))?;
        if ready.transcript != expected.transcript {
            return Err(ReadyFault::Transcript);
        }
        if ready.vk != expected.vk {
            return Err(ReadyFault::VerificationKey);
        }
        if (ready.setup != [0; 32]) != self.has_pairwise_setup {
            return Err(ReadyFault::Setup);
        }
        Ok(ready.setup)
    }
}
