//! Whether a request comes from the session that its evidence commits to.
//!
//! Owns: evidence hash and report data. Never: verifies evidence (`attest` did), judges policy.
//! Source: threshold.md §2.2 "Session".

use dstack_protocol::release::{Ask, RelReq};
use dstack_protocol::{ClusterId, Refusal, RefusalCode, binding};

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

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
