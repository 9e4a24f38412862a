//! The public side of a shared signing root, and one holder's share of it.
//!
//! Owns: the check that verification keys, public key and threshold belong together, the share in locked memory.
//! Never: lends a share to anything but the engines of this module. Source: threshold.md §3 step 5 (`PK`, `VK_j`), §8.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use dstack_protocol::NodeIndex;
use dstack_protocol::limits::NODES_MAX;
use dstack_secret::{LockWarning, Locked};

use crate::dkg::Sharing;
use crate::group::{Group, SecretScalar};
use crate::shamir::lagrange_at_zero;

/// Why keys make no shared root, or bytes no share of it. The fault of the state or file they were read from.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HoldersError {
    /// A threshold below 2 or above the number of holders, or too many holders.
    #[error("threshold {t} of {n} holders")]
    Threshold {
        /// Threshold.
        t: u16,
        /// Holders.
        n: usize,
    },
    /// Holders are indices of nodes in ascending order, each once.
    #[error("holders are not ascending indices of nodes")]
    Order,
    /// The public key is no element of the group.
    #[error("public key is no element of {0}")]
    PublicKey(&'static str),
    /// A verification key is no element of the group.
    #[error("verification key of node {0} is no element")]
    VerificationKey(NodeIndex),
    /// The verification keys do not lie on one polynomial of that degree with the public key at 0.
    #[error("verification key of node {0} does not fit the public key")]
    Inconsistent(NodeIndex),
    /// Not a holder.
    #[error("node {0} is no holder")]
    NotAHolder(NodeIndex),
    /// The bytes are not the scalar behind the holder's verification key.
    #[error("not the share of holder {0}")]
    NotAShare(NodeIndex),
}

/// Threshold, public key and verification keys of a root in one epoch. All public.
#[derive(Debug, Clone, PartialEq)]
pub struct Holders<G: Group> {
    threshold: u16,
    public_key: G::Element,
    verification_keys: BTreeMap<NodeIndex, G::Element>,
}

impl<G: Group> Holders<G> {
    /// Of stored encodings: `PK` and `VK_j` of every holder, ascending.
    ///
    /// # Errors
    /// [`HoldersError`]; keys that do not belong together are refused, so that every `t` holders sign under `public_key`.
    pub fn new(threshold: u16, public_key: &[u8], verification_keys: &[(NodeIndex, Vec<u8>)]) -> Result<Self, HoldersError> {
        let n = verification_keys.len();
        if threshold < 2 || usize::from(threshold) > n || n > NODES_MAX {
            return Err(HoldersError::Threshold { t: threshold, n });
        }
        let ascending = verification_keys.windows(2).all(|pair| pair.first().map(|(i, _)| i) < pair.last().map(|(i, _)| i));
        if !ascending || !verification_keys.iter().all(|(i, _)| (1..0x8000).contains(&i.0)) {
            return Err(HoldersError::Order);
        }
        let public_key = G::decode(public_key).ok_or(HoldersError::PublicKey(G::NAME))?;
        let verification_keys = verification_keys
            .iter()
            .map(|(i, vk)| Ok((*i, G::decode(vk).ok_or(HoldersError::VerificationKey(*i))?)))
            .collect::<Result<BTreeMap<_, _>, HoldersError>>()?;
        let holders = Self { threshold, public_key, verification_keys };
        holders.check_polynomial()?;
        Ok(holders)
    }

    /// Of a finished key generation.
    #[must_use]
    pub fn of(sharing: &Sharing<G>) -> Self {
        let (public_key, verification_keys) = sharing.elements();
        Self { threshold: sharing.threshold(), public_key: *public_key, verification_keys: verification_keys.clone() }
    }

    /// With the first `t − 1` holders, each other one must interpolate to the public key.
    fn check_polynomial(&self) -> Result<(), HoldersError> {
        let base = usize::from(self.threshold).saturating_sub(1);
        for (j, vk) in self.verification_keys.iter().skip(base) {
            let set: Vec<NodeIndex> = self.verification_keys.keys().take(base).chain([j]).copied().collect();
            let points: Vec<G::Element> = self.verification_keys.values().take(base).chain([vk]).copied().collect();
            let weights = lagrange_at_zero::<G>(&set).map_err(|_| HoldersError::Order)?;
            if G::sum_of_products_public(&weights, &points) != self.public_key {
                return Err(HoldersError::Inconsistent(*j));
            }
        }
        Ok(())
    }

    /// Threshold `t`.
    #[must_use]
    pub fn threshold(&self) -> u16 {
        self.threshold
    }

    /// The root's public key `PK`.
    #[must_use]
    pub fn public_key(&self) -> Vec<u8> {
        G::encode(&self.public_key).as_ref().to_vec()
    }

    /// Holders, ascending.
    pub fn members(&self) -> impl Iterator<Item = NodeIndex> + '_ {
        self.verification_keys.keys().copied()
    }

    /// Number of holders.
    #[must_use]
    pub fn count(&self) -> usize {
        self.verification_keys.len()
    }

    /// Whether `signers` are exactly `t` holders; they are ascending and distinct already (see [`crate::sign::Run`]).
    #[must_use]
    pub fn can_sign(&self, signers: &[NodeIndex]) -> bool {
        signers.len() == usize::from(self.threshold) && signers.iter().all(|i| self.verification_keys.contains_key(i))
    }

    pub(crate) fn public_element(&self) -> &G::Element {
        &self.public_key
    }

    pub(crate) fn verification_key(&self, holder: NodeIndex) -> Option<&G::Element> {
        self.verification_keys.get(&holder)
    }

    /// Holders with their keys, ascending.
    pub(crate) fn keys(&self) -> impl Iterator<Item = (NodeIndex, &G::Element)> {
        self.verification_keys.iter().map(|(i, vk)| (*i, vk))
    }
}

/// A holder's share of a signing root, in locked memory, with the public side that it was checked against.
pub struct RootShare<G: Group> {
    index: NodeIndex,
    holders: Arc<Holders<G>>,
    share: Locked<32>,
}

impl<G: Group> RootShare<G> {
    /// Takes over the share of `index`.
    ///
    /// # Errors
    /// [`HoldersError::NotAHolder`], [`HoldersError::NotAShare`].
    pub fn new(index: NodeIndex, holders: Arc<Holders<G>>, share: Locked<32>) -> Result<Self, HoldersError> {
        let vk = holders.verification_key(index).ok_or(HoldersError::NotAHolder(index))?;
        let scalar = SecretScalar::<G>::from_locked(&share).ok_or(HoldersError::NotAShare(index))?;
        if scalar.public() != *vk {
            return Err(HoldersError::NotAShare(index));
        }
        Ok(Self { index, holders, share })
    }

    /// The holder.
    #[must_use]
    pub fn index(&self) -> NodeIndex {
        self.index
    }

    /// The public side.
    #[must_use]
    pub fn holders(&self) -> &Arc<Holders<G>> {
        &self.holders
    }

    /// The share's bytes, for sealing (threshold.md §6).
    #[must_use]
    pub fn scalar(&self) -> &Locked<32> {
        &self.share
    }

    /// Memory protections that the system refused.
    #[must_use]
    pub fn lock_warnings(&self) -> &[LockWarning] {
        self.share.warnings()
    }
}

impl<G: Group> fmt::Debug for RootShare<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RootShare").field("group", &G::NAME).field("index", &self.index).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use dstack_secret::Secret;

    use super::*;
    use crate::group::{Edwards25519, NistP256, Secp256k1};
    use crate::shamir::Polynomial;
    use crate::testing::scalar;

    type Parts = (Vec<u8>, Vec<(NodeIndex, Vec<u8>)>, Vec<Secret<32>>);

    fn parts<G: Group>(t: u16, indices: &[u16]) -> Parts {
        let mut counter = 0;
        let polynomial = Polynomial::<G>::deal(t, || {
            counter += 1;
            scalar(b"holders", counter)
        });
        let pk = G::encode(&polynomial.commit().constant()).as_ref().to_vec();
        let shares: Vec<_> = indices.iter().map(|i| polynomial.eval(NodeIndex(*i))).collect();
        let vks = indices.iter().zip(&shares).map(|(i, s)| (NodeIndex(*i), G::encode(&s.public()).as_ref().to_vec())).collect();
        (pk, vks, shares.iter().map(SecretScalar::to_secret).collect())
    }

    fn checks<G: Group>() {
        let (pk, vks, mut shares) = parts::<G>(3, &[1, 4, 5, 0x1234, 0x7fff]);
        let holders = Arc::new(Holders::<G>::new(3, &pk, &vks).unwrap());
        assert_eq!((holders.threshold(), holders.count(), holders.public_key()), (3, 5, pk.clone()));
        assert!(holders.can_sign(&[NodeIndex(1), NodeIndex(4), NodeIndex(0x7fff)]));
        assert!(!holders.can_sign(&[NodeIndex(1), NodeIndex(4)]));
        assert!(!holders.can_sign(&[NodeIndex(1), NodeIndex(2), NodeIndex(4)]));
        // A key that is off the polynomial, wherever it stands, and a wrong degree.
        let other = G::encode(&scalar::<G>(b"other", 0).public()).as_ref().to_vec();
        for place in 0..5 {
            let mut bad = vks.clone();
            bad[place].1 = other.clone();
            assert!(matches!(Holders::<G>::new(3, &pk, &bad), Err(HoldersError::Inconsistent(_))), "{place}");
        }
        assert!(matches!(Holders::<G>::new(2, &pk, &vks), Err(HoldersError::Inconsistent(_))));
        assert!(matches!(Holders::<G>::new(3, &other, &vks), Err(HoldersError::Inconsistent(_))));
        assert_eq!(Holders::<G>::new(3, &[0; 33], &vks), Err(HoldersError::PublicKey(G::NAME)));
        assert_eq!(Holders::<G>::new(6, &pk, &vks), Err(HoldersError::Threshold { t: 6, n: 5 }));
        assert_eq!(Holders::<G>::new(1, &pk, &vks), Err(HoldersError::Threshold { t: 1, n: 5 }));
        let mut bad = vks.clone();
        bad[1].1 = vec![];
        assert_eq!(Holders::<G>::new(3, &pk, &bad), Err(HoldersError::VerificationKey(NodeIndex(4))));
        bad.swap(0, 1);
        assert_eq!(Holders::<G>::new(3, &pk, &bad), Err(HoldersError::Order));

        let share = |i: u16, s: Secret<32>| RootShare::new(NodeIndex(i), Arc::clone(&holders), Locked::new(s)).map(|s| s.index());
        let second = shares.remove(1);
        let first = shares.remove(0);
        assert_eq!(share(2, Secret::from_fn(|b| b[0] = 1)), Err(HoldersError::NotAHolder(NodeIndex(2))));
        assert_eq!(share(1, second), Err(HoldersError::NotAShare(NodeIndex(1))));
        assert_eq!(share(1, Secret::from_fn(|b| b.fill(0xff))), Err(HoldersError::NotAShare(NodeIndex(1))));
        assert_eq!(share(1, first), Ok(NodeIndex(1)));
    }

    #[test]
    fn only_keys_of_one_polynomial_and_their_shares_are_taken() {
        checks::<Edwards25519>();
        checks::<Secp256k1>();
        checks::<NistP256>();
    }
}
