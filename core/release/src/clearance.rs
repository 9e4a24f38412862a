//! What a holder checks before it evaluates: the list of threshold.md §2.2 "Holder", in one place.
//!
//! Owns: [`Clearance`], the proof that a request was judged here against a committed row. Never: takes the coordinator's word.

use std::sync::Arc;

use dstack_attest::VerifiedIdentity;
use dstack_policy::{Facts, Grant, Rules, decide, still_allowed};
use dstack_protocol::limits::{BEACON_FRESH_MS_MAX, CLOCK_SKEW_MS_MAX, INTENT_ROW_MS_MAX};
use dstack_protocol::policy::AppPolicy;
use dstack_protocol::release::{Ask, Go, Mode};
use dstack_protocol::state::{IntentRow, State};
use dstack_protocol::{ClusterId, NodeIndex, Refusal, RefusalCode, UnixMillis, Wire};

use crate::session::{SignedAsk, check_session};

/// What a holder sees when it judges: its latest applied state and its own clock.
#[derive(Clone, Copy)]
pub struct HolderView<'a> {
    /// Cluster.
    pub cluster_id: &'a ClusterId,
    /// Latest applied state.
    pub state: &'a State,
    /// Own clock.
    pub now: UnixMillis,
    /// Whether a head certificate for the beacon at that position is at hand.
    pub beacon_certified: &'a dyn Fn(u64) -> bool,
}

/// The proof that this node judged a request against its committed intent. It cannot cross a wire.
#[derive(Debug)]
pub struct Clearance {
    grant: Grant,
    row: IntentRow,
    req_hash: [u8; 32],
    epk: [u8; 32],
}

impl Clearance {
    /// What may be evaluated.
    #[must_use]
    pub fn grant(&self) -> &Grant {
        &self.grant
    }
    /// The committed row.
    #[must_use]
    pub fn row(&self) -> &IntentRow {
        &self.row
    }
    /// Hash of the request.
    #[must_use]
    pub fn req_hash(&self) -> &[u8; 32] {
        &self.req_hash
    }
    /// Key that the partial is sealed to.
    #[must_use]
    pub fn epk(&self) -> &[u8; 32] {
        &self.epk
    }
}

/// Whether a node's clock is close enough to log time to serve.
///
/// # Errors
/// [`RefusalCode::ClockSkew`].
pub fn check_clock(log_time: UnixMillis, now: UnixMillis) -> Result<(), Refusal> {
    let skew_ms = log_time.0.abs_diff(now.0);
    if skew_ms > CLOCK_SKEW_MS_MAX {
        return Err(Refusal::new(RefusalCode::ClockSkew, format!("at most {CLOCK_SKEW_MS_MAX} ms"), format!("{skew_ms} ms")));
    }
    Ok(())
}

/// What a coordinator checks before it spends a log entry, and a holder when it is asked early: everything but the row.
/// Its answer is the request with its checked signature; [`clear`] takes nothing less.
///
/// # Errors
/// The first rule broken.
pub fn precheck(ask: Arc<Ask>, identity: &VerifiedIdentity, view: HolderView<'_>) -> Result<SignedAsk, Refusal> {
    let request = &ask.request;
    let state = view.state;
    if request.cluster_id != *view.cluster_id {
        return Err(Refusal::new(RefusalCode::WrongCluster, view.cluster_id.to_string(), request.cluster_id.to_string()));
    }
    if request.mode != Mode::Client {
        return Err(Refusal::new(RefusalCode::ModeUnsupported, "mode C", format!("{:?}", request.mode)));
    }
    check_clock(state.log_time, view.now)?;
    check_beacons(&ask, view)?;
    let session_beacon = state.beacons.get(&ask.session_pos).map(|row| row.value).unwrap_or_default();
    check_session(view.cluster_id, &ask, identity.report_data(), &session_beacon)?;
    let signed = SignedAsk::check(Arc::clone(&ask))?;
    let request_beacon = state.beacons.get(&request.beacon_pos).map_or(UnixMillis(0), |row| row.log_time);
    let age_ms = state.log_time.since(request_beacon);
    if age_ms > BEACON_FRESH_MS_MAX {
        return Err(Refusal::new(RefusalCode::BeaconStale, format!("at most {BEACON_FRESH_MS_MAX} ms"), format!("{age_ms} ms")));
    }
    let (policy, policy_hash) = policy_in_force(state, &ask)?;
    check_session_age(&ask, state, state.log_time, policy.session_ms)?;
    decide(identity, request, Rules { policy: &policy, policy_hash, revoked: &state.governance.revoked, log_time: state.log_time })?;
    Ok(signed)
}

/// Judges `ask` against the committed row that `go` names. That its signature verifies is proven by its type.
///
/// # Errors
/// The first rule of threshold.md §2.2 that is broken.
pub fn clear(signed: &SignedAsk, go: &Go, identity: &VerifiedIdentity, view: HolderView<'_>) -> Result<Clearance, Refusal> {
    let ask = signed.ask();
    let request = &ask.request;
    let state = view.state;
    if request.cluster_id != *view.cluster_id {
        return Err(Refusal::new(RefusalCode::WrongCluster, view.cluster_id.to_string(), request.cluster_id.to_string()));
    }
    // Every field of the Intent equals what this holder computes: its id is the hash of all of them.
    let own = request.intent(NodeIndex(0)).id();
    if own != go.intent_id {
        return Err(Refusal::new(RefusalCode::IntentMismatch, hex(&own), hex(&go.intent_id)));
    }
    let Some(row) = state.intents.get(&own) else {
        return Err(Refusal::new(RefusalCode::IntentUnknown, "a committed intent", hex(&own)));
    };
    if row.pos != go.pos {
        return Err(Refusal::new(RefusalCode::IntentPosition, row.pos.to_string(), go.pos.to_string()));
    }
    // The verdict on the evidence is one under the row's collateral.
    if *identity.collateral_id() != row.collateral_id {
        let (expected, got) = (hex(&row.collateral_id), hex(identity.collateral_id()));
        return Err(Refusal::new(RefusalCode::CollateralChanged, expected, got).retry_after(50));
    }
    check_clock(state.log_time, view.now)?;
    check_age(row, state.log_time, view.now)?;
    check_beacons(ask, view)?;
    let session_beacon = state.beacons.get(&ask.session_pos).map(|row| row.value).unwrap_or_default();
    check_session(view.cluster_id, ask, identity.report_data(), &session_beacon)?;
    // Judged by the row's policy, never by re-reading old state.
    let Some(policy) = state.policies.get(&row.policy_hash).and_then(|blob| AppPolicy::decode(&blob.0).ok()) else {
        return Err(Refusal::new(RefusalCode::Internal, "the policy that the row names", hex(&row.policy_hash)));
    };
    check_session_age(ask, state, row.log_time, policy.session_ms)?;
    let rules = Rules { policy: &policy, policy_hash: row.policy_hash, revoked: &state.governance.revoked, log_time: row.log_time };
    let grant = decide(identity, request, rules)?;
    // And again at the latest applied position: a revocation that committed since stops the partial.
    still_allowed(&Facts::from(identity), request, &state.governance.revoked)?;
    Ok(Clearance { grant, row: row.clone(), req_hash: request.req_hash(), epk: request.epk })
}

fn policy_in_force(state: &State, ask: &Ask) -> Result<(AppPolicy, [u8; 32]), Refusal> {
    let app_id = ask.request.app_id;
    let app = state.apps.get(&app_id).ok_or_else(|| Refusal::new(RefusalCode::AppUnknown, "an app with a policy", app_id.to_string()))?;
    let policy = state.policies.get(&app.policy_hash).and_then(|blob| AppPolicy::decode(&blob.0).ok());
    let policy = policy.ok_or_else(|| Refusal::new(RefusalCode::Internal, "the policy in force", hex(&app.policy_hash)))?;
    Ok((policy, app.policy_hash))
}

fn check_age(row: &IntentRow, log_time: UnixMillis, now: UnixMillis) -> Result<(), Refusal> {
    // By log time and by the holder's own clock: either says no.
    let age_ms = log_time.since(row.log_time).max(now.since(row.log_time));
    if age_ms > INTENT_ROW_MS_MAX {
        return Err(Refusal::new(RefusalCode::IntentTooOld, format!("at most {INTENT_ROW_MS_MAX} ms"), format!("{age_ms} ms")));
    }
    Ok(())
}

fn check_beacons(ask: &Ask, view: HolderView<'_>) -> Result<(), Refusal> {
    let request = &ask.request;
    let unknown = |pos: u64| Refusal::new(RefusalCode::UnknownBeacon, "a beacon of the last 4000 s", format!("position {pos}"));
    let beacon = view.state.beacons.get(&request.beacon_pos).ok_or_else(|| unknown(request.beacon_pos))?;
    if beacon.value != request.beacon {
        return Err(Refusal::new(RefusalCode::UnknownBeacon, hex(&beacon.value), hex(&request.beacon)));
    }
    if !view.state.beacons.contains_key(&ask.session_pos) {
        return Err(unknown(ask.session_pos));
    }
    for pos in [request.beacon_pos, ask.session_pos] {
        if !(view.beacon_certified)(pos) {
            return Err(Refusal::new(RefusalCode::NoCert, "a head certificate of the beacon", format!("position {pos}")).retry_after(200));
        }
    }
    Ok(())
}

fn check_session_age(ask: &Ask, state: &State, at: UnixMillis, session_ms: u64) -> Result<(), Refusal> {
    let began = state.beacons.get(&ask.session_pos).map_or(UnixMillis(0), |row| row.log_time);
    let age_ms = at.since(began);
    if age_ms > session_ms {
        return Err(Refusal::new(RefusalCode::SessionExpired, format!("at most {session_ms} ms"), format!("{age_ms} ms")));
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_may_be_ninety_seconds_off_and_no_more() {
        let log_time = UnixMillis(1_000_000);
        assert!(check_clock(log_time, UnixMillis(1_090_000)).is_ok());
        assert!(check_clock(log_time, UnixMillis(910_000)).is_ok());
        assert_eq!(check_clock(log_time, UnixMillis(1_090_001)).unwrap_err().code, RefusalCode::ClockSkew);
        assert_eq!(check_clock(log_time, UnixMillis(909_999)).unwrap_err().code, RefusalCode::ClockSkew);
    }
}
