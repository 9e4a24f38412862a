//! The actor that takes part in key generation, and leads it when this node leads the log.
//!
//! Owns: this node's secrets of the open attempt, in memory only; when it looks at the state. Never: decides what is valid (`apply`
//! and the threshold core do), persists anything of an attempt outside the log. A restart before `Ready` makes the attempt fail.
//! Source: threshold.md §3, §6.

use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, ActorFutureExt, AsyncContext, Context, Handler, Message, WrapFuture};
use dstack_protocol::binding::{self, JoinBinding};
use dstack_protocol::ceremony::{JoinBody, MessageKind, Open, Step, StepKind, What};
use dstack_protocol::command::Command;
use dstack_protocol::limits::CEREMONY_ROUND_MS_MAX;
use dstack_protocol::state::{AttemptRow, State};
use dstack_protocol::{ClusterId, Epoch, Generation, NodeIndex, Refusal, RefusalCode, RootTag, Seat, Wire};
use dstack_raft::machine::{instance, view};
use dstack_secret::{Locked, Secret};
use dstack_threshold::dkg::{Ceremony as Run, Checked, EncryptionKey, Participant, Stage};
use dstack_threshold::group::Ristretto255;
use dstack_threshold::message::NodeKey;
use dstack_threshold::prf::PrfShare;
use dstack_threshold::share_file::ShareName;
use tracing::{error, info, warn};

use crate::ports::{Evidence, Log, random_secret, read};
use crate::share_holder::ShareHolderPool;

/// How often the state is looked at, beside every change.
const LOOK_EVERY: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(5);
/// Attempts that the leader opens by itself. Each aborted one leaves its last dealer one bit of choice (threshold.md §3), so after
/// these the operators decide.
pub const ATTEMPTS_UNATTENDED_MAX: u32 = 8;

/// Judges the evidence in another node's Join: who it is, what it measures, that it binds `report_data`.
pub type NodeJudge = Arc<dyn Fn(Seat, &[u8], &[u8; 64]) -> Result<(), Refusal> + Send + Sync>;

/// Receives a dealer constant.
#[cfg(feature = "insecure-test-export")]
pub type Export = Arc<dyn Fn(&[u8; 32]) + Send + Sync>;

/// Shares at rest, where the platform can seal.
pub trait ShareFiles: Send + Sync {
    /// The sealed share of that name, if there is one that opens.
    fn load(&self, name: &ShareName) -> Option<Secret<32>>;
    /// Seals a share.
    ///
    /// # Errors
    /// Says why; the share stays in memory only.
    fn save(&self, name: &ShareName, share: &Locked<32>) -> Result<(), String>;
}

/// What the actor works with.
#[derive(Clone)]
pub struct Parts {
    /// Cluster.
    pub cluster_id: ClusterId,
    /// This node's seat.
    pub seat: Seat,
    /// This node's key.
    pub node_key: Arc<NodeKey>,
    /// The log.
    pub log: Arc<dyn Log>,
    /// This node's device.
    pub evidence: Arc<dyn Evidence>,
    /// Judges other nodes.
    pub judge: NodeJudge,
    /// Takes the share into use.
    pub shares: ShareHolderPool,
    /// Shares at rest.
    pub files: Arc<dyn ShareFiles>,
    /// Receives this node's dealer constant, for the memory-search test.
    #[cfg(feature = "insecure-test-export")]
    pub export: Export,
}

/// See the module text.
pub struct Ceremony {
    parts: Parts,
    mine: Option<Mine>,
    busy: bool,
}

/// This node's part in one attempt.
struct Mine {
    attempt: u32,
    key: Option<EncryptionKey>,
    participant: Option<Participant<Ristretto255>>,
    /// Whether every Join was judged; a rejected one means that this node posts no Ready.
    joins_judged: Option<Result<(), Refusal>>,
    /// The last message posted and not seen in the state yet, so that it is not posted twice.
    posted: Option<MessageKind>,
}

impl Ceremony {
    /// An actor that knows nothing of earlier attempts.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        Self { parts, mine: None, busy: false }
    }

    fn look(&mut self, context: &mut Context<Self>) {
        if self.busy {
            return;
        }
        self.busy = true;
        let (parts, mine) = (self.parts.clone(), self.mine.take());
        let step = async move {
            let mut mine = mine;
            let outcome = advance(&parts, &mut mine).await;
            (mine, outcome)
        };
        context.spawn(step.into_actor(self).map(|(mine, outcome), this, _context| {
            this.mine = mine;
            this.busy = false;
            if let Err(refusal) = outcome
                && !refusal.code.retryable()
                && refusal.code != RefusalCode::Duplicate
                && refusal.code != RefusalCode::OutOfOrder
            {
                warn!(code = %refusal.code, expected = refusal.expected, got = refusal.got, "ceremony step refused");
            }
        }));
    }
}

impl Actor for Ceremony {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.set_mailbox_capacity(64);
        context.run_interval(LOOK_EVERY, |this, context| this.look(context));
    }
}

impl actix::Supervised for Ceremony {
    fn restarting(&mut self, _context: &mut Self::Context) {
        // The state says where the attempt is; what this node held for it is gone, and the attempt times out.
        self.mine = None;
        self.busy = false;
    }
}

/// The state changed: look now.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Look;

impl Handler<Look> for Ceremony {
    type Result = ();
    fn handle(&mut self, _message: Look, context: &mut Self::Context) {
        self.look(context);
    }
}

/// What of the state this actor needs, taken at one moment.
struct Seen {
    index: Option<NodeIndex>,
    attempt: Option<AttemptRow>,
    attempts: u32,
    run: Option<Run<Ristretto255>>,
    root: Option<RootSeen>,
    beacon: Option<(u64, [u8; 32])>,
    everyone: Vec<NodeIndex>,
    t: u16,
    has_roots: bool,
    overdue: bool,
}

struct RootSeen {
    epoch: Epoch,
    attempt: u32,
    run: Option<Run<Ristretto255>>,
    vk: Option<Vec<u8>>,
}

fn see(parts: &Parts, state: &State) -> Seen {
    let own = state.seats.get(&parts.seat).filter(|row| row.node_key == parts.node_key.public());
    let index = own.map(|row| row.index);
    let root = state.roots.get(&(Generation(0), RootTag::Prf)).map(|root| RootSeen {
        epoch: root.epoch,
        attempt: root.attempt.open.attempt,
        run: instance(state, &parts.cluster_id, &root.attempt),
        vk: index.and_then(|index| root.vks.get(&index)).map(|vk| vk.0.clone()),
    });
    Seen {
        index,
        attempts: state.attempts,
        run: state.attempt.as_ref().and_then(|attempt| instance(state, &parts.cluster_id, attempt)),
        overdue: state.attempt.as_ref().is_some_and(|a| state.log_time.since(a.round_since) > CEREMONY_ROUND_MS_MAX),
        attempt: state.attempt.clone(),
        root,
        beacon: view::latest_beacon(state).map(|(pos, row)| (pos, row.value)),
        everyone: view::signers(state).map(|signers| signers.keys.into_keys().collect()).unwrap_or_default(),
        t: state.genesis.t,
        has_roots: state.genesis.has_roots(),
    }
}

async fn advance(parts: &Parts, mine: &mut Option<Mine>) -> Result<(), Refusal> {
    let seen = read(&*parts.log, |state| see(parts, state))?;
    if !seen.has_roots {
        return Ok(());
    }
    if let Some(root) = &seen.root {
        return take_share(parts, mine, &seen, root);
    }
    match &seen.attempt {
        Some(attempt) => take_part(parts, mine, &seen, attempt).await,
        None => open_next(parts, &seen).await,
    }
}

async fn open_next(parts: &Parts, seen: &Seen) -> Result<(), Refusal> {
    let ready = parts.log.leads() && seen.beacon.is_some() && !seen.everyone.is_empty();
    if !ready || seen.attempts >= ATTEMPTS_UNATTENDED_MAX {
        return Ok(());
    }
    let open = Open {
        generation: Generation(0),
        what: What::Dkg,
        old_epoch: Epoch(0),
        new_epoch: Epoch(1),
        attempt: seen.attempts.saturating_add(1),
        t: seen.t,
        roots: vec![RootTag::Prf],
        dealers: seen.everyone.clone(),
        holders: seen.everyone.clone(),
    };
    info!(attempt = open.attempt, "opening key generation");
    propose(parts, Command::Open(open)).await
}

async fn take_part(parts: &Parts, mine: &mut Option<Mine>, seen: &Seen, attempt: &AttemptRow) -> Result<(), Refusal> {
    let join_id = attempt.open.join_id(&parts.cluster_id);
    let leads = parts.log.leads();
    if leads && (attempt.ended || seen.overdue) {
        let culprits: Vec<u16> = attempt.convicted.iter().map(|i| i.0).collect();
        let silent = seen.run.as_ref().map(Run::missing).unwrap_or_default();
        error!(attempt = attempt.open.attempt, ?culprits, ?silent, "key generation aborted");
        return propose(parts, Command::Step(Step { kind: StepKind::Aborted, join_id })).await;
    }
    let stage = seen.run.as_ref().map(Run::stage);
    if leads && stage == Some(Stage::Complete) {
        return propose(parts, Command::Step(Step { kind: StepKind::Switched, join_id })).await;
    }
    let Some(index) = seen.index.filter(|index| attempt.open.holders.contains(index)) else { return Ok(()) };
    if attempt.ended {
        return Ok(());
    }
    let Some(run) = &seen.run else {
        if attempt.joins.contains_key(&index) {
            // Others are still to join; or this node restarted, and the attempt will time out.
            return Ok(());
        }
        return join(parts, mine, seen, attempt, index).await;
    };
    let Some(own) = mine.as_mut().filter(|own| own.attempt == attempt.open.attempt) else { return Ok(()) };
    if own.joins_judged.is_none() {
        let judged = judge_joins(parts, attempt).await;
        if let Err(refusal) = &judged {
            error!(code = %refusal.code, expected = refusal.expected, got = refusal.got, "a Join is rejected: no Ready from this node");
        }
        own.joins_judged = Some(judged);
    }
    if own.participant.is_none() {
        let Some(key) = own.key.take() else { return Ok(()) };
        let participant = Participant::new(run.instance().clone(), index, key, random_secret::<64>()?)
            .map_err(|error| Refusal::new(RefusalCode::Internal, "a participant", error.to_string()))?;
        #[cfg(feature = "insecure-test-export")]
        participant.package().dealer_constant.expose(|constant| (parts.export)(constant));
        own.participant = Some(participant);
    }
    let Some(participant) = own.participant.as_mut() else { return Ok(()) };
    let inst = run.instance().inst();
    let waits_for_me = run.missing().contains(&index);
    let messages: Vec<(MessageKind, Vec<u8>)> = match run.stage() {
        Stage::AwaitingCommits if waits_for_me => vec![(MessageKind::Commit, participant.package().commit.to_vec())],
        Stage::AwaitingDeals if waits_for_me => vec![(MessageKind::Deal, participant.package().body.clone())],
        Stage::AwaitingReady if waits_for_me && matches!(own.joins_judged, Some(Ok(()))) => match participant.check(run) {
            Ok(Checked::Ready(ready)) => vec![(MessageKind::Ready, ready.encode())],
            Ok(Checked::Complaints(complaints)) => {
                complaints.into_iter().take(1).map(|complaint| (MessageKind::Complain, complaint.encode())).collect()
            }
            Err(error) => return Err(Refusal::new(RefusalCode::OutOfOrder, "deals of this run", error.to_string())),
        },
        _ => return Ok(()),
    };
    for (kind, body) in messages {
        if own.posted == Some(kind) {
            continue;
        }
        let message = parts.node_key.sign_message(&parts.cluster_id, kind, index, inst, body);
        propose(parts, Command::Ceremony(message)).await?;
        own.posted = Some(kind);
    }
    Ok(())
}

async fn join(parts: &Parts, mine: &mut Option<Mine>, seen: &Seen, attempt: &AttemptRow, index: NodeIndex) -> Result<(), Refusal> {
    let Some((beacon_pos, beacon)) = seen.beacon else { return Ok(()) };
    if mine.as_ref().is_some_and(|own| own.attempt == attempt.open.attempt && own.posted == Some(MessageKind::Join)) {
        return Ok(());
    }
    let key = EncryptionKey::new(random_secret::<64>()?);
    let keys = vec![(RootTag::Prf, key.public())];
    let report_data = binding::join(&JoinBinding {
        cluster_id: &parts.cluster_id,
        generation: attempt.open.generation,
        what: attempt.open.what as u8,
        new_epoch: attempt.open.new_epoch,
        attempt: attempt.open.attempt,
        index,
        beacon_pos,
        beacon: &beacon,
        node_key: &parts.node_key.public(),
        keys: &keys,
    });
    let evidence = evidence(parts, report_data).await?;
    let body = JoinBody { beacon_pos, beacon, keys, evidence }.encode();
    let join_id = attempt.open.join_id(&parts.cluster_id);
    let message = parts.node_key.sign_message(&parts.cluster_id, MessageKind::Join, index, join_id, body);
    *mine = Some(Mine { attempt: attempt.open.attempt, key: Some(key), participant: None, joins_judged: None, posted: None });
    propose(parts, Command::Ceremony(message)).await?;
    if let Some(own) = mine {
        own.posted = Some(MessageKind::Join);
    }
    Ok(())
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
                let report_data = binding::join(&JoinBinding {
                    cluster_id: &parts.cluster_id,
                    generation: attempt.open.generation,
                    what: attempt.open.what as u8,
                    new_epoch: attempt.open.new_epoch,
                    attempt: attempt.open.attempt,
                    index: *index,
                    beacon_pos: body.beacon_pos,
                    beacon: &body.beacon,
                    node_key: &row.node_key,
                    keys: &body.keys,
                });
                Some((*seat, body.evidence, report_data))
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

/// The root is in force: finish this node's run, or load the sealed share of its epoch.
fn take_share(parts: &Parts, mine: &mut Option<Mine>, seen: &Seen, root: &RootSeen) -> Result<(), Refusal> {
    if parts.shares.in_use().is_some_and(|share| share.epoch == root.epoch) {
        return Ok(());
    }
    let Some(index) = seen.index else { return Ok(()) };
    let internal = |what: String| Refusal::new(RefusalCode::Internal, "a share of the root in force", what);
    let name = ShareName::share(parts.cluster_id, RootTag::Prf, Generation(0), root.epoch, index);
    if let Some(own) = mine.take_if(|own| own.attempt == root.attempt)
        && let (Some(participant), Some(run)) = (own.participant, &root.run)
    {
        let outcome = participant.finish(run).map_err(|error| internal(error.to_string()))?;
        let share = outcome.into_prf_share().map_err(|error| internal(error.to_string()))?;
        if let Err(reason) = parts.files.save(&name, share.scalar()) {
            warn!(reason, "share is in memory only: it is lost with this process");
        }
        info!(epoch = root.epoch.0, index = index.0, "share in use");
        parts.shares.install(share);
        return Ok(());
    }
    let (Some(vk), Some(secret)) = (&root.vk, parts.files.load(&name)) else { return Ok(()) };
    let share = PrfShare::new(index, Generation(0), root.epoch, secret, vk).map_err(|error| internal(error.to_string()))?;
    info!(epoch = root.epoch.0, index = index.0, "sealed share in use");
    parts.shares.install(share);
    Ok(())
}

async fn propose(parts: &Parts, command: Command) -> Result<(), Refusal> {
    let answer = parts.log.propose(command, PATIENCE).await?;
    let code = answer.outcomes.first().map_or(0, |outcome| outcome.code);
    match RefusalCode::from_number(code) {
        None => Ok(()),
        Some(code) => Err(Refusal::new(code, "a step that the log accepts", "rejected")),
    }
}
