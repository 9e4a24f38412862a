//! A whole cluster of real processes on one machine: emulated machines, nodes, operators, workloads.
//!
//! Owns: starting them, waiting for conditions, breaking them, ending every process that it started and nothing else.
//! Never: builds a program; reaches into a node but by its listeners, signals and files; passes over an end that nobody asked for.
//!
//! - [`ClusterSpec`] → [`Cluster::plan`] (nothing runs but the device) or [`Cluster::start`] (formed, ready, pinned).
//! - [`Node`], [`Device`], [`Agent`], [`Process`]: what runs. [`Operator`], [`App`]: what people do by `dstack`.
//! - [`until`]: waits for a condition, with an end.

mod agent;
mod app;
mod binaries;
mod device;
mod enclave;
mod error;
pub mod http;
mod node;
mod plan;
mod ports;
pub mod process;
mod small_disk;
mod spec;
mod wait;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use serde_json::Value;

pub use agent::{Agent, AgentSpec};
pub use app::App;
pub use binaries::Binaries;
pub use device::{Device, Machine, measure_executable, value};
pub use enclave::KeyFile;
pub use error::ClusterError;
pub use node::Node;
pub use plan::Operator;
pub use ports::free_port;
pub use process::Process;
pub use small_disk::SmallDisk;
pub use spec::{ClusterSpec, MachineKind};
pub use wait::until;

/// How long a cluster may take to form, and to elect.
pub const FORMING: Duration = Duration::from_secs(60);
/// How long a node may take to end after SIGTERM.
pub const ENDING: Duration = Duration::from_secs(30);

/// A cluster of processes. Ends all of them when dropped.
#[derive(Debug)]
pub struct Cluster {
    /// Nodes by seat, from 1.
    nodes: Vec<Node>,
    /// Operators.
    pub operators: Vec<Operator>,
    /// The emulated machines.
    pub device: Device,
    /// Where the programs are.
    pub binaries: Binaries,
    /// Cluster id in hex.
    pub cluster_id: String,
    genesis: PathBuf,
    pin: Option<PathBuf>,
    dir: PathBuf,
    /// Last, so that the files outlive the processes.
    _temporary: Option<tempfile::TempDir>,
}

impl Cluster {
    /// Everything but running nodes: machines, keys of operators, genesis document, configurations.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub fn plan(spec: &ClusterSpec) -> Result<Self, ClusterError> {
        let binaries = Binaries::find()?;
        let temporary = match &spec.dir {
            Some(_) => None,
            None => Some(
                tempfile::Builder::new().prefix("dstack-").tempdir().map_err(|error| ClusterError::file("temporary directory", error))?,
            ),
        };
        let dir = temporary.as_ref().map(|dir| dir.path().to_owned()).or_else(|| spec.dir.clone()).unwrap_or_default();
        let program = match &spec.node_program {
            Some(program) => program.clone(),
            None => binaries.path("dstack-kms")?,
        };
        let mut nodes = Vec::new();
        for seat in 1..=spec.nodes {
            let ports = [free_port()?, free_port()?];
            let program = spec.seat_programs.get(&seat).unwrap_or(&program);
            let node = Node::new(seat, ports, program.clone(), spec.environment.clone(), dir.clone());
            nodes.push(if spec.dstack { node.serving_dstack(free_port()?) } else { node });
        }
        let of_node = |node: &Node| Machine { name: node.name(), kind: spec.kind, platform_key: spec.platform_key };
        let mut machines: Vec<Machine> = nodes.iter().map(of_node).collect();
        machines.extend(spec.guests.iter().cloned().map(|(name, kind)| Machine { name, kind, platform_key: true }));
        let device = Device::start(&binaries, &dir, &machines)?;
        let operators = plan::operators(&binaries, &dir, spec.operators)?;
        let (genesis, cluster_id) = plan::genesis(&binaries, &dir, spec, &device, &nodes, &operators)?;
        let roots = spec.roots(&device);
        for node in &nodes {
            let config = node::NodeConfig {
                node,
                genesis: &genesis,
                device: &device.text(&node.name()),
                roots: &roots,
                engine: spec.engine,
                more: &spec.more_config,
                collateral: &spec.collateral,
            };
            std::fs::write(node.config(), config.text()).map_err(|error| ClusterError::file(node.config(), error))?;
        }
        Ok(Self { nodes, operators, device, binaries, cluster_id, genesis, pin: None, dir, _temporary: temporary })
    }

    /// A formed cluster: all nodes run, proved their root, and serve.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub fn start(spec: &ClusterSpec) -> Result<Self, ClusterError> {
        let mut cluster = Self::plan(spec)?;
        cluster.start_all()?;
        if spec.nodes >= 3 {
            cluster.init()?;
        }
        cluster.wait_ready(FORMING)?;
        Ok(cluster)
    }

    /// Starts every node that does not run.
    ///
    /// # Errors
    /// [`ClusterError::Process`].
    pub fn start_all(&mut self) -> Result<(), ClusterError> {
        for node in &mut self.nodes {
            if !node.runs() {
                node.start()?;
            }
        }
        Ok(())
    }

    /// SIGTERM to every running node at once, and waits for all ends: seats with how they ended.
    ///
    /// # Errors
    /// [`ClusterError::TimedOut`] when one does not end; the others are killed with the cluster.
    pub fn terminate_all(&mut self) -> Result<Vec<(u16, ExitStatus)>, ClusterError> {
        self.nodes.iter_mut().try_for_each(Node::ask_to_end)?;
        let mut ends = Vec::new();
        for node in &mut self.nodes {
            ends.extend(node.terminate(ENDING)?.map(|status| (node.seat, status)));
        }
        Ok(ends)
    }

    /// Waits for the root, verifies every node's certificate, keeps and answers the pin. Ends early if a node ends.
    ///
    /// # Errors
    /// [`ClusterError`] of the operators' program, or the node that ended.
    pub fn init(&mut self) -> Result<PathBuf, ClusterError> {
        let pin = self.dir.join("pin.json");
        let mut command = self.dstack()?;
        command.args(["cluster", "init", "--timeout", &format!("{}s", FORMING.as_secs()), "--genesis"]).arg(&self.genesis);
        command.arg("--pin-out").arg(&pin);
        let log = self.dir.join("init.log");
        let mut init = Process::spawn("cluster init", &command, &log)?;
        until("the pin", FORMING + Duration::from_secs(10), || {
            self.check_running()?;
            match init.ended() {
                None => Err(ClusterError::unexpected("cluster init", "runs")),
                Some(status) if status.success() => Ok(()),
                Some(_) => init.check_running(),
            }
        })?;
        self.pin = Some(pin.clone());
        Ok(pin)
    }

    /// # Errors
    /// [`ClusterError::Ended`] of a started node that ended by itself.
    pub fn check_running(&mut self) -> Result<(), ClusterError> {
        self.nodes.iter_mut().filter(|node| node.pid().is_some()).try_for_each(Node::check_running)
    }

    /// Waits until every running node serves.
    ///
    /// # Errors
    /// [`ClusterError::TimedOut`] with the last reason, [`ClusterError::Ended`].
    pub fn wait_ready(&mut self, patience: Duration) -> Result<(), ClusterError> {
        until("every running node to be ready", patience, || {
            self.nodes.iter_mut().filter(|node| node.pid().is_some()).try_for_each(Node::check_ready)
        })
    }

    /// A node by its seat.
    ///
    /// # Panics
    /// When there is no such seat: the test is wrong.
    #[must_use]
    pub fn node(&mut self, seat: u16) -> &mut Node {
        self.nodes.iter_mut().find(|node| node.seat == seat).expect("the test names a seat of its cluster")
    }

    /// All nodes.
    #[must_use]
    pub fn nodes(&mut self) -> &mut [Node] {
        &mut self.nodes
    }

    /// Seat of the leader, as soon as a majority of the running nodes names one that runs.
    ///
    /// # Errors
    /// [`ClusterError::TimedOut`].
    pub fn leader(&mut self) -> Result<u16, ClusterError> {
        until("a leader", FORMING, || {
            let running: Vec<u16> = self.nodes.iter_mut().filter_map(|node| node.runs().then_some(node.seat)).collect();
            let mut named = Vec::new();
            for node in self.nodes.iter_mut().filter(|node| running.contains(&node.seat)) {
                named.push(node.status().map(|status| leader_of(&status)));
            }
            let votes = |seat: u16| named.iter().filter(|named| matches!(named, Ok(Some(leader)) if *leader == seat)).count();
            let elected = running.iter().copied().find(|seat| votes(*seat) * 2 > running.len());
            elected.ok_or_else(|| ClusterError::unexpected("the nodes", format!("no majority: {named:?}")))
        })
    }

    /// Addresses of all nodes for clients, comma separated.
    #[must_use]
    pub fn kms_urls(&self) -> String {
        self.nodes.iter().map(Node::url).collect::<Vec<_>>().join(",")
    }

    /// Addresses of the listeners for guests of dstack.
    #[must_use]
    pub fn dstack_urls(&self) -> Vec<String> {
        self.nodes.iter().filter_map(|node| node.dstack).map(|address| format!("https://{address}")).collect()
    }

    /// Folder of the genesis document.
    #[must_use]
    pub fn genesis(&self) -> &Path {
        &self.genesis
    }

    /// File with the pin.
    ///
    /// # Errors
    /// [`ClusterError::Unexpected`] before [`Cluster::init`].
    pub fn pin(&self) -> Result<&Path, ClusterError> {
        self.pin.as_deref().ok_or_else(|| ClusterError::unexpected("cluster", "not formed yet"))
    }

    /// Where everything of this cluster is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The operators' program.
    ///
    /// # Errors
    /// [`ClusterError::NotBuilt`].
    pub fn dstack(&self) -> Result<Command, ClusterError> {
        self.binaries.path("dstack").map(Command::new)
    }
}

/// The leader's seat in a node's status.
fn leader_of(status: &Value) -> Option<u16> {
    let leader = status.get("leader").or_else(|| status.get("raft").and_then(|raft| raft.get("leader")))?;
    leader.as_u64().and_then(|seat| u16::try_from(seat).ok())
}
