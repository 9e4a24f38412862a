//! Collateral that ends while the cluster runs: renewed before that by the leader, brought by an operator after it.

use std::time::Duration;

use dstack_attest::CollateralBundle;
use dstack_protocol::UnixMillis;
use dstack_runtime::clock::{Clock as _, SystemClock};
use dstack_testkit::cluster::{Cluster, ClusterError, ClusterSpec, FORMING, MachineKind, until};
use dstack_testkit::pccs::{Fault, Pccs};
use dstack_testkit::tdx::{CollateralSpec, bundle_json};
use dstack_testkit::{SoftwareRoots, Validity};

use crate::releases::audit_verifies;
use crate::workload::{Workload, check_values, registered, runtime};

/// The first bundle ends so long after the start.
const LIVES_S: u64 = 90;

fn now_s() -> u64 {
    SystemClock::new().now().0 / 1000
}

struct World {
    dir: tempfile::TempDir,
    roots: SoftwareRoots,
    ends_s: u64,
}

impl World {
    /// Roots whose collateral ends soon, where the emulated machines will look for them.
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("dstack-").tempdir().unwrap();
        let roots = SoftwareRoots::generate(UnixMillis(now_s() * 1000)).unwrap();
        roots.save(&dir.path().join("roots")).unwrap();
        let world = Self { ends_s: now_s() + LIVES_S, dir, roots };
        world.write_first(&world.bundle(19, 3600, LIVES_S + 3600));
        world
    }

    fn write_first(&self, bundle: &CollateralBundle) {
        std::fs::write(self.dir.path().join("roots/collateral.json"), bundle.bytes()).unwrap();
    }

    /// Collateral issued `age_s` ago that holds for `for_s` from then on.
    fn bundle(&self, evaluation: u32, age_s: u64, for_s: u64) -> CollateralBundle {
        let from_s = now_s() - age_s;
        let spec = CollateralSpec { evaluation, ..CollateralSpec::new(Validity { from_s, until_s: from_s + for_s }) };
        CollateralBundle::parse(&bundle_json(&[self.roots.collateral(&spec).unwrap()])).unwrap()
    }

    /// A cluster on the short-lived bundle; its clients judge nodes with a long-lived one.
    fn cluster(&self, collateral: String) -> Cluster {
        let spec = ClusterSpec { dir: Some(self.dir.path().to_owned()), collateral, ..ClusterSpec::default() };
        let cluster = Cluster::start(&spec).unwrap();
        self.write_first(&self.bundle(19, 3600, 86_400));
        cluster
    }

    fn wait_for_the_end(&self) {
        std::thread::sleep(Duration::from_secs((self.ends_s + 2).saturating_sub(now_s())));
    }
}

fn evaluation(cluster: &mut Cluster, seat: u16) -> Option<u64> {
    cluster.node(seat).status().ok()?["collateral"]["platforms"][0]["tcb_evaluation"].as_u64()
}

fn until_evaluation(cluster: &mut Cluster, seat: u16, expected: u64) {
    until(&format!("evaluation {expected} at node {seat}"), FORMING, || match evaluation(cluster, seat) {
        Some(got) if got == expected => Ok(()),
        got => Err(ClusterError::Unexpected { from: format!("node {seat}"), got: format!("{got:?}") }),
    })
    .unwrap();
}

#[test]
fn the_leader_renews_collateral_before_it_ends() {
    let (world, server) = (World::new(), Pccs::start(0).unwrap());
    let mut cluster = world.cluster(format!("intel = [\"{}\"]\nrefresh_every_s = 2", server.url()));
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let keys = check_values(&runtime.block_on(web.keys(&cluster.kms_urls())));

    // Older collateral and a lie are not taken, however often they are served.
    let leader = cluster.leader().unwrap();
    for (bundle, fault) in [(world.bundle(18, 60, 86_400), Fault::None), (world.bundle(30, 60, 86_400), Fault::Altered)] {
        server.serve(&bundle);
        server.fault(fault);
        let asked = server.requests();
        until("the leader to ask twice", FORMING, || match server.requests() >= asked + 8 {
            true => Ok(()),
            false => Err(ClusterError::Unexpected { from: "pccs".to_owned(), got: format!("{} requests", server.requests()) }),
        })
        .unwrap();
        assert_eq!(evaluation(&mut cluster, leader), Some(19));
    }

    // Newer collateral is, also by a node that was away.
    let away = (1..=3).find(|seat| *seat != leader).unwrap();
    cluster.node(away).kill();
    server.serve(&world.bundle(20, 60, 86_400));
    server.fault(Fault::None);
    until_evaluation(&mut cluster, leader, 20);
    cluster.start_all().unwrap();
    for seat in 1..=3 {
        until_evaluation(&mut cluster, seat, 20);
    }
    world.wait_for_the_end();
    assert_eq!(check_values(&runtime.block_on(web.keys(&cluster.kms_urls()))), keys, "released after the first bundle ended");

    // A restart keeps it, though the server now has only older collateral.
    server.serve(&world.bundle(19, 30, 86_400));
    cluster.terminate_all().unwrap();
    cluster.start_all().unwrap();
    cluster.wait_ready(FORMING).unwrap();
    for seat in 1..=3 {
        assert_eq!(evaluation(&mut cluster, seat), Some(20));
    }
    assert_eq!(check_values(&runtime.block_on(web.keys(&cluster.kms_urls()))), keys);
    audit_verifies(&mut cluster);
}

#[test]
fn an_operator_brings_collateral_after_everything_has_expired() {
    let world = World::new();
    let mut cluster = world.cluster("mode = \"pinned\"".to_owned());
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let keys = check_values(&runtime.block_on(web.keys(&cluster.kms_urls())));
    cluster.terminate_all().unwrap();
    world.wait_for_the_end();
    // Nodes come back and cannot prove themselves to each other: no quorum, and log time stands still.
    cluster.start_all().unwrap();

    let folder = world.dir.path().join("fresh");
    std::fs::create_dir(&folder).unwrap();
    let import = |cluster: &Cluster| {
        let mut command = cluster.dstack().unwrap();
        command.args(["collateral", "import"]).arg(&folder).arg("--genesis").arg(cluster.genesis());
        command.arg("--key").arg(&cluster.operators[0].key).args(["--timeout", "60s"]);
        command.output().unwrap()
    };
    std::fs::write(folder.join("bundle.json"), world.bundle(18, 60, 86_400).bytes()).unwrap();
    let older = import(&cluster);
    assert_eq!(older.status.code(), Some(1), "{}", String::from_utf8_lossy(&older.stderr));
    assert!(String::from_utf8_lossy(&older.stderr).contains("COLLATERAL_OLDER"), "{}", String::from_utf8_lossy(&older.stderr));

    std::fs::write(folder.join("bundle.json"), world.bundle(20, 60, 86_400).bytes()).unwrap();
    let brought = import(&cluster);
    assert!(brought.status.success(), "{}", String::from_utf8_lossy(&brought.stderr));
    for seat in 1..=3 {
        until_evaluation(&mut cluster, seat, 20);
    }
    cluster.wait_ready(FORMING).unwrap();
    assert_eq!(check_values(&runtime.block_on(web.keys(&cluster.kms_urls()))), keys);
    audit_verifies(&mut cluster);
}
