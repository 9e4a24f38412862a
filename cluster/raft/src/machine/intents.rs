//! Intents: the record that a release is about to happen.
//!
//! Owns: resolving an intent against the state at its position; who speaks for those of modes L and E; deduplication; rates and quotas;
//! first sightings of evidence in mode L. Never: judges evidence. Source: threshold.md §2.2 "Intent", §2.4, §2.5; ADR 0032.

use std::collections::{BTreeMap, BTreeSet};

use dstack_policy::rate;
use dstack_protocol::codec::sha256;
use dstack_protocol::coordinated::CoordinatorWord;
use dstack_protocol::governance::Object;
use dstack_protocol::limits::{BEACON_FRESH_MS_MAX, SIGHTING_KEEP_MS, SIGHTING_MS_MAX, SIGHTINGS_MAX, SIGHTINGS_OF_APP_MAX};
use dstack_protocol::policy::{AppPolicy, Rate};
use dstack_protocol::release::{Intent, KeyClass, Mode};
use dstack_protocol::state::{BucketRow, IntentRow, State};
use dstack_protocol::{AppId, ClusterId, NodeIndex, RefusalCode, RootTag, UnixMillis, Wire, env};

use super::frontier;
use super::view::verifies;

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

/// Whether a node with a seat signed, by its own key, for the intents of modes L and E in a batch.
pub(super) fn is_signed(state: &State, cluster_id: &ClusterId, word: &CoordinatorWord) -> bool {
    let mut seats = state.seats.values();
    let row = seats.find(|row| row.index == word.coordinator);
    row.is_some_and(|row| verifies(&row.node_key, &word.signed_bytes(cluster_id), &word.sig))
}

/// Judges a batch in order. Tokens of the rate limit are taken here. `by`: the signed word for those of modes L and E.
pub(super) fn judge(state: &mut State, batch: &[Intent], by: Option<&CoordinatorWord>) -> Vec<Judged> {
    let mut named = by.into_iter().flat_map(|word| &word.named);
    let mut seen = BTreeSet::new();
    let mut out = Vec::with_capacity(batch.len());
    for intent in batch {
        let id = intent.id();
        let statement = if intent.mode == Mode::Client { None } else { named.next().map(|named| named.statement_id) };
        let kind = if state.intents.contains_key(&id) || seen.contains(&id) {
            Kind::Duplicate(id)
        } else {
            let verdict = resolve(state, intent, by.map(|word| word.coordinator).zip(statement));
            if verdict.is_ok() {
                seen.insert(id);
            }
            Kind::New(verdict)
        };
        out.push(Judged { kind, body: intent.encode() });
    }
    out
}

/// `spoken`: who signed for it, and the evidence it rests on; of mode C nobody does.
fn resolve(state: &mut State, intent: &Intent, spoken: Option<(NodeIndex, [u8; 32])>) -> Result<(), (RefusalCode, u32)> {
    let refuse = |code| Err((code, 0));
    if !state.roots.contains_key(&(intent.generation, RootTag::Prf)) {
        return refuse(RefusalCode::UnknownGeneration);
    }
    if state.governance.revoked.contains(&Object::Generation(intent.generation)) {
        return refuse(RefusalCode::GenerationRevoked);
    }
    match state.app(&intent.app_id) {
        Err(code) => return refuse(code),
        // Of an app that somebody only asked for nothing but its env key is computed.
        Ok(row) if intent.mode != Mode::Env && !row.may_release() => return refuse(RefusalCode::AppUnknown),
        Ok(_) => {}
    }
    let Some(beacon) = state.beacons.get(&intent.beacon_pos) else {
        return refuse(RefusalCode::UnknownBeacon);
    };
    if state.log_time.since(beacon.log_time) > BEACON_FRESH_MS_MAX {
        return refuse(RefusalCode::BeaconStale);
    }
    // In modes L and E it says whose quota it spends and who may have had the keys: only that node may say it.
    match (intent.mode, spoken) {
        (Mode::Client, _) => take_of_app(state, intent),
        (Mode::Legacy, Some((by, statement_id))) if by == intent.coordinator => legacy(state, intent, statement_id),
        (Mode::Env, Some((by, _))) if by == intent.coordinator => of_attempt(state, intent).map_err(|code| (code, 0)),
        (Mode::Legacy | Mode::Env, _) => refuse(RefusalCode::NotTheCoordinator),
    }
}

/// Mode E (threshold.md §2.5): class env alone, by the node that the app's open attempt names.
fn of_attempt(state: &State, intent: &Intent) -> Result<(), RefusalCode> {
    let classes: Vec<KeyClass> = intent.wishes.iter().map(|(class, _)| *class).collect();
    if classes != [KeyClass::Env] {
        return Err(RefusalCode::ClassNotAllowed);
    }
    let row = state.env_keys.get(&(intent.generation, intent.app_id)).filter(|row| row.is_open(state.log_time));
    let named = row.is_some_and(|row| row.combiner == intent.coordinator && env::evidence_hash(row.attempt_pos) == intent.evidence_hash);
    if named { Ok(()) } else { Err(RefusalCode::EnvNotNamed) }
}

/// One release of the app's rate.
fn take_of_app(state: &mut State, intent: &Intent) -> Result<(), (RefusalCode, u32)> {
    let log_time = state.log_time;
    let Some(app) = state.apps.get_mut(&intent.app_id) else {
        return Err((RefusalCode::AppUnknown, 0));
    };
    let policy = state.policies.get(&app.policy_hash).and_then(|blob| AppPolicy::decode(&blob.0).ok());
    let Some(policy) = policy else {
        return Err((RefusalCode::Internal, 0));
    };
    app.tokens_milli = rate::take_one(app.tokens_milli, app.refilled, log_time, policy.rate).map_err(limited)?;
    app.refilled = log_time;
    Ok(())
}

fn limited(wait_ms: u64) -> (RefusalCode, u32) {
    (RefusalCode::RateLimited, u32::try_from(wait_ms).unwrap_or(u32::MAX))
}

/// Mode L (threshold.md §2.4): evidence that the log first saw at most 24 h before, quotas of node and app.
/// Nothing is taken and nothing noted of an intent that is refused. Noted is the statement, which no other encoding of the evidence
/// changes; that it is this evidence's, holders check (ADR 0033).
fn legacy(state: &mut State, intent: &Intent, statement_id: [u8; 32]) -> Result<(), (RefusalCode, u32)> {
    let log_time = state.log_time;
    let of_app = state.sightings.get(&intent.app_id);
    // A row that is over and not swept yet counts as none.
    let known = of_app.and_then(|seen| seen.get(&statement_id)).copied().filter(|first| !is_over(*first, log_time));
    if known.is_some_and(|first| log_time.since(first) > SIGHTING_MS_MAX) {
        return Err((RefusalCode::EvidenceSeen, 0));
    }
    let spent = state.legacy_rates.get(&intent.coordinator).cloned();
    let spent = spent.unwrap_or(BucketRow { tokens_milli: rate::full(Rate::LEGACY_NODE), refilled: log_time });
    let left = rate::take_one(spent.tokens_milli, spent.refilled, log_time, Rate::LEGACY_NODE).map_err(limited)?;
    take_of_app(state, intent)?;
    state.legacy_rates.insert(intent.coordinator, BucketRow { tokens_milli: left, refilled: log_time });
    let first = known.unwrap_or(log_time);
    if known.is_none() {
        make_room(&mut state.sightings, &intent.app_id, SIGHTINGS_OF_APP_MAX, SIGHTINGS_MAX);
    }
    state.sightings.entry(intent.app_id).or_default().insert(statement_id, first);
    Ok(())
}

type Sightings = BTreeMap<AppId, BTreeMap<[u8; 32], UnixMillis>>;

/// Makes room for one more first sighting of `app`: where its own rows are full, its oldest go; where all are, the oldest of the app that has
/// the most. Who makes evidence without end loses the memory of its own, and locks out nobody. A sixteenth goes at once, so that a
/// full table is not looked through for each row.
fn make_room(sightings: &mut Sightings, app: &AppId, of_app_max: usize, all_max: usize) {
    let victim = if sightings.get(app).is_some_and(|seen| seen.len() >= of_app_max) {
        *app
    } else if sightings.values().map(BTreeMap::len).sum::<usize>() >= all_max {
        let Some((largest, _)) = sightings.iter().max_by_key(|(_, seen)| seen.len()) else { return };
        *largest
    } else {
        return;
    };
    let Some(seen) = sightings.get_mut(&victim) else { return };
    let mut rows: Vec<(UnixMillis, [u8; 32])> = seen.iter().map(|(hash, first)| (*first, *hash)).collect();
    rows.sort_unstable();
    for (_, hash) in rows.iter().take((seen.len() / 16).max(1)) {
        seen.remove(hash);
    }
    if seen.is_empty() {
        sightings.remove(&victim);
    }
}

fn is_over(first: UnixMillis, log_time: UnixMillis) -> bool {
    log_time.since(first) > SIGHTING_KEEP_MS
}

/// Forgets old sightings, of one 256th of all hashes: a beacon must not look at a million rows. Which one follows from log time, the same
/// at every node, and over a day every one is met.
fn sweep(sightings: &mut Sightings, log_time: UnixMillis) {
    let [part, ..] = sha256(&[b"DKMS-V1-SWEEP", &log_time.0.to_be_bytes()]);
    let (mut from, mut to) = ([0; 32], [0xff; 32]);
    (from[0], to[0]) = (part, part);
    for seen in sightings.values_mut() {
        let over: Vec<[u8; 32]> = seen.range(from..=to).filter(|(_, first)| is_over(**first, log_time)).map(|(hash, _)| *hash).collect();
        for hash in over {
            seen.remove(&hash);
        }
    }
    sightings.retain(|_, seen| !seen.is_empty());
}

/// Forgets what log time has passed by: old sightings, full buckets.
pub(super) fn prune(state: &mut State) {
    let log_time = state.log_time;
    sweep(&mut state.sightings, log_time);
    let is_full =
        |row: &BucketRow| rate::refilled(row.tokens_milli, row.refilled, log_time, Rate::LEGACY_NODE) == rate::full(Rate::LEGACY_NODE);
    state.legacy_rates.retain(|_, row| !is_full(row));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_makes_evidence_without_end_forgets_its_own_and_locks_out_nobody() {
        let app = |number: u8| AppId([number; 20]);
        let rows = |count: u8| (0..count).map(|at| ([255 - at; 32], UnixMillis(u64::from(at)))).collect::<BTreeMap<_, _>>();
        let mut all: Sightings = [(app(1), rows(32)), (app(2), rows(5)), (app(3), rows(1))].into();
        let before = all.clone();
        make_room(&mut all, &app(2), 33, 39);
        assert_eq!(all, before, "there is room");
        // An app that is full: a sixteenth of its own, the oldest.
        make_room(&mut all, &app(1), 32, 1000);
        let mut left = rows(32);
        left.retain(|_, first| first.0 >= 2);
        assert_eq!((&all[&app(1)], &all[&app(2)], &all[&app(3)]), (&left, &before[&app(2)], &before[&app(3)]));
        // A full log: of the one that has the most, whoever comes; a new app too.
        for newcomer in [app(3), app(9)] {
            let largest = all[&app(1)].len();
            make_room(&mut all, &newcomer, 1000, 36);
            assert!(all[&app(1)].len() < largest || all.values().map(BTreeMap::len).sum::<usize>() < 36);
        }
        assert_eq!((&all[&app(2)], &all[&app(3)]), (&before[&app(2)], &before[&app(3)]));
        let mut one: Sightings = [(app(4), rows(1))].into();
        make_room(&mut one, &app(4), 1, 1);
        assert!(one.is_empty());
    }

    #[test]
    fn a_sweep_looks_at_a_part_and_all_parts_are_met_within_a_day() {
        let start = UnixMillis(1_790_000_000_000);
        let old = |app: u8| (0..=255u8).map(move |first| ([first, app].repeat(16).try_into().unwrap(), start)).collect();
        let mut sightings: BTreeMap<AppId, BTreeMap<[u8; 32], UnixMillis>> = (1..=3).map(|app| (AppId([app; 20]), old(app))).collect();
        let after = start.plus_ms(SIGHTING_KEEP_MS);
        sweep(&mut sightings, after);
        assert_eq!(sightings.values().map(BTreeMap::len).sum::<usize>(), 3 * 256, "400 days and no moment less");
        // One that is young stays, wherever it stands.
        sightings.get_mut(&AppId([2; 20])).unwrap().insert([7; 32], after);
        let mut swept = 0;
        for beacon in 1..=2880u64 {
            let before = sightings.values().map(BTreeMap::len).sum::<usize>();
            sweep(&mut sightings, after.plus_ms(beacon * 30_000));
            let now = sightings.values().map(BTreeMap::len).sum::<usize>();
            assert!(before - now <= 3, "one part of each app at a time");
            swept += before - now;
        }
        assert_eq!(swept, 3 * 256);
        assert_eq!(sightings.into_iter().collect::<Vec<_>>(), [(AppId([2; 20]), BTreeMap::from([([7; 32], after)]))]);
    }
}
