//! What CI runs: check, test, each benchmark once. Owns: the summary. Never: does anything that a person cannot run as `cargo xtask ci`.

use std::time::Instant;

use crate::shell::{Shell, seconds};
use crate::{bench, check, test};

/// All parts; none is begun when the one before failed.
pub(crate) fn run(shell: &Shell) -> anyhow::Result<()> {
    let begun = Instant::now();
    let mut lines = check::run(shell)?;
    lines.extend(test::run(shell, &[], &[])?);
    lines.push(bench::once(shell)?);
    println!("\nci summary");
    for line in lines {
        println!("  {line}");
    }
    println!("  total: {}", seconds(begun.elapsed()));
    Ok(())
}
