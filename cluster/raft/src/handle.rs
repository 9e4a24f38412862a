//! [`RaftHandle`]: what the rest of a node uses of Raft.
//! Owns: starting and stopping, proposing through whoever leads, linearizable reads, members, the state for reading.
//! Never: retries a proposal whose outcome is unknown; never a rule of the KMS.
//! Source: architecture.md §7; dependencies.md §7 pitfalls 8, 11, 12.

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use dstack_protocol::{Seat, limits::COMMAND_BYTES_MAX};
use dstack_storage::LogWriter;
use openraft::{
    ChangeMembers, Raft,
    async_runtime::watch::WatchReceiver as _,
    errors::{ClientWriteError, Fatal, InitializeError, RaftError},
};
use tokio::{sync::watch, task::JoinHandle};
use tracing::{info, warn};

use crate::{
    apply::{State, StateMachine},
    config::RaftConfig,
    confirm::{self, Confirmation, Position},
    contract::{AppliedObserver, LeafSink, Machine},
    disk::{Disk, LogStorage},
    error::{MembersError, ProposeError, ReadError, StartError, Stopped},
    follow,
    guard::{Abstention, Fork, Gate, Refused},
    lead::{self, Proposal, ReadIndex},
    metrics,
    network::Network,
    rpc,
    server::Server,
    status::{self, Halt, Leadership, RaftStatus},
    transport::{RpcKind, Transport, TransportError},
    types::{LogId, TypeConfig, node_id, seat_of},
};

/// Pauses while there is no leader: first, and longest.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(200));

/// What a node's Raft is started with.
pub struct Parts<M, O, T> {
    /// This node's seat: its Raft node id.
    pub seat: Seat,
    /// Timing.
    pub config: RaftConfig,
    /// The writer of the node's store.
    pub writer: Arc<LogWriter>,
    /// The machine with an empty state.
    pub machine: M,
    /// Where audit leaves go.
    pub sink: Box<dyn LeafSink>,
    /// Told of every applied command.
    pub observer: Arc<O>,
    /// The way to the other seats.
    pub transport: Arc<T>,
    /// Whether this node votes from the start. A node that lost its log and votes must not, until the others confirmed its position:
    /// see [`RaftHandle::confirm`] and [`RaftHandle::vote_again`].
    pub votes: bool,
}

/// A command that was committed and applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// Its log index.
    pub index: u64,
    /// The term it was written in.
    pub term: u64,
    /// The machine's answer.
    pub response: Vec<u8>,
}

/// One node's Raft. Cheap to clone; all clones are the same node.
pub struct RaftHandle<M: Machine, O: AppliedObserver<M>, T: Transport> {
    shared: Arc<Shared<M, O, T>>,
}

impl<M: Machine, O: AppliedObserver<M>, T: Transport> Clone for RaftHandle<M, O, T> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

struct Shared<M: Machine, O: AppliedObserver<M>, T> {
    server: Server<M, O>,
    transport: Arc<T>,
    leadership: watch::Receiver<Leadership>,
    halt: watch::Receiver<Option<Halt>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl<M: Machine, O: AppliedObserver<M>, T> Drop for Shared<M, O, T> {
    fn drop(&mut self) {
        for task in self.tasks.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner).drain(..) {
            task.abort();
        }
    }
}

fn stopped(detail: impl ToString) -> Stopped {
    Stopped::Raft { detail: detail.to_string() }
}

fn elapsed_ms(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

fn wire_ms(patience: Duration) -> u32 {
    u32::try_from(patience.as_millis()).unwrap_or(u32::MAX)
}

impl<M: Machine, O: AppliedObserver<M>, T: Transport> RaftHandle<M, O, T> {
    /// Rebuilds the state from snapshot and log, then takes part.
    ///
    /// # Errors
    /// [`StartError`]: do not go on; the store or the configuration cannot be used.
    pub async fn start(parts: Parts<M, O, T>) -> Result<Self, StartError> {
        let Parts { seat, config, writer, machine, sink, observer, transport, votes } = parts;
        let unusable = |detail: String| StartError::Store { detail };
        let config = Arc::new(config.checked()?);
        let state = Arc::new(State::new(machine));
        let disk = Disk::open(writer).map_err(|cause| unusable(cause.to_string()))?;
        let (term_is, term) = watch::channel(0);
        let network = Network { seat, transport: Arc::clone(&transport), term };
        let log = LogStorage::new(disk.clone(), state.watch_applied());
        let machine = StateMachine::new(Arc::clone(&state), disk.clone(), Arc::new(Mutex::new(SinkBox(sink))), observer);
        let raft = Raft::build(node_id(seat), config, network, log, machine).await.map_err(|fatal| unusable(fatal.to_string()))?;
        if !votes {
            raft.runtime_config().elect(false);
        }
        state.go_live();
        raft.run();

        let gate = Arc::new(Gate::new(!votes));
        let (leadership_is, leadership) = watch::channel(Leadership::default());
        let (halt_is, halt) = watch::channel(None);
        let tasks = vec![
            tokio::spawn(follow::follow_leadership(raft.clone(), leadership_is, term_is)),
            tokio::spawn(follow::notice_halt(raft.clone(), disk.clone(), halt_is)),
            tokio::spawn(follow::store_checkpoints(raft.clone(), state.watch_checkpoint())),
            tokio::spawn(follow::stop_at_fork(raft.clone(), gate.watch_fork())),
        ];
        let server = Server { seat, raft, state, gate, disk, incoming: tokio::sync::Mutex::new(None) };
        Ok(Self { shared: Arc::new(Shared { server, transport, leadership, halt, tasks: Mutex::new(tasks) }) })
    }

    /// Handles one RPC that the authenticated `peer` sent.
    ///
    /// # Errors
    /// [`Refused`]: tell the peer its code; nothing was done.
    pub async fn handle(&self, kind: RpcKind, peer: Seat, bytes: &[u8]) -> Result<Vec<u8>, Refused> {
        self.shared.server.handle(kind, peer, bytes).await
    }

    /// Proposes `command` through whoever leads and waits for its answer, at most `patience`.
    ///
    /// # Errors
    /// [`ProposeError`]; only [`ProposeError::Unknown`] leaves open whether the command is or will be applied.
    pub async fn propose(&self, command: Vec<u8>, patience: Duration) -> Result<Committed, ProposeError> {
        let started = Instant::now();
        let result = self.propose_until(command, started, patience).await;
        let outcome = match &result {
            Ok(_) => "applied",
            Err(ProposeError::Unknown { .. }) => "unknown",
            Err(_) => "failed",
        };
        metrics::proposed(outcome, started.elapsed());
        result
    }

    async fn propose_until(&self, command: Vec<u8>, started: Instant, patience: Duration) -> Result<Committed, ProposeError> {
        if command.len() > COMMAND_BYTES_MAX {
            return Err(ProposeError::TooLong { got_bytes: command.len() });
        }
        let unknown = |detail: String| ProposeError::Unknown { waited_ms: elapsed_ms(started), detail };
        let mut pause = RETRY_PAUSE.0;
        loop {
            self.check_fork()?;
            let left = patience.saturating_sub(started.elapsed());
            if left.is_zero() {
                return Err(ProposeError::NoLeader { waited_ms: elapsed_ms(started) });
            }
            let leader = match lead::propose(self.raft(), command.clone(), left).await {
                Proposal::Applied { index, term, response } => return Ok(Committed { index, term, response }),
                Proposal::NotLeader(leader) => leader.filter(|leader| *leader != self.seat()),
                Proposal::Unknown => return Err(unknown("appended here, not confirmed".to_owned())),
                Proposal::Stopped(detail) => return Err(stopped(detail).into()),
            };
            if let Some(leader) = leader {
                match self.forward(leader, &command, patience.saturating_sub(started.elapsed())).await {
                    Ok(Proposal::Applied { index, term, response }) => return Ok(Committed { index, term, response }),
                    Ok(Proposal::NotLeader(_)) => {}
                    Ok(Proposal::Unknown) => return Err(unknown(format!("appended at seat {leader}, not confirmed"))),
                    Ok(Proposal::Stopped(detail)) => return Err(unknown(detail)),
                    Err(TransportError::Unreachable { .. }) => {}
                    // Its Raft stopped before it looked at the command.
                    Err(TransportError::Refused { code, .. }) if code == "raft.stopped" => {}
                    Err(TransportError::Refused { code, detail, .. }) => return Err(ProposeError::Refused { code, detail }),
                    Err(error) => return Err(unknown(error.to_string())),
                }
            }
            tokio::time::sleep(pause.min(patience.saturating_sub(started.elapsed()))).await;
            pause = (pause * 2).min(RETRY_PAUSE.1);
        }
    }

    async fn forward(&self, leader: Seat, command: &[u8], patience: Duration) -> Result<Proposal, TransportError> {
        let broken = |detail: String| TransportError::Broken { to: leader.0, detail };
        let request = rpc::ProposeRequest { patience_ms: wire_ms(patience), command };
        let body = rpc::encode(&request).map_err(|error| broken(error.to_string()))?;
        let bytes = self.call(leader, RpcKind::Propose, body, patience).await?;
        Ok(match rpc::decode(&bytes).map_err(|error| broken(error.to_string()))? {
            rpc::ProposeResponse::Applied { index, term, response } => Proposal::Applied { index, term, response: response.to_vec() },
            rpc::ProposeResponse::NotLeader(leader) => Proposal::NotLeader(leader.map(Seat)),
            rpc::ProposeResponse::Unknown => Proposal::Unknown,
        })
    }

    async fn call(&self, to: Seat, kind: RpcKind, body: Vec<u8>, patience: Duration) -> Result<Vec<u8>, TransportError> {
        let answer = tokio::time::timeout(patience, self.shared.transport.call(to, kind, body, patience)).await;
        answer.unwrap_or(Err(TransportError::Timeout { to: to.0, timeout_ms: u64::from(wire_ms(patience)) }))
    }

    /// Waits until this node's state includes every write acknowledged anywhere before the call; then read with
    /// [`RaftHandle::with_state`]. Returns the log index that was waited for.
    ///
    /// # Errors
    /// [`ReadError`]: no leader with a quorum answered in time, or this node did not catch up.
    pub async fn linearizable_read(&self, patience: Duration) -> Result<u64, ReadError> {
        let started = Instant::now();
        let mut pause = RETRY_PAUSE.0;
        let index = loop {
            self.check_fork()?;
            let left = patience.saturating_sub(started.elapsed());
            if left.is_zero() {
                return Err(ReadError::NoLeader { waited_ms: elapsed_ms(started) });
            }
            let leader = match lead::read_index(self.raft(), left).await {
                ReadIndex::Index(index) => break index,
                ReadIndex::NotLeader(leader) => leader.filter(|leader| *leader != self.seat()),
                ReadIndex::NoQuorum => None,
                ReadIndex::Stopped(detail) => return Err(stopped(detail).into()),
            };
            if let Some(leader) = leader {
                let left = patience.saturating_sub(started.elapsed());
                // A question changes nothing, so every failure is only a reason to ask again.
                let body = rpc::encode(&wire_ms(left)).unwrap_or_default();
                let answer = self.call(leader, RpcKind::ReadIndex, body, left).await;
                if let Ok(rpc::ReadIndexResponse::Index(index)) =
                    answer.as_deref().map_or(Ok(rpc::ReadIndexResponse::NoQuorum), rpc::decode)
                {
                    break index;
                }
            }
            tokio::time::sleep(pause.min(patience.saturating_sub(started.elapsed()))).await;
            pause = (pause * 2).min(RETRY_PAUSE.1);
        };
        let left = patience.saturating_sub(started.elapsed());
        match self.wait_applied(index, left).await {
            Ok(true) => Ok(index),
            Ok(false) => Err(ReadError::Behind { index, waited_ms: elapsed_ms(started) }),
            Err(stopped) => Err(stopped.into()),
        }
    }

    /// Waits until entry `index` is applied here; false if it was not within `patience`.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn wait_applied(&self, index: u64, patience: Duration) -> Result<bool, Stopped> {
        let mut applied = self.shared.server.state.watch_applied();
        let reached = applied.wait_for(|applied| applied.is_some_and(|applied| applied.index >= index));
        match tokio::time::timeout(patience, reached).await {
            Ok(Ok(_)) => Ok(true),
            Ok(Err(_)) => Err(stopped("apply task ended")),
            Err(_) => Ok(false),
        }
    }

    /// Reads the state as applied here, which may be old: see [`RaftHandle::linearizable_read`]. Blocks applying while it runs.
    ///
    /// # Errors
    /// [`Stopped`]: a fork was seen, or the state is broken; nothing may be decided from it any more.
    pub fn with_state<R>(&self, read: impl FnOnce(&M) -> R) -> Result<R, Stopped> {
        self.check_fork()?;
        let machine = self.shared.server.state.read()?;
        Ok(read(&machine))
    }

    /// Position of the last applied entry, as it moves.
    pub fn watch_applied(&self) -> AppliedWatch {
        AppliedWatch(self.shared.server.state.watch_applied())
    }

    /// Term and leader, as they change.
    pub fn watch_leadership(&self) -> watch::Receiver<Leadership> {
        self.shared.leadership.clone()
    }

    /// Set once, when a leader contradicts an applied entry: the node must stop serving and keep its evidence.
    pub fn watch_fork(&self) -> watch::Receiver<Option<Fork>> {
        self.shared.server.gate.watch_fork()
    }

    /// Set once, when Raft on this node stopped by an error of its own: the process should end, and may start again.
    pub fn watch_halt(&self) -> watch::Receiver<Option<Halt>> {
        self.shared.halt.clone()
    }

    /// The leader's seat, if known here.
    pub fn leader(&self) -> Option<Seat> {
        self.raft().metrics().borrow_watched().current_leader.and_then(seat_of)
    }

    /// All figures at this moment.
    pub fn status(&self) -> RaftStatus {
        status::status(self.seat(), &self.raft().metrics().borrow_watched(), &self.shared.server.gate)
    }

    /// This node's seat.
    pub fn seat(&self) -> Seat {
        self.shared.server.seat
    }

    /// Asks the others where a node without a record of its own votes must have been, until enough of them answered. It does not vote
    /// yet: see [`RaftHandle::vote_again`]. `first_run`: this node knows that it never took part.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn confirm(&self, others: &[Seat], first_run: bool) -> Result<Confirmation, Stopped> {
        if first_run {
            self.shared.server.gate.note_first_run();
        }
        let voters = others.len().saturating_add(1);
        let mut said = String::new();
        loop {
            self.check_fork()?;
            let asked = others.iter().map(|seat| async move {
                let body = rpc::encode(&()).ok()?;
                let bytes = self.call(*seat, RpcKind::Position, body, confirm::ASK_TIMEOUT).await.ok()?;
                rpc::decode::<Position>(&bytes).ok().map(|position| (*seat, position))
            });
            let answers: Vec<(Seat, Position)> = futures::future::join_all(asked).await.into_iter().flatten().collect();
            let positions: Vec<Position> = answers.iter().map(|(_, position)| *position).collect();
            if let Some(confirmation) = confirm::conclude(first_run, voters, &positions) {
                return Ok(confirmation);
            }
            let waiting = confirm::waiting(voters, &answers);
            if waiting != said {
                info!(reason = waiting, "this node does not vote yet");
                said = waiting;
            }
            tokio::time::sleep(confirm::ASK_EVERY).await;
        }
    }

    /// Lets this node vote again after a restart, as far as `abstention` allows (architecture.md §7, "Rollback of a disk").
    pub fn vote_again(&self, abstention: Abstention) {
        self.shared.server.gate.open(abstention);
        let (raft, gate) = (self.raft().clone(), Arc::clone(&self.shared.server.gate));
        let mut applied = self.shared.server.state.watch_applied();
        let task = tokio::spawn(async move {
            // It stands for election itself only in terms in which it may vote.
            loop {
                let next_term = raft.metrics().borrow_watched().vote.leader_id.term.saturating_add(1);
                let index = applied.borrow_and_update().map_or(0, |applied| applied.index);
                if gate.allows(next_term, index) {
                    raft.runtime_config().elect(true);
                    return;
                }
                tokio::select! {
                    changed = applied.changed() => if changed.is_err() { return },
                    () = tokio::time::sleep(RETRY_PAUSE.1) => {}
                }
            }
        });
        self.keep_task(task);
    }

    fn keep_task(&self, task: JoinHandle<()>) {
        self.shared.tasks.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(task);
    }

    /// Forms a new cluster of `seats`. Call it on one node, or on all with the same seats.
    ///
    /// # Errors
    /// [`MembersError::AlreadyFormed`] is harmless.
    pub async fn initialize(&self, seats: &BTreeSet<Seat>) -> Result<(), MembersError> {
        let members: BTreeSet<u64> = seats.iter().copied().map(node_id).collect();
        self.check_admitted(&members)?;
        match self.raft().initialize(members).await {
            Ok(()) => Ok(()),
            Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Err(MembersError::AlreadyFormed),
            Err(RaftError::APIError(InitializeError::NotInMembers(_))) => Err(MembersError::NotAmong),
            Err(RaftError::Fatal(fatal)) => Err(stopped(fatal).into()),
        }
    }

    /// Adds a member that receives the log and has no vote; returns when it is committed. Leader only.
    ///
    /// # Errors
    /// [`MembersError`].
    pub async fn add_learner(&self, seat: Seat, patience: Duration) -> Result<(), MembersError> {
        let change = ChangeMembers::AddNodes([(node_id(seat), ())].into());
        self.change(change, patience).await
    }

    /// Makes `seats` the voters. Those who are new must be learners already and admitted seats; voters left out leave the cluster.
    /// Leader only.
    ///
    /// # Errors
    /// [`MembersError`].
    pub async fn change_voters(&self, seats: &BTreeSet<Seat>, patience: Duration) -> Result<(), MembersError> {
        let voters: BTreeSet<u64> = seats.iter().copied().map(node_id).collect();
        self.check_admitted(&voters)?;
        self.change(ChangeMembers::ReplaceAllVoters(voters), patience).await
    }

    fn check_admitted(&self, voters: &BTreeSet<u64>) -> Result<(), MembersError> {
        let seats = self.with_state(Machine::seats)?;
        let Some(seats) = seats else { return Ok(()) };
        let strangers = |voter: &u64| seat_of(*voter).is_none_or(|seat| !seats.contains(&seat));
        let strangers: Vec<u64> = voters.iter().copied().filter(strangers).collect();
        if strangers.is_empty() { Ok(()) } else { Err(MembersError::NotAdmitted { seats: strangers }) }
    }

    async fn change(&self, change: ChangeMembers<u64, ()>, patience: Duration) -> Result<(), MembersError> {
        let started = Instant::now();
        let Ok(result) = tokio::time::timeout(patience, self.raft().change_membership(change, false)).await else {
            return Err(MembersError::Unknown { waited_ms: elapsed_ms(started) });
        };
        match result {
            Ok(_) => Ok(()),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(forward))) => {
                Err(MembersError::NotLeader { leader: forward.leader_id.and_then(seat_of).map(|seat| seat.0) })
            }
            Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_))) => {
                Err(MembersError::Unknown { waited_ms: elapsed_ms(started) })
            }
            Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(error))) => {
                Err(MembersError::Refused { detail: error.to_string() })
            }
            Err(RaftError::APIError(ClientWriteError::PreconditionFailed(error))) => {
                Err(MembersError::Refused { detail: error.to_string() })
            }
            Err(RaftError::Fatal(fatal)) => Err(stopped(fatal).into()),
        }
    }

    /// Hands leadership to `to`, or to the voter whose log is longest; true once another seat leads. No effect on a follower.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn transfer_leader(&self, to: Option<Seat>, patience: Duration) -> Result<bool, Stopped> {
        let own = node_id(self.seat());
        let target = {
            let metrics = self.raft().metrics();
            let metrics = metrics.borrow_watched();
            let Some(replication) = &metrics.replication else { return Ok(metrics.current_leader.is_some_and(|l| l != own)) };
            let best = metrics
                .membership_config
                .voter_ids()
                .filter(|voter| *voter != own)
                .max_by_key(|voter| replication.get(voter).cloned().flatten().map(|matched| matched.index));
            to.map(node_id).or(best)
        };
        let Some(target) = target else { return Ok(false) };
        self.raft().trigger().transfer_leader(target).await.map_err(|fatal: Fatal<TypeConfig>| stopped(fatal))?;
        let mut leadership = self.watch_leadership();
        let moved = leadership.wait_for(|now| !now.is_leader && now.leader.is_some_and(|leader| node_id(leader) != own));
        match tokio::time::timeout(patience, moved).await {
            Ok(Ok(_)) => Ok(true),
            Ok(Err(_)) => Err(stopped("leadership task ended")),
            Err(_) => Ok(false),
        }
    }

    /// Stops for good: hands over leadership if this node has it, then ends Raft. What is committed stays on disk.
    pub async fn shutdown(&self, patience: Duration) {
        if self.shared.leadership.borrow().is_leader && self.status().voters.len() > 1 {
            match self.transfer_leader(None, patience).await {
                Ok(true) => info!("leadership handed over before shutdown"),
                Ok(false) | Err(_) => warn!("leadership not handed over before shutdown"),
            }
        }
        self.stop().await;
    }

    /// Ends Raft at once, without handing over: what a crash looks like to the others.
    pub async fn stop(&self) {
        if let Err(error) = self.raft().shutdown().await {
            warn!(%error, "raft core ended by a panic");
        }
        self.shared.server.disk.close();
        let tasks: Vec<_> = self.shared.tasks.lock().unwrap_or_else(std::sync::PoisonError::into_inner).drain(..).collect();
        for task in tasks {
            task.abort();
        }
    }

    fn raft(&self) -> &Raft<TypeConfig, StateMachine<M, O>> {
        &self.shared.server.raft
    }

    fn check_fork(&self) -> Result<(), Stopped> {
        self.shared.server.gate.fork().map_or(Ok(()), |fork| Err(fork.into()))
    }
}

/// The position of the last applied entry, as it moves.
#[derive(Debug, Clone)]
pub struct AppliedWatch(watch::Receiver<Option<LogId>>);

impl AppliedWatch {
    /// Index of the last applied entry.
    pub fn index(&mut self) -> Option<u64> {
        self.0.borrow_and_update().map(|applied| applied.index)
    }

    /// Waits until it moved since the last call; false when Raft is gone.
    pub async fn changed(&mut self) -> bool {
        self.0.changed().await.is_ok()
    }
}

/// A sized home for the caller's sink.
struct SinkBox(Box<dyn LeafSink>);

impl LeafSink for SinkBox {
    fn append(&mut self, leaves: &[crate::contract::Leaf]) -> io::Result<()> {
        self.0.append(leaves)
    }

    fn skip_to(&mut self, size: u64) -> io::Result<()> {
        self.0.skip_to(size)
    }
}
