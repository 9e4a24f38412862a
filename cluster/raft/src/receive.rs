//! Collects a snapshot that arrives in chunks.
//! Owns: the one transfer under way and its bounds. Never: reads the snapshot.
//! Source: architecture.md §7 (a snapshot is data from a stranger).
//!
//! Only the newest leader's transfer is kept, so a node holds at most one snapshot of at most [`SNAPSHOT_BYTES_MAX`] in memory,
//! and memory grows with what arrives, not with what is announced.

use sha2::{Digest as _, Sha256};

use crate::{
    guard::Refused,
    rpc::SnapshotChunk,
    transport::{SNAPSHOT_BYTES_MAX, SNAPSHOT_CHUNK_BYTES},
    types::Vote,
};

/// A transfer under way.
#[derive(Debug)]
pub(crate) struct Incoming {
    vote: Vote,
    meta: Vec<u8>,
    digest: [u8; 32],
    total_bytes: u64,
    data: Vec<u8>,
}

/// What a chunk led to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// Send from this offset on.
    Next(u64),
    /// All bytes are here and have the announced digest.
    Whole(Vec<u8>),
}

/// Adds `chunk` to the transfer in `slot`, or begins a new one. A chunk that does not follow is answered with the offset that does.
pub(crate) fn receive(slot: &mut Option<Incoming>, vote: Vote, chunk: &SnapshotChunk<'_>) -> Result<Received, Refused> {
    let refused = |detail: &str| Err(Refused::Snapshot { detail: detail.to_owned() });
    let total = usize::try_from(chunk.total_bytes).unwrap_or(usize::MAX);
    if total > SNAPSHOT_BYTES_MAX {
        return refused("longer than any snapshot a node takes");
    }
    if chunk.bytes.len() > SNAPSHOT_CHUNK_BYTES || (chunk.bytes.is_empty() && total > 0) {
        return refused("chunk of a wrong size");
    }
    let same = slot.as_ref().is_some_and(|incoming| {
        incoming.vote == vote && incoming.digest == chunk.digest && incoming.total_bytes == chunk.total_bytes && incoming.meta == chunk.meta
    });
    if chunk.offset == 0 {
        let meta = chunk.meta.to_vec();
        *slot = Some(Incoming { vote, meta, digest: chunk.digest, total_bytes: chunk.total_bytes, data: Vec::new() });
    } else if !same {
        return Ok(Received::Next(0));
    }
    let Some(incoming) = slot.as_mut() else { return Ok(Received::Next(0)) };
    if chunk.offset != incoming.data.len() as u64 {
        return Ok(Received::Next(incoming.data.len() as u64));
    }
    if incoming.data.len().saturating_add(chunk.bytes.len()) > total {
        *slot = None;
        return refused("more bytes than announced");
    }
    incoming.data.extend_from_slice(chunk.bytes);
    if incoming.data.len() < total {
        return Ok(Received::Next(incoming.data.len() as u64));
    }
    let data = std::mem::take(&mut incoming.data);
    *slot = None;
    if <[u8; 32]>::from(Sha256::digest(&data)) != chunk.digest {
        return refused("bytes do not have the announced digest");
    }
    Ok(Received::Whole(data))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::LeaderId;

    fn vote(term: u64) -> Vote {
        Vote { leader_id: LeaderId { term, node_id: 1 }, committed: true }
    }

    fn chunk<'a>(data: &'a [u8], offset: usize, end: usize) -> SnapshotChunk<'a> {
        SnapshotChunk {
            vote: crate::rpc::VoteWire::try_from(&vote(1)).unwrap(),
            meta: b"meta",
            digest: Sha256::digest(data).into(),
            total_bytes: data.len() as u64,
            offset: offset as u64,
            bytes: &data[offset..end],
        }
    }

    #[test]
    fn gives_the_whole_after_the_last_chunk_and_asks_again_for_what_is_missing() {
        let data: Vec<u8> = (0..100).collect();
        let mut slot = None;
        assert_eq!(receive(&mut slot, vote(1), &chunk(&data, 0, 40)).unwrap(), Received::Next(40));
        assert_eq!(receive(&mut slot, vote(1), &chunk(&data, 60, 100)).unwrap(), Received::Next(40));
        // A later leader's transfer begins anew; the old one's chunks no longer fit.
        assert_eq!(receive(&mut slot, vote(2), &chunk(&data, 40, 60)).unwrap(), Received::Next(0));
        assert_eq!(receive(&mut slot, vote(1), &chunk(&data, 40, 60)).unwrap(), Received::Next(60));
        assert_eq!(receive(&mut slot, vote(1), &chunk(&data, 60, 100)).unwrap(), Received::Whole(data));
        assert!(slot.is_none());
    }

    #[test]
    fn refuses_altered_bytes_and_more_than_announced() {
        let data = [7u8; 64];
        let mut altered = chunk(&data, 0, 64);
        altered.digest[0] ^= 1;
        assert!(matches!(receive(&mut None, vote(1), &altered), Err(Refused::Snapshot { .. })));
        let mut longer = chunk(&data, 0, 64);
        longer.total_bytes = 63;
        assert!(matches!(receive(&mut None, vote(1), &longer), Err(Refused::Snapshot { .. })));
        let mut huge = chunk(&data, 0, 64);
        huge.total_bytes = u64::MAX;
        assert!(matches!(receive(&mut None, vote(1), &huge), Err(Refused::Snapshot { .. })));
    }
}
