//! Key generation through the log: attempts, messages, steps.
//!
//! Owns: which attempt is open, who speaks in it, its rounds and timeouts. An attempt makes one or more roots, each in a run of its own;
//! a message names its run by `inst`. The arithmetic and the verdicts are `dstack_threshold::dkg`'s, replayed from the messages kept in
//! the state. Never: evidence in a Join (each node judges it outside `apply`; who rejects it posts no Ready). Source: threshold.md §3.

use std::collections::{BTreeMap, BTreeSet};

use dstack_protocol::ceremony::{InstHolder, JoinBody, Message, MessageKind, Open, Step, StepKind, What, inst, key_hash};
use dstack_protocol::genesis::CaAlgorithm;
use dstack_protocol::limits::{BEACON_FRESH_MS_MAX, CEREMONY_ROUND_MS_MAX};
use dstack_protocol::state::{AttemptRow, Blob, RootRow, State};
use dstack_protocol::{ClusterId, Epoch, Generation, NodeIndex, RefusalCode, RootTag, Wire};
use dstack_threshold::dkg::{Ceremony, CeremonyError, End, Progress, RootRun, Stage};
use dstack_threshold::group::{Group, Ristretto255};

use super::view::{self, verifies};

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

/// What one root's run is replayed from, outside the state: replaying takes a while, and the state must not wait for it.
#[derive(Debug, Clone)]
pub struct Replay {
    cluster_id: ClusterId,
    open: Open,
    root: RootTag,
    ca: CaAlgorithm,
    holders: Vec<InstHolder>,
    messages: Vec<Message>,
}

impl Replay {
    /// Of `root` in `attempt`; `None` while joins are missing, or where the attempt does not make that root.
    #[must_use]
    pub fn of(state: &State, cluster_id: &ClusterId, attempt: &AttemptRow, root: RootTag) -> Option<Self> {
        let holders = joined_holders(state, attempt, root)?;
        let name = inst(cluster_id, &attempt.open, root, &holders);
        let messages = attempt.messages.iter().filter(|message| message.inst == name).cloned().collect();
        let (open, ca) = (attempt.open.clone(), state.genesis.ca_algorithm);
        Some(Self { cluster_id: *cluster_id, open, root, ca, holders, messages })
    }

    /// The run as far as the log has it.
    #[must_use]
    pub fn run(&self) -> Option<RootRun> {
        let mut run = RootRun::new(&self.cluster_id, &self.open, self.root, self.ca, &self.holders).ok()?;
        for message in &self.messages {
            run.apply(message.kind, message.index, &message.body).ok()?;
        }
        Some(run)
    }
}

/// The run of `root` as far as the log has it; `None` while joins are missing.
#[must_use]
pub fn run_of(state: &State, cluster_id: &ClusterId, attempt: &AttemptRow, root: RootTag) -> Option<RootRun> {
    Replay::of(state, cluster_id, attempt, root)?.run()
}

/// The run of root `prf`, typed.
#[must_use]
pub fn instance(state: &State, cluster_id: &ClusterId, attempt: &AttemptRow) -> Option<Ceremony<Ristretto255>> {
    match run_of(state, cluster_id, attempt, RootTag::Prf)? {
        RootRun::Prf(run) => Some(run),
        RootRun::CaEd25519(_) | RootRun::CaP256(_) | RootRun::Id(_) => None,
    }
}

/// Roots that the cluster is to have and has not. A cluster that was born before roots `ca` and `id` existed lacks these two.
#[must_use]
pub fn missing_roots(state: &State) -> Vec<RootTag> {
    let has = |root: &RootTag| state.roots.contains_key(&(Generation(0), *root));
    if state.genesis.has_roots() { RootTag::ALL.into_iter().filter(|root| !has(root)).collect() } else { Vec::new() }
}

/// Epoch of a root made now: 1 for the first ones, the generation's active epoch for those added later (threshold.md §3).
#[must_use]
pub fn epoch_of_new_roots(state: &State) -> Epoch {
    state.roots.range((Generation(0), RootTag::Prf)..=(Generation(0), RootTag::Id)).map(|(_, root)| root.epoch).max().unwrap_or(Epoch(1))
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
    if open.roots.iter().any(|root| state.roots.contains_key(&(open.generation, *root))) {
        return Err(RefusalCode::Duplicate);
    }
    // Any of the missing roots, but `prf` never last: without it nothing is served. The log of an older release opened `prf` alone.
    let prf_first = open.roots.contains(&RootTag::Prf) || state.roots.contains_key(&(open.generation, RootTag::Prf));
    let everyone: Vec<NodeIndex> = signers.keys.keys().copied().collect();
    let expected = Open {
        generation: Generation(0),
        what: What::Dkg,
        old_epoch: Epoch(0),
        new_epoch: epoch_of_new_roots(state),
        attempt: state.attempts.saturating_add(1),
        t: state.genesis.t,
        roots: open.roots.clone(),
        dealers: everyone.clone(),
        holders: everyone,
    };
    if *open != expected || !prf_first {
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

/// A message of one root's run, which it names by `inst`.
fn run(state: &State, cluster_id: &ClusterId, attempt: &mut AttemptRow, message: &Message) -> Result<(), RefusalCode> {
    let replays: Option<Vec<Replay>> = attempt.open.roots.iter().map(|root| Replay::of(state, cluster_id, attempt, *root)).collect();
    let named = |replay: &&Replay| inst(cluster_id, &replay.open, replay.root, &replay.holders) == message.inst;
    let replays = replays.ok_or(RefusalCode::OutOfOrder)?;
    let replay = replays.iter().find(named).ok_or(RefusalCode::UnknownInstance)?;
    let mut run = replay.run().ok_or(RefusalCode::OutOfOrder)?;
    let progress = run.apply(message.kind, message.index, &message.body).map_err(|error| match error {
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
            let rows = root_rows(state, cluster_id, &attempt).ok_or(RefusalCode::OutOfOrder)?;
            state.epoch = attempt.open.new_epoch;
            state.roots.extend(rows.into_iter().map(|(root, row)| ((attempt.open.generation, root), row)));
            state.ceremonies.insert(attempt.open.attempt, attempt);
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

/// The rows of all roots of an attempt; `None` unless every run of it is complete.
fn root_rows(state: &State, cluster_id: &ClusterId, attempt: &AttemptRow) -> Option<BTreeMap<RootTag, RootRow>> {
    let row = |root: &RootTag| {
        let run = run_of(state, cluster_id, attempt, *root)?;
        let sharing = run.switched().ok()?;
        let row = RootRow {
            epoch: attempt.open.new_epoch,
            t: sharing.threshold,
            public_key: Blob(sharing.public_key),
            vks: sharing.verification_keys.into_iter().map(|(index, vk)| (index, Blob(vk))).collect(),
            transcript: sharing.transcript,
            inst: run.inst(),
            attempt: attempt.open.attempt,
        };
        Some((*root, row))
    };
    if attempt.ended { None } else { attempt.open.roots.iter().map(row).collect() }
}

/// Checks the roots of a snapshot: every message is signed, replayed they give these very rows, and each attempt is there because of the
/// roots that it made.
pub(super) fn check_roots(state: &State, cluster_id: &ClusterId) -> Result<(), RefusalCode> {
    let mut replayed = BTreeMap::new();
    for (number, attempt) in &state.ceremonies {
        for message in attempt.joins.values().chain(&attempt.messages) {
            let key = node_key(state, message.index).ok_or(RefusalCode::NotAdmitted)?;
            if !verifies(&key, &message.signed_bytes(cluster_id), &message.sig) {
                return Err(RefusalCode::BadMessageSignature);
            }
        }
        if attempt.open.attempt != *number {
            return Err(RefusalCode::BadTranscript);
        }
        for (root, row) in root_rows(state, cluster_id, attempt).ok_or(RefusalCode::BadTranscript)? {
            if replayed.insert((attempt.open.generation, root), row).is_some() {
                return Err(RefusalCode::BadTranscript);
            }
        }
    }
    if replayed == state.roots { Ok(()) } else { Err(RefusalCode::BadTranscript) }
}
