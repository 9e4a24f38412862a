//! Secrets with every other holder, of the roots that sign with them, and which of them are to be sealed again.
//!
//! Owns: the two groups behind one type, what changed since it was sealed. Never: a file, a message. Source: threshold.md §5.1, ADR 0029.

use std::collections::BTreeSet;

use dstack_protocol::genesis::CaAlgorithm;
use dstack_protocol::{NodeIndex, Refusal, RefusalCode, RootTag};
use dstack_secret::SecretBytes;
use dstack_threshold::group::{NistP256, Secp256k1};
use dstack_threshold::share::has_pairwise_setup;
use dstack_threshold::sign::dkls::Pairwise;
use dstack_threshold::sign::ecdsa::EcdsaError;

use super::{ShareHolderPool, reading, writing};

/// Secrets with every other holder, of the root that signs with them.
#[derive(Debug)]
pub enum Pairs {
    /// Of `ca`, `ca_alg` p256.
    Ca(Pairwise<NistP256>),
    /// Of `id`.
    Id(Pairwise<Secp256k1>),
}

macro_rules! each {
    ($pairs:expr, $it:ident => $do:expr) => {
        match $pairs {
            Pairs::Ca($it) => $do,
            Pairs::Id($it) => $do,
        }
    };
}

impl Pairs {
    /// Of a holder that lost all of them; `None` for a root that has no pairs.
    ///
    /// # Errors
    /// The engine's: `members` are no holders, or not this one's.
    pub fn lost(
        root: RootTag,
        ca: CaAlgorithm,
        inst: [u8; 32],
        index: NodeIndex,
        members: &[NodeIndex],
    ) -> Result<Option<Self>, EcdsaError> {
        if !has_pairwise_setup(root, ca) {
            return Ok(None);
        }
        Ok(match root {
            RootTag::Prf => None,
            RootTag::Ca => Some(Self::Ca(Pairwise::lost(inst, index, members)?)),
            RootTag::Id => Some(Self::Id(Pairwise::lost(inst, index, members)?)),
        })
    }

    /// What was sealed for `root`.
    ///
    /// # Errors
    /// The engine's: other bytes.
    pub fn from_secret(root: RootTag, bytes: &SecretBytes) -> Result<Option<Self>, EcdsaError> {
        Ok(match root {
            RootTag::Prf => None,
            RootTag::Ca => Some(Self::Ca(Pairwise::from_secret(bytes)?)),
            RootTag::Id => Some(Self::Id(Pairwise::from_secret(bytes)?)),
        })
    }

    /// The root.
    #[must_use]
    pub fn root(&self) -> RootTag {
        match self {
            Self::Ca(_) => RootTag::Ca,
            Self::Id(_) => RootTag::Id,
        }
    }

    /// Name of the ceremony that they belong to.
    #[must_use]
    pub fn inst(&self) -> [u8; 32] {
        each!(self, pairs => pairs.inst())
    }

    /// `setup` of Ready.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        each!(self, pairs => pairs.digest())
    }

    /// This holder.
    #[must_use]
    pub fn index(&self) -> NodeIndex {
        each!(self, pairs => pairs.index())
    }

    /// All holders, ascending.
    #[must_use]
    pub fn members(&self) -> &[NodeIndex] {
        each!(self, pairs => pairs.members())
    }

    /// What is sealed.
    ///
    /// # Errors
    /// The engine's.
    pub fn to_secret(&self) -> Result<SecretBytes, EcdsaError> {
        each!(self, pairs => pairs.to_secret())
    }

    /// Holders with whom the secrets are lost, ascending.
    #[must_use]
    pub fn missing(&self) -> Vec<NodeIndex> {
        each!(self, pairs => pairs.missing())
    }

    fn expelled(&self) -> Vec<NodeIndex> {
        each!(self, pairs => pairs.expelled())
    }

    fn expel(&mut self, peer: NodeIndex) -> bool {
        each!(self, pairs => pairs.expel(peer))
    }

    fn lose(&mut self, peer: NodeIndex) -> bool {
        each!(self, pairs => pairs.lose(peer))
    }

    fn adopt(&mut self, redone: Self) -> Result<NodeIndex, EcdsaError> {
        match (self, redone) {
            (Self::Ca(own), Self::Ca(redone)) => own.adopt(redone),
            (Self::Id(own), Self::Id(redone)) => own.adopt(redone),
            (Self::Ca(_) | Self::Id(_), _) => Err(EcdsaError::OtherHolders),
        }
    }
}

/// Secrets of pairs in use.
#[derive(Default)]
pub(super) struct PairsInUse {
    pub(super) ca: Option<Pairs>,
    pub(super) id: Option<Pairs>,
    unsealed: BTreeSet<RootTag>,
}

impl PairsInUse {
    fn of(&self, root: RootTag) -> Option<&Pairs> {
        match root {
            RootTag::Prf => None,
            RootTag::Ca => self.ca.as_ref(),
            RootTag::Id => self.id.as_ref(),
        }
    }

    fn of_mut(&mut self, root: RootTag) -> Option<&mut Pairs> {
        match root {
            RootTag::Prf => None,
            RootTag::Ca => self.ca.as_mut(),
            RootTag::Id => self.id.as_mut(),
        }
    }

    /// Changes the pairs of `root`; what is changed is to be sealed again.
    fn change(&mut self, root: RootTag, change: impl FnOnce(&mut Pairs) -> bool) -> bool {
        let changed = self.of_mut(root).is_some_and(change);
        if changed {
            self.unsealed.insert(root);
        }
        changed
    }
}

impl ShareHolderPool {
    /// Takes the secrets of pairs into use.
    pub fn install_pairs(&self, pairs: Pairs) {
        let mut shares = writing(&self.shares);
        shares.pairs.unsealed.remove(&pairs.root());
        match pairs {
            Pairs::Ca(_) => shares.pairs.ca = Some(pairs),
            Pairs::Id(_) => shares.pairs.id = Some(pairs),
        }
    }

    /// With how many other holders there are secrets for runs of `root`.
    #[must_use]
    pub fn pairs_count(&self, root: RootTag) -> usize {
        let shares = reading(&self.shares);
        shares.pairs.of(root).map_or(0, |pairs| {
            let without = pairs.missing().len().saturating_add(pairs.expelled().len()).saturating_add(1);
            pairs.members().len().saturating_sub(without)
        })
    }

    /// Holders with whom the secrets are lost and to be made anew; `None` where the root has no pairs, or none are in use yet.
    #[must_use]
    pub fn pairs_missing(&self, root: RootTag) -> Option<Vec<NodeIndex>> {
        reading(&self.shares).pairs.of(root).map(Pairs::missing)
    }

    /// No run of `root` with that peer any more, until this process ends (threshold.md §5.1).
    pub fn expel(&self, root: RootTag, peer: NodeIndex) -> bool {
        writing(&self.shares).pairs.change(root, |pairs| pairs.expel(peer))
    }

    /// Whom no run of `root` includes any more.
    #[must_use]
    pub fn expelled(&self, root: RootTag) -> Vec<NodeIndex> {
        reading(&self.shares).pairs.of(root).map(Pairs::expelled).unwrap_or_default()
    }

    /// The secrets with that peer are of another setup than the peer's: they are to be made anew.
    pub fn lose_pair(&self, root: RootTag, peer: NodeIndex) -> bool {
        writing(&self.shares).pairs.change(root, |pairs| pairs.lose(peer))
    }

    /// Takes over what a setup with one other holder gave.
    ///
    /// # Errors
    /// [`RefusalCode::SignerExpelled`]; [`RefusalCode::SignRun`] where it is not of this node and a holder.
    pub fn adopt_pair(&self, redone: Pairs) -> Result<NodeIndex, Refusal> {
        let mut outcome = Err(EcdsaError::OtherHolders);
        writing(&self.shares).pairs.change(redone.root(), |pairs| {
            outcome = pairs.adopt(redone);
            outcome.is_ok()
        });
        outcome.map_err(|error| {
            let code = if matches!(error, EcdsaError::Expelled(_)) { RefusalCode::SignerExpelled } else { RefusalCode::SignRun };
            Refusal::new(code, "secrets of a pair of this root's holders", error.to_string())
        })
    }

    /// What is to be sealed of `root` since it last was; asked once.
    pub(crate) fn pairs_to_seal(&self, root: RootTag) -> Option<SecretBytes> {
        let mut shares = writing(&self.shares);
        if !shares.pairs.unsealed.remove(&root) {
            return None;
        }
        shares.pairs.of(root)?.to_secret().ok()
    }
}
