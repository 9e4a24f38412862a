//! The process that serves the emulated machines. Owns: its roots and sockets. Never: runs inside a node.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::binaries::Binaries;
use super::error::ClusterError;
use super::process::{Process, run};
use super::spec::MachineKind;
use super::wait::until;

/// How long it may take to serve.
const PATIENCE: Duration = Duration::from_secs(30);

/// A machine to serve.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// What it emulates.
    pub kind: MachineKind,
    /// Whether it has a measurement-bound key.
    pub platform_key: bool,
}

/// A served set of machines.
#[derive(Debug)]
pub struct Device {
    process: Process,
    dir: PathBuf,
    identities: BTreeMap<String, String>,
}

impl Device {
    /// Makes roots in `dir` if there are none, and serves `machines` from it.
    ///
    /// # Errors
    /// [`ClusterError`] of the process.
    pub fn start(binaries: &Binaries, dir: &Path, machines: &[Machine]) -> Result<Self, ClusterError> {
        let program = binaries.path("dstack-testkit")?;
        let roots = dir.join("roots");
        if !roots.exists() {
            run(Command::new(&program).args(["init", "--dir"]).arg(&roots))?;
        }
        let mut command = Command::new(&program);
        command.args(["tee", "--with-parent", "--dir"]).arg(&roots);
        for Machine { name, kind, platform_key } in machines {
            let socket = dir.join(format!("{name}.sock"));
            let key = if *platform_key { "" } else { ",platform-key=none" };
            command.arg("--machine").arg(format!("{name}={},platform={}{key}", socket.display(), kind.name()));
        }
        let log = dir.join("device.log");
        std::fs::write(&log, "").map_err(|error| ClusterError::file(&log, error))?;
        let mut process = Process::spawn("device", &command, &log)?;
        until("the device to serve", PATIENCE, || {
            process.check_running()?;
            let ready = process.log_text().lines().any(|line| line == "ready");
            if ready { Ok(()) } else { Err(ClusterError::unexpected("device", "not ready")) }
        })?;
        let identities = process.log_text().lines().filter_map(machine_line).collect();
        Ok(Self { process, dir: dir.to_owned(), identities })
    }

    /// Text of a machine for configs.
    #[must_use]
    pub fn text(&self, machine: &str) -> String {
        format!("software:{}", self.socket(machine).display())
    }

    /// Socket of a machine.
    #[must_use]
    pub fn socket(&self, machine: &str) -> PathBuf {
        self.dir.join(format!("{machine}.sock"))
    }

    /// Platform identity of a machine, in hex.
    ///
    /// # Errors
    /// [`ClusterError::Unexpected`] when there is no such machine.
    pub fn identity(&self, machine: &str) -> Result<&str, ClusterError> {
        self.identities.get(machine).map(String::as_str).ok_or_else(|| ClusterError::unexpected("device", format!("no machine {machine}")))
    }

    /// Software roots, TDX and Nitro, in DER.
    #[must_use]
    pub fn roots(&self) -> [PathBuf; 2] {
        [self.dir.join("roots/tdx-root.der"), self.dir.join("roots/nitro-root.der")]
    }

    /// Its collateral bundle.
    #[must_use]
    pub fn collateral(&self) -> PathBuf {
        self.dir.join("roots/collateral.json")
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// `machine=NAME socket=… identity=HEX`.
fn machine_line(line: &str) -> Option<(String, String)> {
    let rest = line.strip_prefix("machine=")?;
    let name = rest.split_whitespace().next()?;
    let identity = rest.split_whitespace().find_map(|word| word.strip_prefix("identity="))?;
    Some((name.to_owned(), identity.to_owned()))
}

/// What a machine measures for an executable, in hex.
///
/// # Errors
/// [`ClusterError`] of the measuring program.
pub fn measure_executable(binaries: &Binaries, kind: MachineKind, program: &Path) -> Result<String, ClusterError> {
    let mut command = Command::new(binaries.path("dstack-testkit")?);
    let out = run(command.args(["measure", "--platform", kind.name(), "--exe"]).arg(program))?;
    value(&out, "measurement")
}

/// The value of `name=` in the output of a command.
///
/// # Errors
/// [`ClusterError::Unexpected`] when no line has it.
pub fn value(output: &str, name: &str) -> Result<String, ClusterError> {
    let found = output.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    found.map(str::to_owned).ok_or_else(|| ClusterError::unexpected("command", format!("no {name}= in {output:?}")))
}
