//! One root's run of one attempt: who deals to whom, under which name. All public.

use std::collections::BTreeMap;
use std::marker::PhantomData;

use curve25519_dalek::ristretto::RistrettoPoint;
use dstack_protocol::ceremony::{InstHolder, Open, What, inst};
use dstack_protocol::limits::NODES_MAX;
use dstack_protocol::{ClusterId, Epoch, Generation, NodeIndex, RootTag};

use crate::group::{Group, NistP256, Ristretto255, Secp256k1};
use crate::share::ShareId;

/// Why an `Open` and its Joins make no instance. The proposer's fault: the entry has no effect.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InstanceError {
    /// Not a key generation from epoch 0.
    #[error("not a key generation from epoch 0")]
    NotDkg,
    /// The root is not one of this attempt.
    #[error("root {0:?} is not part of the attempt")]
    Root(RootTag),
    /// A share of one root is never used in another's protocol.
    #[error("root {root:?} does not live in {group}")]
    Group {
        /// The root.
        root: RootTag,
        /// The group asked for.
        group: &'static str,
    },
    /// A threshold below 2 or above the number of holders, fewer than 3 holders, or too many.
    #[error("threshold {t} of {n} holders")]
    Threshold {
        /// Threshold.
        t: u16,
        /// Holders.
        n: usize,
    },
    /// In a key generation dealers and holders are the same, ascending, and each brings a key.
    #[error("dealers, holders and joined nodes differ")]
    Members,
    /// An encryption key is no element. That node's fault.
    #[error("encryption key of node {0} is not canonical")]
    Key(NodeIndex),
}

/// Members, threshold and name of one root's key generation.
#[derive(Debug, Clone, PartialEq)]
pub struct Instance<G: Group> {
    inst: [u8; 32],
    generation: Generation,
    epoch: Epoch,
    threshold: u16,
    keys: BTreeMap<NodeIndex, RistrettoPoint>,
    group: PhantomData<G>,
}

impl<G: Group> Instance<G> {
    /// The instance of `root` in the attempt that `open` opened, once every holder has joined. `holders`: ascending.
    ///
    /// # Errors
    /// [`InstanceError`].
    pub fn new(cluster_id: &ClusterId, open: &Open, root: RootTag, holders: &[InstHolder]) -> Result<Self, InstanceError> {
        if open.what != What::Dkg || open.old_epoch != Epoch(0) || open.new_epoch == Epoch(0) {
            return Err(InstanceError::NotDkg);
        }
        if !open.roots.contains(&root) {
            return Err(InstanceError::Root(root));
        }
        if !lives_in(root, G::NAME) {
            return Err(InstanceError::Group { root, group: G::NAME });
        }
        let n = open.holders.len();
        if open.t < 2 || usize::from(open.t) > n || !(3..=NODES_MAX).contains(&n) {
            return Err(InstanceError::Threshold { t: open.t, n });
        }
        let ascending = open.holders.windows(2).all(|pair| pair.first() < pair.last());
        let indices = open.holders.iter().all(|i| (1..0x8000).contains(&i.0));
        if !ascending || !indices || open.dealers != open.holders || !holders.iter().map(|h| &h.index).eq(&open.holders) {
            return Err(InstanceError::Members);
        }
        let keys = holders
            .iter()
            .map(|h| {
                let key = Ristretto255::decode(&h.ek).ok_or(InstanceError::Key(h.index))?;
                Ok((h.index, key))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            inst: inst(cluster_id, open, root, holders),
            generation: open.generation,
            epoch: open.new_epoch,
            threshold: open.t,
            keys,
            group: PhantomData,
        })
    }

    /// `inst`: the name that every message of this run carries.
    #[must_use]
    pub fn inst(&self) -> [u8; 32] {
        self.inst
    }

    /// Generation of the root.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Epoch that the run leads to.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Threshold `t` of the sharing.
    #[must_use]
    pub fn threshold(&self) -> u16 {
        self.threshold
    }

    /// The share that the run gives `index`.
    pub(super) fn share_id(&self, index: NodeIndex) -> ShareId {
        ShareId { index, generation: self.generation, epoch: self.epoch }
    }

    /// Whether the group's signatures are threshold ECDSA, whose holders set up secrets of each pair before Ready (threshold.md §5.1).
    #[must_use]
    pub fn has_pairwise_setup(&self) -> bool {
        G::NAME == Secp256k1::NAME || G::NAME == NistP256::NAME
    }

    /// Dealers and holders, ascending.
    pub fn members(&self) -> impl Iterator<Item = NodeIndex> + '_ {
        self.keys.keys().copied()
    }

    /// Number of members.
    #[must_use]
    pub fn members_count(&self) -> usize {
        self.keys.len()
    }

    /// Whether `index` takes part.
    #[must_use]
    pub fn is_member(&self, index: NodeIndex) -> bool {
        self.keys.contains_key(&index)
    }

    /// `ek_j` of a member.
    pub(crate) fn key(&self, index: NodeIndex) -> Option<&RistrettoPoint> {
        self.keys.get(&index)
    }

    /// Members with their `ek_j`, ascending.
    pub(crate) fn keys(&self) -> impl Iterator<Item = (NodeIndex, &RistrettoPoint)> {
        self.keys.iter().map(|(index, key)| (*index, key))
    }
}

/// The table of roots in threshold.md §0.
fn lives_in(root: RootTag, group: &str) -> bool {
    match root {
        RootTag::Prf => group == "ristretto255",
        RootTag::Ca => group == "edwards25519" || group == "p256",
        RootTag::Id => group == "secp256k1",
    }
}
