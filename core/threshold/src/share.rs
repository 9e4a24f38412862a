//! A holder's shares of the signing roots, in locked memory, and of any root by its tag.
//!
//! Owns: [`SigningShare`], one type for each group, so that a share of one root cannot enter the protocol of another; the check of a
//! share against the verification key that the log states. Never: signs. Source: threshold.md §0 "Roots", §3, §6.

use std::fmt;

use dstack_protocol::genesis::CaAlgorithm;
use dstack_protocol::{Epoch, Generation, NodeIndex, RootTag};
use dstack_secret::{LockWarning, Locked, Secret};

use crate::group::{Edwards25519, Group, NistP256, Ristretto255, Secp256k1, SecretScalar};
use crate::prf::PrfShare;

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
pub struct SigningShare<G: Group> {
    id: ShareId,
    vk: G::Element,
    scalar: Locked<32>,
}

impl<G: Group> SigningShare<G> {
    /// Takes over a share; `None` when the bytes are not the scalar behind `expected_vk`, or the index is 0.
    pub(crate) fn new(id: ShareId, share: Secret<32>, expected_vk: &[u8]) -> Option<Self> {
        let vk = SecretScalar::<G>::from_secret(&share)?.public();
        // `decode` refuses the identity, so a zero share fails here too.
        (id.index.0 != 0 && G::decode(expected_vk) == Some(vk)).then(|| Self { id, vk, scalar: Locked::new(share) })
    }

    /// Which share it is.
    #[must_use]
    pub fn id(&self) -> ShareId {
        self.id
    }

    /// `VK_i = s_i · B`.
    #[must_use]
    pub fn vk(&self) -> Vec<u8> {
        G::encode(&self.vk).as_ref().to_vec()
    }

    /// The share's bytes, canonical encoding of the group's scalar: for sealing (threshold.md §6) and for the engine of this root.
    #[must_use]
    pub fn scalar(&self) -> &Locked<32> {
        &self.scalar
    }
}

impl<G: Group> fmt::Debug for SigningShare<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningShare").field("group", &G::NAME).field("id", &self.id).finish_non_exhaustive()
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
            Self::Ed25519(share) => &share.scalar,
            Self::P256(share) => &share.scalar,
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
    /// Takes over the bytes of a share of `root`. `expected_vk`: the holder's verification key as the log states it.
    ///
    /// # Errors
    /// [`NotAShare`] when the bytes are not the scalar behind that key.
    pub fn new(root: RootTag, ca: CaAlgorithm, id: ShareId, share: Secret<32>, expected_vk: &[u8]) -> Result<Self, NotAShare> {
        let found = match (root, ca) {
            (RootTag::Prf, _) => PrfShare::new(id.index, id.generation, id.epoch, share, expected_vk).ok().map(Self::Prf),
            (RootTag::Ca, CaAlgorithm::Ed25519) => SigningShare::new(id, share, expected_vk).map(CaShare::Ed25519).map(Self::Ca),
            (RootTag::Ca, CaAlgorithm::P256) => SigningShare::new(id, share, expected_vk).map(CaShare::P256).map(Self::Ca),
            (RootTag::Id, _) => SigningShare::new(id, share, expected_vk).map(Self::Id),
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
            Self::Id(share) => &share.scalar,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::scalar;

    const ID: ShareId = ShareId { index: NodeIndex(2), generation: Generation(0), epoch: Epoch(1) };

    fn fits<G: Group>(root: RootTag, ca: CaAlgorithm) {
        let share = || scalar::<G>(b"share", 1);
        let vk = G::encode(&share().public());
        let made = RootShare::new(root, ca, ID, share().to_secret(), vk.as_ref()).unwrap();
        assert_eq!((made.root(), made.id()), (root, ID));
        assert!(made.scalar().expose(|bytes| share().to_secret().expose(|want| want == bytes)));
        let other = G::encode(&scalar::<G>(b"share", 2).public());
        let refused = Some(NotAShare { root, index: ID.index });
        assert_eq!(RootShare::new(root, ca, ID, share().to_secret(), other.as_ref()).err(), refused);
        assert_eq!(RootShare::new(root, ca, ID, Secret::from_fn(|b| b.fill(0xff)), vk.as_ref()).err(), refused);
        assert_eq!(RootShare::new(root, ca, ID, Secret::from_fn(|_| {}), &vec![0; G::ELEMENT_BYTES]).err(), refused, "a zero share");
        let nobody = ShareId { index: NodeIndex(0), ..ID };
        assert!(RootShare::new(root, ca, nobody, share().to_secret(), vk.as_ref()).is_err());
        assert!(!format!("{made:?}").contains(&hex::encode(share().to_secret().expose(|bytes| *bytes))));
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
        // ristretto255 and edwards25519 have the same scalars: only the verification key tells their shares apart.
        let share = || scalar::<Ristretto255>(b"share", 1);
        let vk = Ristretto255::encode(&share().public());
        assert!(RootShare::new(RootTag::Ca, CaAlgorithm::Ed25519, ID, share().to_secret(), &vk).is_err());
        let vk = Secp256k1::encode(&scalar::<Secp256k1>(b"share", 1).public());
        assert!(RootShare::new(RootTag::Ca, CaAlgorithm::P256, ID, scalar::<Secp256k1>(b"share", 1).to_secret(), &vk).is_err());
    }
}
