//! Env public keys: attempts, the node each names, the key that one of them publishes.
//!
//! Owns: when an attempt may begin, when it is over, the pin. Never: computes a key (the named node does, in mode E).
//! Source: threshold.md §2.5. An attempt is a command of its own, since one command is one leaf (§2.6): whoever leads proposes it as
//! soon as [`due`] names it, for apps registered before the root was in force too.

use dstack_protocol::ceremony::Message;
use dstack_protocol::env::{EnvAttempt, EnvPubBody, combiner};
use dstack_protocol::governance::Object;
use dstack_protocol::limits::ENV_ATTEMPTS_FREE;
use dstack_protocol::state::{EnvRow, State};
use dstack_protocol::{AppId, ClusterId, Generation, NodeIndex, RefusalCode, RootTag, Wire};

use super::view::{self, verifies};

/// Begins an attempt at leaf `pos`.
pub(super) fn attempt(state: &mut State, cluster_id: &ClusterId, attempt: &EnvAttempt, pos: u64) -> Result<(), RefusalCode> {
    let combiner = check(state, cluster_id, attempt)?;
    let row = EnvRow { attempt: attempt.attempt, attempt_pos: pos, since: state.log_time, combiner, published: None };
    state.env_keys.insert((attempt.generation, attempt.app_id), row);
    Ok(())
}

/// Whether an attempt may begin now, and whom it would name.
///
/// # Errors
/// The first rule broken.
pub fn check(state: &State, cluster_id: &ClusterId, attempt: &EnvAttempt) -> Result<NodeIndex, RefusalCode> {
    let EnvAttempt { app_id, generation, attempt: number, operator } = *attempt;
    allowed(state, generation, &app_id)?;
    let root = state.roots.get(&(generation, RootTag::Prf)).ok_or(RefusalCode::RootMissing)?;
    let row = state.env_keys.get(&(generation, app_id));
    if row.is_some_and(|row| row.published.is_some()) {
        return Err(RefusalCode::EnvKeyPinned);
    }
    let last = row.map_or(0, |row| row.attempt);
    if row.is_some_and(|row| row.is_open(state.log_time)) || last.checked_add(1) != Some(number) {
        return Err(RefusalCode::EnvAttemptOpen);
    }
    match operator {
        None if number > ENV_ATTEMPTS_FREE => return Err(RefusalCode::EnvAttemptsSpent),
        None => {}
        Some((key, sig)) => {
            let in_force = state.governance.operators.keys.contains(&key);
            if !in_force || !verifies(&key, &attempt.signed_bytes(cluster_id), &sig) {
                return Err(RefusalCode::BadApproval);
            }
        }
    }
    let holders: Vec<NodeIndex> = root.vks.keys().copied().collect();
    combiner(&app_id, generation, number, &holders).ok_or(RefusalCode::Internal)
}

fn allowed(state: &State, generation: Generation, app_id: &AppId) -> Result<(), RefusalCode> {
    if state.governance.revoked.contains(&Object::Generation(generation)) {
        return Err(RefusalCode::GenerationRevoked);
    }
    state.app(app_id).map(drop)
}

/// Publishes a key: signed by the node that the open attempt names.
pub(super) fn publish(state: &mut State, cluster_id: &ClusterId, message: &Message) -> Result<(), RefusalCode> {
    if message.inst != [0; 32] {
        return Err(RefusalCode::UnknownInstance);
    }
    let signers = view::signers(state).ok_or(RefusalCode::OutOfOrder)?;
    let key = signers.keys.get(&message.index).ok_or(RefusalCode::NotAdmitted)?;
    if !verifies(key, &message.signed_bytes(cluster_id), &message.sig) {
        return Err(RefusalCode::BadMessageSignature);
    }
    let body = EnvPubBody::decode(&message.body).map_err(|_| RefusalCode::Malformed)?;
    allowed(state, body.generation, &body.app_id)?;
    let log_time = state.log_time;
    let row = state.env_keys.get_mut(&(body.generation, body.app_id)).ok_or(RefusalCode::EnvNotNamed)?;
    if row.published.is_some() {
        return Err(RefusalCode::EnvKeyPinned);
    }
    if !row.is_open(log_time) || row.attempt != body.attempt || row.combiner != message.index {
        return Err(RefusalCode::EnvNotNamed);
    }
    row.published = Some(message.clone());
    Ok(())
}

/// The next attempt that needs no operator, if one is due: what the leader proposes.
#[must_use]
pub fn due(state: &State) -> Option<EnvAttempt> {
    let generation = Generation(0);
    if !state.roots.contains_key(&(generation, RootTag::Prf)) {
        return None;
    }
    state.apps.keys().find_map(|app_id| {
        let row = state.env_keys.get(&(generation, *app_id));
        let over = row.is_none_or(|row| row.published.is_none() && !row.is_open(state.log_time));
        let attempt = row.map_or(0, |row| row.attempt).checked_add(1).filter(|number| *number <= ENV_ATTEMPTS_FREE)?;
        (over && allowed(state, generation, app_id).is_ok()).then_some(EnvAttempt { app_id: *app_id, generation, attempt, operator: None })
    })
}

/// Attempts that wait for the node at `index`.
#[must_use]
pub fn named(state: &State, index: NodeIndex) -> Vec<(Generation, AppId, EnvRow)> {
    let open = state.env_keys.iter().filter(|(_, row)| row.combiner == index && row.is_open(state.log_time));
    open.map(|((generation, app_id), row)| (*generation, *app_id, row.clone())).collect()
}

/// Checks what a snapshot holds: every published key is signed by the node named, with a key it was admitted with.
pub(super) fn check_snapshot(
    state: &State,
    cluster_id: &ClusterId,
    keys: &std::collections::BTreeMap<NodeIndex, std::collections::BTreeSet<[u8; 32]>>,
) -> Result<(), String> {
    use dstack_protocol::ceremony::MessageKind;
    for ((generation, app_id), row) in &state.env_keys {
        if row.attempt == 0 || row.attempt_pos >= state.size {
            return Err(format!("snapshot: the env attempt of app {app_id} is not in the log"));
        }
        let Some(message) = &row.published else { continue };
        let body = EnvPubBody::decode(&message.body).map_err(|error| format!("snapshot: env key of app {app_id}: {error}"))?;
        let of_row = body.app_id == *app_id && body.generation == *generation && body.attempt == row.attempt;
        let by_named = message.kind == MessageKind::EnvPub && message.inst == [0; 32] && message.index == row.combiner;
        let mut known = keys.get(&message.index).into_iter().flatten();
        if !of_row || !by_named || !known.any(|key| verifies(key, &message.signed_bytes(cluster_id), &message.sig)) {
            return Err(format!("snapshot: the env key of app {app_id} is not signed by the node that its attempt names"));
        }
    }
    Ok(())
}
