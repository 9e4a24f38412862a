//! One process that the harness started. Owns: its end, also when the test panics or the harness is killed. Never: touches another.

use std::fs::File;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::error::ClusterError;
use super::wait::until;

/// Lines of a log that an error quotes.
const TAIL_LINES: usize = 40;

/// Resident memory of a process, bytes; `None` when there is no such process.
#[must_use]
pub fn resident_bytes(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.trim().strip_suffix(" kB")?;
    kib.parse::<u64>().ok().map(|kib| kib << 10)
}

/// A running or ended process with its log.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    ended: Option<ExitStatus>,
    /// A second SIGTERM would mean: at once.
    asked: bool,
}

impl Process {
    /// Starts `command`; standard output and error are appended to `log`. The process gets its own group, so an interrupt at the
    /// keyboard reaches us alone, and the kernel kills it when our thread ends (by `setpriv` of util-linux, where it is).
    ///
    /// # Errors
    /// [`ClusterError::Process`] when the system does not start it.
    pub fn spawn(name: &str, command: &Command, log: &Path) -> Result<Self, ClusterError> {
        let file = File::options().create(true).append(true).open(log).map_err(|error| ClusterError::file(log, error))?;
        let twin = file.try_clone().map_err(|error| ClusterError::file(log, error))?;
        let mut command = with_parent(command);
        command.process_group(0).stdin(Stdio::null()).stdout(file).stderr(twin);
        let child = command.spawn().map_err(|error| ClusterError::Process { name: name.to_owned(), reason: error.to_string() })?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned(), ended: None, asked: false })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its log file.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().ok().flatten();
        }
        self.ended
    }

    /// # Errors
    /// [`ClusterError::Ended`] with the end of the log when it runs no more.
    pub fn check_running(&mut self) -> Result<(), ClusterError> {
        match self.ended() {
            None => Ok(()),
            Some(status) => Err(ClusterError::Ended { name: self.name.clone(), status: status.to_string(), log: self.tail() }),
        }
    }

    /// Kills it at once, without a chance to tidy up.
    pub fn kill(&mut self) {
        if self.ended().is_none() {
            let _ = self.child.kill();
            self.ended = self.child.wait().ok();
        }
    }

    /// SIGTERM, once, without waiting.
    ///
    /// # Errors
    /// [`ClusterError::Process`] when the system does not deliver it.
    pub fn ask_to_end(&mut self) -> Result<(), ClusterError> {
        if self.asked || self.ended().is_some() {
            return Ok(());
        }
        self.signal(Signal::TERM)?;
        self.asked = true;
        Ok(())
    }

    /// Any signal.
    pub(crate) fn signal(&mut self, signal: Signal) -> Result<(), ClusterError> {
        let failed = |reason: String| ClusterError::Process { name: self.name.clone(), reason };
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).ok_or_else(|| failed("no process id".to_owned()))?;
        kill_process(pid, signal).map_err(|error| failed(error.to_string()))
    }

    /// SIGTERM, then waits for its end.
    ///
    /// # Errors
    /// [`ClusterError::TimedOut`] when it does not end; it goes on running.
    pub fn terminate(&mut self, patience: Duration) -> Result<ExitStatus, ClusterError> {
        self.ask_to_end()?;
        self.wait(patience)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`ClusterError::TimedOut`] when it does not end.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus, ClusterError> {
        let what = format!("the end of {}", self.name);
        until(&what, patience, || self.ended().ok_or_else(|| ClusterError::unexpected(&self.name, "it runs")))
    }

    /// Whole log so far.
    #[must_use]
    pub fn log_text(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Last lines of its log.
    #[must_use]
    pub fn tail(&self) -> String {
        let text = self.log_text();
        let lines: Vec<&str> = text.lines().collect();
        lines.get(lines.len().saturating_sub(TAIL_LINES)..).unwrap_or_default().join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let state = self.ended().map_or_else(|| "running".to_owned(), describe);
            eprintln!("── {} (pid {}, {state}), end of its log:\n{}", self.name, self.pid(), self.tail());
        }
        self.kill();
    }
}

fn describe(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("ended by signal {signal}"),
        None => status.to_string(),
    }
}

/// `command` behind `setpriv --pdeathsig`, which replaces itself by it: process id and executable stay those of the program.
fn with_parent(command: &Command) -> Command {
    let helper = Path::new("/usr/bin/setpriv");
    let mut wrapped = if helper.is_file() {
        let mut wrapped = Command::new(helper);
        wrapped.args(["--pdeathsig", "KILL"]).arg(command.get_program());
        wrapped
    } else {
        Command::new(command.get_program())
    };
    // Panics show where they happened; errors that a program reports need no backtrace.
    wrapped.args(command.get_args()).env("RUST_LIB_BACKTRACE", "0");
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(key, value),
            None => wrapped.env_remove(key),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        wrapped.current_dir(folder);
    }
    wrapped
}

/// Runs a command to its end; its standard output if it succeeds.
///
/// # Errors
/// [`ClusterError::Command`] with everything it printed.
pub fn run(command: &mut Command) -> Result<String, ClusterError> {
    let (status, stdout, stderr) = outcome(command)?;
    if status.success() {
        return Ok(stdout);
    }
    Err(ClusterError::Command { command: text(command), status: status.to_string(), output: format!("{stdout}{stderr}") })
}

/// Runs a command to its end: status, standard output, standard error.
///
/// # Errors
/// [`ClusterError::Process`] when it cannot be started.
pub fn outcome(command: &mut Command) -> Result<(ExitStatus, String, String), ClusterError> {
    let output = command
        .stdin(Stdio::null())
        .env("RUST_LIB_BACKTRACE", "0")
        .output()
        .map_err(|error| ClusterError::Process { name: text(command), reason: error.to_string() })?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status, text(&output.stdout), text(&output.stderr)))
}

fn text(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default();
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
