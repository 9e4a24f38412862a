//! The programs of the image: `/app/run` holds their words, one a line, the program first; an empty line lies between two. Owns: running
//! them in order, reporting their ends and the check values of keys that they got. Never: reads the keys.
//!
//! A first word `start` runs the rest beside what follows, `ask` is a question to a socket ([`crate::ask`]), `wait` waits for a file.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::ask::ask;
use crate::say;

/// Where the image says what to run.
const RUN: &str = "/app/run";
/// Where a program keeps check values.
const CHECK_VALUES: &str = "/tmp/kcv.json";
/// What started programs write.
const STARTED: &str = "/tmp/started.log";
/// For a file to be there.
const PATIENCE: Duration = Duration::from_secs(120);
/// Where programs of the system are, for those that call them.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs them and reports.
pub(crate) fn run() -> anyhow::Result<()> {
    let text = fs::read_to_string(RUN).with_context(|| format!("cannot read {RUN}"))?;
    let outcome = all(&text);
    say("started", &fs::read_to_string(STARTED).unwrap_or_default());
    outcome
}

fn all(text: &str) -> anyhow::Result<()> {
    for block in text.split("\n\n") {
        let words: Vec<&str> = block.lines().collect();
        match words.split_first() {
            Some((&"ask", rest)) => ask(rest)?,
            Some((&"start", rest)) => start(rest)?,
            Some((&"wait", rest)) => wait(rest)?,
            Some((program, rest)) => report(program, &command(program, rest).output().with_context(|| format!("cannot run {program}"))?)?,
            None => {}
        }
    }
    Ok(())
}

fn command(program: &str, words: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(words).env("PATH", PATH);
    command
}

/// Beside what follows. It ends with the machine.
fn start(words: &[&str]) -> anyhow::Result<()> {
    let (program, rest) = words.split_first().context("nothing to start")?;
    let log = File::options().create(true).append(true).open(STARTED)?;
    command(program, rest).stdout(log.try_clone()?).stderr(log).spawn().with_context(|| format!("cannot start {program}"))?;
    Ok(())
}

fn wait(files: &[&str]) -> anyhow::Result<()> {
    let begun = Instant::now();
    for file in files {
        while !Path::new(file).exists() {
            ensure!(begun.elapsed() < PATIENCE, "no {file} within {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}

fn report(program: &str, output: &Output) -> anyhow::Result<()> {
    say("ran", program);
    say("said", &String::from_utf8_lossy(&output.stderr));
    // Standard output is for what is no secret; keys go to a file.
    say("printed", &String::from_utf8_lossy(&output.stdout));
    if Path::new(CHECK_VALUES).exists() {
        say("check-values", &fs::read_to_string(CHECK_VALUES)?.split_whitespace().collect::<String>());
    }
    say("exit", &output.status.code().map_or_else(|| output.status.to_string(), |code| code.to_string()));
    Ok(())
}
