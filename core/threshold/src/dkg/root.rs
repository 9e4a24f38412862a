//! A run whose group is known only from its root's tag and the cluster's `ca_alg`.
//!
//! Owns: which group a root's run lives in; the way from tags to the typed run and participant, and back to a typed share.
//! Never: mixes two groups: a participant of one root refuses the run of another. Source: threshold.md §0 "Roots", §3.

use dstack_protocol::ceremony::{InstHolder, MessageKind, Open};
use dstack_protocol::genesis::CaAlgorithm;
use dstack_protocol::{ClusterId, NodeIndex, RootTag};
use dstack_secret::{Locked, Secret};

use crate::dkg::ceremony::{Ceremony, CeremonyError, Progress, Stage};
use crate::dkg::deal::DealPackage;
use crate::dkg::encryption::EncryptionKey;
use crate::dkg::instance::{Instance, InstanceError};
use crate::dkg::participant::{Checked, Participant, ParticipantError};
use crate::dkg::sharing::Sharing;
use crate::group::{Edwards25519, Group, NistP256, Ristretto255, Secp256k1};
use crate::share::{CaShare, RootShare, ShareId};

/// The public result of a root's run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicSharing {
    /// Threshold.
    pub threshold: u16,
    /// Digest over all deals.
    pub transcript: [u8; 32],
    /// The root's public key.
    pub public_key: Vec<u8>,
    /// Verification key of every holder, ascending.
    pub verification_keys: Vec<(NodeIndex, Vec<u8>)>,
}

impl PublicSharing {
    fn of<G: Group>(sharing: &Sharing<G>) -> Self {
        Self {
            threshold: sharing.threshold(),
            transcript: sharing.transcript(),
            public_key: sharing.public_key(),
            verification_keys: sharing.verification_keys(),
        }
    }
}

/// The run of one root, as every node computes it from the log.
#[derive(Debug, Clone)]
pub enum RootRun {
    /// Of `prf`.
    Prf(Ceremony<Ristretto255>),
    /// Of `ca`, `ca_alg` ed25519.
    CaEd25519(Ceremony<Edwards25519>),
    /// Of `ca`, `ca_alg` p256.
    CaP256(Ceremony<NistP256>),
    /// Of `id`.
    Id(Ceremony<Secp256k1>),
}

macro_rules! each {
    ($self:expr, $enum:ident, $it:ident => $do:expr) => {
        match $self {
            $enum::Prf($it) => $do,
            $enum::CaEd25519($it) => $do,
            $enum::CaP256($it) => $do,
            $enum::Id($it) => $do,
        }
    };
}

impl RootRun {
    /// The run of `root` at its start, once every holder has joined. `holders`: ascending, with their keys for this root.
    ///
    /// # Errors
    /// [`InstanceError`].
    pub fn new(cluster_id: &ClusterId, open: &Open, root: RootTag, ca: CaAlgorithm, holders: &[InstHolder]) -> Result<Self, InstanceError> {
        Ok(match (root, ca) {
            (RootTag::Prf, _) => Self::Prf(Ceremony::new(Instance::new(cluster_id, open, root, holders)?)),
            (RootTag::Ca, CaAlgorithm::Ed25519) => Self::CaEd25519(Ceremony::new(Instance::new(cluster_id, open, root, holders)?)),
            (RootTag::Ca, CaAlgorithm::P256) => Self::CaP256(Ceremony::new(Instance::new(cluster_id, open, root, holders)?)),
            (RootTag::Id, _) => Self::Id(Ceremony::new(Instance::new(cluster_id, open, root, holders)?)),
        })
    }

    /// Whose run it is.
    #[must_use]
    pub fn root(&self) -> RootTag {
        match self {
            Self::Prf(_) => RootTag::Prf,
            Self::CaEd25519(_) | Self::CaP256(_) => RootTag::Ca,
            Self::Id(_) => RootTag::Id,
        }
    }

    /// The name that every message of the run carries.
    #[must_use]
    pub fn inst(&self) -> [u8; 32] {
        each!(self, Self, run => run.instance().inst())
    }

    /// Where the run is.
    #[must_use]
    pub fn stage(&self) -> Stage {
        each!(self, Self, run => run.stage())
    }

    /// Members whose message the stage waits for, ascending.
    #[must_use]
    pub fn missing(&self) -> Vec<NodeIndex> {
        each!(self, Self, run => run.missing())
    }

    /// Whether the holders set up secrets of each pair before they are Ready.
    #[must_use]
    pub fn has_pairwise_setup(&self) -> bool {
        each!(self, Self, run => run.instance().has_pairwise_setup())
    }

    /// Dealers and holders, ascending.
    #[must_use]
    pub fn members(&self) -> Vec<NodeIndex> {
        each!(self, Self, run => run.instance().members().collect())
    }

    /// Whether `index` takes part.
    #[must_use]
    pub fn is_member(&self, index: NodeIndex) -> bool {
        each!(self, Self, run => run.instance().is_member(index))
    }

    /// As [`Ceremony::apply`].
    ///
    /// # Errors
    /// [`CeremonyError`].
    pub fn apply(&mut self, kind: MessageKind, from: NodeIndex, body: &[u8]) -> Result<Progress, CeremonyError> {
        each!(self, Self, run => run.apply(kind, from, body))
    }

    /// The public result as soon as all deals are in and none was refused; before `Switched` it is not in force.
    #[must_use]
    pub fn dealt(&self) -> Option<PublicSharing> {
        each!(self, Self, run => run.deals().map(|(_, sharing)| PublicSharing::of(sharing)))
    }

    /// As [`Ceremony::switched`].
    ///
    /// # Errors
    /// [`CeremonyError::Incomplete`], [`CeremonyError::Ended`].
    pub fn switched(&self) -> Result<PublicSharing, CeremonyError> {
        each!(self, Self, run => run.switched().map(PublicSharing::of))
    }
}

/// One node in the run of one root.
#[derive(Debug)]
pub enum RootParticipant {
    /// Of `prf`.
    Prf(Participant<Ristretto255>),
    /// Of `ca`, `ca_alg` ed25519.
    CaEd25519(Participant<Edwards25519>),
    /// Of `ca`, `ca_alg` p256.
    CaP256(Participant<NistP256>),
    /// Of `id`.
    Id(Participant<Secp256k1>),
}

impl RootParticipant {
    /// Deals for `index`, as [`Participant::new`].
    ///
    /// # Errors
    /// [`ParticipantError::NotAMember`].
    pub fn new(run: &RootRun, index: NodeIndex, key: EncryptionKey, seed: Secret<64>) -> Result<Self, ParticipantError> {
        Ok(match run {
            RootRun::Prf(run) => Self::Prf(Participant::new(run.instance().clone(), index, key, seed)?),
            RootRun::CaEd25519(run) => Self::CaEd25519(Participant::new(run.instance().clone(), index, key, seed)?),
            RootRun::CaP256(run) => Self::CaP256(Participant::new(run.instance().clone(), index, key, seed)?),
            RootRun::Id(run) => Self::Id(Participant::new(run.instance().clone(), index, key, seed)?),
        })
    }

    /// As [`Participant::package`].
    #[must_use]
    pub fn package(&self) -> &DealPackage {
        each!(self, Self, participant => participant.package())
    }

    /// As [`Participant::check`].
    ///
    /// # Errors
    /// [`ParticipantError`]; the run of another root is [`ParticipantError::OtherRun`].
    pub fn check(&mut self, run: &RootRun) -> Result<Checked, ParticipantError> {
        match (self, run) {
            (Self::Prf(own), RootRun::Prf(run)) => own.check(run),
            (Self::CaEd25519(own), RootRun::CaEd25519(run)) => own.check(run),
            (Self::CaP256(own), RootRun::CaP256(run)) => own.check(run),
            (Self::Id(own), RootRun::Id(run)) => own.check(run),
            _ => Err(ParticipantError::OtherRun),
        }
    }

    /// As [`Participant::checked_share`].
    ///
    /// # Errors
    /// [`ParticipantError::NotChecked`].
    pub fn checked_share(&self) -> Result<(ShareId, Locked<32>), ParticipantError> {
        each!(self, Self, participant => participant.checked_share())
    }

    /// The share, once `Switched` is valid. Everything else of the run is wiped.
    ///
    /// # Errors
    /// [`ParticipantError`]; the participant is gone, the attempt with it.
    pub fn finish(self, run: &RootRun) -> Result<RootShare, ParticipantError> {
        match (self, run) {
            (Self::Prf(own), RootRun::Prf(run)) => own.finish(run)?.into_prf_share().map(RootShare::Prf).map_err(Into::into),
            (Self::CaEd25519(own), RootRun::CaEd25519(run)) => {
                own.finish(run)?.into_signing_share().map(CaShare::Ed25519).map(RootShare::Ca)
            }
            (Self::CaP256(own), RootRun::CaP256(run)) => own.finish(run)?.into_signing_share().map(CaShare::P256).map(RootShare::Ca),
            (Self::Id(own), RootRun::Id(run)) => own.finish(run)?.into_signing_share().map(RootShare::Id),
            _ => Err(ParticipantError::OtherRun),
        }
    }
}
