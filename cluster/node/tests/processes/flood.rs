//! More connections than a node takes: bounded memory, peers and operators are still served. The flood comes from several processes, each
//! this executable started again with one ignored test.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use dstack_testkit::cluster::process::resident_bytes;
use dstack_testkit::cluster::{Cluster, ClusterSpec, FORMING, MachineKind, until};
use tokio::net::{TcpSocket, TcpStream};

use crate::workload::{Workload, check_values, registered, runtime, wishes};

/// Flooding processes.
const FLOODERS: u8 = 4;
/// Attempts of each, all kept open: far more in all than a node takes, and done in a quarter of a minute. 10⁵ are a test of `ratls`.
const ATTEMPTS: usize = 2_500;
/// Attempts of one process that wait at once.
const ABREAST: usize = 64;
/// What a node may grow by, KiB.
const GROWTH_KIB_MAX: u64 = 200 * 1024;
const ORDER: &str = "DSTACK_TEST_FLOOD";

#[test]
#[ignore = "a flood for the test below, in a process of its own"]
#[expect(clippy::disallowed_methods, reason = "how this process gets its order")]
fn flooder() {
    let Ok(order) = std::env::var(ORDER) else { return };
    let (target, network) = order.split_once(' ').unwrap();
    let (target, network): (SocketAddr, u8) = (target.parse().unwrap(), network.parse().unwrap());
    dstack_runtime::hardening::raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let connected = runtime.block_on(async {
        let mut held = Vec::new();
        for first in (0..ATTEMPTS).step_by(ABREAST) {
            let batch = (first..ATTEMPTS.min(first + ABREAST)).map(|attempt| connect(network, attempt, target));
            held.extend(futures::future::join_all(batch).await.into_iter().flatten());
        }
        held.len()
    });
    assert!(connected > ATTEMPTS / 2, "{connected}");
}

/// From addresses of its own, or ports run out.
async fn connect(network: u8, attempt: usize, target: SocketAddr) -> Option<TcpStream> {
    let source = Ipv4Addr::new(127, 0, network, 1 + u8::try_from(attempt % 8).unwrap());
    let socket = TcpSocket::new_v4().ok()?;
    socket.bind(SocketAddr::from((source, 0))).ok()?;
    tokio::time::timeout(Duration::from_secs(5), socket.connect(target)).await.ok()?.ok()
}

fn start(target: SocketAddr, network: u8) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "flood::flooder", "--nocapture"]).env(ORDER, format!("{target} {network}"));
    command.stdout(Stdio::inherit()).spawn().unwrap()
}

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
    let term = cluster.node(leader).status().unwrap()["raft"]["term"].clone();
    let (address, pid) = (cluster.node(leader).address, cluster.node(leader).pid().unwrap());
    let resident_kib = || resident_bytes(pid).unwrap() >> 10;
    let before = resident_kib();

    // While it lasts: the flooded node serves its operators, and releases pass through the others, whose peer it is.
    let mut flood: Vec<Child> = (1..=FLOODERS).map(|network| start(address, network)).collect();
    let other = (1..=3).find(|seat| *seat != leader).unwrap();
    let url = cluster.node(other).url();
    let (mut grown, mut rounds) = (0, 0);
    while flood.iter_mut().any(|child| child.try_wait().unwrap().is_none()) {
        cluster.node(leader).status().unwrap();
        assert_eq!(check_values(&runtime.block_on(web.keys(&url))), keys);
        grown = grown.max(resident_kib().saturating_sub(before));
        rounds += 1;
    }
    for child in &mut flood {
        assert!(child.wait().unwrap().success());
    }
    assert!(rounds > 0 && grown < GROWTH_KIB_MAX, "grew by {grown} KiB");
    assert_eq!(cluster.node(leader).status().unwrap()["raft"]["term"], term, "no election because of a flood");
    let pressed =
        cluster.node(leader).metric("kms_ratls_evicted_total").unwrap() + cluster.node(leader).metric("kms_ratls_refused_total").unwrap();
    assert!(pressed > 0.0, "the flood was larger than what a node takes");

    // And after it, its clients.
    until("the flooded node to serve clients", FORMING, || cluster.node(leader).check_ready()).unwrap();
    let url = cluster.node(leader).url();
    assert_eq!(check_values(&runtime.block_on(web.keys(&url))), keys);
}
