//! The newest snapshot, in chunks. Owns: writing beside the old one and switching in one commit, reading, removal of unfinished ones.
//! Never: keeps two; shows a snapshot that is not whole.
//!
//! Layout in [`Tree::Snapshot`]: `newest` → `version(1) ‖ generation(8) ‖ bytes(8) ‖ SHA-256 of the data(32) ‖ meta`;
//! `c ‖ generation(8) ‖ number(4)` → chunk.

use std::io::Read;

use sha2::{Digest, Sha256};

use super::{ENTRY_BYTES_MAX, LogStore};
use crate::engine::{Page, Tree};
use crate::error::StoreError;
use crate::sealed::{SealedBatch, Stamp};

/// What is known of the newest snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRecord {
    /// Grows with each snapshot.
    pub generation: u64,
    /// Size of the data.
    pub size_bytes: u64,
    /// SHA-256 of the data.
    pub sha256: [u8; 32],
    /// What the caller stored with it.
    pub meta: Vec<u8>,
}

/// A snapshot being written. Dropped without [`SnapshotWriter::finish`], the old one stays.
#[derive(Debug)]
pub struct SnapshotWriter<'a> {
    store: &'a LogStore,
    /// Which call of [`LogStore::begin_snapshot`] made it.
    ticket: u64,
    generation: u64,
    next_chunk: u32,
    size_bytes: u64,
    hash: Sha256,
    buffer: Vec<u8>,
}

impl LogStore {
    /// Begins a snapshot beside the current one. Only one is written at a time: beginning another removes what this one wrote.
    ///
    /// # Errors
    /// As [`crate::sealed::Sealed::write`].
    pub fn begin_snapshot(&self) -> Result<SnapshotWriter<'_>, StoreError> {
        let mut ticket = self.snapshot_ticket();
        *ticket = ticket.wrapping_add(1);
        let newest = self.remove_unfinished_snapshots()?;
        Ok(SnapshotWriter {
            store: self,
            ticket: *ticket,
            generation: newest.saturating_add(1),
            next_chunk: 0,
            size_bytes: 0,
            hash: Sha256::new(),
            buffer: Vec::new(),
        })
    }

    /// Writes and switches to a snapshot of `data`.
    ///
    /// # Errors
    /// As [`crate::sealed::Sealed::write`]; the old snapshot stays.
    pub fn save_snapshot(&self, meta: &[u8], data: &[u8]) -> Result<SnapshotRecord, StoreError> {
        let mut writer = self.begin_snapshot()?;
        writer.write(data)?;
        writer.finish(meta)
    }

    /// The newest snapshot, without its data.
    ///
    /// # Errors
    /// As [`crate::sealed::Sealed::get`].
    pub fn snapshot(&self) -> Result<Option<SnapshotRecord>, StoreError> {
        let Some(record) = self.sealed.get(Tree::Snapshot, KEY_CURRENT)? else { return Ok(None) };
        decode(&record.value).map(Some)
    }

    /// One piece of `snapshot`'s data: number 0, 1, … each of [`CHUNK_BYTES`] but the last; none after it.
    ///
    /// # Errors
    /// [`StoreError::Snapshot`] if a newer one replaced it; as [`crate::sealed::Sealed::get`].
    pub fn snapshot_chunk(&self, snapshot: &SnapshotRecord, number: u32) -> Result<Option<Vec<u8>>, StoreError> {
        let chunk_bytes = u64::try_from(CHUNK_BYTES).unwrap_or(u64::MAX);
        if u64::from(number).saturating_mul(chunk_bytes) >= snapshot.size_bytes {
            return Ok(None);
        }
        match self.value(Tree::Snapshot, &chunk_key(snapshot.generation, number))? {
            Some(chunk) => Ok(Some(chunk)),
            None => Err(StoreError::Snapshot { detail: "replaced by a newer one while it was read" }),
        }
    }

    /// The newest snapshot with all its data, its hash checked.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`] over `max_bytes`; as [`LogStore::snapshot_chunk`].
    pub fn load_snapshot(&self, max_bytes: u64) -> Result<Option<(SnapshotRecord, Vec<u8>)>, StoreError> {
        let Some(snapshot) = self.snapshot()? else { return Ok(None) };
        if snapshot.size_bytes > max_bytes {
            return Err(StoreError::TooLarge { what: "snapshot", bytes: snapshot.size_bytes, max_bytes });
        }
        let mut data = Vec::new();
        for number in 0.. {
            match self.snapshot_chunk(&snapshot, number)? {
                Some(chunk) => data.extend_from_slice(&chunk),
                None => break,
            }
        }
        if Sha256::digest(&data).as_slice() != snapshot.sha256 {
            return Err(StoreError::Snapshot { detail: "data differs from its hash" });
        }
        Ok(Some((snapshot, data)))
    }

    /// Removes chunks that no snapshot refers to and answers the newest generation ever seen.
    pub(super) fn remove_unfinished_snapshots(&self) -> Result<u64, StoreError> {
        let current = self.snapshot()?.map_or(0, |snapshot| snapshot.generation);
        let after = chunk_key(current.saturating_add(1), 0);
        let end = [b'c'.saturating_add(1)];
        let mut batch = SealedBatch::default();
        if !self.sealed.range(Tree::Snapshot, &after, Some(&end), Page::entries(1))?.is_empty() {
            batch.delete_range(Tree::Snapshot, &after, Some(&end));
            self.sealed.write(batch)?;
        }
        Ok(current)
    }
}

impl SnapshotWriter<'_> {
    /// Adds data; whole chunks are written at once.
    ///
    /// # Errors
    /// As [`crate::sealed::Sealed::write`].
    pub fn write(&mut self, mut data: &[u8]) -> Result<(), StoreError> {
        self.hash.update(data);
        self.size_bytes = self.size_bytes.saturating_add(u64::try_from(data.len()).unwrap_or(u64::MAX));
        while !data.is_empty() {
            let room = CHUNK_BYTES.saturating_sub(self.buffer.len());
            let (now, later) = data.split_at_checked(room).unwrap_or((data, &[]));
            self.buffer.extend_from_slice(now);
            data = later;
            if self.buffer.len() == CHUNK_BYTES {
                self.flush_chunk()?;
            }
        }
        Ok(())
    }

    /// Adds all that `source` gives.
    ///
    /// # Errors
    /// The source's error as [`crate::EngineError::Io`]; as [`SnapshotWriter::write`].
    pub fn write_from(&mut self, source: &mut dyn Read) -> Result<(), StoreError> {
        let mut piece = vec![0; CHUNK_BYTES];
        loop {
            let count = source.read(&mut piece).map_err(|error| crate::EngineError::from_io("read snapshot source", &error))?;
            if count == 0 {
                return Ok(());
            }
            self.write(piece.get(..count).unwrap_or(&[]))?;
        }
    }

    /// Makes this the current snapshot and removes the one before, in one commit.
    ///
    /// # Errors
    /// As [`crate::sealed::Sealed::write`]; the old snapshot stays.
    pub fn finish(mut self, meta: &[u8]) -> Result<SnapshotRecord, StoreError> {
        if meta.len() > ENTRY_BYTES_MAX / 2 {
            return Err(StoreError::Snapshot { detail: "meta is too large" });
        }
        if !self.buffer.is_empty() {
            self.flush_chunk()?;
        }
        let record = SnapshotRecord {
            generation: self.generation,
            size_bytes: self.size_bytes,
            sha256: self.hash.clone().finalize().into(),
            meta: meta.to_vec(),
        };
        let mut batch = SealedBatch::default();
        batch.put(Tree::Snapshot, KEY_CURRENT, Stamp::default(), &encode(&record));
        batch.delete_range(Tree::Snapshot, b"c", Some(&chunk_key(self.generation, 0)));
        self.commit(batch)?;
        Ok(record)
    }

    fn flush_chunk(&mut self) -> Result<(), StoreError> {
        let mut batch = SealedBatch::default();
        batch.put(Tree::Snapshot, &chunk_key(self.generation, self.next_chunk), Stamp::default(), &self.buffer);
        self.commit(batch)?;
        self.next_chunk = self.next_chunk.checked_add(1).ok_or(StoreError::Snapshot { detail: "too many chunks" })?;
        self.buffer.clear();
        Ok(())
    }
}

impl SnapshotWriter<'_> {
    /// Writes, unless a later writer has removed what this one wrote.
    fn commit(&self, batch: SealedBatch) -> Result<(), StoreError> {
        let ticket = self.store.snapshot_ticket();
        if *ticket != self.ticket {
            return Err(StoreError::Snapshot { detail: "another one was begun after this" });
        }
        self.store.sealed.write(batch)
    }
}

fn chunk_key(generation: u64, number: u32) -> Vec<u8> {
    let mut key = vec![b'c'];
    key.extend_from_slice(&generation.to_be_bytes());
    key.extend_from_slice(&number.to_be_bytes());
    key
}

fn encode(record: &SnapshotRecord) -> Vec<u8> {
    let mut bytes = vec![VERSION];
    bytes.extend_from_slice(&record.generation.to_be_bytes());
    bytes.extend_from_slice(&record.size_bytes.to_be_bytes());
    bytes.extend_from_slice(&record.sha256);
    bytes.extend_from_slice(&record.meta);
    bytes
}

fn decode(bytes: &[u8]) -> Result<SnapshotRecord, StoreError> {
    let parse = || {
        let (generation, rest) = bytes.get(1..)?.split_first_chunk::<8>()?;
        let (size_bytes, rest) = rest.split_first_chunk::<8>()?;
        let (sha256, meta) = rest.split_first_chunk::<32>()?;
        Some(SnapshotRecord {
            generation: u64::from_be_bytes(*generation),
            size_bytes: u64::from_be_bytes(*size_bytes),
            sha256: *sha256,
            meta: meta.to_vec(),
        })
    };
    match bytes.first() {
        Some(&VERSION) => parse().ok_or(StoreError::Snapshot { detail: "record of the current snapshot is too short" }),
        found => Err(StoreError::Version { found: found.copied().unwrap_or(0), supported: VERSION }),
    }
}

const KEY_CURRENT: &[u8] = b"newest";
const VERSION: u8 = 1;
/// Size of a piece of snapshot data.
pub const CHUNK_BYTES: usize = 256 << 10;
