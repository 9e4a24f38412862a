//! Who calls: what the client's certificate proves. Owns: judging it for a request, upstream's text where it does not hold. Never: what
//! the caller may do. Source: KMS API reference §2, attestation reference §3.

use std::sync::Arc;

use dstack_attest::VerifiedIdentity;
use dstack_protocol::binding;
use dstack_prpc::RpcError;
use dstack_ratls::ShownEvidence;
use dstack_ratls::dstack_server::DstackPeer;

use super::Dstack;
use super::serve::{error_of, prefixed};

/// The caller of one request.
pub(super) struct Caller {
    /// What its certificate proves; `None` for an anonymous caller.
    pub(super) attested: Option<Attested>,
}

/// A caller with evidence that holds and is bound to its TLS key.
pub(super) struct Attested {
    /// What the evidence proves.
    pub(super) identity: Arc<VerifiedIdentity>,
    /// The evidence and the key.
    pub(super) shown: ShownEvidence,
}

impl Caller {
    /// Judges what the connection showed.
    pub(super) async fn of(dstack: &Dstack, peer: &DstackPeer) -> Result<Self, RpcError> {
        let Some(shown) = peer.shown.clone() else { return Ok(Self { attested: None }) };
        let now = (dstack.parts.now)();
        let known = peer.identity.clone().filter(|identity| identity.earliest_expiry() > now);
        let identity = match known {
            Some(identity) => identity,
            None => verified(dstack, &shown.evidence, &shown.spki, "invalid quote").await?,
        };
        Ok(Self { attested: Some(Attested { identity, shown }) })
    }
}

/// Verifies evidence that is bound to `spki`; `prefix`: upstream's text where it does not hold.
pub(super) async fn verified(dstack: &Dstack, evidence: &Arc<[u8]>, spki: &[u8], prefix: &str) -> Result<Arc<VerifiedIdentity>, RpcError> {
    let verdict = dstack.parts.holder.verify(Arc::clone(evidence)).await;
    let identity = verdict.map_err(|refusal| prefixed(prefix, error_of(&refusal)))?;
    if *identity.report_data() != binding::ratls_certificate(spki) {
        return Err(RpcError::refused(format!(
            "{prefix}: report data is not that of the public key: it must be SHA-512(\"ratls-cert:\" ‖ SPKI)"
        )));
    }
    Ok(identity)
}
