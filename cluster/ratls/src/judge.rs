//! Who says that a peer's evidence holds. Owns: the question and the reasons of a no. Never: what the peer may do then.

use std::sync::Arc;

use dstack_attest::VerifiedIdentity;

use crate::peer::{PeerCertificate, PeerRole};

/// Judges the evidence of a peer during the handshake.
///
/// Runs on a guarded thread of this crate, where a panic refuses the one handshake. It may block for as long as a
/// verification takes, never on the network.
pub trait EvidenceJudge: Send + Sync {
    /// The identity that the evidence proves, bound to the certificate's key.
    ///
    /// # Errors
    /// [`JudgeError`]: why the peer is refused.
    fn judge(&self, certificate: &PeerCertificate<'_>) -> Result<Arc<VerifiedIdentity>, JudgeError>;
}

/// Why a peer's certificate is refused.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum JudgeError {
    /// The certificate is larger than allowed. Peer's fault.
    #[error("certificate has {size_bytes} bytes, the limit is {limit_bytes}")]
    TooLarge {
        /// Its size.
        size_bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
    /// The certificate is not of the form that carries evidence. Peer's fault.
    #[error("certificate refused: {reason}")]
    Certificate {
        /// What is wrong.
        reason: &'static str,
    },
    /// The certificate is not valid now. Peer's fault, or a clock's.
    #[error("certificate is valid from {not_before} to {not_after}, now is {now} (unix ms)")]
    Validity {
        /// Begin.
        not_before: u64,
        /// End.
        not_after: u64,
        /// Our clock.
        now: u64,
    },
    /// The certificate has no evidence. Peer's fault.
    #[error("certificate carries no evidence")]
    NoEvidence,
    /// The evidence was made for another key, cluster or beacon. Peer's fault.
    #[error("evidence is not bound to this certificate: report data differs")]
    Binding,
    /// A session certificate where none is allowed. Peer's fault.
    #[error("session certificate shown as {role:?}")]
    SessionNotAllowed {
        /// In which role it was shown.
        role: PeerRole,
    },
    /// The session names a beacon that this node does not know: too old, or not yet applied here. Try another node.
    #[error("no beacon at position {beacon_pos}")]
    UnknownBeacon {
        /// As named by the certificate.
        beacon_pos: u64,
    },
    /// The evidence does not verify. Peer's fault, or our collateral is stale; the class says which.
    #[error("evidence refused ({class}): {detail}")]
    Evidence {
        /// Refusal class of the attestation crate.
        class: &'static str,
        /// Its message.
        detail: String,
    },
    /// Collateral of the bundle is over. Ours to fix: pin fresh collateral. (A document that is over is evidence that is refused.)
    #[error("{part} expired at {expired_at_ms}, judged at {now_ms} (unix ms)")]
    CollateralExpired {
        /// What is over.
        part: &'static str,
        /// Since when.
        expired_at_ms: u64,
        /// Time of judgement.
        now_ms: u64,
    },
    /// The bundle that the log names is not at hand. Ours: this node is behind, or its state is damaged.
    #[error("no collateral bundle {id} at hand")]
    CollateralMissing {
        /// Its id, hex.
        id: String,
    },
    /// The evidence holds under collateral beyond its hard maximum age. Ours to fix: pin fresh collateral.
    #[error("collateral issued at {issued_ms} is older than {age_ms_max} ms at {now_ms} (unix ms)")]
    CollateralTooOld {
        /// When its oldest renewed part was issued.
        issued_ms: u64,
        /// The maximum.
        age_ms_max: u64,
        /// Time of judgement.
        now_ms: u64,
    },
    /// The evidence holds, and the identity is not one we talk to. Peer's fault, or ours: a wrong list.
    #[error("identity not accepted: {reason}")]
    NotAccepted {
        /// What was expected and what came.
        reason: String,
    },
    /// Too many certificates wait for verification. Nobody's fault: retry later.
    #[error("verification queue is full")]
    Busy,
    /// The parser panicked on these bytes. Our bug; alarm.
    #[error("parser failed on this certificate")]
    ParserFailed,
}

impl JudgeError {
    /// Stable short name.
    pub fn code(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "judge.too_large",
            Self::Certificate { .. } => "judge.certificate",
            Self::Validity { .. } => "judge.validity",
            Self::NoEvidence => "judge.no_evidence",
            Self::Binding => "judge.binding",
            Self::SessionNotAllowed { .. } => "judge.session_not_allowed",
            Self::UnknownBeacon { .. } => "judge.unknown_beacon",
            Self::Evidence { .. } => "judge.evidence",
            Self::CollateralExpired { .. } => "judge.collateral_expired",
            Self::CollateralMissing { .. } => "judge.collateral_missing",
            Self::CollateralTooOld { .. } => "judge.collateral_too_old",
            Self::NotAccepted { .. } => "judge.not_accepted",
            Self::Busy => "judge.busy",
            Self::ParserFailed => "judge.parser_failed",
        }
    }
}
