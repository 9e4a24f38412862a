//! Apps that only the authority knows: the delegation of the operators, and adoption under it.
//!
//! Owns: who may adopt, how many, how fast, what is forgotten. Never: asks an authority (each node does, and each holder before its
//! partial): a node that adopts an app which no authority allows has gained nothing. Source: ADR 0024.
//!
//! | basis | what it opens | bound | full |
//! | --- | --- | --- | --- |
//! | booted | releases, as a registered app has them | 65 536 | refused |
//! | asked | its env public key, signed | 4 096 | the oldest is forgotten; its key would be the same again |

use dstack_policy::rate;
use dstack_protocol::adopt::{Adopt, AdoptBasis};
use dstack_protocol::governance::{Object, policy_hash};
use dstack_protocol::limits::{ADOPTED_APPS_MAX, ASKED_APPS_MAX, BEACON_FRESH_MS_MAX};
use dstack_protocol::policy::{AppPolicy, Rate};
use dstack_protocol::sign::SignKey;
use dstack_protocol::state::{AdoptedRow, AppRow, Blob, BucketRow, State};
use dstack_protocol::{AppId, ClusterId, RefusalCode, Wire};

use super::view::{self, verifies};

/// Sets the policy of apps that nobody registered; those adopted so far stand under it from now on.
pub(super) fn delegate(state: &mut State, app_rate: Rate, body: &[u8]) {
    let hash = policy_hash(body);
    state.policies.insert(hash, Blob(body.to_vec()));
    state.delegation = Some(hash);
    for row in state.apps.values_mut().filter(|row| row.adopted.is_some()) {
        row.policy_hash = hash;
        row.tokens_milli = row.tokens_milli.min(rate::full(app_rate));
    }
}

/// Adopts an app; a repetition changes nothing. A refusal has its retry hint, ms.
pub(super) fn apply(state: &mut State, cluster_id: &ClusterId, adopt: &Adopt) -> Result<(), (RefusalCode, u32)> {
    let refuse = |code| Err((code, 0));
    let Some(signers) = view::signers(state) else { return refuse(RefusalCode::OutOfOrder) };
    let Some(key) = signers.keys.get(&adopt.author) else { return refuse(RefusalCode::NotAdmitted) };
    if !verifies(key, &adopt.signed_bytes(cluster_id), &adopt.sig) {
        return refuse(RefusalCode::BadMessageSignature);
    }
    let Some(beacon) = state.beacons.get(&adopt.beacon_pos) else { return refuse(RefusalCode::UnknownBeacon) };
    if state.log_time.since(beacon.log_time) > BEACON_FRESH_MS_MAX {
        return refuse(RefusalCode::BeaconStale);
    }
    let revoked = &state.governance.revoked;
    if revoked.contains(&Object::App(adopt.app_id)) {
        return refuse(RefusalCode::AppRevoked);
    }
    if revoked.contains(&Object::Delegation) {
        return refuse(RefusalCode::DelegationRevoked);
    }
    let Some(policy_hash) = state.delegation else { return refuse(RefusalCode::NotAdoptable) };
    match state.apps.get(&adopt.app_id) {
        Some(AppRow { adopted: None, .. }) => return refuse(RefusalCode::NotAdoptable),
        // Another node was first.
        Some(_) if !state.wants_adoption(&adopt.app_id, adopt.basis) => return Ok(()),
        _ => {}
    }
    if adopt.basis == AdoptBasis::Booted && state.adopted(AdoptBasis::Booted) >= ADOPTED_APPS_MAX {
        return refuse(RefusalCode::AdoptedFull);
    }
    spend(state, adopt)?;
    if adopt.basis == AdoptBasis::Asked && state.adopted(AdoptBasis::Asked) >= ASKED_APPS_MAX {
        forget_oldest(state);
    }
    let policy = state.policies.get(&policy_hash).and_then(|blob| AppPolicy::decode(&blob.0).ok());
    let Some(policy) = policy else { return refuse(RefusalCode::Internal) };
    let adopted = Some(AdoptedRow { adopt: *adopt, since: state.log_time });
    let row = AppRow { policy_hash, tokens_milli: rate::full(policy.rate), refilled: state.log_time, adopted };
    state.apps.insert(adopt.app_id, row);
    Ok(())
}

const fn rate_of(basis: AdoptBasis) -> (Rate, u32) {
    match basis {
        AdoptBasis::Booted => (Rate::ADOPTED_BOOTED, 1),
        AdoptBasis::Asked => (Rate::ADOPTED_ASKED, Rate::ADOPTED_ASKED_COST),
    }
}

/// One adoption of the author's rate. Strangers who ask for env keys spend nothing of what boots need.
fn spend(state: &mut State, adopt: &Adopt) -> Result<(), (RefusalCode, u32)> {
    let (now, (limit, cost)) = (state.log_time, rate_of(adopt.basis));
    let of_node = (adopt.author, adopt.basis);
    let spent = state.adopt_rates.get(&of_node).cloned();
    let spent = spent.unwrap_or(BucketRow { tokens_milli: rate::full(limit), refilled: now });
    let left = rate::take(cost, spent.tokens_milli, spent.refilled, now, limit);
    let tokens_milli = left.map_err(|wait_ms| (RefusalCode::RateLimited, u32::try_from(wait_ms).unwrap_or(u32::MAX)))?;
    state.adopt_rates.insert(of_node, BucketRow { tokens_milli, refilled: now });
    Ok(())
}

/// Forgets the app that was asked for first, with its env key and the signatures over it: all of them come again as they were.
fn forget_oldest(state: &mut State) {
    let asked = state.apps.iter().filter_map(|(app_id, row)| {
        let adopted = row.adopted.as_ref().filter(|adopted| adopted.adopt.basis == AdoptBasis::Asked)?;
        Some((adopted.since, *app_id))
    });
    let Some((_, app_id)) = asked.min() else { return };
    state.apps.remove(&app_id);
    state.env_keys.retain(|(_, of), _| *of != app_id);
    state.signatures.retain(|key, _| !of_env_key(key, &app_id));
}

fn of_env_key(key: &SignKey, app_id: &AppId) -> bool {
    matches!(key, SignKey::EnvKey(_, of) | SignKey::EnvKeyAt(_, of) if of == app_id)
}

/// Forgets full buckets.
pub(super) fn prune(state: &mut State) {
    let now = state.log_time;
    state.adopt_rates.retain(|(_, basis), row| {
        let (limit, _) = rate_of(*basis);
        rate::refilled(row.tokens_milli, row.refilled, now, limit) != rate::full(limit)
    });
}

/// Checks what a snapshot holds: each adopted app stands under the delegation and was adopted by a node that was admitted.
pub(super) fn check_snapshot(
    state: &State,
    cluster_id: &ClusterId,
    keys: &std::collections::BTreeMap<dstack_protocol::NodeIndex, std::collections::BTreeSet<[u8; 32]>>,
) -> Result<(), String> {
    if let Some(hash) = state.delegation {
        let signed = state.governance.proofs.get(&Object::Delegation).is_some_and(|proof| policy_hash(&proof.action.body) == hash);
        if !signed {
            return Err("snapshot: the delegation has no signed action".to_owned());
        }
    }
    for (app_id, row) in &state.apps {
        let Some(AdoptedRow { adopt, since }) = &row.adopted else { continue };
        let mut known = keys.get(&adopt.author).into_iter().flatten();
        let by_node = known.any(|key| verifies(key, &adopt.signed_bytes(cluster_id), &adopt.sig));
        if adopt.app_id != *app_id || state.delegation != Some(row.policy_hash) || *since > state.log_time || !by_node {
            return Err(format!("snapshot: app {app_id} was not adopted by a node under the delegation in force"));
        }
    }
    let within = AdoptBasis::ALL.map(|basis| state.adopted(basis));
    if within[0] > ADOPTED_APPS_MAX || within[1] > ASKED_APPS_MAX {
        return Err(format!("snapshot: {} adopted and {} asked apps are too many", within[0], within[1]));
    }
    Ok(())
}
