//! Which files the rules look at. Owns: the walk. Never: follows links or enters build output.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// Folders that are not ours to judge.
const SKIPPED: &[&str] = &["target", ".git", "node_modules", "corpus", "artifacts", "__pycache__"];

/// All files below `root`, relative to it, in order.
pub(crate) fn all(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let entry = entry?;
            let kind = entry.file_type()?;
            // In a linked work tree `.git` is a file.
            if SKIPPED.iter().any(|skipped| entry.file_name() == *skipped) {
                continue;
            }
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                found.push(entry.path().strip_prefix(root)?.to_owned());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// All Rust files.
pub(crate) fn sources(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = all(root)?;
    files.retain(|file| file.extension().is_some_and(|end| end == "rs"));
    Ok(files)
}
