//! Whether the generated documents are fresh. Owns: the comparison. Never: writes; `cargo xtask docs` does.

use std::fs;
use std::path::Path;

use crate::docs;

/// All findings below `root`.
pub(crate) fn check(root: &Path) -> anyhow::Result<Vec<String>> {
    let stale = |(path, text): &(std::path::PathBuf, String)| fs::read_to_string(root.join(path)).ok().as_ref() != Some(text);
    let documents = docs::generated(root)?;
    Ok(documents
        .iter()
        .filter(|document| stale(document))
        .map(|(path, _)| format!("{}: not fresh: `cargo xtask docs`", path.display()))
        .collect())
}
