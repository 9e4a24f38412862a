//! Files beside the store: sealed shares, certificates, fork evidence.
//!
//! Owns: writing a file so that it is whole or absent after a crash. Never: a secret in clear.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use dstack_actors::ceremony::ShareFiles;
use dstack_secret::{Locked, Secret, SecretBytes};
use dstack_threshold::share_file::{SealingKey, ShareFileError, ShareName, open, open_pairs, seal, seal_pairs};

/// Writes `bytes` to a temporary file, flushes, renames, flushes the directory. Mode 0600.
pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let parent = path.parent().context("a file has a directory")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .with_context(|| format!("cannot write {}", temporary.display()))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).with_context(|| format!("cannot write {}", temporary.display()))?;
    fs::rename(&temporary, path).with_context(|| format!("cannot rename to {}", path.display()))?;
    File::open(parent).and_then(|directory| directory.sync_all()).with_context(|| format!("cannot flush {}", parent.display()))
}

/// Shares sealed in a directory.
pub(crate) struct SealedShares {
    dir: PathBuf,
    key: Option<Arc<SealingKey>>,
}

impl SealedShares {
    /// Shares in `dir`; without a key none is kept.
    pub(crate) fn new(dir: PathBuf, key: Option<Arc<SealingKey>>) -> Self {
        Self { dir, key }
    }

    fn path(&self, name: &ShareName) -> PathBuf {
        let root = name.root.map_or(0, dstack_protocol::RootTag::byte);
        self.dir.join(format!("root-{root}-generation-{}-epoch-{}.sealed", name.generation, name.epoch))
    }
}

impl SealedShares {
    fn pairs_path(&self, name: &ShareName) -> PathBuf {
        self.path(name).with_extension("pairs.sealed")
    }

    /// What `open` makes of a file; one that it refuses is deleted.
    fn opened<T>(path: &Path, open: impl FnOnce(&[u8]) -> Result<T, ShareFileError>) -> Option<T> {
        match open(&fs::read(path).ok()?) {
            Ok(secret) => Some(secret),
            Err(error) => {
                // threshold.md §6: it is of no use; deleted, and the share is repaired by the next reshare.
                tracing::warn!(%error, "sealed share deleted");
                let _already_gone = fs::remove_file(path);
                None
            }
        }
    }
}

impl ShareFiles for SealedShares {
    fn load(&self, name: &ShareName) -> Option<Secret<32>> {
        let key = self.key.as_deref()?;
        Self::opened(&self.path(name), |file| open(key, name, file))
    }

    fn load_pairs(&self, name: &ShareName) -> Option<SecretBytes> {
        let key = self.key.as_deref()?;
        Self::opened(&self.pairs_path(name), |file| open_pairs(key, name, file))
    }

    fn save_pairs(&self, name: &ShareName, pairs: &SecretBytes) -> Result<(), String> {
        let key = self.key.as_deref().ok_or("this platform has no sealing key")?;
        let mut nonce = [0u8; 24];
        getrandom::fill(&mut nonce).map_err(|error| error.to_string())?;
        write_durably(&self.pairs_path(name), &seal_pairs(key, name, pairs, nonce)).map_err(|error| format!("{error:#}"))
    }

    fn save(&self, name: &ShareName, share: &Locked<32>) -> Result<(), String> {
        let key = self.key.as_deref().ok_or("this platform has no sealing key")?;
        let mut nonce = [0u8; 24];
        getrandom::fill(&mut nonce).map_err(|error| error.to_string())?;
        write_durably(&self.path(name), &seal(key, name, share, nonce)).map_err(|error| format!("{error:#}"))
    }
}
