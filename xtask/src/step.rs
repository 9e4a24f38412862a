//! A long step: its output in a file, its price in processor time. Owns: what is shown of it. Never: hides why it failed.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, bail};

use crate::shell::seconds;

/// Lines of the log that a failure shows.
const TAIL_LINES: usize = 40;
/// Of the times in the kernel's process files.
const TICKS_PER_SECOND: f64 = 100.0;

/// See the module text.
pub(crate) struct Step {
    name: &'static str,
    log: PathBuf,
    begun: Instant,
    processor_s: f64,
}

impl Step {
    /// `price`: what it takes, in words.
    pub(crate) fn begin(name: &'static str, price: &str, log: PathBuf) -> Self {
        eprintln!("\n── {name}, once for this machine: {price}; log: {}", log.display());
        Self { name, log, begun: Instant::now(), processor_s: processor_s() }
    }

    /// Runs a command, its output appended to the log.
    pub(crate) fn run(&self, command: &mut Command) -> anyhow::Result<()> {
        let program = command.get_program().to_string_lossy().into_owned();
        let log =
            File::options().create(true).append(true).open(&self.log).with_context(|| format!("cannot write {}", self.log.display()))?;
        let twin = log.try_clone()?;
        let status = command.stdin(Stdio::null()).stdout(log).stderr(twin).status().with_context(|| format!("cannot start {program}"))?;
        if status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        for line in lines.iter().skip(lines.len().saturating_sub(TAIL_LINES)) {
            eprintln!("   {line}");
        }
        bail!("{}: `{program}` failed ({status})", self.name)
    }

    /// Says what it took.
    pub(crate) fn end(self) {
        let processor_s = processor_s() - self.processor_s;
        eprintln!("{}: done, {}, {processor_s:.0} s of processor time", self.name, seconds(self.begun.elapsed()));
    }
}

/// User and system time of our ended children.
fn processor_s() -> f64 {
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name, which is in brackets: state is the third field, these the sixteenth and seventeenth.
    let rest = text.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    let ticks: f64 = rest.split_whitespace().skip(13).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    ticks / TICKS_PER_SECOND
}
