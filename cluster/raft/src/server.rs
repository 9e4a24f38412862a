//! Answers the Raft RPCs of peers.
//! Owns: the way of one RPC from bytes to openraft and back. Never: accepts one that [`crate::guard`] refuses; never sends any.
//! Source: architecture.md §2 and §7.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use dstack_protocol::{Seat, limits::COMMAND_BYTES_MAX};
use openraft::{
    Raft, Snapshot,
    async_runtime::watch::WatchReceiver as _,
    errors::{Fatal, RaftError},
    raft::TransferLeaderError,
};
use tokio::sync::Mutex;
use tracing::{error, warn};

use crate::{
    apply::{State, StateMachine},
    confirm::Position,
    contract::{AppliedObserver, Machine},
    disk::Disk,
    format,
    guard::{self, Eligible, Gate, Refused},
    lead::{self, Proposal, ReadIndex},
    metrics,
    receive::{self, Incoming, Received},
    rpc::{self, AppendRequest, AppendResponse, AppendResponseWire, SnapshotResponseWire, TransferResponseWire, VoteWire},
    transport::RpcKind,
    types::{LogId, TypeConfig, Vote},
};

/// Longest time a forwarded proposal or read may wait here, whatever the peer asks for.
const PATIENCE_MAX: Duration = Duration::from_secs(30);

/// The server side of one node's Raft.
pub(crate) struct Server<M: Machine, O: AppliedObserver<M>> {
    pub(crate) seat: Seat,
    pub(crate) raft: Raft<TypeConfig, StateMachine<M, O>>,
    pub(crate) state: Arc<State<M>>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) disk: Disk,
    pub(crate) incoming: Mutex<Option<Incoming>>,
}

fn stopped(fatal: &Fatal<TypeConfig>) -> Refused {
    Refused::Stopped { detail: fatal.to_string() }
}

fn stopped_raft(error: RaftError<TypeConfig>) -> Refused {
    match error {
        RaftError::Fatal(fatal) => stopped(&fatal),
    }
}

impl<M: Machine, O: AppliedObserver<M>> Server<M, O> {
    /// Handles one RPC of the authenticated `peer`.
    pub(crate) async fn handle(&self, kind: RpcKind, peer: Seat, bytes: &[u8]) -> Result<Vec<u8>, Refused> {
        let result = self.dispatch(kind, peer, bytes).await;
        if let Err(refused) = &result {
            metrics::rpc_refused(kind, refused.code());
            match refused {
                Refused::Fork(fork) => error!(peer_id = %peer, %fork, "leader contradicts an applied entry"),
                Refused::Abstaining { .. } | Refused::Stopped { .. } => {}
                _ => warn!(peer_id = %peer, rpc = %kind, reason = %refused, "raft rpc refused"),
            }
        }
        result
    }

    async fn dispatch(&self, kind: RpcKind, peer: Seat, bytes: &[u8]) -> Result<Vec<u8>, Refused> {
        if bytes.len() > kind.request_bytes_max() {
            return Err(Refused::TooLarge { kind, got_bytes: bytes.len(), max_bytes: kind.request_bytes_max() });
        }
        if let Some(fork) = self.gate.fork() {
            return Err(Refused::Stopped { detail: fork.to_string() });
        }
        match kind {
            RpcKind::Append => self.append(peer, bytes).await,
            RpcKind::Vote | RpcKind::PreVote => self.vote(kind, peer, bytes).await,
            RpcKind::Snapshot => self.snapshot(peer, bytes).await,
            RpcKind::TransferLeader => self.transfer(peer, bytes).await,
            RpcKind::Propose => self.propose(bytes).await,
            RpcKind::ReadIndex => self.read_index(bytes).await,
            RpcKind::Position => self.position(bytes),
        }
    }

    fn our_vote(&self) -> Vote {
        self.raft.metrics().borrow_watched().vote
    }

    fn check_sender(&self, kind: RpcKind, vote: &Vote, peer: Seat) -> Result<(), Refused> {
        guard::check_sender(kind, vote, peer, self.our_vote().leader_id.term)
    }

    fn applied_index(&self) -> u64 {
        self.state.applied().map_or(0, |applied| applied.index)
    }

    /// Who may vote by this node's applied state (architecture.md §7, Seats).
    pub(crate) fn eligible(&self) -> Result<Eligible, Refused> {
        let seats = self.state.read().map_err(|broken| Refused::Stopped { detail: broken.to_string() })?.seats();
        let in_force = self.raft.metrics().borrow_watched().membership_config.voter_ids().collect();
        Ok(Eligible { seats, in_force })
    }

    async fn append(&self, peer: Seat, bytes: &[u8]) -> Result<Vec<u8>, Refused> {
        let mut request = rpc::decode_append(bytes)?;
        self.check_sender(RpcKind::Append, &request.vote, peer)?;
        guard::check_append(&request)?;
        self.check_fork(&request).await?;

        // Entries before a configuration that cannot be accepted yet still count: they may admit its voters.
        let bad = self.eligible()?.first_bad_membership(&request);
        if let Some((at, _)) = &bad {
            request.entries.truncate(*at);
        }
        let kept = request.entries.last().map(|entry| entry.log_id).or(request.prev_log_id);
        let kept_none = request.entries.is_empty();
        let response = self.raft.append_entries(request).await.map_err(stopped_raft)?;
        let response = match bad {
            Some((_, seats)) if kept_none => return Err(Refused::Voters { seats }),
            Some(_) if response == AppendResponse::Success => AppendResponse::PartialSuccess(kept),
            _ => response,
        };
        let wire = AppendResponseWire::try_from(&response).map_err(rpc::RpcFormatError::from)?;
        Ok(rpc::encode(&wire)?)
    }

    /// A node never un-applies: a leader that contradicts an applied entry stops it (architecture.md §2).
    async fn check_fork(&self, request: &AppendRequest) -> Result<(), Refused> {
        let applied = self.state.applied();
        let first = request.prev_log_id.map_or(0, |prev| prev.index);
        let end = request.entries.last().map_or(first, |entry| entry.log_id.index);
        let known: BTreeMap<u64, LogId> = match applied {
            Some(applied) if first < applied.index => {
                let ids = self.disk.log_ids(first, end.min(applied.index)).await;
                ids.map_err(|cause| Refused::Stopped { detail: cause.to_string() })?
            }
            _ => BTreeMap::new(),
        };
        match guard::contradiction(request, applied, &known) {
            None => Ok(()),
            Some(fork) => {
                self.gate.raise_fork(fork);
                Err(Refused::Fork(fork))
            }
        }
    }

    async fn vote(&self, kind: RpcKind, peer: Seat, bytes: &[u8]) -> Result<Vec<u8>, Refused> {
        let request = rpc::decode_vote_request(bytes)?;
        self.check_sender(kind, &request.vote, peer)?;
        guard::check_vote_request(kind, &request)?;
        let term = request.vote.leader_id.term;
        if !self.gate.allows(term, self.applied_index()) {
            return Err(Refused::Abstaining { term });
        }
        let response = match kind {
            RpcKind::PreVote => self.raft.pre_vote(request).await,
            _ => self.raft.vote(request).await,
        };
        Ok(rpc::encode_vote_response(&response.map_err(stopped_raft)?)?)
    }

    async fn snapshot(&self, peer: Seat, bytes: &[u8]) -> Result<Vec<u8>, Refused> {
        let chunk: rpc::SnapshotChunk<'_> = rpc::decode(bytes)?;
        let vote = Vote::from(chunk.vote);
        self.check_sender(RpcKind::Snapshot, &vote, peer)?;
        let meta = format::decode_snapshot_meta(chunk.meta).map_err(rpc::RpcFormatError::from)?;
        let committed = self.raft.metrics().borrow_watched().local_committed;
        guard::check_snapshot(&vote, &meta, committed)?;
        let ours = self.our_vote();
        if vote.leader_id < ours.leader_id {
            let ours = VoteWire::try_from(&ours).map_err(rpc::RpcFormatError::from)?;
            return Ok(rpc::encode(&SnapshotResponseWire::Done(ours))?);
        }
        let data = match receive::receive(&mut *self.incoming.lock().await, vote, &chunk)? {
            Received::Next(offset) => return Ok(rpc::encode(&SnapshotResponseWire::Next(offset))?),
            Received::Whole(data) => Arc::new(data),
        };
        self.check_snapshot_content(&meta, Arc::clone(&data)).await?;
        let response = self.raft.install_full_snapshot(vote, Snapshot { meta, snapshot: data }).await;
        let vote = response.map_err(|fatal| stopped(&fatal))?.vote;
        let vote = VoteWire::try_from(&vote).map_err(rpc::RpcFormatError::from)?;
        Ok(rpc::encode(&SnapshotResponseWire::Done(vote))?)
    }

    /// Lets the machine check everything in the snapshot before openraft may act on it.
    async fn check_snapshot_content(&self, meta: &crate::types::SnapshotMeta, data: Arc<Vec<u8>>) -> Result<(), Refused> {
        let state = Arc::clone(&self.state);
        let checked = tokio::task::spawn_blocking(move || {
            let machine = state.read().map_err(|broken| broken.to_string())?;
            machine.restored(&data).map(|restored| (restored.at_checkpoint(), restored.seats()))
        });
        let refused = |detail: String| Refused::Snapshot { detail };
        let (at_checkpoint, seats) = checked.await.map_err(|panicked| refused(panicked.to_string()))?.map_err(refused)?;
        if !at_checkpoint {
            return Err(refused("not taken at a checkpoint position".to_owned()));
        }
        let eligible = Eligible { seats, ..self.eligible()? };
        let seats = eligible.strangers(meta.last_membership.membership());
        if seats.is_empty() { Ok(()) } else { Err(Refused::Voters { seats }) }
    }

    async fn transfer(&self, peer: Seat, bytes: &[u8]) -> Result<Vec<u8>, Refused> {
        let request = rpc::decode_transfer(bytes)?;
        self.check_sender(RpcKind::TransferLeader, request.from_leader(), peer)?;
        guard::check_transfer(&request, self.seat)?;
        let term = request.from_leader().leader_id.term.saturating_add(1);
        if !self.gate.allows(term, self.applied_index()) {
            return Err(Refused::Abstaining { term });
        }
        let answer = self.raft.handle_transfer_leader(request).await.map_err(|fatal| stopped(&fatal))?;
        let wire = match answer {
            Ok(()) => TransferResponseWire::Accepted,
            Err(TransferLeaderError::VoteChanged { actual, .. }) => {
                TransferResponseWire::VoteChanged(VoteWire::try_from(&actual).map_err(rpc::RpcFormatError::from)?)
            }
            Err(TransferLeaderError::LogNotFlushed { actual, .. }) => {
                let actual = actual.as_ref().map(rpc::LogIdWire::try_from).transpose();
                TransferResponseWire::LogNotFlushed(actual.map_err(rpc::RpcFormatError::from)?)
            }
        };
        Ok(rpc::encode(&wire)?)
    }

    async fn propose(&self, bytes: &[u8]) -> Result<Vec<u8>, Refused> {
        let request: rpc::ProposeRequest<'_> = rpc::decode(bytes)?;
        let patience = Duration::from_millis(u64::from(request.patience_ms)).min(PATIENCE_MAX);
        // A longer command could not be stored: it would stop the leader instead of its proposer.
        if request.command.len() > COMMAND_BYTES_MAX {
            return Err(Refused::TooLarge { kind: RpcKind::Propose, got_bytes: request.command.len(), max_bytes: COMMAND_BYTES_MAX });
        }
        let outcome = lead::propose(&self.raft, request.command.to_vec(), patience).await;
        let wire = match &outcome {
            Proposal::Applied { index, term, response } => rpc::ProposeResponse::Applied { index: *index, term: *term, response },
            Proposal::NotLeader(leader) => rpc::ProposeResponse::NotLeader(leader.map(|seat| seat.0)),
            Proposal::Unknown => rpc::ProposeResponse::Unknown,
            Proposal::Stopped(detail) => return Err(Refused::Stopped { detail: detail.clone() }),
        };
        Ok(rpc::encode(&wire)?)
    }

    /// architecture.md §7: highest term seen, last index. It changes nothing.
    fn position(&self, bytes: &[u8]) -> Result<Vec<u8>, Refused> {
        rpc::decode::<()>(bytes)?;
        let (term, last_index) = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            (metrics.vote.leader_id.term.max(metrics.current_term), metrics.last_log_index)
        };
        let position =
            Position { standing: self.gate.standing(self.applied_index()), highest_term: term.max(self.gate.terms_to()), last_index };
        Ok(rpc::encode(&position)?)
    }

    async fn read_index(&self, bytes: &[u8]) -> Result<Vec<u8>, Refused> {
        let patience_ms: u32 = rpc::decode(bytes)?;
        let patience = Duration::from_millis(u64::from(patience_ms)).min(PATIENCE_MAX);
        let wire = match lead::read_index(&self.raft, patience).await {
            ReadIndex::Index(index) => rpc::ReadIndexResponse::Index(index),
            ReadIndex::NotLeader(leader) => rpc::ReadIndexResponse::NotLeader(leader.map(|seat| seat.0)),
            ReadIndex::NoQuorum => rpc::ReadIndexResponse::NoQuorum,
            ReadIndex::Stopped(detail) => return Err(Refused::Stopped { detail }),
        };
        Ok(rpc::encode(&wire)?)
    }
}
