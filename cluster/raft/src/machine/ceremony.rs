//! Key generation through the log: attempts, messages, steps.
//!
//! Owns: which attempt is open, who speaks in it, its rounds and timeouts. The arithmetic and the verdicts are
//! `dstack_threshold::dkg`'s, replayed from the messages kept in the state. Never: evidence in a Join (each node judges it
//! outside `apply`; who rejects it posts no Ready). Source: threshold.md §3.

use std::collections::{BTreeMap, BTreeSet};

use dstack_protocol::ceremony::{InstHolder, JoinBody, Message, MessageKind, Open, Step, StepKind, What, key_hash};
use dstack_protocol::limits::{BEACON_FRESH_MS_MAX, CEREMONY_ROUND_MS_MAX};
use dstack_protocol::state::{AttemptRow, Blob, RootRow, State};
use dstack_protocol::{ClusterId, Epoch, Generation, NodeIndex, RefusalCode, RootTag, Wire};
use dstack_threshold::dkg::{Ceremony, CeremonyError, End, Instance, Progress, Stage};
use dstack_threshold::group::{Group, Ristretto255};

use super::view::{self, verifies};

/// What an attempt waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Round {
    /// Joins of these holders.
    AwaitingJoins(Vec<NodeIndex>),
    /// Messages of the run, as the run says.
    Running(Stage),
}

/// Holders of `root` as its instance names them, once all have joined. Ascending.
#[must_use]
pub fn joined_holders(state: &State, attempt: &AttemptRow, root: RootTag) -> Option<Vec<InstHolder>> {
    attempt
        .open
        .holders
        .iter()
        .map(|index| {
            let join = JoinBody::decode(&attempt.joins.get(index)?.body).ok()?;
            let ek = join.keys.iter().find(|(tag, _)| *tag == root).map(|(_, key)| *key)?;
            Some(InstHolder { index: *index, key_hash: key_hash(&node_key(state, *index)?), ek })
        })
        .collect()
}

/// The run of root `prf` as far as the log has it; `None` while joins are missing.
#[must_use]
pub fn instance(state: &State, cluster_id: &ClusterId, attempt: &AttemptRow) -> Option<Ceremony<Ristretto255>> {
    let holders = joined_holders(state, attempt, RootTag::Prf)?;
    let instance = Instance::new(cluster_id, &attempt.open, RootTag::Prf, &holders).ok()?;
    let mut ceremony = Ceremony::new(instance);
    for message in &attempt.messages {
        ceremony.apply(message.kind, message.index, &message.body).ok()?;
    }
    Some(ceremony)
}

impl Round {
    /// Where an attempt is.
    #[must_use]
    pub fn of(state: &State, cluster_id: &ClusterId, attempt: &AttemptRow) -> Self {
        let missing: Vec<NodeIndex> = attempt.open.holders.iter().filter(|index| !attempt.joins.contains_key(index)).copied().collect();
        match instance(state, cluster_id, attempt) {
            Some(ceremony) if missing.is_empty() => Self::Running(ceremony.stage()),
            _ => Self::AwaitingJoins(missing),
        }
    }
}

/// The node key that an index was admitted with.
fn node_key(state: &State, index: NodeIndex) -> Option<[u8; 32]> {
    let admit = &state.admissions.get(&index)?.admit;
    dstack_protocol::ceremony::AdmitBody::decode(&admit.body).ok().map(|body| body.node_key)
}

pub(super) fn open(state: &mut State, open: &Open) -> Result<(), RefusalCode> {
    let signers = view::signers(state).ok_or(RefusalCode::OutOfOrder)?;
    if state.latest_beacon.is_none() || state.attempt.is_some() || !state.genesis.has_roots() {
        return Err(RefusalCode::OutOfOrder);
    }
    if state.roots.contains_key(&(open.generation, RootTag::Prf)) {
        return Err(RefusalCode::Duplicate);
    }
    let everyone: Vec<NodeIndex> = signers.keys.keys().copied().collect();
    let expected = Open {
        generation: Generation(0),
        what: What::Dkg,
        old_epoch: Epoch(0),
        new_epoch: Epoch(1),
        attempt: state.attempts.saturating_add(1),
        t: state.genesis.t,
        roots: vec![RootTag::Prf],
        dealers: everyone.clone(),
        holders: everyone,
    };
    if *open != expected {
        return Err(RefusalCode::OutOfOrder);
    }
    state.attempts = expected.attempt;
    state.attempt = Some(AttemptRow {
        open: expected,
        round_since: state.log_time,
        joins: BTreeMap::new(),
        messages: Vec::new(),
        ended: false,
        convicted: BTreeSet::new(),
    });
    Ok(())
}

pub(super) fn message(state: &mut State, cluster_id: &ClusterId, message: &Message) -> Result<(), RefusalCode> {
    let Some(mut attempt) = state.attempt.clone() else { return Err(RefusalCode::UnknownInstance) };
    if !attempt.open.holders.contains(&message.index) {
        return Err(RefusalCode::NotAHolder);
    }
    let key = node_key(state, message.index).ok_or(RefusalCode::NotAdmitted)?;
    if !verifies(&key, &message.signed_bytes(cluster_id), &message.sig) {
        return Err(RefusalCode::BadMessageSignature);
    }
    match message.kind {
        MessageKind::Join => join(state, cluster_id, &mut attempt, message)?,
        MessageKind::Commit | MessageKind::Deal | MessageKind::Ready | MessageKind::Complain | MessageKind::Unready => {
            run(state, cluster_id, &mut attempt, message)?;
        }
        MessageKind::Admit | MessageKind::Vouch | MessageKind::Live | MessageKind::Erased | MessageKind::EnvPub => {
            return Err(RefusalCode::OutOfOrder);
        }
    }
    state.attempt = Some(attempt);
    Ok(())
}

fn join(state: &State, cluster_id: &ClusterId, attempt: &mut AttemptRow, message: &Message) -> Result<(), RefusalCode> {
    if message.inst != attempt.open.join_id(cluster_id) {
        return Err(RefusalCode::UnknownInstance);
    }
    if attempt.joins.contains_key(&message.index) {
        return Err(RefusalCode::Duplicate);
    }
    let body = JoinBody::decode(&message.body).map_err(|_| RefusalCode::Malformed)?;
    let beacon = state.beacons.get(&body.beacon_pos).ok_or(RefusalCode::UnknownBeacon)?;
    if beacon.value != body.beacon {
        return Err(RefusalCode::UnknownBeacon);
    }
    if state.log_time.since(beacon.log_time) > BEACON_FRESH_MS_MAX {
        return Err(RefusalCode::BeaconStale);
    }
    if !body.keys.iter().map(|(root, _)| root).eq(&attempt.open.roots) {
        return Err(RefusalCode::Malformed);
    }
    if body.keys.iter().any(|(_, key)| Ristretto255::decode(key).is_none()) {
        return Err(RefusalCode::BadProof);
    }
    attempt.joins.insert(message.index, message.clone());
    if attempt.joins.len() == attempt.open.holders.len() {
        attempt.round_since = state.log_time;
    }
    Ok(())
}

fn run(state: &State, cluster_id: &ClusterId, attempt: &mut AttemptRow, message: &Message) -> Result<(), RefusalCode> {
    let mut ceremony = instance(state, cluster_id, attempt).ok_or(RefusalCode::OutOfOrder)?;
    if message.inst != ceremony.instance().inst() {
        return Err(RefusalCode::UnknownInstance);
    }
    let progress = ceremony.apply(message.kind, message.index, &message.body).map_err(|error| match error {
        CeremonyError::NotAMember(_) => RefusalCode::NotAHolder,
        CeremonyError::Repeated { .. } => RefusalCode::Duplicate,
        CeremonyError::Ended(End::Convicted { .. }) => RefusalCode::ConvictedDealer,
        _ => RefusalCode::OutOfOrder,
    })?;
    attempt.messages.push(message.clone());
    if let Progress::Moved(stage) = progress {
        attempt.round_since = state.log_time;
        if let Stage::Ended(end) = stage {
            attempt.ended = true;
            if let End::Convicted { culprit, .. } = end {
                attempt.convicted.insert(culprit);
            }
        }
    }
    Ok(())
}

pub(super) fn step(state: &mut State, cluster_id: &ClusterId, step: &Step) -> Result<(), RefusalCode> {
    let Some(attempt) = state.attempt.clone() else { return Err(RefusalCode::UnknownInstance) };
    if step.join_id != attempt.open.join_id(cluster_id) {
        return Err(RefusalCode::UnknownInstance);
    }
    match step.kind {
        StepKind::Switched => {
            // Valid only with Ready signatures of all holders over equal transcripts; every node checks them itself.
            let ceremony = instance(state, cluster_id, &attempt).ok_or(RefusalCode::OutOfOrder)?;
            let row = root_row(&ceremony, &attempt).ok_or(RefusalCode::OutOfOrder)?;
            state.epoch = attempt.open.new_epoch;
            state.roots.insert((attempt.open.generation, RootTag::Prf), row);
            state.attempt = None;
            Ok(())
        }
        StepKind::Aborted => {
            if !attempt.ended && !overdue(state, &attempt) {
                return Err(RefusalCode::OutOfOrder);
            }
            state.attempt = None;
            Ok(())
        }
        StepKind::Finalized | StepKind::Reverted => Err(RefusalCode::OutOfOrder),
    }
}

/// Whether the present round is over its 60 s of log time.
pub(super) fn overdue(state: &State, attempt: &AttemptRow) -> bool {
    state.log_time.since(attempt.round_since) > CEREMONY_ROUND_MS_MAX
}

fn root_row(ceremony: &Ceremony<Ristretto255>, attempt: &AttemptRow) -> Option<RootRow> {
    let sharing = ceremony.switched().ok()?;
    Some(RootRow {
        epoch: attempt.open.new_epoch,
        t: sharing.threshold(),
        public_key: Blob(sharing.public_key()),
        vks: sharing.verification_keys().into_iter().map(|(index, vk)| (index, Blob(vk))).collect(),
        transcript: sharing.transcript(),
        inst: ceremony.instance().inst(),
        attempt: attempt.clone(),
    })
}

/// Checks a root of a snapshot: every message is signed, and replayed they give this very row.
pub(super) fn check_root(state: &State, cluster_id: &ClusterId, root: RootTag, row: &RootRow) -> Result<(), RefusalCode> {
    if root != RootTag::Prf {
        return Err(RefusalCode::UnknownInstance);
    }
    for message in row.attempt.joins.values().chain(&row.attempt.messages) {
        let key = node_key(state, message.index).ok_or(RefusalCode::NotAdmitted)?;
        if !verifies(&key, &message.signed_bytes(cluster_id), &message.sig) {
            return Err(RefusalCode::BadMessageSignature);
        }
    }
    let ceremony = instance(state, cluster_id, &row.attempt).ok_or(RefusalCode::BadTranscript)?;
    let replayed = root_row(&ceremony, &row.attempt).ok_or(RefusalCode::BadTranscript)?;
    if replayed == *row { Ok(()) } else { Err(RefusalCode::BadTranscript) }
}
