//! Running other programs from the workspace root, visibly. Owns: echo, time, the error that names the command.
//! Never: hides a program's output unless the caller reads it.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// Where commands run.
pub(crate) struct Shell {
    root: PathBuf,
}

impl Shell {
    /// The workspace this xtask belongs to.
    pub(crate) fn at_workspace_root() -> anyhow::Result<Self> {
        let manifest = env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = manifest.parent().context("xtask lies inside the workspace")?.to_owned();
        Ok(Self { root })
    }

    /// The workspace root.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Where tools of our own choice are unpacked: below the target directory, so `cargo clean` removes them.
    pub(crate) fn tools(&self) -> PathBuf {
        self.target().join("tools")
    }

    /// The target directory.
    pub(crate) fn target(&self) -> PathBuf {
        env::var_os("CARGO_TARGET_DIR").map_or_else(|| self.root.join("target"), PathBuf::from)
    }

    /// A cargo command of the toolchain that runs us.
    pub(crate) fn cargo(&self, arguments: &[&str]) -> Command {
        let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        self.command(cargo, arguments)
    }

    /// Any command, in the workspace root.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(&self.root);
        command
    }

    /// Prints and runs a command; its failure is ours.
    pub(crate) fn run(&self, mut command: Command) -> anyhow::Result<Duration> {
        let text = text(&command);
        eprintln!("\n── {text}");
        let begun = Instant::now();
        let status = command.stdin(Stdio::null()).status().with_context(|| format!("cannot start `{text}`"))?;
        if !status.success() {
            bail!("`{text}` failed: {status}");
        }
        Ok(begun.elapsed())
    }

    /// Runs a command quietly; its standard output if it succeeds.
    pub(crate) fn read(&self, mut command: Command) -> anyhow::Result<String> {
        let text = text(&command);
        let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{text}`"))?;
        if !output.status.success() {
            bail!("`{text}` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        String::from_utf8(output.stdout).with_context(|| format!("`{text}` prints no text"))
    }

    /// Whether a command can be started and succeeds.
    pub(crate) fn works(&self, command: Command) -> bool {
        self.read(command).is_ok()
    }
}

/// Whether CI runs us: there a missing tool is a failure.
pub(crate) fn is_ci() -> bool {
    env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false" && value != "0")
}

/// Finds a program on the search path.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).chain(system).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// `90.5 s`.
pub(crate) fn seconds(elapsed: Duration) -> String {
    format!("{:.1} s", elapsed.as_secs_f64())
}

fn text(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default();
    let words = std::iter::once(program).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}
