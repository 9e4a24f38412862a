//! A guest agent as a process: `dstack-agent` on an emulated TDX machine. Owns: its configuration, state directory and socket; asking it
//! as an app does. Never: prints a key.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::app::App;
use super::error::ClusterError;
use super::process::Process;
use super::wait::until;
use super::{Cluster, FORMING};

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    socket: PathBuf,
    state_dir: PathBuf,
}

/// What an agent is started with.
#[derive(Debug, Clone)]
pub struct AgentSpec<'a> {
    /// Machine it runs on.
    pub machine: &'a str,
    /// Text of another device than that machine's.
    pub device: Option<&'a str>,
    /// The app.
    pub app: &'a App,
    /// Another app id than that of the compose document.
    pub app_id: Option<&'a str>,
    /// Seed of the instance id, in hex; without one it is made anew with each state directory.
    pub instance_seed: Option<&'a str>,
    /// Name of its files.
    pub name: &'a str,
}

impl Agent {
    /// Starts an agent and waits until it holds its keys and serves them.
    ///
    /// # Errors
    /// [`ClusterError::Ended`] with the agent's own words when it gets no keys.
    pub fn start(cluster: &Cluster, spec: &AgentSpec<'_>) -> Result<Self, ClusterError> {
        let dir = cluster.dir();
        let (socket, state_dir) = (dir.join(format!("{}.agent.sock", spec.name)), dir.join(format!("{}.state", spec.name)));
        let config = dir.join(format!("{}.toml", spec.name));
        std::fs::write(&config, config_text(cluster, spec, &socket, &state_dir)).map_err(|error| ClusterError::file(&config, error))?;
        let mut command = Command::new(cluster.binaries.path("dstack-agent")?);
        command.arg("--config").arg(&config);
        let log = dir.join(format!("{}.log", spec.name));
        let mut agent = Self { process: Process::spawn(spec.name, &command, &log)?, socket, state_dir };
        until("the agent to hold its keys", FORMING, || {
            agent.process.check_running()?;
            agent.call("Version", "{}")
        })?;
        Ok(agent)
    }

    /// The guest socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Socket of the legacy API.
    #[must_use]
    pub fn tappd_socket(&self) -> PathBuf {
        self.socket.with_extension("tappd")
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Calls a method of the guest API.
    ///
    /// # Errors
    /// [`ClusterError::Unexpected`] with its answer when that is no success.
    pub fn call(&self, method: &str, arguments: &str) -> Result<Value, ClusterError> {
        let wrong = |reason: &dyn ToString| ClusterError::unexpected(format!("{method} at {}", self.socket.display()), reason.to_string());
        let mut stream = UnixStream::connect(&self.socket).map_err(|error| wrong(&error))?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).map_err(|error| wrong(&error))?;
        let head = format!(
            "POST /{method} HTTP/1.1\r\nhost: dstack\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
            arguments.len()
        );
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(arguments.as_bytes())).map_err(|error| wrong(&error))?;
        let mut answer = Vec::new();
        stream.take(4 << 20).read_to_end(&mut answer).map_err(|error| wrong(&error))?;
        let answer = String::from_utf8_lossy(&answer);
        let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| wrong(&"no HTTP"))?;
        if !head.starts_with("HTTP/1.1 200") {
            return Err(wrong(&format!("{}: {body}", head.lines().next().unwrap_or_default())));
        }
        serde_json::from_str(body).map_err(|error| wrong(&error))
    }

    /// Check values of the keys it holds, by class: equal ones mean equal keys, and they betray nothing.
    ///
    /// # Errors
    /// [`ClusterError`] when there are none.
    pub fn check_values(&self) -> Result<Vec<(String, String)>, ClusterError> {
        check_values(&self.state_dir.join("kcv.json"))
    }

    /// SIGTERM, and waits for the end.
    ///
    /// # Errors
    /// [`ClusterError::TimedOut`].
    pub fn stop(mut self) -> Result<(), ClusterError> {
        self.process.terminate(super::ENDING).map(drop)
    }
}

/// The check values in a file of them.
pub(crate) fn check_values(file: &Path) -> Result<Vec<(String, String)>, ClusterError> {
    let text = std::fs::read_to_string(file).map_err(|error| ClusterError::file(file, error))?;
    let wrong = || ClusterError::file(file, "no check values in it");
    let document: Value = serde_json::from_str(&text).map_err(|_| wrong())?;
    let kcvs = document.get("kcvs").and_then(Value::as_object).ok_or_else(wrong)?;
    kcvs.iter().map(|(class, kcv)| Ok((class.clone(), kcv.as_str().ok_or_else(wrong)?.to_owned()))).collect()
}

fn config_text(cluster: &Cluster, spec: &AgentSpec<'_>, socket: &Path, state_dir: &Path) -> String {
    let quoted = |path: &Path| format!("{:?}", path.display().to_string());
    let urls: Vec<String> = cluster.kms_urls().split(',').map(|url| format!("{url:?}")).collect();
    let roots: Vec<String> = cluster.device.roots().iter().map(|path| quoted(path)).collect();
    let member = |name: &str, value: Option<&str>| value.map(|value| format!("{name} = {value:?}\n")).unwrap_or_default();
    let dstack = cluster.dstack_urls();
    let dstack_urls = if dstack.is_empty() { String::new() } else { format!("dstack_urls = {dstack:?}\n") };
    let boot = format!("[boot]\n{}{}", member("app_id", spec.app_id), member("instance_seed", spec.instance_seed));
    format!(
        "device = {:?}\napp_compose = {}\nkms_urls = [{}]\n{dstack_urls}state_dir = {}\n\n[api]\nsocket = {}\ntappd_socket = {}\nsocket_mode = \"0600\"\n\n\
         [trust]\nsoftware_roots = [{}]\ncollateral = {}\n\n[log]\nformat = \"pretty\"\n\n{boot}",
        spec.device.map_or_else(|| cluster.device.text(spec.machine), str::to_owned),
        quoted(&spec.app.compose),
        urls.join(", "),
        quoted(state_dir),
        quoted(socket),
        quoted(&socket.with_extension("tappd")),
        roots.join(", "),
        quoted(&cluster.device.collateral()),
    )
}
