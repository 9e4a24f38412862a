//! What a node may conclude from its own disk at a start: whether the records there are its own, and whether it ever took part.
//!
//! Owns: the file `standing`, the record key of a node whose device has none, removing what such a node can no longer read.
//! Never: touches records that a device with a key wrote. Source: threshold.md §6; architecture.md §7 "Rollback of a disk", §8.
//!
//! The file is no secret and proves nothing to others: a host that alters it gains no vote, because a node without its records votes only
//! by the word of the others (`dstack_raft::Confirmation`).

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use dstack_secret::Secret;
use dstack_storage::RecordKey;
use tracing::warn;

use crate::files::write_durably;

const FILE: &str = "standing";
const RAFT: &str = "raft";
/// What only a device with a key leaves behind.
const SEALED: [&str; 2] = ["node-key.sealed", "shares"];

/// What is known of the runs before this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Noted {
    /// The records are under a key that was in memory only.
    keyless: bool,
    /// This node was confirmed: it took part.
    confirmed: bool,
}

/// See the module text.
#[derive(Debug)]
pub(crate) struct Standing {
    path: PathBuf,
    keyless: bool,
    before: Option<Noted>,
}

impl Standing {
    /// Reads what earlier runs noted.
    ///
    /// # Errors
    /// Says what is in the way and what to do; nothing was changed.
    pub(crate) fn read(data_dir: &Path, keyless: bool) -> anyhow::Result<Self> {
        let path = data_dir.join(FILE);
        let before = match std::fs::read_to_string(&path) {
            Ok(text) => {
                Some(parse(&text).with_context(|| format!("{}: not written by a node; move the data directory away", path.display()))?)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        Ok(Self { path, keyless, before })
    }

    /// The record key of a node whose device has none: new for each run. Removes the records of the run before, which nobody can read
    /// any more, after making sure that they are such.
    ///
    /// # Errors
    /// Something on this disk was written under a device's key: it is kept, and the node does not start.
    pub(crate) fn key_in_memory(&self, data_dir: &Path) -> anyhow::Result<RecordKey> {
        let holds = |name: &&str| {
            let path = data_dir.join(name);
            path.is_file() || path.read_dir().is_ok_and(|mut entries| entries.next().is_some())
        };
        let foreign = "was written with a device key, and this device gives none; restore the device, or move the data directory away to \
                       rejoin as a fresh member without a share";
        if let Some(sealed) = SEALED.iter().find(|name| holds(name)) {
            bail!("{}: {foreign}", data_dir.join(sealed).display());
        }
        let raft = data_dir.join(RAFT);
        if holds(&RAFT) {
            if !self.before.is_some_and(|before| before.keyless) {
                bail!("{}: {foreign}", raft.display());
            }
            std::fs::remove_dir_all(&raft).with_context(|| format!("cannot remove {}", raft.display()))?;
            warn!(path = %raft.display(), "removed the records of the run before: their key was in memory only, so this node starts empty");
        }
        let key = Secret::try_from_fn(|bytes: &mut [u8; 32]| getrandom::fill(bytes));
        key.map(RecordKey::new).map_err(|error| anyhow::anyhow!("randomness: {error}"))
    }

    /// Whether this node must be confirmed by the others before it votes, and if so whether it knows that it never took part.
    /// `empty`: the store holds neither a log nor a vote. Notes it durably.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn begin(&self, empty: bool) -> anyhow::Result<Option<FirstRun>> {
        let took_part = self.before.is_some_and(|before| before.confirmed);
        // A store with content and no note is of a node that voted before there were notes.
        let own_record = !empty && self.before.is_none_or(|before| before.confirmed && !before.keyless);
        if own_record {
            return Ok(None);
        }
        self.note(took_part)?;
        Ok(Some(FirstRun(!took_part)))
    }

    /// Notes that this node takes part from now on.
    ///
    /// # Errors
    /// The file cannot be written; the node must not vote.
    pub(crate) fn note_confirmed(&self) -> anyhow::Result<()> {
        self.note(true)
    }

    fn note(&self, confirmed: bool) -> anyhow::Result<()> {
        let text = format!("{} {}\n", if self.keyless { KEYLESS } else { SEALING }, if confirmed { CONFIRMED } else { UNCONFIRMED });
        write_durably(&self.path, text.as_bytes())
    }
}

/// Whether a node knows that it never took part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FirstRun(pub(crate) bool);

const KEYLESS: &str = "key-in-memory";
const SEALING: &str = "key-of-device";
const CONFIRMED: &str = "confirmed";
const UNCONFIRMED: &str = "unconfirmed";

fn parse(text: &str) -> anyhow::Result<Noted> {
    let (key, standing) = text.trim_end().split_once(' ').context("want two words")?;
    let one_of = |word: &str, yes: &str, no: &str| match word {
        word if word == yes => Ok(true),
        word if word == no => Ok(false),
        _ => bail!("want {yes} or {no}"),
    };
    Ok(Noted { keyless: one_of(key, KEYLESS, SEALING)?, confirmed: one_of(standing, CONFIRMED, UNCONFIRMED)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(dir: &Path, keyless: bool) -> Standing {
        Standing::read(dir, keyless).unwrap()
    }

    fn with_records(dir: &Path) {
        std::fs::create_dir_all(dir.join(RAFT)).unwrap();
        std::fs::write(dir.join(RAFT).join("store"), b"records").unwrap();
    }

    #[test]
    fn a_device_with_a_key_votes_by_its_own_record_once_it_was_confirmed() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(at(dir.path(), false).begin(true).unwrap(), Some(FirstRun(true)));
        // It ended before it was confirmed: what it received meanwhile is no record of votes.
        assert_eq!(at(dir.path(), false).begin(false).unwrap(), Some(FirstRun(true)));
        at(dir.path(), false).note_confirmed().unwrap();
        assert_eq!(at(dir.path(), false).begin(false).unwrap(), None);
        // Its records vanished: it knows that it took part.
        assert_eq!(at(dir.path(), false).begin(true).unwrap(), Some(FirstRun(false)));
    }

    #[test]
    fn a_store_without_a_note_is_of_a_node_that_took_part() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(at(dir.path(), false).begin(false).unwrap(), None);
        assert!(!dir.path().join(FILE).exists());
    }

    #[test]
    fn a_device_without_a_key_is_confirmed_anew_at_each_start_and_remembers_that_it_took_part() {
        let dir = tempfile::tempdir().unwrap();
        let first = at(dir.path(), true);
        first.key_in_memory(dir.path()).unwrap();
        assert_eq!(first.begin(true).unwrap(), Some(FirstRun(true)));
        with_records(dir.path());
        first.note_confirmed().unwrap();
        let second = at(dir.path(), true);
        second.key_in_memory(dir.path()).unwrap();
        assert!(!dir.path().join(RAFT).exists(), "unreadable records stay");
        assert_eq!(second.begin(true).unwrap(), Some(FirstRun(false)));
    }

    #[test]
    fn records_under_a_device_key_are_never_removed() {
        for (file, note) in [("node-key.sealed", None), ("raft/store", None), ("raft/store", Some("key-of-device confirmed\n"))] {
            let dir = tempfile::tempdir().unwrap();
            with_records(dir.path());
            std::fs::write(dir.path().join(file), b"sealed").unwrap();
            if let Some(note) = note {
                std::fs::write(dir.path().join(FILE), note).unwrap();
            }
            let refused = at(dir.path(), true).key_in_memory(dir.path()).unwrap_err().to_string();
            assert!(refused.contains("written with a device key"), "{refused}");
            assert!(dir.path().join("raft/store").exists());
        }
    }

    #[test]
    fn refuses_a_note_that_no_node_wrote() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "key-in-memory", "key-in-memory sure", "confirmed key-in-memory", "key-in-memory confirmed confirmed"] {
            std::fs::write(dir.path().join(FILE), text).unwrap();
            assert!(Standing::read(dir.path(), true).is_err(), "{text:?}");
        }
    }
}
