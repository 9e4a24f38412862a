//! openraft's network over a [`Transport`].
//! Owns: encoding requests, checking answers, the errors that make openraft wait or retry. Never: sockets.
//! Source: dependencies.md §7 pitfalls 7 and 10 (bounded calls, pre-vote and transfer implemented).

use std::{future::Future, io, sync::Arc, time::Duration};

use dstack_protocol::Seat;
use openraft::{
    RPCTypes, RaftNetworkFactory, RaftNetworkV2,
    errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable},
    network::RPCOption,
    raft::{SnapshotResponse, TransferLeaderError, TransferLeaderRequest, TransferLeaderResponse},
};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use crate::{
    format, guard, metrics,
    rpc::{
        self, AppendRequest, AppendResponse, AppendResponseWire, SnapshotChunk, SnapshotResponseWire, TransferResponseWire, VoteRequest,
        VoteResponse, VoteWire,
    },
    transport::{RpcKind, SNAPSHOT_CHUNK_BYTES, Transport, TransportError},
    types::{LogId, TypeConfig, Vote, node_id, seat_of},
};

/// Chunks that may be answered with an earlier offset before a transfer is given up.
const SNAPSHOT_REWINDS_MAX: u32 = 4;

/// Makes one connection per peer for openraft.
pub(crate) struct Network<T> {
    pub(crate) seat: Seat,
    pub(crate) transport: Arc<T>,
    /// Our current term, as far as it is known here; only bounds what peers may claim.
    pub(crate) term: watch::Receiver<u64>,
}

impl<T: Transport> RaftNetworkFactory<TypeConfig> for Network<T> {
    type Network = Peer<T>;

    async fn new_client(&mut self, target: u64, _node: &()) -> Peer<T> {
        Peer { seat: self.seat, target, transport: Arc::clone(&self.transport), term: self.term.clone() }
    }
}

/// The way to one peer.
pub(crate) struct Peer<T> {
    seat: Seat,
    target: u64,
    transport: Arc<T>,
    term: watch::Receiver<u64>,
}

fn broken(cause: &dyn std::error::Error) -> RPCError<TypeConfig> {
    RPCError::Network(NetworkError::from_string(cause))
}

impl<T: Transport> Peer<T> {
    async fn call(&self, kind: RpcKind, body: Vec<u8>, timeout: Duration) -> Result<Vec<u8>, RPCError<TypeConfig>> {
        let Some(seat) = seat_of(self.target) else {
            return Err(RPCError::Unreachable(Unreachable::from_string(format!("node id {} is no seat", self.target))));
        };
        // The transport keeps the time too; this bound holds even if it does not.
        let answer = tokio::time::timeout(timeout, self.transport.call(seat, kind, body, timeout)).await;
        let error = match answer {
            Ok(Ok(bytes)) => return Ok(bytes),
            Ok(Err(error)) => error,
            Err(_) => TransportError::Timeout { to: seat.0, timeout_ms: timeout.as_millis() as u64 },
        };
        metrics::rpc_failed(kind);
        Err(match error {
            TransportError::Timeout { .. } => RPCError::Timeout(Timeout {
                action: match kind {
                    RpcKind::Vote | RpcKind::PreVote => RPCTypes::Vote,
                    RpcKind::Snapshot => RPCTypes::InstallSnapshot,
                    RpcKind::TransferLeader => RPCTypes::TransferLeader,
                    RpcKind::Append | RpcKind::Propose | RpcKind::ReadIndex | RpcKind::Position => RPCTypes::AppendEntries,
                },
                id: node_id(self.seat),
                target: self.target,
                timeout,
            }),
            TransportError::Broken { .. } => broken(&error),
            // Backs off before the next try.
            TransportError::Unreachable { .. } | TransportError::Refused { .. } => RPCError::Unreachable(Unreachable::new(&error)),
        })
    }

    fn our_term(&self, own: &Vote) -> u64 {
        (*self.term.borrow()).max(own.leader_id.term)
    }

    async fn ask_vote(&self, kind: RpcKind, request: &VoteRequest, option: &RPCOption) -> Result<VoteResponse, RPCError<TypeConfig>> {
        let body = rpc::encode_vote_request(request).map_err(|error| broken(&error))?;
        let bytes = self.call(kind, body, option.soft_ttl()).await?;
        let response = rpc::decode_vote_response(&bytes).map_err(|error| broken(&error))?;
        guard::check_term(&response.vote, self.our_term(&request.vote)).map_err(|error| broken(&error))?;
        Ok(response)
    }

    async fn send_snapshot(&self, vote: &Vote, meta: &[u8], data: &[u8], option: &RPCOption) -> Result<Vote, StreamingError<TypeConfig>> {
        let failed = |error: &dyn std::error::Error| StreamingError::Network(NetworkError::from_string(error));
        let digest: [u8; 32] = Sha256::digest(data).into();
        let wire_vote = VoteWire::try_from(vote).map_err(|error| failed(&error))?;
        let (mut offset, mut rewinds) = (0usize, 0u32);
        loop {
            let end = offset.saturating_add(SNAPSHOT_CHUNK_BYTES).min(data.len());
            let chunk = SnapshotChunk {
                vote: wire_vote,
                meta,
                digest,
                total_bytes: data.len() as u64,
                offset: offset as u64,
                bytes: data.get(offset..end).unwrap_or_default(),
            };
            let body = rpc::encode(&chunk).map_err(|error| failed(&error))?;
            let bytes = self.call(RpcKind::Snapshot, body, option.soft_ttl()).await?;
            match rpc::decode(&bytes).map_err(|error| failed(&error))? {
                SnapshotResponseWire::Done(vote) => return Ok(vote.into()),
                SnapshotResponseWire::Next(next) => {
                    let next = usize::try_from(next).unwrap_or(usize::MAX);
                    if next <= offset {
                        rewinds += 1;
                    }
                    if next >= data.len() || rewinds > SNAPSHOT_REWINDS_MAX {
                        return Err(failed(&io::Error::other("the receiver asks for snapshot bytes that lead nowhere")));
                    }
                    offset = next;
                }
            }
        }
    }
}

impl<T: Transport> RaftNetworkV2<TypeConfig> for Peer<T> {
    type SnapshotData = Arc<Vec<u8>>;

    async fn append_entries(&mut self, request: AppendRequest, option: RPCOption) -> Result<AppendResponse, RPCError<TypeConfig>> {
        let body = rpc::encode_append(&request).map_err(|error| broken(&error))?;
        let bytes = self.call(RpcKind::Append, body, option.soft_ttl()).await?;
        let wire: AppendResponseWire = rpc::decode(&bytes).map_err(|error| broken(&error))?;
        let response = AppendResponse::from(wire);
        let sent: Vec<LogId> = request.entries.iter().map(|entry| entry.log_id).collect();
        guard::check_append_response(&sent, request.prev_log_id, &response, self.our_term(&request.vote))
            .map_err(|error| broken(&error))?;
        Ok(response)
    }

    async fn vote(&mut self, request: VoteRequest, option: RPCOption) -> Result<VoteResponse, RPCError<TypeConfig>> {
        self.ask_vote(RpcKind::Vote, &request, &option).await
    }

    async fn pre_vote(&mut self, request: VoteRequest, option: RPCOption) -> Result<VoteResponse, RPCError<TypeConfig>> {
        self.ask_vote(RpcKind::PreVote, &request, &option).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: openraft::type_config::alias::SnapshotOf<TypeConfig, Arc<Vec<u8>>>,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let meta =
            format::encode_snapshot_meta(&snapshot.meta).map_err(|error| StreamingError::Network(NetworkError::from_string(error)))?;
        let answered = tokio::select! {
            closed = cancel => return Err(StreamingError::Closed(closed)),
            answered = self.send_snapshot(&vote, &meta, &snapshot.snapshot, &option) => answered?,
        };
        guard::check_term(&answered, self.our_term(&vote)).map_err(|error| StreamingError::Network(NetworkError::from_string(error)))?;
        Ok(SnapshotResponse::new(answered))
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let body = rpc::encode_transfer(&request).map_err(|error| broken(&error))?;
        let bytes = self.call(RpcKind::TransferLeader, body, option.soft_ttl()).await?;
        Ok(match rpc::decode(&bytes).map_err(|error| broken(&error))? {
            TransferResponseWire::Accepted => Ok(()),
            TransferResponseWire::VoteChanged(actual) => {
                Err(TransferLeaderError::VoteChanged { expected: *request.from_leader(), actual: actual.into() })
            }
            TransferResponseWire::LogNotFlushed(actual) => {
                Err(TransferLeaderError::LogNotFlushed { expected: request.last_log_id().copied(), actual: actual.map(LogId::from) })
            }
        })
    }
}
