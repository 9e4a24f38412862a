//! A dealer's contribution: commitments, proof of possession, encrypted sub-shares.
//!
//! Owns: making a Deal and checking everything in it that is public. Source: threshold.md §3 steps 1 and 2.

use std::collections::BTreeMap;

use curve25519_dalek::ristretto::RistrettoPoint;
use dstack_protocol::ceremony::{DealBody, DealtShare, body_digest};
use dstack_protocol::codec::sha256;
use dstack_protocol::{DecodeError, NodeIndex};

use crate::dkg::encryption::{Envelope, SharedPoint, Stream};
use crate::dkg::instance::Instance;
use crate::group::{Group, Ristretto255};
use crate::shamir::{Commitment, Polynomial};

/// What is wrong with a Deal. The dealer signed it: the dealer is guilty.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DealFault {
    /// It is not the deal that was committed to.
    #[error("deal differs from its commitment")]
    NotCommitted,
    /// The body has not the layout of a Deal in this group.
    #[error("deal: {0}")]
    Malformed(#[from] DecodeError),
    /// Not `t` commitments.
    #[error("{got} commitments, threshold is {want}")]
    Degree {
        /// The threshold.
        want: u16,
        /// Commitments in the deal.
        got: usize,
    },
    /// A commitment is not canonical or the identity.
    #[error("commitment {0} is not canonical")]
    Commitment(usize),
    /// The proof that the dealer knows its constant fails.
    #[error("proof of possession fails")]
    Possession,
    /// Not one sub-share for each holder.
    #[error("recipients are not the holders")]
    Recipients,
    /// An ephemeral key is not canonical or the identity.
    #[error("ephemeral key for {0} is not canonical")]
    Ephemeral(NodeIndex),
}

/// What a dealer publishes: first the commit, after all commits the body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DealPackage {
    /// Body of the Commit message, `h_i`.
    pub commit: [u8; 32],
    /// Body of the Deal message.
    pub body: Vec<u8>,
    /// The dealer's secret constant. For the memory-search test only.
    #[cfg(feature = "insecure-test-export")]
    pub dealer_constant: std::sync::Arc<dstack_secret::Secret<32>>,
}

/// `h_i = SHA-256("DKMS-V1-DKG0" ‖ inst(32) ‖ i(2) ‖ bd(body_i))`.
#[must_use]
pub fn commit_hash(inst: &[u8; 32], dealer: NodeIndex, body: &[u8]) -> [u8; 32] {
    sha256(&[b"DKMS-V1-DKG0", inst, &dealer.0.to_be_bytes(), &body_digest(body)])
}

/// Deals once: the polynomial and the ephemeral scalars are wiped when this returns.
pub(super) fn deal<G: Group>(instance: &Instance<G>, dealer: NodeIndex, stream: &mut Stream) -> DealPackage {
    let polynomial = Polynomial::<G>::deal(instance.threshold(), || stream.scalar());
    let commitment = polynomial.commit();
    let inst = instance.inst();

    // Proof of possession of the constant: R = k·B, c = H_s(…), z = k + c·a_0.
    let nonce = stream.scalar::<G>();
    let c = possession_challenge::<G>(&inst, dealer, &commitment.constant(), &nonce.public());
    let z = polynomial.with_constant(|a| nonce.expose(|k| *k + c * *a)).expect("the threshold is at least 2");

    let shares = instance
        .keys()
        .map(|(recipient, key)| {
            let secret = stream.scalar::<Ristretto255>();
            let ephemeral = secret.public();
            let envelope = Envelope { inst: &inst, dealer, recipient, ephemeral: &ephemeral, key };
            let shared = SharedPoint(secret.expose(|e| Ristretto255::mul(key, e)));
            let ct = envelope.seal(&shared, &polynomial.eval(recipient));
            DealtShare { to: recipient, ephemeral: Ristretto255::encode(&ephemeral), ct }
        })
        .collect();
    let body = DealBody {
        commitments: commitment.points.iter().map(|point| G::encode(point).as_ref().to_vec()).collect(),
        possession: Some((G::encode_scalar(&c), G::encode_scalar(&z))),
        shares,
    }
    .encode();
    DealPackage {
        commit: commit_hash(&inst, dealer, &body),
        body,
        #[cfg(feature = "insecure-test-export")]
        dealer_constant: std::sync::Arc::new(dstack_secret::Secret::from_fn(|bytes| {
            *bytes = polynomial.with_constant(G::encode_scalar).unwrap_or_default();
        })),
    }
}

/// `H_s("DKMS-V1-POP" ‖ inst ‖ i(2) ‖ C_i0 ‖ R)`.
fn possession_challenge<G: Group>(inst: &[u8; 32], dealer: NodeIndex, constant: &G::Element, r: &G::Element) -> G::Scalar {
    G::hash_to_scalar(&[b"DKMS-V1-POP", inst, &dealer.0.to_be_bytes(), G::encode(constant).as_ref(), G::encode(r).as_ref()])
}

/// A Deal whose public part is right. Whether a sub-share is right, only its recipient sees.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckedDeal<G: Group> {
    pub(super) digest: [u8; 32],
    pub(super) commitment: Commitment<G>,
    pub(super) shares: BTreeMap<NodeIndex, SealedSubshare>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct SealedSubshare {
    pub(super) ephemeral: RistrettoPoint,
    pub(super) ct: [u8; 48],
}

/// Checks a Deal against the dealer's Commit and everything in it that is public.
///
/// # Errors
/// [`DealFault`]: the dealer is guilty.
pub fn check_deal<G: Group>(
    instance: &Instance<G>,
    dealer: NodeIndex,
    commit: &[u8; 32],
    body: &[u8],
) -> Result<CheckedDeal<G>, DealFault> {
    let inst = instance.inst();
    if commit_hash(&inst, dealer, body) != *commit {
        return Err(DealFault::NotCommitted);
    }
    let deal = DealBody::decode(body, G::ELEMENT_BYTES, true)?;
    if deal.commitments.len() != usize::from(instance.threshold()) {
        return Err(DealFault::Degree { want: instance.threshold(), got: deal.commitments.len() });
    }
    let points =
        deal.commitments.iter().enumerate().map(|(k, bytes)| G::decode(bytes).ok_or(DealFault::Commitment(k))).collect::<Result<_, _>>()?;
    let commitment = Commitment::<G> { points };

    let (c, z) = deal.possession.ok_or(DealFault::Possession)?;
    let c = G::decode_scalar(&c).ok_or(DealFault::Possession)?;
    let z = G::decode_scalar(&z).ok_or(DealFault::Possession)?;
    // R = z·B − c·C_i0
    let r = G::mul_base(&z) - G::sum_of_products_public(&[c], &[commitment.constant()]);
    if possession_challenge::<G>(&inst, dealer, &commitment.constant(), &r) != c {
        return Err(DealFault::Possession);
    }

    if !deal.shares.iter().map(|share| share.to).eq(instance.members()) {
        return Err(DealFault::Recipients);
    }
    let shares = deal
        .shares
        .iter()
        .map(|share| {
            let ephemeral = Ristretto255::decode(&share.ephemeral).ok_or(DealFault::Ephemeral(share.to))?;
            Ok((share.to, SealedSubshare { ephemeral, ct: share.ct }))
        })
        .collect::<Result<_, DealFault>>()?;
    Ok(CheckedDeal { digest: body_digest(body), commitment, shares })
}
