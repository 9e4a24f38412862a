//! Bytes of the Raft RPCs: a version byte, then postcard.
//! Owns: message layouts and their conversion from and to openraft's types. Never: trusts them; see [`crate::guard`].
//! Source: dependencies.md §3.2 (postcard is positional: a changed layout is a new version).
//!
//! Entries travel in their stored layout ([`crate::format`]), so what is replicated is what is kept.

use serde::{Deserialize, Serialize};

use crate::{
    format::{self, FormatError},
    types::{Entry, LeaderId, LogId, TypeConfig, Vote},
};

/// The version byte in front of every message.
pub const RPC_VERSION: u8 = 1;
/// Most entries in one append.
pub(crate) const APPEND_ENTRIES_MAX: usize = 1024;

/// Bytes that are not a message of this version.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum RpcFormatError {
    /// Empty, or another version: the peer runs another release.
    #[error("unknown rpc version {got:?}, this build speaks {RPC_VERSION}")]
    Version {
        /// The first byte, if any.
        got: Option<u8>,
    },
    /// Not the postcard layout of the message.
    #[error("malformed rpc: {detail}")]
    Malformed {
        /// For people.
        detail: String,
    },
    /// An entry, vote or membership inside does not follow its layout.
    #[error("malformed record in rpc: {0}")]
    Record(#[from] FormatError),
    /// More entries than one append may carry.
    #[error("{got} entries in one append, the limit is {APPEND_ENTRIES_MAX}")]
    Entries {
        /// How many.
        got: usize,
    },
}

pub(crate) fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, RpcFormatError> {
    postcard::to_extend(message, vec![RPC_VERSION]).map_err(|error| RpcFormatError::Malformed { detail: error.to_string() })
}

pub(crate) fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, RpcFormatError> {
    match bytes.split_first() {
        Some((&RPC_VERSION, body)) => match postcard::take_from_bytes(body) {
            Ok((message, [])) => Ok(message),
            Ok((_, rest)) => Err(RpcFormatError::Malformed { detail: format!("{} bytes after the message", rest.len()) }),
            Err(error) => Err(RpcFormatError::Malformed { detail: error.to_string() }),
        },
        other => Err(RpcFormatError::Version { got: other.map(|(version, _)| *version) }),
    }
}

/// Position of an entry: the leader that wrote it, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LogIdWire {
    term: u64,
    seat: u16,
    index: u64,
}

impl TryFrom<&LogId> for LogIdWire {
    type Error = FormatError;

    fn try_from(log_id: &LogId) -> Result<Self, FormatError> {
        let LeaderId { term, node_id } = log_id.leader_id;
        let seat = u16::try_from(node_id).map_err(|_| FormatError::NotASeat { node_id })?;
        Ok(Self { term, seat, index: log_id.index })
    }
}

impl From<LogIdWire> for LogId {
    fn from(wire: LogIdWire) -> Self {
        LogId::new(LeaderId { term: wire.term, node_id: u64::from(wire.seat) }, wire.index)
    }
}

fn wire_log_id(log_id: Option<&LogId>) -> Result<Option<LogIdWire>, FormatError> {
    log_id.map(LogIdWire::try_from).transpose()
}

/// Who leads or wants to, and whether a quorum granted it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VoteWire {
    term: u64,
    seat: u16,
    committed: bool,
}

impl TryFrom<&Vote> for VoteWire {
    type Error = FormatError;

    fn try_from(vote: &Vote) -> Result<Self, FormatError> {
        let LeaderId { term, node_id } = vote.leader_id;
        let seat = u16::try_from(node_id).map_err(|_| FormatError::NotASeat { node_id })?;
        Ok(Self { term, seat, committed: vote.committed })
    }
}

impl From<VoteWire> for Vote {
    fn from(wire: VoteWire) -> Self {
        Vote { leader_id: LeaderId { term: wire.term, node_id: u64::from(wire.seat) }, committed: wire.committed }
    }
}

#[derive(Serialize, Deserialize)]
pub(crate) struct AppendWire<'a> {
    vote: VoteWire,
    prev: Option<LogIdWire>,
    commit: Option<LogIdWire>,
    #[serde(borrow)]
    entries: Vec<&'a [u8]>,
}

pub(crate) type AppendRequest = openraft::raft::AppendEntriesRequest<TypeConfig>;
pub(crate) type AppendResponse = openraft::raft::AppendEntriesResponse<TypeConfig>;
pub(crate) type VoteRequest = openraft::raft::VoteRequest<TypeConfig>;
pub(crate) type VoteResponse = openraft::raft::VoteResponse<TypeConfig>;
pub(crate) type TransferRequest = openraft::raft::TransferLeaderRequest<TypeConfig>;

pub(crate) fn encode_append(request: &AppendRequest) -> Result<Vec<u8>, RpcFormatError> {
    let entries = request.entries.iter().map(format::encode_entry).collect::<Result<Vec<_>, _>>()?;
    encode(&AppendWire {
        vote: VoteWire::try_from(&request.vote)?,
        prev: wire_log_id(request.prev_log_id.as_ref())?,
        commit: wire_log_id(request.leader_commit.as_ref())?,
        entries: entries.iter().map(Vec::as_slice).collect(),
    })
}

pub(crate) fn decode_append(bytes: &[u8]) -> Result<AppendRequest, RpcFormatError> {
    let wire: AppendWire<'_> = decode(bytes)?;
    if wire.entries.len() > APPEND_ENTRIES_MAX {
        return Err(RpcFormatError::Entries { got: wire.entries.len() });
    }
    let entries = wire.entries.into_iter().map(format::decode_entry).collect::<Result<Vec<Entry>, _>>()?;
    Ok(AppendRequest {
        vote: wire.vote.into(),
        prev_log_id: wire.prev.map(LogId::from),
        entries,
        leader_commit: wire.commit.map(LogId::from),
    })
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum AppendResponseWire {
    Success,
    Partial(Option<LogIdWire>),
    Conflict,
    HigherVote(VoteWire),
}

impl TryFrom<&AppendResponse> for AppendResponseWire {
    type Error = FormatError;

    fn try_from(response: &AppendResponse) -> Result<Self, FormatError> {
        Ok(match response {
            AppendResponse::Success => Self::Success,
            AppendResponse::PartialSuccess(upto) => Self::Partial(wire_log_id(upto.as_ref())?),
            AppendResponse::Conflict => Self::Conflict,
            AppendResponse::HigherVote(vote) => Self::HigherVote(VoteWire::try_from(vote)?),
        })
    }
}

impl From<AppendResponseWire> for AppendResponse {
    fn from(wire: AppendResponseWire) -> Self {
        match wire {
            AppendResponseWire::Success => Self::Success,
            AppendResponseWire::Partial(upto) => Self::PartialSuccess(upto.map(LogId::from)),
            AppendResponseWire::Conflict => Self::Conflict,
            AppendResponseWire::HigherVote(vote) => Self::HigherVote(vote.into()),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct VoteRequestWire {
    vote: VoteWire,
    last: Option<LogIdWire>,
    transfer: bool,
}

pub(crate) fn encode_vote_request(request: &VoteRequest) -> Result<Vec<u8>, RpcFormatError> {
    encode(&VoteRequestWire {
        vote: VoteWire::try_from(&request.vote)?,
        last: wire_log_id(request.last_log_id.as_ref())?,
        transfer: request.leadership_transfer,
    })
}

pub(crate) fn decode_vote_request(bytes: &[u8]) -> Result<VoteRequest, RpcFormatError> {
    let wire: VoteRequestWire = decode(bytes)?;
    let mut request = VoteRequest::new(wire.vote.into(), wire.last.map(LogId::from));
    request.leadership_transfer = wire.transfer;
    Ok(request)
}

#[derive(Serialize, Deserialize)]
struct VoteResponseWire {
    vote: VoteWire,
    granted: bool,
    last: Option<LogIdWire>,
}

pub(crate) fn encode_vote_response(response: &VoteResponse) -> Result<Vec<u8>, RpcFormatError> {
    encode(&VoteResponseWire {
        vote: VoteWire::try_from(&response.vote)?,
        granted: response.vote_granted,
        last: wire_log_id(response.last_log_id.as_ref())?,
    })
}

pub(crate) fn decode_vote_response(bytes: &[u8]) -> Result<VoteResponse, RpcFormatError> {
    let wire: VoteResponseWire = decode(bytes)?;
    Ok(VoteResponse { vote: wire.vote.into(), vote_granted: wire.granted, last_log_id: wire.last.map(LogId::from) })
}

#[derive(Serialize, Deserialize)]
struct TransferWire {
    from: VoteWire,
    to: u16,
    last: Option<LogIdWire>,
}

pub(crate) fn encode_transfer(request: &TransferRequest) -> Result<Vec<u8>, RpcFormatError> {
    let node_id = *request.to_node_id();
    encode(&TransferWire {
        from: VoteWire::try_from(request.from_leader())?,
        to: u16::try_from(node_id).map_err(|_| FormatError::NotASeat { node_id })?,
        last: wire_log_id(request.last_log_id())?,
    })
}

pub(crate) fn decode_transfer(bytes: &[u8]) -> Result<TransferRequest, RpcFormatError> {
    let wire: TransferWire = decode(bytes)?;
    Ok(TransferRequest::new(wire.from.into(), u64::from(wire.to), wire.last.map(LogId::from)))
}

/// The receiver's reason not to take over; the leader only waits or tries another.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum TransferResponseWire {
    Accepted,
    VoteChanged(VoteWire),
    LogNotFlushed(Option<LogIdWire>),
}

/// One chunk of a snapshot. All chunks of one transfer carry the same description.
#[derive(Serialize, Deserialize)]
pub(crate) struct SnapshotChunk<'a> {
    pub(crate) vote: VoteWire,
    /// [`format::encode_snapshot_meta`].
    #[serde(borrow)]
    pub(crate) meta: &'a [u8],
    /// SHA-256 of the whole snapshot.
    pub(crate) digest: [u8; 32],
    pub(crate) total_bytes: u64,
    pub(crate) offset: u64,
    #[serde(borrow)]
    pub(crate) bytes: &'a [u8],
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SnapshotResponseWire {
    /// Chunk kept; the next one starts at this offset.
    Next(u64),
    /// All received: installed, or refused by this vote if it is higher than the leader's.
    Done(VoteWire),
}

#[derive(Serialize, Deserialize)]
pub(crate) struct ProposeRequest<'a> {
    /// How long the proposer still waits.
    pub(crate) patience_ms: u32,
    #[serde(borrow)]
    pub(crate) command: &'a [u8],
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ProposeResponse<'a> {
    /// Committed and applied.
    Applied {
        index: u64,
        term: u64,
        #[serde(borrow)]
        response: &'a [u8],
    },
    /// Nothing was appended; ask that seat, if one is named.
    NotLeader(Option<u16>),
    /// Appended; whether it will be committed is not known.
    Unknown,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ReadIndexResponse {
    /// A read at or after this index sees every write acknowledged before the question.
    Index(u64),
    /// Ask that seat, if one is named.
    NotLeader(Option<u16>),
    /// No quorum confirmed the leader.
    NoQuorum,
}

#[cfg(test)]
mod tests {
    use openraft::entry::RaftEntry as _;

    use super::*;
    use crate::types::{Command, Payload};

    fn log_id(term: u64, index: u64) -> LogId {
        LogId::new(LeaderId { term, node_id: 2 }, index)
    }

    fn append() -> AppendRequest {
        AppendRequest {
            vote: Vote { leader_id: LeaderId { term: 3, node_id: 2 }, committed: true },
            prev_log_id: Some(log_id(2, 8)),
            entries: vec![Entry::new(log_id(3, 9), Payload::Blank), Entry::new(log_id(3, 10), Payload::Normal(Command(vec![7; 300])))],
            leader_commit: Some(log_id(2, 8)),
        }
    }

    #[test]
    fn append_survives_a_round_trip() {
        let bytes = encode_append(&append()).unwrap();
        let back = decode_append(&bytes).unwrap();
        assert_eq!((back.vote, back.prev_log_id, back.leader_commit), (append().vote, append().prev_log_id, append().leader_commit));
        assert_eq!(back.entries, append().entries);
    }

    #[test]
    fn refuses_other_versions_trailing_bytes_and_any_cut() {
        let bytes = encode_append(&append()).unwrap();
        assert_eq!(decode_append(&[]).err(), Some(RpcFormatError::Version { got: None }));
        assert_eq!(decode_append(&[9, 9]).err(), Some(RpcFormatError::Version { got: Some(9) }));
        assert!(matches!(decode_append(&[bytes.clone(), vec![0]].concat()).err(), Some(RpcFormatError::Malformed { .. })));
        for cut in 1..bytes.len() {
            assert!(decode_append(&bytes[..cut]).is_err(), "cut at {cut} was accepted");
        }
    }

    #[test]
    fn refuses_a_count_that_promises_more_than_there_is() {
        // version, vote (term 1, seat 1, committed), no prev, no commit, then 2^32 entries in 5 bytes.
        let bytes = [1, 1, 1, 1, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x0f];
        assert!(matches!(decode_append(&bytes).err(), Some(RpcFormatError::Malformed { .. })));
    }
}
