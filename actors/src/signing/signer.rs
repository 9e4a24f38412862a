//! A signer's side of runs: commits and signs in FROST, takes part in ECDSA.
//!
//! Owns: the bounded table of runs, one for each `sign_id` ever; their end on success, abort and timeout. Never: signs without an ask
//! that waits in its own applied state; signs a digest it was handed; believes a message about who sent it.
//! Source: threshold.md §5.1, §5.2.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dstack_protocol::limits::{HOLDER_WAIT_MS_MAX, SIGN_RUN_MS_MAX, SIGN_RUNS_MAX, SIGN_RUNS_OF_ONE_MAX, SIGN_RUNS_REMEMBERED};
use dstack_protocol::rpc::PATH_PEER_SIGN_ROUND;
use dstack_protocol::{ClusterId, NodeIndex, Refusal, RefusalCode, RootTag, Seat, Wire};
use dstack_release::clearance::check_clock;
use dstack_secret::SecretBytes;
use dstack_threshold::message::NodeKey;
use dstack_threshold::sign::Run;
use dstack_threshold::sign::ecdsa::{EcdsaError, Outgoing};
use dstack_threshold::sign::frost::Nonces;
use tokio::runtime::Handle;
use tokio::sync::{Mutex as AsyncMutex, watch};
use tracing::{error, info, warn};

use super::send::{Letter, deliver};
use super::subject::{Algorithm, Subject};
use super::wire::{RoundMessage, RunAsk, ShareAsk};
use crate::ceremony::ShareFiles;
use crate::guarded::guarded;
use crate::metrics;
use crate::ports::{Later, Log, Now, Peers, read};
use crate::share_holder::{EcdsaRun, ShareHolderPool};

/// Judges the claim that an ask rests on: signature by the app's key, evidence, beacon (threshold.md §5.1).
pub type ClaimJudge = Arc<dyn Fn(Vec<u8>) -> Later<Result<(), Refusal>> + Send + Sync>;

/// What a signer works with.
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
    /// Other nodes.
    pub peers: Arc<dyn Peers>,
    /// The shares.
    pub shares: ShareHolderPool,
    /// Shares and secrets of pairs at rest.
    pub files: Arc<dyn ShareFiles>,
    /// Judges claims.
    pub claims: ClaimJudge,
    /// Own clock.
    pub now: Now,
    /// Where work in the background runs.
    pub runtime: Handle,
}

/// The end of an ECDSA run: `r ‖ s ‖ recid`.
type Ending = Result<[u8; 65], Refusal>;

/// See the module text.
pub(super) struct Signer {
    parts: Parts,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    runs: HashMap<[u8; 32], Entry>,
    /// Names of runs that were begun here, oldest first. None is begun twice.
    seen: HashSet<[u8; 32]>,
    oldest_first: VecDeque<[u8; 32]>,
}

struct Entry {
    coordinator: NodeIndex,
    root: RootTag,
    signers: Vec<NodeIndex>,
    kind: Kind,
}

impl Entry {
    /// Whether it has not ended; what has ended well is kept a while for those that ask late, and is small.
    fn runs(&self) -> bool {
        match &self.kind {
            Kind::Frost(_) => true,
            Kind::Ecdsa(run) => run.ending.borrow().is_none(),
        }
    }
}

enum Kind {
    Frost(Option<Box<Committed>>),
    Ecdsa(Arc<Ecdsa>),
}

/// A FROST run between commitment and share.
struct Committed {
    nonces: Nonces,
    run: Run,
    ask: RunAsk,
}

struct Ecdsa {
    sign_id: [u8; 32],
    ask: RunAsk,
    seats: std::collections::BTreeMap<NodeIndex, Seat>,
    machine: AsyncMutex<Machine>,
    ending: watch::Sender<Option<Ending>>,
}

enum Machine {
    NotBegun,
    Live(EcdsaRun),
    Ended,
}

impl Signer {
    pub(super) fn new(parts: Parts) -> Arc<Self> {
        Arc::new(Self { parts, table: Mutex::default() })
    }

    pub(super) fn parts(&self) -> &Parts {
        &self.parts
    }

    /// Runs under way here.
    pub(super) fn running(&self) -> usize {
        lock(&self.table).runs.values().filter(|entry| entry.runs()).count()
    }

    /// This node's index, once admitted with its key.
    pub(super) fn index(&self) -> Result<NodeIndex, Refusal> {
        let (seat, key) = (self.parts.seat, self.parts.node_key.public());
        let own = read(&*self.parts.log, |state| state.seats.get(&seat).filter(|row| row.node_key == key).map(|row| row.index))?;
        own.ok_or_else(|| Refusal::new(RefusalCode::NotAdmitted, "a node admitted with its key", "not yet").retry_after(500))
    }

    /// Step 1 of FROST, for the coordinator `from`.
    pub(super) async fn commit(self: &Arc<Self>, from: NodeIndex, ask: RunAsk) -> Result<Vec<u8>, Refusal> {
        let (subject, run, _) = self.prepare(&ask).await?;
        coordinates(from, &ask)?;
        if subject.algorithm() != Algorithm::Frost {
            return Err(Refusal::new(RefusalCode::SignRun, "a run of the root's own algorithm", "FROST"));
        }
        let sign_id = run.id();
        self.enter(sign_id, Entry { coordinator: from, root: subject.under.root, signers: ask.signers.clone(), kind: Kind::Frost(None) })?;
        let outcome = self.parts.shares.frost_commit(subject.under, run.clone()).await;
        let mut table = lock(&self.table);
        match outcome {
            Ok((nonces, commitments)) => {
                if let Some(Entry { kind: Kind::Frost(committed), .. }) = table.runs.get_mut(&sign_id) {
                    *committed = Some(Box::new(Committed { nonces, run, ask }));
                }
                Ok(commitments)
            }
            Err(refusal) => {
                table.runs.remove(&sign_id);
                Err(refusal)
            }
        }
    }

    /// Step 3 of FROST. The nonces are gone whatever comes of it.
    pub(super) async fn share(self: &Arc<Self>, from: NodeIndex, ask: ShareAsk) -> Result<Vec<u8>, Refusal> {
        let committed = {
            let mut table = lock(&self.table);
            let entry = table.runs.get(&ask.sign_id).filter(|entry| entry.coordinator == from);
            let unknown = || Refusal::new(RefusalCode::SignRun, "a run that this node committed to for that coordinator", "none");
            if !matches!(entry, Some(Entry { kind: Kind::Frost(Some(_)), .. })) {
                return Err(unknown());
            }
            let Some(Entry { kind: Kind::Frost(Some(committed)), .. }) = table.runs.remove(&ask.sign_id) else { return Err(unknown()) };
            *committed
        };
        // Once more against the state as it is now: a revocation since the commitment stops the share.
        let (subject, run, _) = self.prepare(&committed.ask).await?;
        if run.id() != committed.run.id() {
            return Err(Refusal::new(RefusalCode::SignRun, "the run that was committed to", "another"));
        }
        self.parts.shares.frost_share(subject.under, committed.nonces, run, subject.message(), ask.package).await
    }

    /// Takes part in an ECDSA run for the coordinator `from`, to its end.
    pub(super) async fn run(self: &Arc<Self>, from: NodeIndex, ask: RunAsk) -> Result<Vec<u8>, Refusal> {
        coordinates(from, &ask)?;
        let ecdsa = self.ecdsa(ask).await?;
        let mut ending = ecdsa.ending.subscribe();
        let ended = ending.wait_for(Option::is_some).await;
        let outcome = ended.ok().and_then(|ending| ending.clone());
        outcome.unwrap_or_else(|| Err(timed_out())).map(|signature| signature.to_vec())
    }

    /// Takes a fellow signer's message of an ECDSA run; begins the run if this is the first that this node hears of it.
    pub(super) async fn round(self: &Arc<Self>, from: NodeIndex, message: RoundMessage) -> Result<Vec<u8>, Refusal> {
        if !message.run.signers.contains(&from) {
            return Err(Refusal::new(RefusalCode::SignRun, "a message of a signer of the run", from.to_string()));
        }
        let ecdsa = self.ecdsa(message.run).await?;
        self.feed(&ecdsa, from, message.message).await?;
        Ok(Vec::new())
    }

    /// The run of `ask`, begun here now or before.
    async fn ecdsa(self: &Arc<Self>, ask: RunAsk) -> Result<Arc<Ecdsa>, Refusal> {
        if let Some(known) = self.known(&ask) {
            return Ok(known);
        }
        let (subject, run, claim) = self.prepare(&ask).await?;
        if subject.algorithm() != Algorithm::Ecdsa {
            return Err(Refusal::new(RefusalCode::SignRun, "a run of the root's own algorithm", "ECDSA"));
        }
        if subject.claim().is_some() && !claim {
            // A fellow signer's message came before the coordinator's, which brings the claim.
            return Err(Refusal::new(RefusalCode::NotYet, "the claim that the ask rests on", "not here yet").retry_after(50));
        }
        let fresh = Arc::new(Ecdsa {
            sign_id: run.id(),
            ask: RunAsk { claim: Vec::new(), ..ask.clone() },
            seats: subject.seats.clone(),
            machine: AsyncMutex::new(Machine::NotBegun),
            ending: watch::channel(None).0,
        });
        let entry = Entry {
            coordinator: ask.coordinator(),
            root: subject.under.root,
            signers: ask.signers.clone(),
            kind: Kind::Ecdsa(Arc::clone(&fresh)),
        };
        // Held from before anybody else can find it until it has begun: a message that comes meanwhile waits.
        let mut machine = fresh.machine.lock().await;
        match self.enter(run.id(), entry) {
            Ok(()) => {}
            Err(refusal) => return self.known(&ask).ok_or(refusal),
        }
        match self.parts.shares.ecdsa_begin(subject.under, run, subject.digest()).await {
            Ok((live, send)) => {
                *machine = Machine::Live(live);
                drop(machine);
                self.post(&fresh, send);
                Ok(fresh)
            }
            Err(refusal) => {
                *machine = Machine::Ended;
                drop(machine);
                self.end(&fresh, Err(refusal.clone()));
                Err(refusal)
            }
        }
    }

    fn known(&self, ask: &RunAsk) -> Option<Arc<Ecdsa>> {
        let same = |known: &RunAsk| {
            (known.key, known.ask_pos, known.epoch, known.attempt) == (ask.key, ask.ask_pos, ask.epoch, ask.attempt)
                && known.signers == ask.signers
        };
        lock(&self.table).runs.values().find_map(|entry| match &entry.kind {
            Kind::Ecdsa(ecdsa) if same(&ecdsa.ask) => Some(Arc::clone(ecdsa)),
            Kind::Ecdsa(_) | Kind::Frost(_) => None,
        })
    }

    /// Everything before a run: the ask as this node's own state has it, rebuilt. True if the claim came and is right.
    async fn prepare(&self, ask: &RunAsk) -> Result<(Subject, Run, bool), Refusal> {
        let index = self.index()?;
        if !ask.signers.contains(&index) {
            return Err(Refusal::new(RefusalCode::SignRun, "a run with this node among its signers", "without it"));
        }
        applied(&*self.parts.log, ask.ask_pos).await?;
        let (subject, log_time) =
            read(&*self.parts.log, |state| (Subject::of(state, &self.parts.cluster_id, &ask.key, ask.ask_pos), state.log_time))?;
        let subject = subject?;
        check_clock(log_time, (self.parts.now)())?;
        let run = subject.run(ask.epoch, ask.attempt, &ask.signers)?;
        let claim = match subject.claim() {
            Some(hash) if !ask.claim.is_empty() => {
                let got = dstack_protocol::codec::sha256(&[&ask.claim]);
                if got != hash {
                    return Err(Refusal::new(RefusalCode::ClaimInvalid, "the claim that the ask names", "another"));
                }
                (self.parts.claims)(ask.claim.clone()).await?;
                true
            }
            Some(_) | None => false,
        };
        Ok((subject, run, claim))
    }

    /// A place in the table, once for each name.
    fn enter(self: &Arc<Self>, sign_id: [u8; 32], entry: Entry) -> Result<(), Refusal> {
        let mut table = lock(&self.table);
        if table.seen.contains(&sign_id) {
            return Err(Refusal::new(RefusalCode::Duplicate, "a run not begun before", "one that was"));
        }
        let running = table.runs.values().filter(|other| other.runs());
        let (all, of_one) =
            running.fold((0, 0), |(all, of_one), other| (all + 1, of_one + usize::from(other.coordinator == entry.coordinator)));
        if all >= SIGN_RUNS_MAX || of_one >= SIGN_RUNS_OF_ONE_MAX {
            return Err(crate::mailbox::full("signer"));
        }
        table.runs.insert(sign_id, entry);
        table.seen.insert(sign_id);
        table.oldest_first.push_back(sign_id);
        while table.oldest_first.len() > SIGN_RUNS_REMEMBERED {
            if let Some(oldest) = table.oldest_first.pop_front() {
                table.seen.remove(&oldest);
            }
        }
        drop(table);
        let this = Arc::clone(self);
        self.parts.runtime.spawn(async move {
            tokio::time::sleep(Duration::from_millis(SIGN_RUN_MS_MAX)).await;
            this.expire(&sign_id);
        });
        Ok(())
    }

    fn expire(&self, sign_id: &[u8; 32]) {
        let entry = lock(&self.table).runs.remove(sign_id);
        if let Some(Entry { kind: Kind::Ecdsa(ecdsa), root, .. }) = entry {
            metrics::signing_run(root, "timeout");
            self.end(&ecdsa, Err(timed_out()));
        }
    }

    async fn feed(self: &Arc<Self>, ecdsa: &Arc<Ecdsa>, from: NodeIndex, message: Vec<u8>) -> Result<(), Refusal> {
        let (this, ecdsa) = (Arc::clone(self), Arc::clone(ecdsa));
        // On its own task, so that a caller that goes away does not leave a step half done.
        let step = self.parts.runtime.spawn(async move {
            let mut machine = ecdsa.machine.lock().await;
            let Machine::Live(mut live) = std::mem::replace(&mut *machine, Machine::Ended) else { return Ok(()) };
            let began = Instant::now();
            let stepped = guarded(move || {
                let outcome = live.receive(from, &message);
                (live, outcome)
            });
            let (live, outcome) = stepped.await?;
            metrics::stage("sign_step", began.elapsed());
            match outcome {
                Ok(progress) => {
                    if progress.done.is_none() {
                        *machine = Machine::Live(live);
                    }
                    drop(machine);
                    this.post(&ecdsa, progress.send);
                    if let Some(signature) = progress.done {
                        this.end(&ecdsa, Ok(signature.to_bytes()));
                    }
                    Ok(())
                }
                Err(EcdsaError::Duplicate { .. }) => {
                    *machine = Machine::Live(live);
                    Ok(())
                }
                Err(error) => {
                    let ends = error.ends_run();
                    if !ends {
                        *machine = Machine::Live(live);
                    }
                    drop(machine);
                    this.blame(&ecdsa, from, &error, ends);
                    Err(Refusal::new(RefusalCode::Malformed, "a message of this run", error.to_string()))
                }
            }
        });
        step.await.map_err(|error| Refusal::new(RefusalCode::Internal, "a step of a run", error.to_string()))?
    }

    /// A run went wrong: the culprit is named, and where threshold.md §5.1 demands it no run with that node goes on or begins any more.
    fn blame(&self, ecdsa: &Arc<Ecdsa>, from: NodeIndex, fault: &EcdsaError, ends: bool) {
        let root = ecdsa.ask.key.root();
        let culprit = fault.culprit().map(|index| index.0);
        if culprit.is_some() {
            metrics::misbehaved(root);
        }
        warn!(root = root.name(), from = from.0, ?culprit, ended = ends, error = %fault, "signing run disturbed");
        if let Some(peer) = fault.must_redo()
            && self.parts.shares.lose_pair(root, peer)
        {
            warn!(root = root.name(), peer_id = peer.0, "the two ends of a pair have secrets of different setups: they are made anew");
        }
        if let Some(peer) = fault.must_expel() {
            self.parts.shares.expel(root, peer);
            error!(root = root.name(), peer_id = peer.0, error = %fault, "no signing run with this node any more: it cheated");
            let with_it: Vec<Arc<Ecdsa>> = lock(&self.table)
                .runs
                .values()
                .filter(|entry| entry.root == root && entry.signers.contains(&peer))
                .filter_map(|entry| match &entry.kind {
                    Kind::Ecdsa(other) => Some(Arc::clone(other)),
                    Kind::Frost(_) => None,
                })
                .collect();
            let expelled = Refusal::new(RefusalCode::SignerExpelled, "a signer that did not cheat", peer.to_string());
            with_it.iter().for_each(|run| self.end(run, Err(expelled.clone())));
        }
        if ends {
            self.end(ecdsa, Err(Refusal::new(RefusalCode::SignRun, "a run to its end", fault.to_string()).retry_after(100)));
        }
    }

    /// The end of a run, once: whoever waits learns of it, its state is destroyed.
    fn end(&self, ecdsa: &Arc<Ecdsa>, ending: Ending) {
        let first = ecdsa.ending.send_if_modified(|known| {
            let first = known.is_none();
            if first {
                *known = Some(ending.clone());
            }
            first
        });
        if !first {
            return;
        }
        let root = ecdsa.ask.key.root();
        match &ending {
            Ok(_) => info!(root = root.name(), ask_pos = ecdsa.ask.ask_pos, "signed"),
            Err(refusal) => warn!(root = root.name(), ask_pos = ecdsa.ask.ask_pos, code = %refusal.code, got = refusal.got, "run ended"),
        }
        metrics::signing_run(root, metrics::outcome(&ending));
        let machine = Arc::clone(ecdsa);
        self.parts.runtime.spawn(async move { *machine.machine.lock().await = Machine::Ended });
        // One that succeeded stays until its timeout: its coordinator may still ask, and fellow signers send again what was lost.
        if ending.is_err() {
            lock(&self.table).runs.remove(&ecdsa.sign_id);
        }
    }

    fn post(&self, ecdsa: &Ecdsa, send: Vec<Outgoing>) {
        for Outgoing { to, bytes } in send {
            let Some(seat) = ecdsa.seats.get(&to) else { continue };
            let message = RoundMessage { run: ecdsa.ask.clone(), message: bytes.expose(<[u8]>::to_vec) };
            let body = SecretBytes::take(message.encode());
            drop(SecretBytes::take(message.message));
            let letter = Letter { seat: *seat, path: PATH_PEER_SIGN_ROUND, body };
            self.parts.runtime.spawn(deliver(Arc::clone(&self.parts.peers), letter, Duration::from_millis(SIGN_RUN_MS_MAX)));
        }
    }
}

/// The attempt's number is the coordinator's own, so that no node spends another's.
fn coordinates(from: NodeIndex, ask: &RunAsk) -> Result<(), Refusal> {
    if ask.coordinator() == from {
        return Ok(());
    }
    Err(Refusal::new(RefusalCode::SignRun, format!("a run coordinated by node {from}"), ask.coordinator().to_string()))
}

fn timed_out() -> Refusal {
    Refusal::new(RefusalCode::DeadlineExceeded, format!("a run of at most {SIGN_RUN_MS_MAX} ms"), "no end").retry_after(200)
}

/// Waits a moment for a position to be applied here.
pub(super) async fn applied(log: &dyn Log, pos: u64) -> Result<(), Refusal> {
    let mut applied = log.applied();
    let reached = async {
        while read(log, |state| state.size)? <= pos {
            applied.changed().await.map_err(|_| crate::mailbox::gone("raft"))?;
        }
        Ok(())
    };
    match tokio::time::timeout(Duration::from_millis(HOLDER_WAIT_MS_MAX), reached).await {
        Ok(outcome) => outcome,
        Err(_) => {
            let size = read(log, |state| state.size)?;
            Err(Refusal::new(RefusalCode::NotYet, format!("position {pos} applied"), format!("{size} leaves applied")).retry_after(100))
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
