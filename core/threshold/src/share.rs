//! A holder's shares of the signing roots, in locked memory, and of any root by its tag.
//!
//! Owns: [`SigningShare`], one type for each group, so that a share of one root cannot enter the protocol of another; the check of a
//! share against the verification key that the log states. Never: signs. Source: threshold.md §0 "Roots", §3, §6.

use std::sync::Arc;

use dstack_protocol::genesis::CaAlgorithm;
use dstack_protocol::{Epoch, Generation, NodeIndex, RootTag};
use dstack_secret::{LockWarning, Locked, Secret};

use crate::dkg::PublicSharing;
use crate::group::{Edwards25519, Group, NistP256, Ristretto255, Secp256k1};
use crate::prf::PrfShare;
use crate::sign;

/// The bytes are no share of that root: not canonical, zero, or not the expected verification key. The file or the ceremony that gave
/// them is at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not the share of holder {index} of root {root:?}")]
pub struct NotAShare {
    /// The root.
    pub root: RootTag,
    /// The holder.
    pub index: NodeIndex,
}

/// Which share of a root: public.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShareId {
    /// Holder, the evaluation point.
    pub index: NodeIndex,
    /// Generation of the root.
    pub generation: Generation,
    /// Epoch of the sharing.
    pub epoch: Epoch,
}

/// A share of a signing root, in locked memory. The group is the root: edwards25519 and P-256 are `ca`, secp256k1 is `id`.
#[derive(Debug)]
pub struct SigningShare<G: Group> {
    id: ShareId,
    share: sign::RootShare<G>,
}

impl<G: Group> SigningShare<G> {
    /// Takes over a share; `None` when the bytes are not the scalar behind the holder's verification key.
    pub(crate) fn new(id: ShareId, holders: Arc<sign::Holders<G>>, share: Secret<32>) -> Option<Self> {
        let share = sign::RootShare::new(id.index, holders, Locked::new(share)).ok()?;
        Some(Self { id, share })
    }

    fn of(id: ShareId, sharing: &PublicSharing, share: Secret<32>) -> Option<Self> {
        let holders = sign::Holders::new(sharing.threshold, &sharing.public_key, &sharing.verification_keys).ok()?;
        Self::new(id, Arc::new(holders), share)
    }

    /// Which share it is.
    #[must_use]
    pub fn id(&self) -> ShareId {
        self.id
    }

    /// The share as the engine of this root takes it.
    #[must_use]
    pub fn engine(&self) -> &sign::RootShare<G> {
        &self.share
    }
}

/// A share of root `ca`.
#[derive(Debug)]
pub enum CaShare {
    /// `ca_alg` ed25519.
    Ed25519(SigningShare<Edwards25519>),
    /// `ca_alg` p256.
    P256(SigningShare<NistP256>),
}

impl CaShare {
    /// Which share it is.
    #[must_use]
    pub fn id(&self) -> ShareId {
        match self {
            Self::Ed25519(share) => share.id,
            Self::P256(share) => share.id,
        }
    }

    fn scalar(&self) -> &Locked<32> {
        match self {
            Self::Ed25519(share) => share.share.scalar(),
            Self::P256(share) => share.share.scalar(),
        }
    }
}

/// A share of root `id`.
pub type IdShare = SigningShare<Secp256k1>;

/// A share of some root.
#[derive(Debug)]
pub enum RootShare {
    /// Of `prf`.
    Prf(PrfShare),
    /// Of `ca`.
    Ca(CaShare),
    /// Of `id`.
    Id(IdShare),
}

impl From<PrfShare> for RootShare {
    fn from(share: PrfShare) -> Self {
        Self::Prf(share)
    }
}

impl RootShare {
    /// Takes over the bytes of a share of `root`. `sharing`: its public side, as the log states it.
    ///
    /// # Errors
    /// [`NotAShare`] when the bytes are not the scalar behind the holder's verification key.
    pub fn new(root: RootTag, ca: CaAlgorithm, id: ShareId, sharing: &PublicSharing, share: Secret<32>) -> Result<Self, NotAShare> {
        let found = match (root, ca) {
            (RootTag::Prf, _) => {
                let vk = sharing.verification_keys.iter().find(|(holder, _)| *holder == id.index);
                vk.and_then(|(_, vk)| PrfShare::new(id.index, id.generation, id.epoch, share, vk).ok()).map(Self::Prf)
            }
            (RootTag::Ca, CaAlgorithm::Ed25519) => SigningShare::of(id, sharing, share).map(CaShare::Ed25519).map(Self::Ca),
            (RootTag::Ca, CaAlgorithm::P256) => SigningShare::of(id, sharing, share).map(CaShare::P256).map(Self::Ca),
            (RootTag::Id, _) => SigningShare::of(id, sharing, share).map(Self::Id),
        };
        found.ok_or(NotAShare { root, index: id.index })
    }

    /// Whose share it is.
    #[must_use]
    pub fn root(&self) -> RootTag {
        match self {
            Self::Prf(_) => RootTag::Prf,
            Self::Ca(_) => RootTag::Ca,
            Self::Id(_) => RootTag::Id,
        }
    }

    /// Which share it is.
    #[must_use]
    pub fn id(&self) -> ShareId {
        match self {
            Self::Prf(share) => share.share_id(),
            Self::Ca(share) => share.id(),
            Self::Id(share) => share.id,
        }
    }

    /// The share's bytes, for sealing (threshold.md §6).
    #[must_use]
    pub fn scalar(&self) -> &Locked<32> {
        match self {
            Self::Prf(share) => share.scalar(),
            Self::Ca(share) => share.scalar(),
            Self::Id(share) => share.share.scalar(),
        }
    }

    /// Memory protections that the system refused.
    #[must_use]
    pub fn lock_warnings(&self) -> &[LockWarning] {
        self.scalar().warnings()
    }
}

/// Name of the group that `root` lives in (threshold.md §0).
#[must_use]
pub fn group_name(root: RootTag, ca: CaAlgorithm) -> &'static str {
    match (root, ca) {
        (RootTag::Prf, _) => Ristretto255::NAME,
        (RootTag::Ca, CaAlgorithm::Ed25519) => Edwards25519::NAME,
        (RootTag::Ca, CaAlgorithm::P256) => NistP256::NAME,
        (RootTag::Id, _) => Secp256k1::NAME,
    }
}

/// Whether `bytes` are a public key of `root`: canonical, in the group, not the identity.
#[must_use]
pub fn is_public_key(root: RootTag, ca: CaAlgorithm, bytes: &[u8]) -> bool {
    match (root, ca) {
        (RootTag::Prf, _) => Ristretto255::decode(bytes).is_some(),
        (RootTag::Ca, CaAlgorithm::Ed25519) => Edwards25519::decode(bytes).is_some(),
        (RootTag::Ca, CaAlgorithm::P256) => NistP256::decode(bytes).is_some(),
        (RootTag::Id, _) => Secp256k1::decode(bytes).is_some(),
    }
}

/// Whether the holders of `root` sign by threshold ECDSA, for which every two of them set up secrets of their pair (threshold.md §5.1).
#[must_use]
pub fn has_pairwise_setup(root: RootTag, ca: CaAlgorithm) -> bool {
    matches!((root, ca), (RootTag::Id, _) | (RootTag::Ca, CaAlgorithm::P256))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::SecretScalar;
    use crate::shamir::Polynomial;
    use crate::testing::scalar;

    const ID: ShareId = ShareId { index: NodeIndex(2), generation: Generation(0), epoch: Epoch(1) };

    /// A sharing among 1, 2 and 3, and the share of 2.
    fn shared<G: Group>() -> (PublicSharing, SecretScalar<G>) {
        let mut counter = 0;
        let polynomial = Polynomial::<G>::deal(2, || {
            counter += 1;
            scalar(b"share", counter)
        });
        let vk = |i: u16| (NodeIndex(i), G::encode(&polynomial.eval(NodeIndex(i)).public()).as_ref().to_vec());
        let public_key = G::encode(&polynomial.commit().constant()).as_ref().to_vec();
        let verification_keys = (1..=3).map(vk).collect();
        (PublicSharing { threshold: 2, transcript: [0; 32], public_key, verification_keys }, polynomial.eval(ID.index))
    }

    fn fits<G: Group>(root: RootTag, ca: CaAlgorithm) {
        let (sharing, share) = shared::<G>();
        let made = RootShare::new(root, ca, ID, &sharing, share.to_secret()).unwrap();
        assert_eq!((made.root(), made.id()), (root, ID));
        assert!(made.scalar().expose(|bytes| share.to_secret().expose(|want| want == bytes)));
        let refused = |id: ShareId, bytes: Secret<32>| {
            assert_eq!(RootShare::new(root, ca, id, &sharing, bytes).err(), Some(NotAShare { root, index: id.index }));
        };
        refused(ID, scalar::<G>(b"another", 1).to_secret());
        refused(ID, Secret::from_fn(|b| b.fill(0xff)));
        refused(ID, Secret::from_fn(|_| {}));
        for stranger in [0, 1, 4] {
            refused(ShareId { index: NodeIndex(stranger), ..ID }, share.to_secret());
        }
        assert!(!format!("{made:?}").contains(&hex::encode(share.to_secret().expose(|bytes| *bytes))));
        assert!(is_public_key(root, ca, &sharing.public_key));
        assert!(!is_public_key(root, ca, &vec![0xff; sharing.public_key.len()]));
    }

    #[test]
    fn a_share_must_match_its_verification_key_in_the_group_of_its_root() {
        for ca in [CaAlgorithm::Ed25519, CaAlgorithm::P256] {
            fits::<Ristretto255>(RootTag::Prf, ca);
            fits::<Secp256k1>(RootTag::Id, ca);
        }
        fits::<Edwards25519>(RootTag::Ca, CaAlgorithm::Ed25519);
        fits::<NistP256>(RootTag::Ca, CaAlgorithm::P256);
    }

    #[test]
    fn a_share_of_one_root_is_none_of_another() {
        // ristretto255 and edwards25519 have the same scalars: only the public side tells their shares apart.
        let (sharing, share) = shared::<Ristretto255>();
        assert!(RootShare::new(RootTag::Ca, CaAlgorithm::Ed25519, ID, &sharing, share.to_secret()).is_err());
        let (sharing, share) = shared::<Secp256k1>();
        assert!(RootShare::new(RootTag::Ca, CaAlgorithm::P256, ID, &sharing, share.to_secret()).is_err());
    }
}
