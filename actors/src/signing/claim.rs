//! Whether an app's claim to its secp256k1 key holds: what every signer checks of it (threshold.md §5.1).
//!
//! Owns: the order of the checks. Never: takes the coordinator's word; beacon, policy and collateral are those of this node's own state.

use std::sync::Arc;

use dstack_certificates::identity;
use dstack_policy::{Permit, Rules, decide};
use dstack_protocol::codec::sha256;
use dstack_protocol::limits::BEACON_FRESH_MS_MAX;
use dstack_protocol::policy::AppPolicy;
use dstack_protocol::release::{KeyClass, Mode, RelReq, Wish};
use dstack_protocol::sign::AppPkClaim;
use dstack_protocol::state::State;
use dstack_protocol::{ClusterId, Refusal, RefusalCode, Wire};

use super::signer::ClaimJudge;
use crate::authority::OwnAuthority;
use crate::ports::{Log, read};
use crate::verifier::VerifierPool;

/// A judge of claims over this node's state. `evidence`: the bounded pool that judges guests' evidence, a full one refuses at once.
/// `authority`: this node's own, if it has one.
#[must_use]
pub fn judge(cluster_id: ClusterId, log: Arc<dyn Log>, evidence: VerifierPool, authority: Option<OwnAuthority>) -> ClaimJudge {
    Arc::new(move |bytes| {
        let (log, evidence, authority) = (Arc::clone(&log), evidence.clone(), authority.clone());
        Box::pin(async move { check(&cluster_id, &*log, &evidence, authority.as_ref(), AppPkClaim::decode(&bytes)?).await })
    })
}

fn invalid(expected: &str, got: impl ToString) -> Refusal {
    Refusal::new(RefusalCode::ClaimInvalid, expected, got.to_string())
}

/// Signature by the key, a fresh beacon of this log, evidence that binds the claim, of the app, allowed by its policy.
///
/// # Errors
/// The first rule broken.
async fn check(
    cluster_id: &ClusterId,
    log: &dyn Log,
    evidence: &VerifierPool,
    authority: Option<&OwnAuthority>,
    claim: AppPkClaim,
) -> Result<(), Refusal> {
    identity::verify_plain(&claim.app_pk, &claim.digest(cluster_id), &claim.sig)
        .map_err(|error| invalid("a signature by the key", error))?;
    // What costs nothing comes before the evidence: an unknown app, an old beacon.
    let collateral_id = read(log, |state| policy(state, &claim).and_then(|_| fresh(state, &claim)).map(|()| state.collateral_id))??;
    let identity = evidence.verify(Arc::from(claim.evidence.as_slice()), collateral_id).await?;
    if identity.report_data() != &claim.report_data(cluster_id) {
        return Err(invalid("evidence that binds this claim", "evidence of something else"));
    }
    // The app's policy decides as it does of a release of the very key that is claimed.
    let request = RelReq {
        cluster_id: *cluster_id,
        generation: claim.generation,
        beacon_pos: claim.beacon_pos,
        beacon: claim.beacon,
        mode: Mode::Client,
        evidence_hash: sha256(&[b"DKMS-V1-EVIDENCE", &claim.evidence]),
        epk: [0; 32],
        nonce: [0; 32],
        app_id: claim.app_id,
        wishes: vec![Wish::new(KeyClass::K256, Vec::new())?],
    };
    let decided = |permit: Option<&Permit>| {
        read(log, |state| {
            let (policy, policy_hash) = policy(state, &claim)?;
            let rules = Rules {
                policy: &policy,
                policy_hash,
                revoked: &state.governance.revoked,
                log_time: state.log_time,
                tcb_known: &state.tcb_known,
                permit,
            };
            decide(&identity, &request, rules).map(drop)
        })?
    };
    match (decided(None), authority) {
        (Err(refusal), Some(authority)) if refusal.code == RefusalCode::AuthorityMissing => {
            decided(Some(&authority.permit(&request, &identity).await?))
        }
        (judged, _) => judged,
    }
}

fn fresh(state: &State, claim: &AppPkClaim) -> Result<(), Refusal> {
    let beacon = state.beacons.get(&claim.beacon_pos).filter(|row| row.value == claim.beacon);
    let beacon = beacon.ok_or_else(|| invalid("a beacon of this log", format!("position {}", claim.beacon_pos)))?;
    let age_ms = state.log_time.since(beacon.log_time);
    if age_ms > BEACON_FRESH_MS_MAX {
        return Err(invalid("a beacon at most 120 s old", format!("{age_ms} ms")));
    }
    Ok(())
}

fn policy(state: &State, claim: &AppPkClaim) -> Result<(AppPolicy, [u8; 32]), Refusal> {
    let unserved = |code| Refusal::new(code, "an app that may be served", claim.app_id.to_string());
    let app = state.app(&claim.app_id).map_err(unserved)?;
    let policy = state.policies.get(&app.policy_hash).and_then(|blob| AppPolicy::decode(&blob.0).ok());
    let policy = policy.ok_or_else(|| Refusal::new(RefusalCode::Internal, "the policy in force", hex(&app.policy_hash)))?;
    Ok((policy, app.policy_hash))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
