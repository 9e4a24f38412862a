//! A snapshot is data from a stranger: everything in it that signatures can vouch for is checked.
//!
//! Owns: those checks. Never: evidence (a head certificate over the state root vouches for what was judged outside).
//! Source: architecture.md §7 "Snapshots".

use std::collections::{BTreeMap, BTreeSet};

use dstack_audit::Frontier;
use dstack_policy::governance;
use dstack_protocol::ceremony::{AdmitBody, MessageKind, body_digest};
use dstack_protocol::genesis::collateral_id;
use dstack_protocol::governance::policy_hash;
use dstack_protocol::policy::AppPolicy;
use dstack_protocol::state::State;
use dstack_protocol::{NodeIndex, RefusalCode, Wire};

use super::view::verifies;
use super::{Birth, adopt, ceremony, env, sign};

/// Decodes and checks the canonical state.
pub(super) fn checked(birth: &Birth, bytes: &[u8]) -> Result<State, String> {
    let state = State::from_bytes(bytes).map_err(|error| format!("snapshot does not decode: {error}"))?;
    if state.genesis != *birth.genesis() {
        return Err("snapshot is of another cluster".to_owned());
    }
    Frontier::from_parts(state.size, state.peaks.clone()).map_err(|error| format!("snapshot: {error}"))?;
    objects(&state)?;
    let keys = admissions(birth, &state)?;
    governance::check_signatures(&state.governance, birth.cluster_id(), &keys)
        .map_err(|code: RefusalCode| format!("snapshot: governance signatures: {code}"))?;
    ceremony::check_roots(&state, birth.cluster_id()).map_err(|code| format!("snapshot: roots: {code}"))?;
    sign::check_snapshot(&state, birth.cluster_id())?;
    env::check_snapshot(&state, birth.cluster_id(), &keys)?;
    adopt::check_snapshot(&state, birth.cluster_id(), &keys)?;
    Ok(state)
}

/// Objects named by hash are what their names say, and everything named is there.
fn objects(state: &State) -> Result<(), String> {
    for (hash, policy) in &state.policies {
        if policy_hash(&policy.0) != *hash || AppPolicy::decode(&policy.0).is_err() {
            return Err(format!("snapshot: policy {} is not what its hash says", hex(hash)));
        }
    }
    for (id, bundle) in &state.collaterals {
        if collateral_id(&bundle.0) != *id {
            return Err(format!("snapshot: collateral {} is not what its hash says", hex(id)));
        }
    }
    let policies =
        state.apps.values().map(|app| app.policy_hash).chain(state.intents.values().map(|row| row.policy_hash)).chain(state.delegation);
    for hash in policies {
        if !state.policies.contains_key(&hash) {
            return Err(format!("snapshot: policy {} is missing", hex(&hash)));
        }
    }
    let bundles = state.intents.values().map(|row| row.collateral_id).chain([state.collateral_id]);
    for id in bundles {
        if !state.collaterals.contains_key(&id) {
            return Err(format!("snapshot: collateral {} is missing", hex(&id)));
        }
    }
    // Every policy in force rests on an action signed by operators; of adopted apps the delegation's does.
    for (app_id, app) in state.apps.iter().filter(|(_, app)| app.adopted.is_none()) {
        let object = dstack_protocol::governance::Object::App(*app_id);
        let signed = state.governance.proofs.get(&object).is_some_and(|proof| policy_hash(&proof.action.body) == app.policy_hash);
        if !signed {
            return Err(format!("snapshot: the policy of app {app_id} has no signed action"));
        }
    }
    Ok(())
}

/// Admissions: the Admit is signed by the key it brings, enough signers vouched, and seats and signer lists follow from them.
/// Returns every node key an index ever had.
fn admissions(birth: &Birth, state: &State) -> Result<BTreeMap<NodeIndex, BTreeSet<[u8; 32]>>, String> {
    let cluster_id = birth.cluster_id();
    let mut keys: BTreeMap<NodeIndex, BTreeSet<[u8; 32]>> = BTreeMap::new();
    for (index, row) in &state.admissions {
        let body = AdmitBody::decode(&row.admit.body).map_err(|error| format!("snapshot: admission {index}: {error}"))?;
        let own = row.admit.kind == MessageKind::Admit && verifies(&body.node_key, &row.admit.signed_bytes(cluster_id), &row.admit.sig);
        if !own {
            return Err(format!("snapshot: admission {index} is not signed by the key it brings"));
        }
        keys.entry(*index).or_default().insert(body.node_key);
    }
    for (index, row) in &state.admissions {
        let admit_hash = body_digest(&row.admit.body);
        for (author, vouch) in &row.vouches {
            let names = vouch.kind == MessageKind::Vouch && vouch.index == *author && vouch.body == admit_hash;
            let mut known = keys.get(author).into_iter().flatten();
            if !names || !known.any(|key| verifies(key, &vouch.signed_bytes(cluster_id), &vouch.sig)) {
                return Err(format!("snapshot: the vouch of {author} for {index} does not verify"));
            }
        }
        let genesis = index.0 <= state.genesis.n;
        let need = if genesis { usize::from(state.genesis.n) } else { usize::from(state.genesis.n) / 2 + 1 };
        if row.vouches.len() < need {
            return Err(format!("snapshot: admission {index} has {} vouches, {need} needed", row.vouches.len()));
        }
    }
    for (version, members) in &state.members {
        for (index, key) in &members.signers {
            if !keys.get(index).is_some_and(|known| known.contains(key)) {
                return Err(format!("snapshot: signer {index} of members version {version} was never admitted"));
            }
        }
    }
    for (seat, row) in &state.seats {
        if !keys.get(&row.index).is_some_and(|known| known.contains(&row.node_key)) {
            return Err(format!("snapshot: seat {seat} is held by a key that was never admitted"));
        }
    }
    Ok(keys)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}
