//! The program of the image: `/app/run` holds its words, one a line, the program first. Owns: running it, reporting its end and the
//! check values of the keys that it got. Never: reads the keys.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;

use crate::say;

/// Where the image says what to run.
const RUN: &str = "/app/run";
/// Where the program keeps check values.
const CHECK_VALUES: &str = "/tmp/kcv.json";

/// Runs it and reports.
pub(crate) fn run() -> anyhow::Result<()> {
    let text = fs::read_to_string(RUN).with_context(|| format!("cannot read {RUN}"))?;
    let mut words = text.lines();
    let program = words.next().context("nothing to run")?;
    let output = Command::new(program).args(words).output().with_context(|| format!("cannot run {program}"))?;
    say("said", &String::from_utf8_lossy(&output.stderr));
    // Standard output is for what is no secret; keys go to a file.
    say("printed", &String::from_utf8_lossy(&output.stdout));
    if Path::new(CHECK_VALUES).exists() {
        say("check-values", &fs::read_to_string(CHECK_VALUES)?.split_whitespace().collect::<String>());
    }
    say("exit", &output.status.code().map_or_else(|| output.status.to_string(), |code| code.to_string()));
    Ok(())
}
