//! What the fuzz targets call: every decoder of Raft messages, of Raft records on disk and of audit leaves.
//!
//! Owns: the list, by the number that selects. Never: part of the public face; no product uses it.

use crate::{audit_log, format, rpc};

/// Number of decoders that [`any`] knows.
pub const DECODERS: u8 = 16;

/// What decodes can be written, and what was written reads as the same. Two encodings of one message exist (postcard's numbers may be
/// padded), two messages of one encoding do not.
macro_rules! again {
    ($bytes:expr, $decode:expr, $encode:expr) => {
        if let Ok(value) = $decode($bytes) {
            let written = $encode(&value).expect("what was read can be written");
            let value = $decode(&written).expect("and read again");
            assert_eq!($encode(&value).expect("and written again"), written, "the same");
        }
    };
}

/// A record on disk has one encoding.
macro_rules! exact {
    ($bytes:expr, $decode:expr, $encode:expr) => {
        if let Ok(value) = $decode($bytes) {
            assert_eq!($encode(&value).expect("what was read can be written"), $bytes, "one encoding for each record");
        }
    };
}

/// Decodes `bytes` as what `selected` names.
///
/// # Panics
/// When bytes break one of the promises above: a finding.
pub fn any(selected: u8, bytes: &[u8]) {
    match selected % DECODERS {
        0 => again!(bytes, rpc::decode_append, rpc::encode_append),
        1 => again!(bytes, rpc::decode_vote_request, rpc::encode_vote_request),
        2 => again!(bytes, rpc::decode_vote_response, rpc::encode_vote_response),
        3 => again!(bytes, rpc::decode_transfer, rpc::encode_transfer),
        4 => again!(bytes, rpc::decode::<rpc::SnapshotChunk<'_>>, rpc::encode),
        5 => again!(bytes, rpc::decode::<rpc::ProposeRequest<'_>>, rpc::encode),
        6 => again!(bytes, rpc::decode::<rpc::AppendResponseWire>, rpc::encode),
        7 => again!(bytes, rpc::decode::<rpc::SnapshotResponseWire>, rpc::encode),
        8 => again!(bytes, rpc::decode::<rpc::ProposeResponse<'_>>, rpc::encode),
        9 => again!(bytes, rpc::decode::<rpc::ReadIndexResponse>, rpc::encode),
        10 => again!(bytes, rpc::decode::<rpc::TransferResponseWire>, rpc::encode),
        11 => exact!(bytes, format::decode_entry, format::encode_entry),
        12 => exact!(bytes, format::decode_vote, format::encode_vote),
        13 => exact!(bytes, format::decode_log_id, format::encode_log_id),
        14 => exact!(bytes, format::decode_snapshot_meta, format::encode_snapshot_meta),
        _ => exact!(bytes, |bytes| audit_log::decode(0, bytes), audit_log::encode),
    }
}

#[cfg(test)]
mod tests {
    use openraft::entry::RaftEntry as _;

    use super::*;
    use crate::types::{Command, Entry, LeaderId, LogId, Payload, Vote};

    /// Real messages behind their selecting byte pass every promise: these are the fuzzer's seeds too.
    #[test]
    fn real_messages_keep_the_promises() {
        let log_id = LogId::new(LeaderId { term: 3, node_id: 2 }, 9);
        let vote = Vote { leader_id: LeaderId { term: 3, node_id: 2 }, committed: true };
        let entry = Entry::new(log_id, Payload::Normal(Command(vec![7; 30])));
        let append = rpc::AppendRequest { vote, prev_log_id: Some(log_id), entries: vec![entry.clone()], leader_commit: None };
        let transfer = rpc::TransferRequest::new(vote, 3, Some(log_id));
        let seeds: Vec<(u8, &str, Vec<u8>)> = vec![
            (0, "append", rpc::encode_append(&append).unwrap()),
            (1, "vote-request", rpc::encode_vote_request(&rpc::VoteRequest::new(vote, Some(log_id))).unwrap()),
            (3, "transfer", rpc::encode_transfer(&transfer).unwrap()),
            (5, "propose", rpc::encode(&rpc::ProposeRequest { patience_ms: 500, command: &[1, 2, 3] }).unwrap()),
            (7, "snapshot-next", rpc::encode(&rpc::SnapshotResponseWire::Next(4096)).unwrap()),
            (8, "applied", rpc::encode(&rpc::ProposeResponse::Applied { index: 9, term: 3, response: &[5; 4] }).unwrap()),
            (9, "read-index", rpc::encode(&rpc::ReadIndexResponse::NotLeader(Some(2))).unwrap()),
            (11, "entry", format::encode_entry(&entry).unwrap()),
            (12, "vote", format::encode_vote(&vote).unwrap()),
            (13, "log-id", format::encode_log_id(&log_id).unwrap()),
        ];
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/raft");
        for (selected, name, bytes) in seeds {
            any(selected, &bytes);
            let seed = [&[selected], bytes.as_slice()].concat();
            assert_eq!(std::fs::read(folder.join(name)).ok().map(hexed), Some(hexed(seed)), "fuzz/seeds/raft/{name}");
        }
    }

    fn hexed(bytes: Vec<u8>) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
