//! This node's part in the open attempt: Join, and for each root Commit, Deal, Ready or Complain; the leader's steps.
//!
//! Owns: what is posted when. Never: judges messages of others (`apply` does) but their evidence, which `apply` cannot.
//! Source: threshold.md §3.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use dstack_protocol::binding::{self, JoinBinding};
use dstack_protocol::ceremony::{JoinBody, MessageKind, Step, StepKind};
use dstack_protocol::command::Command;
use dstack_protocol::state::AttemptRow;
use dstack_protocol::{NodeIndex, Refusal, RefusalCode, RootTag, Wire};
use dstack_raft::machine::Replay;
use dstack_threshold::dkg::{Checked, EncryptionKey, RootParticipant, RootRun, Stage};
use dstack_threshold::share::ShareId;
use futures::future::join_all;
use tracing::{error, warn};

use super::seen::{OpenAttempt, Seen};
use super::{Mine, Parts, propose, shares};
use crate::ports::{random_secret, read};

pub(super) async fn take_part(parts: &Parts, mine: &mut Option<Mine>, seen: &Seen, open: &OpenAttempt) -> Result<(), Refusal> {
    let attempt = &open.row;
    let runs: Option<Vec<RootRun>> = open.runs.as_ref().and_then(|runs| runs.iter().map(Replay::run).collect());
    if parts.log.leads()
        && let Some(step) = leaders_step(open, runs.as_deref())
    {
        let join_id = attempt.open.join_id(&parts.cluster_id);
        return propose(parts, Command::Step(Step { kind: step, join_id })).await;
    }
    let Some(index) = seen.index.filter(|index| attempt.open.holders.contains(index)) else { return Ok(()) };
    if attempt.ended {
        return Ok(());
    }
    let Some(runs) = runs else {
        if attempt.joins.contains_key(&index) {
            // Others are still to join; or this node restarted, and the attempt will time out.
            return Ok(());
        }
        return join(parts, mine, seen, attempt, index).await;
    };
    let Some(own) = mine.as_mut().filter(|own| own.attempt == attempt.open.attempt) else {
        return after_a_restart(parts, seen, attempt, &runs, index).await;
    };
    if own.joins_judged.is_none() {
        let judged = judge_joins(parts, attempt).await;
        if let Err(refusal) = &judged {
            error!(code = %refusal.code, expected = refusal.expected, got = refusal.got, "a Join is rejected: no Ready from this node");
        }
        own.joins_judged = Some(judged);
    }
    for run in runs.iter().filter(|run| run.has_pairwise_setup()) {
        // In the background, beside commits and deals.
        parts.setups.begin(run.root(), seen.ca, run.inst(), index, seen.seats_of(&run.members()));
    }
    let mut messages = Vec::new();
    for run in &runs {
        if let Some((kind, body)) = next_message(parts, own, run, index)?
            && !own.posted.contains(&(run.root(), kind))
        {
            messages.push((run.root(), parts.node_key.sign_message(&parts.cluster_id, kind, index, run.inst(), body)));
        }
    }
    // Together, so that three roots take as many rounds of the log as one.
    let posting = messages.into_iter().map(|(root, message)| async move {
        let kind = message.kind;
        (root, kind, propose(parts, Command::Ceremony(message)).await)
    });
    let mut outcome = Ok(());
    for (root, kind, posted) in join_all(posting).await {
        match posted {
            Ok(()) => drop(own.posted.insert((root, kind))),
            Err(refusal) => outcome = Err(refusal),
        }
    }
    outcome
}

/// What the leader does with the attempt: ends it when it cannot go on, switches when every root is complete.
fn leaders_step(open: &OpenAttempt, runs: Option<&[RootRun]>) -> Option<StepKind> {
    let attempt = &open.row;
    if attempt.ended || open.overdue {
        let culprits: Vec<u16> = attempt.convicted.iter().map(|i| i.0).collect();
        let silent: BTreeMap<&str, Vec<u16>> =
            runs.into_iter().flatten().map(|run| (run.root().name(), run.missing().iter().map(|i| i.0).collect())).collect();
        error!(attempt = attempt.open.attempt, ?culprits, ?silent, "key generation aborted");
        return Some(StepKind::Aborted);
    }
    runs?.iter().all(|run| run.stage() == Stage::Complete).then_some(StepKind::Switched)
}

/// What the run waits for from this node; deals first, if it has not yet.
fn next_message(parts: &Parts, own: &mut Mine, run: &RootRun, index: NodeIndex) -> Result<Option<(MessageKind, Vec<u8>)>, Refusal> {
    let root = run.root();
    if let Some(key) = own.keys.remove(&root) {
        let participant = RootParticipant::new(run, index, key, random_secret::<64>()?)
            .map_err(|error| Refusal::new(RefusalCode::Internal, "a participant", error.to_string()))?;
        #[cfg(feature = "insecure-test-export")]
        participant.package().dealer_constant.expose(|constant| (parts.export)(root, constant));
        own.participants.insert(root, participant);
    }
    let Some(participant) = own.participants.get_mut(&root) else { return Ok(None) };
    if !run.missing().contains(&index) {
        return Ok(None);
    }
    Ok(match run.stage() {
        Stage::AwaitingCommits => Some((MessageKind::Commit, participant.package().commit.to_vec())),
        Stage::AwaitingDeals => Some((MessageKind::Deal, participant.package().body.clone())),
        Stage::AwaitingReady if own.posted.contains(&(root, MessageKind::Ready)) => None,
        Stage::AwaitingReady if matches!(own.joins_judged, Some(Ok(()))) => {
            if let Entry::Vacant(vacant) = own.checked.entry(root) {
                match participant.check(run) {
                    Ok(Checked::Ready(ready)) => {
                        vacant.insert(ready);
                    }
                    Ok(Checked::Complaints(complaints)) => {
                        return Ok(complaints.into_iter().next().map(|complaint| (MessageKind::Complain, complaint.encode())));
                    }
                    Err(error) => return Err(Refusal::new(RefusalCode::OutOfOrder, "deals of this run", error.to_string())),
                }
            }
            let Some(mut ready) = own.checked.get(&root).cloned() else { return Ok(None) };
            if run.has_pairwise_setup() {
                let Some(digest) = parts.setups.digest(&run.inst()) else { return Ok(None) };
                ready.setup = digest;
            }
            seal(parts, run, participant)?;
            Some((MessageKind::Ready, ready.encode()))
        }
        Stage::AwaitingReady | Stage::Complete | Stage::Ended(_) => None,
    })
}

/// threshold.md §4: Ready is posted only when the share is durable, where sealing exists.
fn seal(parts: &Parts, run: &RootRun, participant: &RootParticipant) -> Result<(), Refusal> {
    let root = run.root();
    let checked = participant.checked_share();
    let (id, share) = checked.map_err(|error| Refusal::new(RefusalCode::Internal, "a checked share", error.to_string()))?;
    let name = shares::name(parts.cluster_id, root, id);
    let saved = parts.files.save(&name, &share).and_then(|()| match parts.setups.secret(&run.inst()) {
        Some(pairs) => parts.files.save_pairs(&name, &pairs),
        None => Ok(()),
    });
    if let Err(reason) = saved {
        warn!(reason, root = root.name(), "share is in memory only: it is lost with this process");
    }
    Ok(())
}

/// This process knows nothing of the attempt, so it is another than the one that joined. Of a run that it declared Ready it needs the
/// sealed share: where that is gone, it says so, and the attempt ends instead of making a root with a holder less.
async fn after_a_restart(parts: &Parts, seen: &Seen, attempt: &AttemptRow, runs: &[RootRun], index: NodeIndex) -> Result<(), Refusal> {
    for run in runs {
        let declared = matches!(run.stage(), Stage::AwaitingReady | Stage::Complete) && !run.missing().contains(&index);
        let Some(sharing) = run.dealt().filter(|_| declared) else { continue };
        let id = ShareId { index, generation: attempt.open.generation, epoch: attempt.open.new_epoch };
        if shares::sealed(parts, seen.ca, run.root(), id, &sharing).is_some() {
            continue;
        }
        warn!(root = run.root().name(), attempt = attempt.open.attempt, "share was lost after Ready");
        let message = parts.node_key.sign_message(&parts.cluster_id, MessageKind::Unready, index, run.inst(), Vec::new());
        return propose(parts, Command::Ceremony(message)).await;
    }
    Ok(())
}

async fn join(parts: &Parts, mine: &mut Option<Mine>, seen: &Seen, attempt: &AttemptRow, index: NodeIndex) -> Result<(), Refusal> {
    let Some((beacon_pos, beacon)) = seen.beacon else { return Ok(()) };
    if mine.as_ref().is_some_and(|own| own.attempt == attempt.open.attempt && own.joined) {
        return Ok(());
    }
    let secrets: BTreeMap<RootTag, EncryptionKey> =
        attempt.open.roots.iter().map(|root| Ok((*root, EncryptionKey::new(random_secret::<64>()?)))).collect::<Result<_, Refusal>>()?;
    let keys: Vec<(RootTag, [u8; 32])> = secrets.iter().map(|(root, key)| (*root, key.public())).collect();
    let report_data = report_data(parts, attempt, index, &parts.node_key.public(), (beacon_pos, &beacon), &keys);
    let evidence = evidence(parts, report_data).await?;
    let body = JoinBody { beacon_pos, beacon, keys, evidence }.encode();
    let join_id = attempt.open.join_id(&parts.cluster_id);
    let message = parts.node_key.sign_message(&parts.cluster_id, MessageKind::Join, index, join_id, body);
    *mine = Some(Mine {
        attempt: attempt.open.attempt,
        keys: secrets,
        participants: BTreeMap::new(),
        checked: BTreeMap::new(),
        joins_judged: None,
        joined: false,
        posted: std::collections::BTreeSet::new(),
    });
    propose(parts, Command::Ceremony(message)).await?;
    if let Some(own) = mine {
        own.joined = true;
    }
    Ok(())
}

fn report_data(
    parts: &Parts,
    attempt: &AttemptRow,
    index: NodeIndex,
    node_key: &[u8; 32],
    (beacon_pos, beacon): (u64, &[u8; 32]),
    keys: &[(RootTag, [u8; 32])],
) -> [u8; 64] {
    binding::join(&JoinBinding {
        cluster_id: &parts.cluster_id,
        generation: attempt.open.generation,
        what: attempt.open.what as u8,
        new_epoch: attempt.open.new_epoch,
        attempt: attempt.open.attempt,
        index,
        beacon_pos,
        beacon,
        node_key,
        keys,
    })
}

async fn evidence(parts: &Parts, report_data: [u8; 64]) -> Result<Vec<u8>, Refusal> {
    let device = Arc::clone(&parts.evidence);
    let answer = tokio::task::spawn_blocking(move || device.evidence(report_data)).await;
    let failed = |what: String| Refusal::new(RefusalCode::Internal, "evidence from this node's device", what).retry_after(1000);
    answer.map_err(|error| failed(error.to_string()))?.map_err(failed)
}

/// threshold.md §3: every node verifies every Join; who rejects one posts no Ready.
async fn judge_joins(parts: &Parts, attempt: &AttemptRow) -> Result<(), Refusal> {
    let bindings = read(&*parts.log, |state| {
        attempt
            .joins
            .iter()
            .filter_map(|(index, message)| {
                let body = JoinBody::decode(&message.body).ok()?;
                let (seat, row) = state.seats.iter().find(|(_, row)| row.index == *index)?;
                let bound = report_data(parts, attempt, *index, &row.node_key, (body.beacon_pos, &body.beacon), &body.keys);
                Some((*seat, body.evidence, bound))
            })
            .collect::<Vec<_>>()
    })?;
    if bindings.len() != attempt.open.holders.len() {
        return Err(Refusal::new(RefusalCode::NotAdmitted, "a Join of every holder's seat", bindings.len().to_string()));
    }
    let judge = Arc::clone(&parts.judge);
    let judged = tokio::task::spawn_blocking(move || {
        bindings.iter().try_for_each(|(seat, evidence, report_data)| judge(*seat, evidence, report_data))
    });
    judged.await.map_err(|error| Refusal::new(RefusalCode::Internal, "a judgement", error.to_string()))?
}
