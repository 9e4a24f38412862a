//! Intents: the record that a release is about to happen.
//!
//! Owns: resolving an intent against the state at its position; deduplication; the rate limit. Never: judges evidence.
//! Source: threshold.md §2.2 "Intent".

use std::collections::BTreeSet;

use dstack_policy::rate;
use dstack_protocol::governance::Object;
use dstack_protocol::limits::BEACON_FRESH_MS_MAX;
use dstack_protocol::policy::AppPolicy;
use dstack_protocol::release::{Intent, Mode};
use dstack_protocol::state::{IntentRow, State};
use dstack_protocol::{RefusalCode, RootTag, Wire};

use super::frontier;

/// What an intent of a batch is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// Already in the table, or earlier in this batch: no leaf.
    Duplicate([u8; 32]),
    /// A leaf, accepted or refused with a retry hint in ms.
    New(Result<(), (RefusalCode, u32)>),
}

/// An intent with its verdict.
pub(super) struct Judged {
    pub(super) kind: Kind,
    pub(super) body: Vec<u8>,
}

/// Judges a batch in order. Tokens of the rate limit are taken here.
pub(super) fn judge(state: &mut State, batch: &[Intent]) -> Vec<Judged> {
    let mut seen = BTreeSet::new();
    let mut out = Vec::with_capacity(batch.len());
    for intent in batch {
        let id = intent.id();
        let kind = if state.intents.contains_key(&id) || seen.contains(&id) {
            Kind::Duplicate(id)
        } else {
            let verdict = resolve(state, intent);
            if verdict.is_ok() {
                seen.insert(id);
            }
            Kind::New(verdict)
        };
        out.push(Judged { kind, body: intent.encode() });
    }
    out
}

fn resolve(state: &mut State, intent: &Intent) -> Result<(), (RefusalCode, u32)> {
    let refuse = |code| Err((code, 0));
    if intent.mode != Mode::Client {
        return refuse(RefusalCode::ModeUnsupported);
    }
    if !state.roots.contains_key(&(intent.generation, RootTag::Prf)) {
        return refuse(RefusalCode::UnknownGeneration);
    }
    if state.governance.revoked.contains(&Object::Generation(intent.generation)) {
        return refuse(RefusalCode::GenerationRevoked);
    }
    if !state.apps.contains_key(&intent.app_id) {
        return refuse(RefusalCode::AppUnknown);
    }
    if state.governance.revoked.contains(&Object::App(intent.app_id)) {
        return refuse(RefusalCode::AppRevoked);
    }
    let Some(beacon) = state.beacons.get(&intent.beacon_pos) else {
        return refuse(RefusalCode::UnknownBeacon);
    };
    if state.log_time.since(beacon.log_time) > BEACON_FRESH_MS_MAX {
        return refuse(RefusalCode::BeaconStale);
    }
    let log_time = state.log_time;
    let Some(app) = state.apps.get_mut(&intent.app_id) else {
        return refuse(RefusalCode::AppUnknown);
    };
    let policy = state.policies.get(&app.policy_hash).and_then(|blob| AppPolicy::decode(&blob.0).ok());
    let Some(policy) = policy else {
        return refuse(RefusalCode::Internal);
    };
    match rate::take_one(app.tokens_milli, app.refilled, log_time, policy.rate) {
        Ok(left) => {
            app.tokens_milli = left;
            app.refilled = log_time;
            Ok(())
        }
        Err(wait_ms) => Err((RefusalCode::RateLimited, u32::try_from(wait_ms).unwrap_or(u32::MAX))),
    }
}

/// Puts an accepted intent into the table; `state` is at the end of its entry.
pub(super) fn insert(state: &mut State, intent: &Intent, pos: u64) {
    let Some(app) = state.apps.get(&intent.app_id) else { return };
    let row = IntentRow {
        pos,
        size: state.size,
        log_root: frontier(state).root(),
        log_time: state.log_time,
        policy_hash: app.policy_hash,
        collateral_id: state.collateral_id,
        members_version: state.members_version,
        generation: intent.generation,
        app_id: intent.app_id,
        mode: intent.mode,
        coordinator: intent.coordinator,
        classes: intent.wishes.iter().map(|(class, _)| *class).collect(),
    };
    state.intents.insert(intent.id(), row);
}
