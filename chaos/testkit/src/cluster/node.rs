//! One node process. Owns: its configuration, data directory and life; what it says of itself on its admin listener.
//! Never: trusts what it says for more than a test's condition.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use super::error::ClusterError;
use super::http;
use super::process::Process;

/// A node, running or not.
#[derive(Debug)]
pub struct Node {
    /// Its seat.
    pub seat: u16,
    /// Where it serves nodes and clients.
    pub address: SocketAddr,
    /// Where it serves operators.
    pub admin: SocketAddr,
    /// Where it serves guests of dstack, if it does.
    pub dstack: Option<SocketAddr>,
    /// Its program.
    pub program: PathBuf,
    /// Its environment, beside ours.
    pub environment: Vec<(String, String)>,
    dir: PathBuf,
    process: Option<Process>,
}

impl Node {
    pub(crate) fn new(seat: u16, ports: [u16; 2], program: PathBuf, environment: Vec<(String, String)>, dir: PathBuf) -> Self {
        let [port, admin] = ports.map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        Self { seat, address: port, admin, dstack: None, program, environment, dir, process: None }
    }

    /// The same with a listener for guests of dstack.
    pub(crate) fn serving_dstack(mut self, port: u16) -> Self {
        self.dstack = Some(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        self
    }

    /// Name in logs and of its machine.
    #[must_use]
    pub fn name(&self) -> String {
        format!("node-{}", self.seat)
    }

    /// Its configuration file.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.dir.join(format!("{}.toml", self.name()))
    }

    /// Its data directory.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.dir.join(format!("{}.data", self.name()))
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.dir.join(format!("{}.log", self.name()))
    }

    /// Everything it logged since the first start.
    #[must_use]
    pub fn log_text(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log()).unwrap_or_default()).into_owned()
    }

    /// Where clients find it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// Starts it.
    ///
    /// # Errors
    /// [`ClusterError::Process`].
    pub fn start(&mut self) -> Result<(), ClusterError> {
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(self.config()).envs(self.environment.iter().map(|(key, value)| (key, value)));
        self.process = Some(Process::spawn(&self.name(), &command, &self.log())?);
        Ok(())
    }

    /// Whether it runs.
    pub fn runs(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| process.ended().is_none())
    }

    /// # Errors
    /// [`ClusterError::Ended`] when it was started and ended by itself.
    pub fn check_running(&mut self) -> Result<(), ClusterError> {
        match &mut self.process {
            Some(process) => process.check_running(),
            None => Err(ClusterError::unexpected(self.name(), "not started")),
        }
    }

    /// Its process id, while it is started.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// Stops it without a word, as a machine that hangs: its connections stay open and nothing answers.
    ///
    /// # Errors
    /// [`ClusterError::Process`] when the system does not deliver the signal.
    pub fn pause(&mut self) -> Result<(), ClusterError> {
        self.process.as_mut().map_or(Ok(()), |process| process.signal(Signal::STOP))
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// [`ClusterError::Process`] when the system does not deliver the signal.
    pub fn resume(&mut self) -> Result<(), ClusterError> {
        self.process.as_mut().map_or(Ok(()), |process| process.signal(Signal::CONT))
    }

    /// SIGTERM, without waiting.
    pub(crate) fn ask_to_end(&mut self) -> Result<(), ClusterError> {
        self.process.as_mut().map_or(Ok(()), Process::ask_to_end)
    }

    /// SIGTERM, and waits for the end.
    ///
    /// # Errors
    /// [`ClusterError::TimedOut`] when it does not end; it is killed then.
    pub fn terminate(&mut self, patience: Duration) -> Result<Option<ExitStatus>, ClusterError> {
        match self.process.take() {
            Some(mut process) => process.terminate(patience).map(Some),
            None => Ok(None),
        }
    }

    /// Waits for an end that it comes to by itself.
    ///
    /// # Errors
    /// [`ClusterError::TimedOut`].
    pub fn wait(&mut self, patience: Duration) -> Result<Option<ExitStatus>, ClusterError> {
        self.process.as_mut().map(|process| process.wait(patience)).transpose()
    }

    /// Its status, as JSON.
    ///
    /// # Errors
    /// [`ClusterError`] when it does not answer, or ended.
    pub fn status(&mut self) -> Result<Value, ClusterError> {
        self.check_running()?;
        let (code, body) = http::get(self.admin, "/status")?;
        if code != 200 {
            return Err(ClusterError::unexpected(self.name(), format!("status {code}: {body}")));
        }
        serde_json::from_str(&body).map_err(|error| ClusterError::unexpected(self.name(), format!("{error}: {body}")))
    }

    /// # Errors
    /// [`ClusterError`] with its own words when it does not serve.
    pub fn check_ready(&mut self) -> Result<(), ClusterError> {
        self.check_running()?;
        match http::get(self.admin, "/readyz")? {
            (200, _) => Ok(()),
            (code, body) => Err(ClusterError::unexpected(self.name(), format!("{code}: {}", body.trim()))),
        }
    }

    /// Its metrics in Prometheus' text form.
    ///
    /// # Errors
    /// [`ClusterError`] when it does not answer.
    pub fn metrics(&self) -> Result<String, ClusterError> {
        http::get(self.admin, "/metrics").map(|(_, body)| body)
    }

    /// Sum of all samples of a metric, whatever their labels; 0 when there is none.
    ///
    /// # Errors
    /// [`ClusterError`] when it does not answer.
    pub fn metric(&self, name: &str) -> Result<f64, ClusterError> {
        let text = self.metrics()?;
        let samples = text.lines().filter(|line| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with('{') || rest.starts_with(' '))
        });
        Ok(samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }
}

/// The configuration of a node.
pub(crate) struct NodeConfig<'a> {
    pub(crate) node: &'a Node,
    pub(crate) genesis: &'a Path,
    pub(crate) device: &'a str,
    pub(crate) roots: &'a [PathBuf],
    pub(crate) engine: &'a str,
    pub(crate) more: &'a str,
    /// Section `collateral`: a cluster of tests reaches no vendor.
    pub(crate) collateral: &'a str,
}

impl NodeConfig<'_> {
    pub(crate) fn text(&self) -> String {
        let Self { node, genesis, device, roots, engine, more, collateral } = self;
        let quoted = |path: &Path| format!("{:?}", path.display().to_string());
        let roots: Vec<String> = roots.iter().map(|path| quoted(path)).collect();
        let dstack = |address: SocketAddr| format!("\n[dstack]\nlisten = \"{address}\"\nhosts = [\"127.0.0.1\", \"localhost\"]\n");
        let dstack = node.dstack.map(dstack).unwrap_or_default();
        format!(
            "[cluster]\ngenesis = {}\ncollateral = {}\n\n[node]\nseat = {}\ndata_dir = {}\nlisten = \"{}\"\nadmin_listen = \"{}\"\n\
             device = {device:?}\nsoftware_roots = [{}]\nengine = {engine:?}\nlog_format = \"pretty\"\n{more}\n\n[collateral]\n{collateral}\n{dstack}",
            quoted(&genesis.join("genesis.bin")),
            quoted(&genesis.join("collateral.json")),
            node.seat,
            quoted(&node.data_dir()),
            node.address,
            node.admin,
            roots.join(", "),
        )
    }
}
