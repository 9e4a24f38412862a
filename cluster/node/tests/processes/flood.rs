//! More connections than a node takes: bounded memory, peers and operators are still served. The full count (10⁵) is a test of `ratls`.

use std::net::TcpStream;
use std::time::Duration;

use dstack_testkit::cluster::{Cluster, ClusterSpec, MachineKind};

use crate::workload::{Workload, check_values, registered, runtime, wishes};

/// Attempts, of which as many as possible stay open.
const CONNECTIONS: usize = 3000;
/// What a node may grow by, KiB.
const GROWTH_KIB_MAX: u64 = 200 * 1024;

#[test]
fn a_flood_of_connections_is_bounded_and_peers_are_served() {
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let urls = cluster.kms_urls();
    let client = web.client(&urls);
    let keys = runtime.block_on(async { check_values(&client.release(&web.app_id, &wishes()).await.unwrap()) });
    let leader = cluster.leader().unwrap();
    let (address, pid) = (cluster.node(leader).address, cluster.node(leader).pid().unwrap());
    let before = resident_kib(pid);

    dstack_runtime::hardening::raise_descriptor_limit();
    let flood: Vec<TcpStream> =
        (0..CONNECTIONS).filter_map(|_| TcpStream::connect_timeout(&address, Duration::from_secs(2)).ok()).collect();
    assert!(flood.len() > CONNECTIONS / 2, "{} connected", flood.len());

    // While they are open: the flooded node leads, serves its operators, and a release passes through the others.
    cluster.node(leader).check_ready().unwrap();
    let other = (1..=3).find(|seat| *seat != leader).unwrap();
    let url = cluster.node(other).url();
    assert_eq!(check_values(&runtime.block_on(web.keys(&url))), keys);
    assert_eq!(cluster.leader().unwrap(), leader, "no election because of a flood");
    let grown = resident_kib(pid).saturating_sub(before);
    assert!(grown < GROWTH_KIB_MAX, "grew by {grown} KiB");
    let pressed =
        cluster.node(leader).metric("kms_ratls_evicted_total").unwrap() + cluster.node(leader).metric("kms_ratls_refused_total").unwrap();
    assert!(pressed > 0.0, "the flood was larger than what a node takes");

    drop(flood);
    let url = cluster.node(leader).url();
    assert_eq!(check_values(&runtime.block_on(web.keys(&url))), keys);
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
