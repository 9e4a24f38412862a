//! Read-only checks, cheapest first, and `fix`, the one command that rewrites. Owns: their order.
//! Never: stops at the first failure; all are run, then all that failed are named.

use std::time::Instant;

use anyhow::bail;

use crate::shell::{Shell, seconds};
use crate::{deny, tidy};

/// Runs every check; the lines say how each ended.
pub(crate) fn run(shell: &Shell) -> anyhow::Result<Vec<String>> {
    type Check = (&'static str, fn(&Shell) -> anyhow::Result<String>);
    let checks: [Check; 5] =
        [("format", format), ("tidy", tidy::run), ("dependencies", deny::run), ("lints", lints), ("documentation", documentation)];
    let (mut lines, mut failed) = (Vec::new(), Vec::new());
    for (name, check) in checks {
        let begun = Instant::now();
        let outcome = check(shell);
        let elapsed = seconds(begun.elapsed());
        match outcome {
            Ok(note) => lines.push(format!("check {name}: right, {elapsed}{}", if note.is_empty() { note } else { format!(" ({note})") })),
            Err(cause) => {
                eprintln!("check {name}: {cause:#}");
                lines.push(format!("check {name}: WRONG, {elapsed}"));
                failed.push(name);
            }
        }
    }
    eprintln!();
    for line in &lines {
        eprintln!("{line}");
    }
    if !failed.is_empty() {
        bail!("checks failed: {}; `cargo xtask fix` repairs format and simple lints", failed.join(", "));
    }
    Ok(lines)
}

/// Formats, and lets clippy repair what it can.
pub(crate) fn fix(shell: &Shell) -> anyhow::Result<()> {
    shell.run(shell.cargo(&["clippy", "--workspace", "--all-targets", "--fix", "--allow-dirty", "--allow-staged"]))?;
    shell.run(shell.cargo(&["fmt", "--all"])).map(drop)
}

fn format(shell: &Shell) -> anyhow::Result<String> {
    shell.run(shell.cargo(&["fmt", "--all", "--check", "--", "-l"])).map(|_| String::new())
}

fn lints(shell: &Shell) -> anyhow::Result<String> {
    shell.run(shell.cargo(&["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"])).map(|_| String::new())
}

fn documentation(shell: &Shell) -> anyhow::Result<String> {
    let mut command = shell.cargo(&["doc", "--locked", "--workspace", "--no-deps", "--lib"]);
    command.env("RUSTDOCFLAGS", "-D warnings");
    shell.run(command).map(|_| String::new())
}
