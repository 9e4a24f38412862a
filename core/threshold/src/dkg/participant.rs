//! The private side of a run: one node's secrets from Join to `Switched`.
//!
//! Owns: `dk_j`, the received sub-shares, the sum of them. The polynomial and the ephemeral scalars live only while dealing. Dropping
//! the participant, on abort or after [`Participant::finish`], wipes everything; nothing is persisted before.
//! Source: threshold.md §3 steps 2, 3 and 5.

use std::fmt;
use std::sync::Arc;

use dstack_protocol::NodeIndex;
use dstack_protocol::ceremony::{ComplainBody, ReadyBody};
use dstack_secret::{Locked, Secret};

use crate::dkg::ceremony::{Ceremony, CeremonyError};
use crate::dkg::complaint::complain;
use crate::dkg::deal::{DealPackage, deal};
use crate::dkg::encryption::{EncryptionKey, Envelope, Stream};
use crate::dkg::instance::Instance;
use crate::dkg::sharing::Sharing;
use crate::group::{Group, Ristretto255, SecretScalar};
use crate::prf::{PrfError, PrfShare};
use crate::share::{ShareId, SigningShare};
use crate::sign::Holders;

/// Why a participant cannot go on.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParticipantError {
    /// This node is no member, or its key is not the one in its Join. Our fault: the attempt will time out on us.
    #[error("node {0} does not take part with this key")]
    NotAMember(NodeIndex),
    /// The ceremony is another run.
    #[error("ceremony of another run")]
    OtherRun,
    /// The log has not all deals yet, or the run has ended.
    #[error("deals are not complete")]
    NotDealt,
    /// [`Participant::check`] has not accepted the deals of this run.
    #[error("sub-shares have not been checked")]
    NotChecked,
    /// `Switched` is not valid.
    #[error(transparent)]
    NotSwitched(#[from] CeremonyError),
    /// The share is not the one that the log states, which a checked run does not give.
    #[error(transparent)]
    NotAShare(#[from] PrfError),
}

/// What to post after all deals are in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Checked {
    /// Every sub-share is right.
    Ready(ReadyBody),
    /// These dealers' sub-shares are wrong; each complaint opens one of them. At least one.
    Complaints(Vec<ComplainBody>),
}

/// One node in one run.
pub struct Participant<G: Group> {
    instance: Instance<G>,
    index: NodeIndex,
    key: EncryptionKey,
    stream: Stream,
    package: DealPackage,
    share: Option<SecretScalar<G>>,
}

impl<G: Group> Participant<G> {
    /// Deals for `index`. `key`: the one whose public half is in its Join. `seed`: 64 fresh bytes from the operating system; the same
    /// seed gives the same deal.
    ///
    /// # Errors
    /// [`ParticipantError::NotAMember`].
    pub fn new(instance: Instance<G>, index: NodeIndex, key: EncryptionKey, seed: Secret<64>) -> Result<Self, ParticipantError> {
        if instance.key(index) != Some(key.element()) {
            return Err(ParticipantError::NotAMember(index));
        }
        let mut stream = Stream::new(seed, &instance.inst());
        let package = deal(&instance, index, &mut stream);
        Ok(Self { instance, index, key, stream, package, share: None })
    }

    /// What to publish: the commit at once, the body when all commits are in the log.
    #[must_use]
    pub fn package(&self) -> &DealPackage {
        &self.package
    }

    /// Opens and checks every sub-share for this node, once all deals are in the log.
    ///
    /// # Errors
    /// [`ParticipantError::OtherRun`], [`ParticipantError::NotDealt`].
    pub fn check(&mut self, ceremony: &Ceremony<G>) -> Result<Checked, ParticipantError> {
        if *ceremony.instance() != self.instance {
            return Err(ParticipantError::OtherRun);
        }
        let (deals, sharing) = ceremony.deals().ok_or(ParticipantError::NotDealt)?;
        let inst = self.instance.inst();
        let mut sum = SecretScalar::new(G::scalar_from_u64(0));
        let mut complaints = Vec::new();
        for (dealer, deal) in deals {
            let sealed = deal.shares.get(&self.index).ok_or(ParticipantError::NotDealt)?;
            let envelope =
                Envelope { inst: &inst, dealer: *dealer, recipient: self.index, ephemeral: &sealed.ephemeral, key: self.key.element() };
            match envelope.open(&self.key.shared(&sealed.ephemeral), &sealed.ct, &deal.commitment) {
                Ok(subshare) => sum.accumulate(&subshare),
                Err(_) => {
                    let rng = self.stream.bytes();
                    complaints.push(complain(*dealer, &self.key, &sealed.ephemeral, &rng));
                }
            }
        }
        if !complaints.is_empty() {
            return Ok(Checked::Complaints(complaints));
        }
        let ready = sharing.ready_body(self.index).ok_or(ParticipantError::NotAMember(self.index))?;
        assert!(
            Some(&sum.public()) == sharing.verification_key(self.index),
            "sub-shares that match their commitments sum to the share of the summed commitment"
        );
        self.share = Some(sum);
        Ok(Checked::Ready(ready))
    }

    /// The share that the checked deals give this node, before `Switched`: to seal it.
    ///
    /// # Errors
    /// [`ParticipantError::NotChecked`].
    pub fn checked_share(&self) -> Result<(ShareId, Locked<32>), ParticipantError> {
        let share = self.share.as_ref().ok_or(ParticipantError::NotChecked)?;
        Ok((self.instance.share_id(self.index), Locked::new(share.to_secret())))
    }

    /// The share, once `Switched` is valid. Everything else of the run is wiped.
    ///
    /// # Errors
    /// [`ParticipantError`]; the participant is gone, the attempt with it.
    pub fn finish(self, ceremony: &Ceremony<G>) -> Result<Outcome<G>, ParticipantError> {
        if *ceremony.instance() != self.instance {
            return Err(ParticipantError::OtherRun);
        }
        let sharing = ceremony.switched()?.clone();
        let share = self.share.as_ref().ok_or(ParticipantError::NotChecked)?;
        if Some(&share.public()) != sharing.verification_key(self.index) {
            return Err(ParticipantError::NotChecked);
        }
        Ok(Outcome { index: self.index, share: share.to_secret(), instance: self.instance, sharing })
    }
}

impl<G: Group> fmt::Debug for Participant<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Participant").field("index", &self.index).finish_non_exhaustive()
    }
}

/// What a node takes away from a run.
pub struct Outcome<G: Group> {
    index: NodeIndex,
    share: Secret<32>,
    instance: Instance<G>,
    sharing: Sharing<G>,
}

impl<G: Group> Outcome<G> {
    /// The public result.
    #[must_use]
    pub fn sharing(&self) -> &Sharing<G> {
        &self.sharing
    }

    /// The node's share `s_j`, canonical encoding.
    #[must_use]
    pub fn share(&self) -> &Secret<32> {
        &self.share
    }
}

impl<G: Group> Outcome<G> {
    /// The share of a signing root, in locked memory.
    ///
    /// # Errors
    /// [`ParticipantError::NotAShare`], which a checked run does not give.
    pub(super) fn into_signing_share(self) -> Result<SigningShare<G>, ParticipantError> {
        let not = ParticipantError::NotAShare(PrfError::NotAShare(self.index));
        SigningShare::new(self.instance.share_id(self.index), Arc::new(Holders::of(&self.sharing)), self.share).ok_or(not)
    }
}

impl Outcome<Ristretto255> {
    /// The share of root `prf`, in locked memory, ready to evaluate.
    ///
    /// # Errors
    /// [`PrfError::NotAShare`], which a checked run does not give.
    pub fn into_prf_share(self) -> Result<PrfShare, PrfError> {
        let vk = self.sharing.verification_key(self.index).map(Ristretto255::encode).ok_or(PrfError::NotAShare(self.index))?;
        PrfShare::new(self.index, self.instance.generation(), self.instance.epoch(), self.share, &vk)
    }
}

impl<G: Group> fmt::Debug for Outcome<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outcome").field("index", &self.index).finish_non_exhaustive()
    }
}
