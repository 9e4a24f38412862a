//! The cache folder: `$XDG_CACHE_HOME/dstack-kms`, else `~/.cache/dstack-kms`. Owns: that an entry is there whole or not at all.
//! Never: removes an entry; a new version or hash is a new one. Workshops of ended processes go.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};

/// See the module text.
pub(crate) struct Cache {
    folder: PathBuf,
}

impl Cache {
    pub(crate) fn open() -> anyhow::Result<Self> {
        let above = match env::var_os("XDG_CACHE_HOME").filter(|value| Path::new(value).is_absolute()) {
            Some(above) => PathBuf::from(above),
            None => PathBuf::from(env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?).join(".cache"),
        };
        let folder = above.join("dstack-kms");
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let cache = Self { folder };
        cache.sweep();
        Ok(cache)
    }

    /// Removes workshops of processes that ended without keeping what they built.
    fn sweep(&self) {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().filter_map(Result::ok);
        for entry in entries {
            let name = entry.file_name().to_string_lossy().into_owned();
            let process =
                name.strip_prefix('.').and_then(|rest| rest.rsplit_once('-')).and_then(|(_, process)| process.parse::<u32>().ok());
            if process.is_some_and(|process| !Path::new("/proc").join(process.to_string()).exists()) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    /// The entry `<name>-<version>-<key>` of the highest version, whatever that is: what is there needs no network.
    pub(crate) fn find(&self, name: &str, key: &str) -> Option<PathBuf> {
        let (head, tail) = (format!("{name}-"), format!("-{key}"));
        let entries = fs::read_dir(&self.folder).ok()?.filter_map(Result::ok);
        let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.retain(|entry| entry.starts_with(&head) && entry.ends_with(&tail));
        names.sort_by_key(|name| numbers(name));
        names.pop().map(|name| self.folder.join(name))
    }

    /// An empty folder to build in, on the cache's file system.
    pub(crate) fn workshop(&self, name: &str) -> anyhow::Result<PathBuf> {
        let folder = self.folder.join(format!(".{name}-{}", std::process::id()));
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(folder)
    }

    /// Makes `product`, a folder inside `workshop`, the entry, and removes the workshop. Another process may have been first.
    pub(crate) fn keep(&self, workshop: &Path, product: &Path, name: &str, version: &str, key: &str) -> anyhow::Result<PathBuf> {
        let entry = self.folder.join(format!("{name}-{version}-{key}"));
        let moved = fs::rename(product, &entry);
        if !entry.is_dir() {
            moved.with_context(|| format!("cannot keep {}", entry.display()))?;
        }
        fs::remove_dir_all(workshop).with_context(|| format!("cannot remove {}", workshop.display()))?;
        Ok(entry)
    }
}

/// A short name for everything that an entry depends on.
pub(crate) fn key(parts: &[&str]) -> String {
    let sum =
        parts.iter().fold(Sha256::new(), |sum, part| sum.chain_update((part.len() as u64).to_be_bytes()).chain_update(part)).finalize();
    sum.iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

/// The numbers of a name in order, so that 10.0.13 comes after 10.0.2.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_depend_on_every_part_and_versions_are_numbers() {
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
        assert_ne!(key(&["a", "b"]), key(&["ab", ""]));
        assert_eq!(key(&[]).len(), 12);
        assert!(numbers("qemu-10.0.13-ab") > numbers("qemu-10.0.2-ab"));
    }
}
