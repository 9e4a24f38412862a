//! Whether a request comes from the session that its evidence commits to.
//!
//! Owns: evidence hash, report data, signature and the proof that it was checked. Never: verifies evidence (`attest` did), judges policy.
//! Source: threshold.md §2.2 "Session".

use std::sync::Arc;

use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
use dstack_protocol::release::{Ask, RelReq};
use dstack_protocol::{ClusterId, Refusal, RefusalCode, Wire, binding};
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

/// Checks that `evidence` is what the request names.
///
/// # Errors
/// [`RefusalCode::EvidenceHash`].
pub fn check_evidence_hash(request: &RelReq, evidence: &[u8]) -> Result<(), Refusal> {
    let got = binding::evidence_hash(evidence);
    if got == request.evidence_hash {
        return Ok(());
    }
    Err(Refusal::new(RefusalCode::EvidenceHash, hex(&request.evidence_hash), hex(&got)))
}

/// Checks that the verified report data commits to this cluster, the session's beacon and the session's key.
///
/// # Errors
/// [`RefusalCode::SessionMismatch`].
pub fn check_session(cluster_id: &ClusterId, ask: &Ask, report_data: &[u8; 64], session_beacon: &[u8; 32]) -> Result<(), Refusal> {
    let expected = binding::session(cluster_id, ask.session_pos, session_beacon, &ask.spki);
    if expected == *report_data {
        return Ok(());
    }
    Err(Refusal::new(RefusalCode::SessionMismatch, hex(&expected), hex(report_data)))
}

/// The proof that this node checked a request's signature: what [`crate::clear`] asks for, so that no partial leaves without it.
///
/// threshold.md §2.2: "`sig` verifies (every time)". Each request that a holder is handed is checked there, once: the proof holds exactly
/// the bytes that were checked, nothing in it can be changed, and it cannot cross a wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedAsk {
    ask: Arc<Ask>,
}

impl SignedAsk {
    /// Checks the request's signature by the session's P-256 key. `sig` is over the digest `req_hash`, which is the SHA-256 of the
    /// request's encoding, so the whole encoding is what ECDSA with SHA-256 verifies. The only way to a proof.
    ///
    /// # Errors
    /// [`RefusalCode::BadSignature`].
    pub fn check(ask: Arc<Ask>) -> Result<Self, Refusal> {
        let refuse = |got: &str| Refusal::new(RefusalCode::BadSignature, "ECDSA P-256 by the session's key over req_hash", got);
        let (rest, spki) = SubjectPublicKeyInfo::from_der(&ask.spki).map_err(|_| refuse("an SPKI that does not parse"))?;
        if !rest.is_empty() {
            return Err(refuse("bytes after the SPKI"));
        }
        let point: &[u8] = &spki.subject_public_key.data;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point)
            .verify(&ask.request.encode(), &ask.sig)
            .map_err(|_| refuse("a signature that does not verify"))?;
        Ok(Self { ask })
    }

    /// The request.
    #[must_use]
    pub fn ask(&self) -> &Ask {
        &self.ask
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
