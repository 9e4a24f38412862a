//! What a holder checks before it evaluates: the list of threshold.md §2.2 "Holder", with what §2.4 and §2.5 put in its place for modes
//! L and E.
//!
//! Owns: [`Clearance`], the proof that a request was judged here against a committed row. Never: takes the coordinator's word.

use std::sync::Arc;

use dstack_attest::VerifiedIdentity;
use dstack_policy::{Facts, Grant, Permit, Rules, decide, decide_env, not_revoked, still_allowed};
use dstack_protocol::limits::{BEACON_FRESH_MS_MAX, CLOCK_SKEW_MS_MAX, INTENT_ROW_MS_MAX};
use dstack_protocol::policy::AppPolicy;
use dstack_protocol::release::{Ask, Go, Mode, RelReq};
use dstack_protocol::state::{IntentRow, State};
use dstack_protocol::{ClusterId, NodeIndex, Refusal, RefusalCode, UnixMillis, Wire};

use crate::asker::AttributedAsk;
use crate::attempt;
use crate::legacy::{check_binding, check_sighting, first_sighting};
use crate::session::check_session;

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
    /// The word of this node's own authority on the guest, where it was asked.
    pub permit: Option<&'a Permit>,
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
/// Its answer is the request with the proof who asks it; [`clear`] takes nothing less. `from`: index of the node that asks, 0 for a
/// client. `identity`: what the evidence proved; none in mode E alone.
///
/// # Errors
/// The first rule broken.
pub fn precheck(
    ask: Arc<Ask>,
    from: NodeIndex,
    identity: Option<&VerifiedIdentity>,
    view: HolderView<'_>,
) -> Result<AttributedAsk, Refusal> {
    let request = &ask.request;
    let state = view.state;
    check_cluster(request, view)?;
    check_clock(state.log_time, view.now)?;
    check_beacons(&ask, view)?;
    check_bound(&ask, identity, view)?;
    let attributed = AttributedAsk::check(Arc::clone(&ask), from)?;
    let request_beacon = state.beacons.get(&request.beacon_pos).map_or(UnixMillis(0), |row| row.log_time);
    let age_ms = state.log_time.since(request_beacon);
    if age_ms > BEACON_FRESH_MS_MAX {
        return Err(Refusal::new(RefusalCode::BeaconStale, format!("at most {BEACON_FRESH_MS_MAX} ms"), format!("{age_ms} ms")));
    }
    let (policy, policy_hash) = policy_in_force(state, &ask)?;
    if let (Mode::Legacy, Some(identity)) = (request.mode, identity)
        && let Some(seen) = first_sighting(state, request, identity)
    {
        check_sighting(seen, state.log_time)?;
    }
    let rules = Rules {
        policy: &policy,
        policy_hash,
        revoked: &state.governance.revoked,
        log_time: state.log_time,
        tcb_known: &state.tcb_known,
        permit: view.permit,
    };
    judge(&attributed, identity, rules, view)?;
    Ok(attributed)
}

/// Judges `ask` against the committed row that `go` names. Who asks it is proven by its type.
///
/// # Errors
/// The first rule of threshold.md §2.2, §2.4 or §2.5 that is broken.
pub fn clear(attributed: &AttributedAsk, go: &Go, identity: Option<&VerifiedIdentity>, view: HolderView<'_>) -> Result<Clearance, Refusal> {
    let ask = attributed.ask();
    let request = &ask.request;
    let state = view.state;
    check_cluster(request, view)?;
    // Every field of the Intent equals what this holder computes: its id is the hash of all of them, who combines included.
    let own = attributed.intent().id();
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
    if let Some(identity) = identity.filter(|identity| *identity.collateral_id() != row.collateral_id) {
        let (expected, got) = (hex(&row.collateral_id), hex(identity.collateral_id()));
        return Err(Refusal::new(RefusalCode::CollateralChanged, expected, got).retry_after(50));
    }
    check_clock(state.log_time, view.now)?;
    check_age(row, state.log_time, view.now)?;
    check_beacons(ask, view)?;
    check_bound(ask, identity, view)?;
    // Judged by the row's policy, never by re-reading old state.
    let Some(policy) = state.policies.get(&row.policy_hash).and_then(|blob| AppPolicy::decode(&blob.0).ok()) else {
        return Err(Refusal::new(RefusalCode::Internal, "the policy that the row names", hex(&row.policy_hash)));
    };
    if let (Mode::Legacy, Some(identity)) = (request.mode, identity) {
        // None, or not for this evidence: the node that combines told the log of other evidence.
        let unseen = || Refusal::new(RefusalCode::EvidenceSeen, "a first sighting, noted with the intent", "none");
        check_sighting(first_sighting(state, request, identity).ok_or_else(unseen)?, row.log_time)?;
    }
    let rules = Rules {
        policy: &policy,
        policy_hash: row.policy_hash,
        revoked: &state.governance.revoked,
        log_time: row.log_time,
        tcb_known: &state.tcb_known,
        permit: view.permit,
    };
    let grant = judge(attributed, identity, rules, view)?;
    // And again at the latest applied position: a revocation that committed since stops the partial, of the delegation too.
    state.app(&request.app_id).map_err(|code| Refusal::new(code, "an app that may be served", request.app_id.to_string()))?;
    match identity {
        Some(identity) => still_allowed(&Facts::from(identity), request, &state.governance.revoked)?,
        None => not_revoked(request, &state.governance.revoked)?,
    }
    Ok(Clearance { grant, row: row.clone(), req_hash: request.req_hash(), epk: request.epk })
}

fn check_cluster(request: &RelReq, view: HolderView<'_>) -> Result<(), Refusal> {
    if request.cluster_id == *view.cluster_id {
        return Ok(());
    }
    Err(Refusal::new(RefusalCode::WrongCluster, view.cluster_id.to_string(), request.cluster_id.to_string()))
}

/// The evidence commits to the key that asks: the session's in mode C, the guest's TLS key in mode L.
fn check_bound(ask: &Ask, identity: Option<&VerifiedIdentity>, view: HolderView<'_>) -> Result<(), Refusal> {
    match (ask.request.mode, identity) {
        (Mode::Client, Some(identity)) => {
            let session_beacon = view.state.beacons.get(&ask.session_pos).map(|row| row.value).unwrap_or_default();
            check_session(view.cluster_id, ask, identity.report_data(), &session_beacon)
        }
        (Mode::Legacy, Some(identity)) => check_binding(ask, identity.report_data()),
        (Mode::Env, None) => Ok(()),
        (Mode::Client | Mode::Legacy, None) => Err(Refusal::new(RefusalCode::NeedEvidence, "evidence", "none")),
        (Mode::Env, Some(_)) => Err(Refusal::new(RefusalCode::EvidenceHash, "no evidence in mode E", "some")),
    }
}

/// The decision, by mode. `rules.log_time` is that of the judgement: the row's, or before there is one the latest.
fn judge(
    attributed: &AttributedAsk,
    identity: Option<&VerifiedIdentity>,
    rules: Rules<'_>,
    view: HolderView<'_>,
) -> Result<Grant, Refusal> {
    let (ask, state) = (attributed.ask(), view.state);
    let request = &ask.request;
    match (request.mode, identity) {
        (Mode::Client, Some(identity)) => {
            check_session_age(ask, state, rules.log_time, rules.policy.session_ms)?;
            decide(identity, request, rules)
        }
        (Mode::Legacy, Some(identity)) => decide(identity, request, rules),
        // threshold.md §2.5: only the named node, only while the attempt is open: by the latest state, not by the row's.
        (Mode::Env, _) => {
            attempt::check(state, request, attributed.coordinator())?;
            decide_env(request, rules)
        }
        (Mode::Client | Mode::Legacy, None) => Err(Refusal::new(RefusalCode::NeedEvidence, "evidence", "none")),
    }
}

fn policy_in_force(state: &State, ask: &Ask) -> Result<(AppPolicy, [u8; 32]), Refusal> {
    // Of an app that nobody registered it is the delegation's, before the app is adopted too.
    let policy_hash = state.policy_of(&ask.request.app_id)?;
    let policy = state.policies.get(&policy_hash).and_then(|blob| AppPolicy::decode(&blob.0).ok());
    let policy = policy.ok_or_else(|| Refusal::new(RefusalCode::Internal, "the policy in force", hex(&policy_hash)))?;
    Ok((policy, policy_hash))
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
    // Modes L and E have no session.
    let session = (request.mode == Mode::Client).then_some(ask.session_pos);
    if let Some(pos) = session.filter(|pos| !view.state.beacons.contains_key(pos)) {
        return Err(unknown(pos));
    }
    for pos in [request.beacon_pos].into_iter().chain(session) {
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
