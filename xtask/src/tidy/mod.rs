//! Rules of the tree itself, as a test. Owns: arrows, module docs, lengths, words, fresh documents.
//! Never: rewrites; each finding names file, line and what to do.

mod arrows;
pub(crate) mod files;
mod generated;
mod sources;
mod words;

use anyhow::bail;

use crate::shell::Shell;
use crate::{checks, methods};

/// Runs all rules; findings are printed, one a line.
pub(crate) fn run(shell: &Shell) -> anyhow::Result<String> {
    let root = shell.root();
    let mut findings = arrows::check(root)?;
    findings.extend(sources::check(root)?);
    findings.extend(words::check(root)?);
    findings.extend(generated::check(root)?);
    findings.extend(checks::findings(root)?);
    findings.extend(methods::findings(root)?);
    for finding in &findings {
        eprintln!("tidy: {finding}");
    }
    if !findings.is_empty() {
        bail!("{} findings", findings.len());
    }
    eprintln!("tidy: right");
    Ok(String::new())
}
