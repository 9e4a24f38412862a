//! What CI runs: check, then test. Owns: the summary. Never: does anything that a person cannot run as `cargo xtask ci`.

use std::time::Instant;

use crate::shell::{Shell, seconds};
use crate::{check, test};

/// Both parts; the second is not begun when the first fails.
pub(crate) fn run(shell: &Shell) -> anyhow::Result<()> {
    let begun = Instant::now();
    let mut lines = check::run(shell)?;
    lines.extend(test::run(shell, &[], &[])?);
    println!("\nci summary");
    for line in lines {
        println!("  {line}");
    }
    println!("  total: {}", seconds(begun.elapsed()));
    Ok(())
}
