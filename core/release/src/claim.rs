//! An app's claim to its secp256k1 key (mode C): what each signer checks before it lends its share.
//!
//! Owns: signature, freshness, binding, the app's policy. Never: verifies evidence (who calls has the verdict), reads a clock.
//! Source: threshold.md §5.1.

use dstack_attest::VerifiedIdentity;
use dstack_policy::{Rules, decide};
use dstack_protocol::limits::BEACON_FRESH_MS_MAX;
use dstack_protocol::release::{KeyClass, Mode, RelReq, Wish};
use dstack_protocol::sign::AppPkClaim;
use dstack_protocol::state::BeaconRow;
use dstack_protocol::{ClusterId, Refusal, RefusalCode, UnixMillis, binding};
use k256::ecdsa::signature::hazmat::PrehashVerifier as _;
use k256::ecdsa::{Signature, VerifyingKey};

/// What the log says of a claim's beacon, at the moment that judges it: for a signer that is the log time of the ask's row.
#[derive(Debug, Clone, Copy)]
pub struct At<'a> {
    /// The beacon at the claim's position.
    pub beacon: Option<&'a BeaconRow>,
    /// Log time.
    pub log_time: UnixMillis,
}

/// Judges a claim whose evidence verified as `identity`: as a request for class 0x03 of that app would be judged.
///
/// # Errors
/// [`RefusalCode::ClaimInvalid`], [`RefusalCode::UnknownBeacon`], [`RefusalCode::BeaconStale`], or what the policy refuses.
pub fn judge(claim: &AppPkClaim, cluster_id: &ClusterId, at: At<'_>, identity: &VerifiedIdentity, rules: Rules<'_>) -> Result<(), Refusal> {
    check(claim, cluster_id, at, identity.report_data())?;
    decide(identity, &as_request(claim, cluster_id)?, rules).map(|_grant| ())
}

/// Everything but evidence and policy: the signature by the key claimed, the beacon, what the evidence is bound to. A node checks this
/// before it asks for a verdict on the evidence, each signer again.
///
/// # Errors
/// As [`judge`].
pub fn check(claim: &AppPkClaim, cluster_id: &ClusterId, at: At<'_>, report_data: &[u8; 64]) -> Result<(), Refusal> {
    match at.beacon {
        Some(row) if row.value != claim.beacon => {
            return Err(Refusal::new(RefusalCode::UnknownBeacon, hex(&row.value), hex(&claim.beacon)));
        }
        Some(row) if at.log_time.since(row.log_time) > BEACON_FRESH_MS_MAX => {
            let age_ms = at.log_time.since(row.log_time);
            return Err(Refusal::new(RefusalCode::BeaconStale, format!("at most {BEACON_FRESH_MS_MAX} ms"), format!("{age_ms} ms")));
        }
        Some(_) => {}
        None => return Err(Refusal::new(RefusalCode::UnknownBeacon, "a beacon of this log", format!("position {}", claim.beacon_pos))),
    }
    let expected = claim.report_data(cluster_id);
    if expected != *report_data {
        return Err(invalid(format!("report data {}", hex(&expected)), hex(report_data)));
    }
    let key = VerifyingKey::from_sec1_bytes(&claim.app_pk).map_err(|_| invalid("a point of secp256k1", hex(&claim.app_pk)))?;
    let signature = Signature::from_slice(&claim.sig).map_err(|_| invalid("r and s of the group", hex(&claim.sig)))?;
    if signature.normalize_s() != signature {
        return Err(invalid("a low s", hex(&claim.sig)));
    }
    key.verify_prehash(&claim.digest(cluster_id), &signature).map_err(|_| invalid("a signature by the key claimed", hex(&claim.sig)))
}

/// The request in mode C that the claim amounts to, for the policy's question alone.
fn as_request(claim: &AppPkClaim, cluster_id: &ClusterId) -> Result<RelReq, Refusal> {
    Ok(RelReq {
        cluster_id: *cluster_id,
        generation: claim.generation,
        beacon_pos: claim.beacon_pos,
        beacon: claim.beacon,
        mode: Mode::Client,
        evidence_hash: binding::evidence_hash(&claim.evidence),
        epk: [9; 32],
        nonce: claim.hash(),
        app_id: claim.app_id,
        wishes: vec![Wish::new(KeyClass::K256, Vec::new())?],
    })
}

fn invalid(expected: impl Into<String>, got: impl Into<String>) -> Refusal {
    Refusal::new(RefusalCode::ClaimInvalid, expected, got)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use dstack_protocol::{AppId, Generation};

    const CLUSTER: ClusterId = ClusterId([7; 32]);
    const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

    fn claim() -> AppPkClaim {
        let key = k256::ecdsa::SigningKey::from_slice(&[5; 32]).unwrap();
        let app_pk = key.verifying_key().to_sec1_point(true).as_bytes().try_into().unwrap();
        let unsigned = AppPkClaim {
            generation: Generation(0),
            app_id: AppId([1; 20]),
            app_pk,
            beacon_pos: 4,
            beacon: [3; 32],
            sig: [0; 64],
            evidence: vec![8; 20],
        };
        let (signature, _) = key.sign_prehash_recoverable(&unsigned.digest(&CLUSTER));
        AppPkClaim { sig: signature.to_bytes().into(), ..unsigned }
    }

    fn code(claim: &AppPkClaim, row: Option<&BeaconRow>, log_time: UnixMillis, report_data: &[u8; 64]) -> Option<RefusalCode> {
        check(claim, &CLUSTER, At { beacon: row, log_time }, report_data).err().map(|refusal| refusal.code)
    }

    #[test]
    fn a_claim_is_fresh_bound_and_signed_by_what_it_claims() {
        let good = claim();
        let row = BeaconRow { value: [3; 32], log_time: NOW };
        let data = good.report_data(&CLUSTER);
        assert_eq!(code(&good, Some(&row), NOW, &data), None);
        assert_eq!(code(&good, Some(&row), NOW.plus_ms(120_000), &data), None);
        assert_eq!(code(&good, Some(&row), NOW.plus_ms(120_001), &data), Some(RefusalCode::BeaconStale));
        assert_eq!(code(&good, None, NOW, &data), Some(RefusalCode::UnknownBeacon));
        let other = BeaconRow { value: [4; 32], log_time: NOW };
        assert_eq!(code(&good, Some(&other), NOW, &data), Some(RefusalCode::UnknownBeacon));
        assert_eq!(code(&good, Some(&row), NOW, &[0; 64]), Some(RefusalCode::ClaimInvalid), "evidence of something else");
        // Another app, another key, another generation: the evidence is not bound to it.
        for changed in [
            AppPkClaim { app_id: AppId([2; 20]), ..good.clone() },
            AppPkClaim { generation: Generation(1), ..good.clone() },
            AppPkClaim {
                app_pk: {
                    let mut key = good.app_pk;
                    key[0] ^= 1;
                    key
                },
                ..good.clone()
            },
        ] {
            assert_eq!(code(&changed, Some(&row), NOW, &data), Some(RefusalCode::ClaimInvalid));
            // Bound, and still not signed by the key.
            assert_eq!(code(&changed, Some(&row), NOW, &changed.report_data(&CLUSTER)), Some(RefusalCode::ClaimInvalid));
        }
    }

    #[test]
    fn a_signature_has_one_form() {
        let good = claim();
        let row = BeaconRow { value: [3; 32], log_time: NOW };
        let data = good.report_data(&CLUSTER);
        let with = |sig| code(&AppPkClaim { sig, ..good.clone() }, Some(&row), NOW, &data);
        let signature = Signature::from_slice(&good.sig).unwrap();
        let high = Signature::from_scalars(signature.r().to_bytes(), (-*signature.s()).to_bytes()).unwrap();
        assert_eq!(with(high.to_bytes().into()), Some(RefusalCode::ClaimInvalid));
        assert_eq!(with([0; 64]), Some(RefusalCode::ClaimInvalid));
        assert_eq!(with([0xff; 64]), Some(RefusalCode::ClaimInvalid));
        let mut flipped = good.sig;
        flipped[9] ^= 1;
        assert_eq!(with(flipped), Some(RefusalCode::ClaimInvalid));
        let off_curve = AppPkClaim { app_pk: [0xff; 33], ..good.clone() };
        assert_eq!(code(&off_curve, Some(&row), NOW, &off_curve.report_data(&CLUSTER)), Some(RefusalCode::ClaimInvalid));
    }
}
