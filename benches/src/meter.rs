//! What a series costs the processes of a cluster: processor time by node and thread, stages. Owns: readings before and after. Never:
//! wall time; the clients' own time but that of this process.

use std::collections::BTreeMap;
use std::time::Duration;

use cpu_time::ProcessTime;
use dstack_testkit::cluster::Cluster;

use crate::cpu::{Usage, Used};
use crate::stages::{self, Means, Stages};

/// What a series used.
#[derive(Debug)]
pub struct Cost {
    /// By node, in the order of seats.
    pub nodes: Vec<Duration>,
    /// Of the nodes, by thread name.
    pub threads: BTreeMap<String, Used>,
    /// The process with the emulated machines.
    pub device: Duration,
    /// This process.
    pub clients: Duration,
    /// Stages as nodes report them.
    pub stages: Means,
}

impl Cost {
    /// All nodes together.
    #[must_use]
    pub fn cluster(&self) -> Duration {
        self.nodes.iter().sum()
    }

    /// How often a thread of a node went to sleep.
    #[must_use]
    pub fn sleeps(&self) -> u64 {
        self.threads.values().map(|used| used.sleeps).sum()
    }
}

/// Readings before a series.
pub struct Meter {
    nodes: Vec<Usage>,
    device: Usage,
    clients: ProcessTime,
    stages: Stages,
}

impl Meter {
    /// Reads.
    #[must_use]
    pub fn start(cluster: &mut Cluster) -> Self {
        let (nodes, device, stages) = readings(cluster);
        Self { nodes, device, clients: ProcessTime::now(), stages }
    }

    /// What was used since the start.
    #[must_use]
    pub fn stop(&self, cluster: &mut Cluster) -> Cost {
        let clients = self.clients.elapsed();
        let (after, device, stages) = readings(cluster);
        let mut threads: BTreeMap<String, Used> = BTreeMap::new();
        let mut nodes = Vec::new();
        for (after, before) in after.iter().zip(&self.nodes) {
            let (total, by_name) = after.since(before);
            nodes.push(total);
            for (name, used) in by_name {
                threads.entry(name).or_default().add(used);
            }
        }
        let device = device.since(&self.device).0;
        Cost { nodes, threads, device, clients, stages: stages::means(&self.stages, &stages) }
    }
}

fn readings(cluster: &mut Cluster) -> (Vec<Usage>, Usage, Stages) {
    let mut stages = Stages::new();
    let device = Usage::of(cluster.device.process().pid());
    let mut nodes = Vec::new();
    for node in cluster.nodes() {
        nodes.push(Usage::of(node.pid().unwrap()));
        stages::add(&mut stages, &node.metrics().unwrap());
    }
    (nodes, device, stages)
}
