//! Threshold ECDSA as the rest of the system sees it: one trait, its messages, its errors, the signature.
//!
//! Owns: the interface behind which the engine can be exchanged, and the verification of what it makes by another implementation.
//! Never: knows the engine ([`crate::sign::dkls`] does). Source: threshold.md §5.1.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use dkls23_core::curve::DklsCurve;
use dstack_protocol::NodeIndex;
use dstack_protocol::codec::DecodeError;
use dstack_secret::{Locked, SecretBytes};
use k256::elliptic_curve::{self, CurveArithmetic};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::group::{Group, NistP256, Secp256k1};
use crate::sign::{HoldersError, RootShare, Run};

/// A threshold ECDSA engine over one group.
pub trait ThresholdEcdsa {
    /// The root's group.
    type Group: Group;
    /// A setup in progress.
    type Setup: Rounds<Output = Self::Pairwise>;
    /// What a setup leaves: secrets with every other holder, for all runs of one epoch.
    type Pairwise;
    /// A signing run in progress.
    type Signing: Rounds<Output = EcdsaSignature>;

    /// The share of our own key generation, checked against the holders' public side.
    ///
    /// # Errors
    /// [`HoldersError`].
    fn import_share(
        index: NodeIndex,
        holders: Arc<crate::sign::Holders<Self::Group>>,
        share: Locked<32>,
    ) -> Result<RootShare<Self::Group>, HoldersError>;

    /// Begins the pairwise setup of `index` with all other `members` (ascending). `inst`: the name of the ceremony; a setup that
    /// starts over needs another name.
    ///
    /// # Errors
    /// [`EcdsaError`].
    fn setup(inst: [u8; 32], index: NodeIndex, members: &[NodeIndex]) -> Result<(Self::Setup, Vec<Outgoing>), EcdsaError>;

    /// Begins a run over `digest`, which the caller computed from typed fields.
    ///
    /// # Errors
    /// [`EcdsaError`].
    fn sign(
        share: &RootShare<Self::Group>,
        pairwise: &Self::Pairwise,
        run: &Run,
        digest: [u8; 32],
    ) -> Result<(Self::Signing, Vec<Outgoing>), EcdsaError>;
}

/// A machine between participants that send each other one message a round.
pub trait Rounds {
    /// What it ends with.
    type Output;

    /// Takes a message that arrived over the connection of node `from`.
    ///
    /// # Errors
    /// [`EcdsaError`]; [`EcdsaError::ends_run`] tells whether the machine is destroyed.
    fn receive(&mut self, from: NodeIndex, message: &[u8]) -> Result<Progress<Self::Output>, EcdsaError>;

    /// Whose message the machine waits for now, ascending. Empty after its end.
    fn missing(&self) -> Vec<NodeIndex>;

    /// Whether `peer` takes part.
    fn involves(&self, peer: NodeIndex) -> bool;
}

/// What a message led to. Both can be there at once.
#[derive(Debug)]
pub struct Progress<T> {
    /// To be sent, each to its own recipient only.
    pub send: Vec<Outgoing>,
    /// The machine's end.
    pub done: Option<T>,
}

impl<T> Progress<T> {
    pub(crate) fn waiting() -> Self {
        Self { send: Vec::new(), done: None }
    }
}

/// A message for one other participant. It may hold secrets of the pair: encrypted connection, no relay, wiped on drop.
#[derive(Debug)]
pub struct Outgoing {
    /// The recipient.
    pub to: NodeIndex,
    /// The bytes.
    pub bytes: SecretBytes,
}

/// An ECDSA signature with low `s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EcdsaSignature {
    /// The x coordinate of R modulo the order, big-endian.
    pub r: [u8; 32],
    /// Big-endian, at most half the order.
    pub s: [u8; 32],
    /// Bit 0: R has an odd y. Bit 1: R's x exceeds the order.
    pub recid: u8,
}

impl EcdsaSignature {
    /// `r(32) ‖ s(32) ‖ recid(1)`.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 65] {
        let mut bytes = [0; 65];
        for (to, from) in bytes.iter_mut().zip(self.r.iter().chain(&self.s).chain([&self.recid])) {
            *to = *from;
        }
        bytes
    }

    /// `r(32) ‖ s(32)`.
    #[must_use]
    pub fn to_rs(&self) -> [u8; 64] {
        let mut bytes = [0; 64];
        for (to, from) in bytes.iter_mut().zip(self.r.iter().chain(&self.s)) {
            *to = *from;
        }
        bytes
    }
}

/// Why a machine refuses a message or has come to its end.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EcdsaError {
    /// The signers are not exactly `t` holders of the root. The fault of who chose them.
    #[error("{got} signers that are not exactly {threshold} holders of the root")]
    Signers {
        /// Threshold.
        threshold: u16,
        /// How many signers the run names.
        got: usize,
    },
    /// This node does not take part.
    #[error("node {0} does not take part")]
    NotAMember(NodeIndex),
    /// Members of a setup are 2 to 64 indices of nodes, ascending.
    #[error("members are not 2 to 64 ascending indices of nodes")]
    Members,
    /// The pairwise state belongs to other holders than the share. The caller's fault.
    #[error("the pairwise setup is that of other holders")]
    OtherHolders,
    /// No run with that node any more: it cheated in the oblivious-transfer part (threshold.md §5.1).
    #[error("node {0} is expelled from this setup: it cheated")]
    Expelled(NodeIndex),
    /// No secrets with that node: they were lost, and a setup with it makes new ones. Retry after that, or with others.
    #[error("no secrets with node {0}: they are to be made anew")]
    NoPair(NodeIndex),
    /// A stored pairwise state that does not decode. The file's fault: a new setup is needed.
    #[error("pairwise state: {0}")]
    State(DecodeError),
    /// The engine's message did not serialize. An error of ours.
    #[error("a message of the engine does not serialize")]
    Encode,

    /// Not an envelope. Whoever sent it is at fault; the run goes on.
    #[error("envelope: {0}")]
    Envelope(#[from] DecodeError),
    /// A message of another run. The run goes on.
    #[error("message of another run")]
    OtherRun,
    /// A message for another participant. The run goes on.
    #[error("message for node {to}")]
    NotForUs {
        /// Its recipient.
        to: NodeIndex,
    },
    /// A message under another index than its sender's. The run goes on.
    #[error("node {peer} sent a message of node {claimed}")]
    Sender {
        /// Who sent it.
        peer: NodeIndex,
        /// Whom it names as author.
        claimed: NodeIndex,
    },
    /// A message of a node that takes no part. The run goes on.
    #[error("node {0} takes no part")]
    Stranger(NodeIndex),
    /// The first message of a peer and round counts. The run goes on.
    #[error("node {peer} has sent its message of round {round} already")]
    Duplicate {
        /// Author.
        peer: NodeIndex,
        /// Round.
        round: u8,
    },

    /// A body that is not of its round. That node's fault; the run has ended.
    #[error("message of node {peer}: {error}")]
    Malformed {
        /// Author.
        peer: NodeIndex,
        /// What is wrong.
        error: DecodeError,
    },
    /// A proof or an opening of a setup is wrong. That node's fault; the setup has ended, nothing of it was used yet.
    #[error("setup with node {peer}: {reason}")]
    SetupFault {
        /// Who sent it.
        peer: NodeIndex,
        /// What is wrong.
        reason: &'static str,
    },
    /// Two nodes state different transcripts of their setup with each other: one of them lies. The setup has ended.
    #[error("nodes {0} and {1} state different transcripts of their setup")]
    SetupDiffers(NodeIndex, NodeIndex),
    /// That node signs another digest, or has another setup. The run has ended; retry after both agree.
    #[error("node {0} signs another digest or holds another setup")]
    Mismatch(NodeIndex),
    /// That node holds secrets of another setup of the pair than this one. The run has ended, nothing of them was used; a setup between
    /// the two makes new ones.
    #[error("node {0} holds secrets of another setup of our pair")]
    OtherPair(NodeIndex),
    /// That node cheated, or its state is broken, in the oblivious-transfer part: the run has ended, every run with it must end, and
    /// it is to be expelled. Each retry with it would leak bits of the long-lived correlation.
    #[error("node {peer} fails a check of the oblivious transfer: {reason}; end every run with it")]
    Cheated {
        /// Who.
        peer: NodeIndex,
        /// The check.
        reason: String,
    },
    /// The engine gave up without damage. The run has ended; retry.
    #[error("aborted: {reason}")]
    Aborted {
        /// Who is at fault, where that is known.
        peer: Option<NodeIndex>,
        /// Why.
        reason: String,
    },
    /// What came out does not verify: some signer sent a wrong last message, nobody can tell who. The run has ended.
    #[error("the combined signature does not verify")]
    BadSignature,
    /// The engine panicked on that node's bytes: a fault of the engine, found by them. The run has ended.
    #[error("the engine failed on a message of node {0}")]
    EngineFailed(NodeIndex),
    /// The machine ended before.
    #[error("the run has ended")]
    Ended,
}

impl EcdsaError {
    /// Whether the machine is destroyed. If not, the message had no effect.
    #[must_use]
    pub fn ends_run(&self) -> bool {
        match self {
            Self::Envelope(_)
            | Self::OtherRun
            | Self::NotForUs { .. }
            | Self::Sender { .. }
            | Self::Stranger(_)
            | Self::Duplicate { .. } => false,
            Self::Signers { .. }
            | Self::NotAMember(_)
            | Self::Members
            | Self::OtherHolders
            | Self::Expelled(_)
            | Self::NoPair(_)
            | Self::OtherPair(_)
            | Self::State(_)
            | Self::Encode
            | Self::Malformed { .. }
            | Self::SetupFault { .. }
            | Self::SetupDiffers(..)
            | Self::Mismatch(_)
            | Self::Cheated { .. }
            | Self::Aborted { .. }
            | Self::BadSignature
            | Self::EngineFailed(_)
            | Self::Ended => true,
        }
    }

    /// The participant that is at fault, where that is known.
    #[must_use]
    pub fn culprit(&self) -> Option<NodeIndex> {
        match self {
            Self::Sender { peer, .. }
            | Self::Malformed { peer, .. }
            | Self::SetupFault { peer, .. }
            | Self::Cheated { peer, .. }
            | Self::Stranger(peer)
            | Self::EngineFailed(peer)
            | Self::Expelled(peer) => Some(*peer),
            Self::Aborted { peer, .. } => *peer,
            Self::Signers { .. }
            | Self::NotAMember(_)
            | Self::Members
            | Self::OtherHolders
            | Self::NoPair(_)
            | Self::OtherPair(_)
            | Self::State(_)
            | Self::Encode
            | Self::Envelope(_)
            | Self::OtherRun
            | Self::NotForUs { .. }
            | Self::Duplicate { .. }
            | Self::SetupDiffers(..)
            | Self::Mismatch(_)
            | Self::BadSignature
            | Self::Ended => None,
        }
    }

    /// The node that no run may include any more (threshold.md §5.1).
    #[must_use]
    pub fn must_expel(&self) -> Option<NodeIndex> {
        if let Self::Cheated { peer, .. } = self { Some(*peer) } else { None }
    }

    /// The node whose pair with this one is to be made anew (ADR 0029).
    #[must_use]
    pub fn must_redo(&self) -> Option<NodeIndex> {
        if let Self::OtherPair(peer) = self { Some(*peer) } else { None }
    }
}

/// Runs a step of a machine on the bytes of `peer`; a panic of the engine becomes an error that ends the run. The caller destroys the
/// state, so nothing half done is used again.
pub(crate) fn guarded<T>(peer: NodeIndex, step: impl FnOnce() -> Result<T, EcdsaError>) -> Result<T, EcdsaError> {
    catch_unwind(AssertUnwindSafe(step)).unwrap_or(Err(EcdsaError::EngineFailed(peer)))
}

/// A group whose curve the engine and an independent ECDSA implementation both know.
pub trait EcdsaGroup: Group<Scalar = elliptic_curve::Scalar<Self::Curve>, Element = elliptic_curve::ProjectivePoint<Self::Curve>> {
    /// The curve.
    type Curve: DklsCurve
        + CurveArithmetic<
            AffinePoint: Serialize + DeserializeOwned + Send + Sync,
            Scalar: Serialize + DeserializeOwned + Send + Sync,
            ProjectivePoint: From<elliptic_curve::AffinePoint<Self::Curve>>,
        >;

    /// Whether `signature` is one of `digest` under `public_key`, with low `s` and the right recovery id.
    fn verify(public_key: &Self::Element, digest: &[u8; 32], signature: &EcdsaSignature) -> bool;
}

macro_rules! ecdsa_group {
    ($group:ident, $curve:ident, $name:ident) => {
        impl EcdsaGroup for $group {
            type Curve = $curve::$name;

            fn verify(public_key: &Self::Element, digest: &[u8; 32], signature: &EcdsaSignature) -> bool {
                use $curve::ecdsa::signature::hazmat::PrehashVerifier as _;
                use $curve::ecdsa::{RecoveryId, Signature, VerifyingKey};
                let Ok(key) = VerifyingKey::from_affine(public_key.to_affine()) else { return false };
                let Ok(parsed) = Signature::from_scalars(signature.r, signature.s) else { return false };
                let low = parsed.normalize_s() == parsed;
                let recovered = RecoveryId::from_byte(signature.recid)
                    .and_then(|recid| VerifyingKey::recover_from_prehash(digest, &parsed, recid).ok());
                low && key.verify_prehash(digest, &parsed).is_ok() && recovered == Some(key)
            }
        }
    };
}

ecdsa_group!(Secp256k1, k256, Secp256k1);
ecdsa_group!(NistP256, p256, NistP256);

impl fmt::Display for EcdsaSignature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::panic, reason = "that is what is caught")]
    fn a_panic_of_the_engine_ends_the_run_and_nothing_else() {
        let failed = guarded(NodeIndex(2), || -> Result<(), EcdsaError> { panic!("a vector of a length that nobody checked") });
        assert_eq!(failed, Err(EcdsaError::EngineFailed(NodeIndex(2))));
        assert!(EcdsaError::EngineFailed(NodeIndex(2)).ends_run());
        assert_eq!(guarded(NodeIndex(2), || Ok(5)), Ok(5));
    }

    #[test]
    fn a_signature_has_one_form() {
        let signature = EcdsaSignature { r: [1; 32], s: [2; 32], recid: 1 };
        assert_eq!(signature.to_bytes()[..], [&[1; 32][..], &[2; 32], &[1]].concat());
        assert_eq!(signature.to_rs()[..], signature.to_bytes()[..64]);
        assert_eq!(signature.to_string(), format!("{}{}01", "01".repeat(32), "02".repeat(32)));
    }
}
