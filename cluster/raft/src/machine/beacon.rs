//! Beacons: how log time moves, and what fresh evidence commits to.
//!
//! Owns: judging readings, log time, what expires with it. Never: a clock of its own. Source: threshold.md §2.6.

use std::collections::BTreeSet;

use dstack_policy::governance;
use dstack_protocol::limits::{BEACON_KEEP_MS, INTENT_ROW_MS_MAX};
use dstack_protocol::log::BeaconBody;
use dstack_protocol::state::{BeaconRow, State};
use dstack_protocol::{ClusterId, RefusalCode};

use super::view::{self, verifies};
use super::{adopt, intents};

/// Judges the readings and moves log time.
pub(super) fn apply(state: &mut State, cluster_id: &ClusterId, body: &BeaconBody) -> Result<(), RefusalCode> {
    let voters = view::signers(state).ok_or(RefusalCode::OutOfOrder)?;
    if body.cluster_id != *cluster_id {
        return Err(RefusalCode::WrongCluster);
    }
    let (prev_pos, prev) = view::latest_beacon(state).map_or((0, cluster_id.0), |(pos, row)| (pos, row.value));
    for reading in &body.readings {
        let key = voters.keys.get(&reading.index).ok_or(RefusalCode::BadReading)?;
        let current = reading.prev_beacon_pos == prev_pos && reading.prev_beacon == prev;
        if !current || !verifies(key, &reading.signed_bytes(cluster_id), &reading.sig) {
            return Err(RefusalCode::BadReading);
        }
    }
    if body.readings.len() < view::beacon_threshold(state) {
        return Err(RefusalCode::TooFewReadings);
    }
    let earliest = body.readings.iter().map(|reading| reading.unix_ms).min().ok_or(RefusalCode::TooFewReadings)?;
    // threshold.md §2.6: max(previous, min): the leader picks whose, and time never runs back.
    state.log_time = state.log_time.max(earliest);
    Ok(())
}

/// Notes the beacon at its leaf and forgets what log time has passed by.
pub(super) fn settle(state: &mut State, pos: u64, value: [u8; 32]) {
    let log_time = state.log_time;
    state.beacons.insert(pos, BeaconRow { value, log_time });
    state.latest_beacon = Some(pos);
    state.beacons.retain(|at, row| *at == pos || log_time.since(row.log_time) <= BEACON_KEEP_MS);
    state.intents.retain(|_, row| log_time.since(row.log_time) <= INTENT_ROW_MS_MAX);
    intents::prune(state);
    adopt::prune(state);
    governance::prune(&mut state.governance, log_time);
    // Policies and collateral stay readable while an app or a row names them.
    let policies = state.apps.values().map(|app| app.policy_hash).chain(state.intents.values().map(|row| row.policy_hash));
    let policies: BTreeSet<[u8; 32]> = policies.chain(state.delegation).collect();
    state.policies.retain(|hash, _| policies.contains(hash));
    let in_force = state.collateral_id;
    let collaterals: BTreeSet<[u8; 32]> = state.intents.values().map(|row| row.collateral_id).chain([in_force]).collect();
    state.collaterals.retain(|id, _| collaterals.contains(id));
}
