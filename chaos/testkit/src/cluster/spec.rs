//! What a cluster is made of. Owns: defaults for tests: three TDX nodes, two operators of whom one suffices, no timelock, two guests.
//! Never: starts anything.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::device::Device;

/// Kind of an emulated machine, in the words of `dstack-testkit tee`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineKind {
    /// Intel TDX.
    Tdx,
    /// AWS Nitro Enclave.
    Nitro,
}

impl MachineKind {
    /// Its name on command lines and in plans.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tdx => "tdx",
            Self::Nitro => "nitro",
        }
    }
}

/// A cluster to be.
#[derive(Debug, Clone)]
pub struct ClusterSpec {
    /// How many nodes: 1, or 3 and more.
    pub nodes: u16,
    /// Machines of all nodes.
    pub kind: MachineKind,
    /// Whether the machines of nodes have a measurement-bound key; without one a node keeps everything in memory.
    pub platform_key: bool,
    /// Storage engine.
    pub engine: &'static str,
    /// Operators; each gets a key file.
    pub operators: u8,
    /// Approvals that a change needs.
    pub approvals: u8,
    /// Algorithm of root `ca`, as the plan names it.
    pub ca_algorithm: &'static str,
    /// Seconds between the approval of a change and its effect.
    pub timelock_s: u64,
    /// Machines for workloads, by name.
    pub guests: Vec<(String, MachineKind)>,
    /// Another node program than the one that was built.
    pub node_program: Option<PathBuf>,
    /// Programs of single seats, other than those of the rest; the genesis document allows what they measure as well.
    pub seat_programs: BTreeMap<u16, PathBuf>,
    /// More of a node's `[node]` section.
    pub more_config: String,
    /// A node's `[collateral]` section. By default nothing is fetched: a cluster of tests reaches no vendor.
    pub collateral: String,
    /// Software roots beside those of the emulated machines, DER files: of platforms that a test emulates itself.
    pub more_roots: Vec<PathBuf>,
    /// Whether nodes serve guests of dstack as well, and apps are registered for them (mode L).
    pub dstack: bool,
    /// Environment of every node.
    pub environment: Vec<(String, String)>,
    /// Where everything is kept; a temporary directory by default.
    pub dir: Option<PathBuf>,
}

impl ClusterSpec {
    /// All software roots that nodes trust.
    pub(crate) fn roots(&self, device: &Device) -> Vec<PathBuf> {
        device.roots().into_iter().chain(self.more_roots.iter().cloned()).collect()
    }
}

impl Default for ClusterSpec {
    fn default() -> Self {
        Self {
            nodes: 3,
            kind: MachineKind::Tdx,
            platform_key: true,
            engine: "redb",
            operators: 2,
            approvals: 1,
            ca_algorithm: "ed25519",
            timelock_s: 0,
            guests: vec![("web".to_owned(), MachineKind::Tdx), ("signer".to_owned(), MachineKind::Nitro)],
            node_program: None,
            seat_programs: BTreeMap::new(),
            more_config: String::new(),
            collateral: "mode = \"pinned\"".to_owned(),
            more_roots: Vec::new(),
            dstack: false,
            environment: Vec::new(),
            dir: None,
        }
    }
}
