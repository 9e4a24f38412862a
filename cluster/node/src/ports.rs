//! The ports of the actors over Raft and RA-TLS.
//!
//! Owns: [`RaftLog`], [`PeerNodes`]. Never: a rule.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dstack_actors::ports::{Later, Log, Peers};
use dstack_protocol::command::{Command, CommandAnswer};
use dstack_protocol::limits::FRAME_BYTES_MAX;
use dstack_protocol::state::State;
use dstack_protocol::{Refusal, RefusalCode, Seat, Wire};
use dstack_raft::machine::KmsMachine;
use dstack_raft::peers::Peers as RaftPeers;
use dstack_raft::{Halt, ProposeError, RaftHandle, Stopped};
use dstack_ratls::PeerError;
use dstack_ratls::peer_client::PeerClient;
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::latency::Latencies;
use crate::observer::Observer;

/// This node's Raft.
pub(crate) type Raft = RaftHandle<KmsMachine, Observer, RaftPeers>;

/// The log over Raft.
pub(crate) struct RaftLog {
    raft: Raft,
    applied: watch::Receiver<u64>,
    runtime: Handle,
}

impl RaftLog {
    /// The log of this node. Work runs on `runtime`, whichever thread asks.
    pub(crate) fn new(raft: Raft, applied: watch::Receiver<u64>, runtime: Handle) -> Self {
        Self { raft, applied, runtime }
    }
}

fn of_stopped(stopped: &Stopped) -> Refusal {
    match stopped {
        Stopped::Fork(fork) => Refusal::new(RefusalCode::Fork, "one log", fork.to_string()),
        other => Refusal::new(RefusalCode::ShuttingDown, "a running node", other.to_string()).retry_after(500),
    }
}

fn of_propose(error: ProposeError) -> Refusal {
    match error {
        ProposeError::NoLeader { waited_ms } => {
            Refusal::new(RefusalCode::NoLeader, "a leader with a quorum", format!("none within {waited_ms} ms")).retry_after(500)
        }
        ProposeError::TooLong { got_bytes } => Refusal::new(
            RefusalCode::TooLarge,
            format!("at most {} bytes", dstack_protocol::limits::COMMAND_BYTES_MAX),
            got_bytes.to_string(),
        ),
        ProposeError::Unknown { waited_ms, detail } => {
            // Unknown, not failed: the same bytes may be retried, the log records them once.
            Refusal::new(RefusalCode::DeadlineExceeded, "a confirmed write", format!("unconfirmed after {waited_ms} ms: {detail}"))
                .retry_after(200)
        }
        ProposeError::Refused { code, detail } => {
            Refusal::new(RefusalCode::NotThePeer, "a proposal that the leader takes", format!("{code}: {detail}"))
        }
        ProposeError::Stopped(stopped) => of_stopped(&stopped),
        other => Refusal::new(RefusalCode::Internal, "a proposal", other.to_string()).retry_after(500),
    }
}

impl Log for RaftLog {
    fn propose(&self, command: Command, patience: Duration) -> Later<Result<CommandAnswer, Refusal>> {
        let raft = self.raft.clone();
        // On the node's own runtime, so that connections do not live on an actor's thread.
        let halt = raft.watch_halt();
        let proposal = self.runtime.spawn(async move { raft.propose(command.encode(), patience).await });
        Box::pin(async move {
            let committed = proposal
                .await
                .map_err(|_| Refusal::new(RefusalCode::ShuttingDown, "a running node", "proposal dropped").retry_after(500))?
                .map_err(|error| match (&error, &*halt.borrow()) {
                    (ProposeError::Stopped(_), Some(Halt::DiskFull { detail })) => {
                        Refusal::new(RefusalCode::StorageFull, "space on this node's disk", detail.clone()).retry_after(500)
                    }
                    _ => of_propose(error),
                })?;
            CommandAnswer::decode(&committed.response)
                .map_err(|error| Refusal::new(RefusalCode::Internal, "an answer of apply", error.to_string()))
        })
    }

    fn show(&self, read: &mut dyn FnMut(Option<&State>)) -> Result<(), Refusal> {
        self.raft.with_state(|machine| read(machine.state())).map_err(|stopped| of_stopped(&stopped))
    }

    fn applied(&self) -> watch::Receiver<u64> {
        self.applied.clone()
    }

    fn leads(&self) -> bool {
        self.raft.watch_leadership().borrow().is_leader
    }
}

/// The other nodes.
pub(crate) struct PeerNodes {
    clients: BTreeMap<Seat, PeerClient>,
    latencies: Arc<Mutex<Latencies>>,
    runtime: Handle,
}

impl PeerNodes {
    /// Clients by seat.
    pub(crate) fn new(clients: BTreeMap<Seat, PeerClient>, runtime: Handle) -> Self {
        Self { clients, latencies: Arc::default(), runtime }
    }

    /// Where connections live.
    pub(crate) fn runtime(&self) -> &Handle {
        &self.runtime
    }
}

fn of_peer(seat: Seat, error: &PeerError) -> Refusal {
    Refusal::new(RefusalCode::NotReady, format!("an answer from seat {seat}"), error.to_string()).retry_after(300)
}

impl Peers for PeerNodes {
    fn post(&self, seat: Seat, path: &'static str, body: Vec<u8>, timeout: Duration) -> Later<Result<Vec<u8>, Refusal>> {
        let Some(client) = self.clients.get(&seat).cloned() else {
            let refusal = Refusal::new(RefusalCode::NotReady, "a seat of the genesis document", seat.to_string());
            return Box::pin(std::future::ready(Err(refusal)));
        };
        let latencies = Arc::clone(&self.latencies);
        let sent = self.runtime.spawn(async move {
            let request = lock(&latencies).sent(seat, Instant::now());
            let answer = client.post(path, body, timeout).await;
            lock(&latencies).ended(request, Instant::now(), answer.is_ok());
            answer
        });
        Box::pin(async move {
            let (status, bytes) = sent
                .await
                .map_err(|_| Refusal::new(RefusalCode::ShuttingDown, "a running node", "request dropped"))?
                .map_err(|error| of_peer(seat, &error))?;
            if status == 200 {
                debug_assert!(bytes.len() <= FRAME_BYTES_MAX);
                return Ok(bytes.to_vec());
            }
            Err(Refusal::decode(&bytes).unwrap_or_else(|_| {
                Refusal::new(RefusalCode::NotReady, format!("an answer from seat {seat}"), format!("HTTP status {status}"))
            }))
        })
    }

    fn latency(&self, seat: Seat) -> Option<Duration> {
        lock(&self.latencies).of(seat, Instant::now())
    }
}

fn lock(latencies: &Mutex<Latencies>) -> MutexGuard<'_, Latencies> {
    latencies.lock().unwrap_or_else(PoisonError::into_inner)
}
