//! [`Anchor`]: a small file outside the engine that says which commit was acknowledged last.
//!
//! Owns: two slots of 512 bytes, 4096 bytes apart, written in turn, so that a torn write leaves the other. Slot (version 1,
//! big-endian): `magic(8) ‖ version(1) ‖ sequence(8) ‖ last position ‖ SHA-256 tag of the head(32) ‖ tag(32)`, zeros after.
//! Never: more than one commit per slot; decides anything but newer, older, different.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::head::{Head, decode_position, encode_position, take};
use super::record::{Keys, VERSION};
use crate::engine::sync_dir;
use crate::error::{EngineError, StoreError};
use crate::log_store::LogPosition;

#[derive(Debug)]
pub(super) struct Anchor {
    file: File,
    path: PathBuf,
    newest: Slot,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Slot {
    sequence: u64,
    last: Option<LogPosition>,
    head_tag: [u8; 32],
}

impl Anchor {
    /// Makes the anchor of a new store, durable with its name.
    pub(super) fn create(path: &Path, head: &Head, keys: &Keys) -> Result<Self, StoreError> {
        refuse_lost_engine(path)?;
        // Written aside and renamed, so that an anchor is whole from its first moment: one that is not was damaged.
        let aside = path.with_extension("new");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&aside).map_err(io("create anchor"))?;
        // Zeros and not a hole: later writes find their blocks, also on a full disk.
        let zeros = vec![0; usize::try_from(FILE_BYTES).unwrap_or(0)];
        file.write_all_at(&zeros, 0).map_err(io("write anchor"))?;
        let mut anchor = Self { file, path: path.to_owned(), newest: Slot::of(head, keys) };
        anchor.write(head, keys)?;
        anchor.file.sync_all().map_err(io("sync anchor"))?;
        std::fs::rename(&aside, path).map_err(io("name anchor"))?;
        if let Some(dir) = path.parent() {
            sync_dir(dir).map_err(io("sync directory"))?;
        }
        Ok(anchor)
    }

    /// Reads the newest whole slot.
    pub(super) fn open(path: &Path, keys: &Keys) -> Result<Self, StoreError> {
        let wrong = |detail| StoreError::Anchor { path: path.display().to_string(), detail };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => wrong("missing, though the store has commits"),
            _ => io("open anchor")(error),
        })?;
        let mut slots = Vec::new();
        for number in 0..2 {
            let mut bytes = [0; SLOT_BYTES];
            match file.read_exact_at(&mut bytes, offset(number)) {
                Ok(()) => slots.extend(Slot::decode(&bytes, keys)),
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {}
                Err(error) => return Err(io("read anchor")(error)),
            }
        }
        let newest = slots
            .into_iter()
            .max_by_key(|slot| slot.sequence)
            .ok_or_else(|| wrong("neither half authenticates: damaged, of another store, or the record key is another"))?;
        Ok(Self { file, path: path.to_owned(), newest })
    }

    /// Compares the engine's newest commit with the newest acknowledged one.
    pub(super) fn check(&self, head: &Head, keys: &Keys) -> Result<(), StoreError> {
        if head.sequence < self.newest.sequence {
            return Err(StoreError::SteppedBack {
                found: head.sequence,
                found_last: head.bounds.last,
                anchored: self.newest.sequence,
                anchored_last: self.newest.last,
            });
        }
        if head.sequence == self.newest.sequence && Slot::of(head, keys) != self.newest {
            return Err(StoreError::Forked { sequence: head.sequence });
        }
        Ok(())
    }

    /// Writes `head` over the older slot. Durable after [`Anchor::sync`].
    pub(super) fn write(&mut self, head: &Head, keys: &Keys) -> Result<(), StoreError> {
        let slot = Slot::of(head, keys);
        self.file.write_all_at(&slot.encode(keys), offset(slot.sequence % 2)).map_err(io("write anchor"))?;
        self.newest = slot;
        Ok(())
    }

    pub(super) fn sync(&mut self) -> Result<(), StoreError> {
        self.file.sync_data().map_err(io("sync anchor"))
    }
}

impl Drop for Anchor {
    fn drop(&mut self) {
        if let Err(error) = self.file.sync_data() {
            tracing::warn!(path = %self.path.display(), %error, "anchor not synced at close");
        }
    }
}

impl Slot {
    fn of(head: &Head, keys: &Keys) -> Self {
        Self { sequence: head.sequence, last: head.bounds.last, head_tag: keys.anchor_tag(&head.encode()) }
    }

    fn encode(&self, keys: &Keys) -> [u8; SLOT_BYTES] {
        let mut content = MAGIC.to_vec();
        content.push(VERSION);
        content.extend_from_slice(&self.sequence.to_be_bytes());
        encode_position(self.last, &mut content);
        content.extend_from_slice(&self.head_tag);
        let tag = keys.anchor_tag(&content);
        content.extend_from_slice(&tag);
        let mut bytes = [0; SLOT_BYTES];
        for (to, from) in bytes.iter_mut().zip(content) {
            *to = from;
        }
        bytes
    }

    fn decode(bytes: &[u8; SLOT_BYTES], keys: &Keys) -> Option<Self> {
        let mut rest = bytes.strip_prefix(MAGIC)?;
        let [version] = take::<1>(&mut rest)?;
        if *version != VERSION {
            return None;
        }
        let sequence = u64::from_be_bytes(*take(&mut rest)?);
        let last = decode_position(&mut rest)?;
        let head_tag = *take(&mut rest)?;
        let slot = Self { sequence, last, head_tag };
        // The whole slot is compared, zeros included: one form only.
        (slot.encode(keys) == *bytes).then_some(slot)
    }
}

/// A creation that was cut short leaves an anchor at commit 0. Any other anchor beside an empty engine means that the engine's files are
/// gone, or that the configuration names another engine than before.
fn refuse_lost_engine(path: &Path) -> Result<(), StoreError> {
    let mut start = [0; 17];
    let read = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io("read anchor")(error)),
        Ok(file) => file.read_exact_at(&mut start, 0).and_then(|()| {
            let mut other = [0; SLOT_BYTES];
            file.read_exact_at(&mut other, offset(1)).map(|()| other)
        }),
    };
    let at_commit_0 = start.strip_prefix(MAGIC) == Some(&[VERSION, 0, 0, 0, 0, 0, 0, 0, 0]);
    if at_commit_0 && read.is_ok_and(|other| other.iter().all(|byte| *byte == 0)) {
        return Ok(());
    }
    Err(StoreError::Anchor {
        path: path.display().to_string(),
        detail: "it knows of commits or is damaged, but the engine is empty: its files are gone or the configuration names another engine",
    })
}

fn offset(slot: u64) -> u64 {
    slot.saturating_mul(SLOT_DISTANCE)
}

fn io(during: &'static str) -> impl Fn(std::io::Error) -> StoreError {
    move |error| EngineError::from_io(during, &error).into()
}

const MAGIC: &[u8] = b"dskanchr";
const SLOT_BYTES: usize = 512;
const SLOT_DISTANCE: u64 = 4096;
const FILE_BYTES: u64 = SLOT_DISTANCE + 512;
const _: () = assert!(SLOT_BYTES >= 8 + 1 + 8 + 17 + 32 + 32);
