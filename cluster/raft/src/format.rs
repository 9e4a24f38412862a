//! Byte layouts of everything Raft keeps on disk: log entries, the vote, log ids, snapshot descriptions.
//! Owns: these layouts and their versions. Never: what a command means, and never a type of openraft on disk.
//! Source: architecture.md §8 (versions in every record), dependencies.md §0 (formats are ours).
//!
//! Integers are big-endian.
//! ```text
//! log_id     = term(8) ‖ seat(2) ‖ index(8)                                       seat: the leader that wrote it
//! entry      = version(1)=1 ‖ log_id(18) ‖ kind(1: 0 blank, 1 command, 2 membership) ‖ body
//! vote       = version(1)=1 ‖ term(8) ‖ seat(2) ‖ committed(1)
//! membership = count(1) ‖ { count(2) ‖ seat(2)* }* ‖ count(2) ‖ seat(2)*          voter sets (two while joint), then all members; ascending
//! snapshot   = version(1)=1 ‖ present(1) ‖ [log_id] ‖ present(1) ‖ [log_id] ‖ membership    last applied, then of the membership
//! ```

use std::collections::{BTreeMap, BTreeSet};

use dstack_protocol::limits::{COMMAND_BYTES_MAX, NODES_MAX};
use openraft::entry::RaftEntry as _;

use crate::types::{Command, Entry, LeaderId, LogId, Membership, Payload, SnapshotMeta, StoredMembership, Vote};

/// The version byte in front of every stored record.
pub const FORMAT_VERSION: u8 = 1;
/// Bytes of an entry beside its command.
pub const ENTRY_OVERHEAD_BYTES: usize = 20;

/// Voter sets in one membership: two while a joint change is under way.
const VOTER_SETS_MAX: usize = 2;

/// Stored or received Raft bytes that do not follow their layout.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum FormatError {
    /// The record ends early. Damaged disk or a peer's fault: never used in part.
    #[error("raft record truncated: need {need_bytes} more bytes, have {have_bytes}")]
    Truncated {
        /// Bytes the next field needs.
        need_bytes: usize,
        /// Bytes left.
        have_bytes: usize,
    },
    /// Bytes follow the record's end.
    #[error("{extra_bytes} bytes after the end of a raft record")]
    Trailing {
        /// How many.
        extra_bytes: usize,
    },
    /// Written by a version this build does not know: upgrade, or the disk is damaged.
    #[error("unknown raft record version {got}, this build knows {FORMAT_VERSION}")]
    Version {
        /// The version byte found.
        got: u8,
    },
    /// A field holds a value outside its range.
    #[error("raft record field {field} is invalid")]
    Invalid {
        /// The field's name.
        field: &'static str,
    },
    /// A command is longer than any that may be proposed.
    #[error("command of {got_bytes} bytes, the limit is {COMMAND_BYTES_MAX}")]
    TooLong {
        /// Its length.
        got_bytes: usize,
    },
    /// A node id is no seat number. Our fault: only seats become node ids.
    #[error("node id {node_id} is not a seat")]
    NotASeat {
        /// The id.
        node_id: u64,
    },
}

/// Encodes one log entry.
pub(crate) fn encode_entry(entry: &Entry) -> Result<Vec<u8>, FormatError> {
    let mut out = Vec::with_capacity(ENTRY_OVERHEAD_BYTES + 64);
    out.push(FORMAT_VERSION);
    put_log_id(&mut out, &entry.log_id)?;
    match &entry.payload {
        Payload::Blank => out.push(0),
        Payload::Normal(command) => {
            if command.0.len() > COMMAND_BYTES_MAX {
                return Err(FormatError::TooLong { got_bytes: command.0.len() });
            }
            out.push(1);
            out.extend_from_slice(&command.0);
        }
        Payload::Membership(membership) => {
            out.push(2);
            put_membership(&mut out, membership)?;
        }
    }
    Ok(out)
}

/// Decodes one log entry; the inverse of [`encode_entry`].
pub(crate) fn decode_entry(bytes: &[u8]) -> Result<Entry, FormatError> {
    let mut input = Input(bytes);
    input.version()?;
    let log_id = input.log_id()?;
    let payload = match input.u8()? {
        0 => Payload::Blank,
        1 => {
            let body = input.rest();
            if body.len() > COMMAND_BYTES_MAX {
                return Err(FormatError::TooLong { got_bytes: body.len() });
            }
            Payload::Normal(Command(body.to_vec()))
        }
        2 => Payload::Membership(input.membership()?),
        _ => return Err(FormatError::Invalid { field: "kind" }),
    };
    input.end()?;
    Ok(Entry::new(log_id, payload))
}

/// Encodes the vote.
pub(crate) fn encode_vote(vote: &Vote) -> Result<Vec<u8>, FormatError> {
    let mut out = Vec::with_capacity(12);
    out.push(FORMAT_VERSION);
    out.extend_from_slice(&vote.leader_id.term.to_be_bytes());
    put_seat(&mut out, vote.leader_id.node_id)?;
    out.push(u8::from(vote.committed));
    Ok(out)
}

/// Decodes the vote; the inverse of [`encode_vote`].
pub(crate) fn decode_vote(bytes: &[u8]) -> Result<Vote, FormatError> {
    let mut input = Input(bytes);
    input.version()?;
    let (term, node_id) = (input.u64()?, u64::from(input.u16()?));
    let committed = input.flag("committed")?;
    input.end()?;
    Ok(Vote { leader_id: LeaderId { term, node_id }, committed })
}

/// Encodes a log id with its version byte.
pub(crate) fn encode_log_id(log_id: &LogId) -> Result<Vec<u8>, FormatError> {
    let mut out = Vec::with_capacity(19);
    out.push(FORMAT_VERSION);
    put_log_id(&mut out, log_id)?;
    Ok(out)
}

/// Decodes a log id; the inverse of [`encode_log_id`].
pub(crate) fn decode_log_id(bytes: &[u8]) -> Result<LogId, FormatError> {
    let mut input = Input(bytes);
    input.version()?;
    let log_id = input.log_id()?;
    input.end()?;
    Ok(log_id)
}

/// Encodes what a snapshot says about itself.
pub(crate) fn encode_snapshot_meta(meta: &SnapshotMeta) -> Result<Vec<u8>, FormatError> {
    let mut out = vec![FORMAT_VERSION];
    put_optional(&mut out, meta.last_log_id.as_ref())?;
    put_optional(&mut out, meta.last_membership.log_id().as_ref())?;
    put_membership(&mut out, meta.last_membership.membership())?;
    Ok(out)
}

/// Decodes what a snapshot says about itself; the inverse of [`encode_snapshot_meta`].
pub(crate) fn decode_snapshot_meta(bytes: &[u8]) -> Result<SnapshotMeta, FormatError> {
    let mut input = Input(bytes);
    input.version()?;
    let last_log_id = input.optional_log_id()?;
    let membership_log_id = input.optional_log_id()?;
    let membership = input.membership()?;
    input.end()?;
    if membership_log_id > last_log_id {
        return Err(FormatError::Invalid { field: "membership log id" });
    }
    Ok(SnapshotMeta { last_log_id, last_membership: StoredMembership::new(membership_log_id, membership) })
}

fn put_seat(out: &mut Vec<u8>, node_id: u64) -> Result<(), FormatError> {
    let seat = u16::try_from(node_id).map_err(|_| FormatError::NotASeat { node_id })?;
    out.extend_from_slice(&seat.to_be_bytes());
    Ok(())
}

fn put_log_id(out: &mut Vec<u8>, log_id: &LogId) -> Result<(), FormatError> {
    out.extend_from_slice(&log_id.leader_id.term.to_be_bytes());
    put_seat(out, log_id.leader_id.node_id)?;
    out.extend_from_slice(&log_id.index.to_be_bytes());
    Ok(())
}

fn put_optional(out: &mut Vec<u8>, log_id: Option<&LogId>) -> Result<(), FormatError> {
    out.push(u8::from(log_id.is_some()));
    log_id.map_or(Ok(()), |log_id| put_log_id(out, log_id))
}

fn put_membership(out: &mut Vec<u8>, membership: &Membership) -> Result<(), FormatError> {
    let sets = membership.get_joint_config();
    if sets.len() > VOTER_SETS_MAX {
        return Err(FormatError::Invalid { field: "voter sets" });
    }
    out.push(sets.len() as u8);
    for set in sets {
        put_seats(out, set.iter().copied().collect())?;
    }
    put_seats(out, membership.nodes().map(|(node_id, ())| *node_id).collect())
}

/// `seats` are ascending: they come from ordered sets and maps.
fn put_seats(out: &mut Vec<u8>, seats: Vec<u64>) -> Result<(), FormatError> {
    if seats.len() > NODES_MAX {
        return Err(FormatError::Invalid { field: "members" });
    }
    out.extend_from_slice(&(seats.len() as u16).to_be_bytes());
    seats.into_iter().try_for_each(|node_id| put_seat(out, node_id))
}

/// Reads fields off the front; every failure is typed.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let (head, tail) = self.0.split_first_chunk::<N>().ok_or(FormatError::Truncated { need_bytes: N, have_bytes: self.0.len() })?;
        self.0 = tail;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, FormatError> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, FormatError> {
        self.array().map(u16::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_be_bytes)
    }

    fn version(&mut self) -> Result<(), FormatError> {
        match self.u8()? {
            FORMAT_VERSION => Ok(()),
            got => Err(FormatError::Version { got }),
        }
    }

    fn flag(&mut self, field: &'static str) -> Result<bool, FormatError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(FormatError::Invalid { field }),
        }
    }

    fn log_id(&mut self) -> Result<LogId, FormatError> {
        let (term, node_id, index) = (self.u64()?, u64::from(self.u16()?), self.u64()?);
        Ok(LogId::new(LeaderId { term, node_id }, index))
    }

    fn optional_log_id(&mut self) -> Result<Option<LogId>, FormatError> {
        self.flag("presence")?.then(|| self.log_id()).transpose()
    }

    fn seats(&mut self) -> Result<BTreeSet<u64>, FormatError> {
        let count = self.u16()?;
        if usize::from(count) > NODES_MAX {
            return Err(FormatError::Invalid { field: "members" });
        }
        let mut seats = BTreeSet::new();
        for _ in 0..count {
            let seat = u64::from(self.u16()?);
            // One encoding per set: strictly ascending.
            if seats.last().is_some_and(|last| *last >= seat) {
                return Err(FormatError::Invalid { field: "seat order" });
            }
            seats.insert(seat);
        }
        Ok(seats)
    }

    fn membership(&mut self) -> Result<Membership, FormatError> {
        let count = self.u8()?;
        if usize::from(count) > VOTER_SETS_MAX {
            return Err(FormatError::Invalid { field: "voter sets" });
        }
        let sets = (0..count).map(|_| self.seats()).collect::<Result<Vec<_>, _>>()?;
        let nodes: BTreeMap<u64, ()> = self.seats()?.into_iter().map(|node_id| (node_id, ())).collect();
        // `Membership::new` refuses an empty voter set and a voter that is no member.
        Membership::new(sets, nodes).map_err(|_| FormatError::Invalid { field: "membership" })
    }

    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn end(&self) -> Result<(), FormatError> {
        if self.0.is_empty() { Ok(()) } else { Err(FormatError::Trailing { extra_bytes: self.0.len() }) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn log_id(term: u64, seat: u16, index: u64) -> LogId {
        LogId::new(LeaderId { term, node_id: u64::from(seat) }, index)
    }

    fn membership(sets: &[&[u64]], learners: &[u64]) -> Membership {
        let sets: Vec<BTreeSet<u64>> = sets.iter().map(|set| set.iter().copied().collect()).collect();
        Membership::new_with_defaults(sets, learners.iter().copied())
    }

    #[test]
    fn command_entry_has_the_documented_bytes() {
        let entry = Entry::new(log_id(5, 0x0102, 7), Payload::Normal(Command(vec![0xaa, 0xbb])));
        let bytes = encode_entry(&entry).unwrap();
        assert_eq!(bytes, [1, 0, 0, 0, 0, 0, 0, 0, 5, 1, 2, 0, 0, 0, 0, 0, 0, 0, 7, 1, 0xaa, 0xbb]);
        assert_eq!(decode_entry(&bytes).unwrap(), entry);
    }

    #[test]
    fn joint_membership_entry_has_the_documented_bytes() {
        let entry = Entry::new(log_id(1, 1, 2), Payload::Membership(membership(&[&[1, 2], &[2, 3]], &[4])));
        let bytes = encode_entry(&entry).unwrap();
        assert_eq!(bytes[19..], [2, 2, 0, 2, 0, 1, 0, 2, 0, 2, 0, 2, 0, 3, 0, 4, 0, 1, 0, 2, 0, 3, 0, 4]);
        assert_eq!(decode_entry(&bytes).unwrap(), entry);
    }

    #[test]
    fn vote_and_snapshot_description_survive_a_round_trip() {
        let vote = Vote { leader_id: LeaderId { term: 9, node_id: 3 }, committed: true };
        assert_eq!(encode_vote(&vote).unwrap(), [1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 3, 1]);
        assert_eq!(decode_vote(&encode_vote(&vote).unwrap()).unwrap(), vote);
        let meta = SnapshotMeta {
            last_log_id: Some(log_id(4, 2, 90)),
            last_membership: StoredMembership::new(Some(log_id(1, 1, 0)), membership(&[&[1, 2, 3]], &[])),
        };
        assert_eq!(decode_snapshot_meta(&encode_snapshot_meta(&meta).unwrap()).unwrap(), meta);
    }

    #[test]
    fn refuses_what_no_writer_of_ours_produces() {
        let blank = encode_entry(&Entry::new(log_id(1, 1, 1), Payload::Blank)).unwrap();
        let with = |at: usize, byte: u8| {
            let mut bytes = blank.clone();
            bytes[at] = byte;
            decode_entry(&bytes)
        };
        assert_eq!(with(0, 2), Err(FormatError::Version { got: 2 }));
        assert_eq!(with(19, 3), Err(FormatError::Invalid { field: "kind" }));
        assert_eq!(decode_entry(&[blank.clone(), vec![0]].concat()), Err(FormatError::Trailing { extra_bytes: 1 }));
        assert_eq!(decode_entry(&blank[..18]), Err(FormatError::Truncated { need_bytes: 8, have_bytes: 7 }));
        // A voter that is no member, and seats out of order.
        let head = &blank[..19];
        let membership = |body: &[u8]| decode_entry(&[head, &[2], body].concat());
        assert_eq!(membership(&[1, 0, 1, 0, 1, 0, 0]), Err(FormatError::Invalid { field: "membership" }));
        assert_eq!(membership(&[1, 0, 2, 0, 2, 0, 1, 0, 0]), Err(FormatError::Invalid { field: "seat order" }));
        let long = Entry::new(log_id(1, 1, 1), Payload::Normal(Command(vec![0; COMMAND_BYTES_MAX + 1])));
        assert_eq!(encode_entry(&long), Err(FormatError::TooLong { got_bytes: COMMAND_BYTES_MAX + 1 }));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_an_error_or_to_what_encodes_to_them(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(entry) = decode_entry(&bytes) {
                prop_assert_eq!(encode_entry(&entry).unwrap(), bytes.clone());
            }
            if let Ok(vote) = decode_vote(&bytes) {
                prop_assert_eq!(encode_vote(&vote).unwrap(), bytes.clone());
            }
            if let Ok(meta) = decode_snapshot_meta(&bytes) {
                prop_assert_eq!(encode_snapshot_meta(&meta).unwrap(), bytes);
            }
        }
    }
}
