//! How a cluster forms, and who may take part.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use dstack_protocol::RefusalCode;
use dstack_testkit::cluster::process::{outcome, run};
use dstack_testkit::cluster::{Binaries, Cluster, ClusterError, ClusterSpec, FORMING, MachineKind, until};
use serde_json::Value;

use crate::releases::audit_verifies;
use crate::workload::{Workload, check_values, registered, runtime};

#[test]
fn three_nodes_form_and_print_one_pin() {
    let mut cluster = Cluster::plan(&ClusterSpec::default()).unwrap();
    let config = cluster.node(1).config();
    let effective =
        run(Command::new(cluster.binaries.path("dstack-kms").unwrap()).arg("--config").arg(&config).arg("--check-config")).unwrap();
    assert!(effective.contains("seat = 1") && effective.contains("redb"), "{effective}");

    cluster.start_all().unwrap();
    let pin: Value = serde_json::from_slice(&std::fs::read(cluster.init().unwrap()).unwrap()).unwrap();
    cluster.wait_ready(FORMING).unwrap();
    assert_eq!(pin["cluster_id"], cluster.cluster_id);
    assert_eq!(pin["generation"], 0);
    let leader = cluster.leader().unwrap();
    for seat in 1..=3 {
        let status = cluster.node(seat).status().unwrap();
        assert_eq!(status["state"]["pk_prf"], pin["pk_prf"], "node {seat}");
        assert_eq!(status["share"]["index"], u64::from(seat));
        assert_eq!(status["share"]["epoch"], 1);
        assert_eq!(status["raft"]["voters"], serde_json::json!([1, 2, 3]));
        assert_eq!(status["raft"]["is_leader"], seat == leader);
        assert_eq!(status["software_tee"], true, "a node that trusts a software root says so");
        assert!(cluster.node(seat).log_text().contains("SOFTWARE"), "in its log, too");
    }

    let mut status = cluster.dstack().unwrap();
    status.args(["cluster", "status", "--json", "--genesis"]).arg(cluster.genesis());
    let rows: Value = serde_json::from_str(&run(&mut status).unwrap()).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 3);
    assert!(rows.as_array().unwrap().iter().all(|row| row["software_root"] == true && row["status"]["ready"] == true), "{rows}");

    // Another question, the same pin: it is the root's, not a run's.
    let mut again = cluster.dstack().unwrap();
    again.args(["cluster", "init", "--timeout", "20s", "--genesis"]).arg(cluster.genesis());
    assert_eq!(serde_json::from_str::<Value>(&run(&mut again).unwrap()).unwrap(), pin);
    audit_verifies(&mut cluster);
}

#[test]
fn five_nodes_serve_with_two_of_them_dead() {
    let mut cluster = Cluster::start(&ClusterSpec { nodes: 5, ..ClusterSpec::default() }).unwrap();
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let first = runtime.block_on(web.keys(&cluster.kms_urls()));
    assert!(first.holders.len() >= 3, "three of five combine: {:?}", first.holders);

    let leader = cluster.leader().unwrap();
    let other = (1..=5).find(|seat| *seat != leader).unwrap();
    cluster.node(leader).kill();
    cluster.node(other).kill();
    assert_eq!(check_values(&runtime.block_on(web.keys(&cluster.kms_urls()))), check_values(&first));
}

#[test]
fn nitro_nodes_form_as_well() {
    let mut cluster = Cluster::start(&ClusterSpec { kind: MachineKind::Nitro, ..ClusterSpec::default() }).unwrap();
    let app = registered(&cluster, "signer", MachineKind::Nitro);
    let signer = Workload::boot(&cluster, "signer", &app);
    let runtime = runtime();
    let keys = check_values(&runtime.block_on(signer.keys(&cluster.kms_urls())));
    let url = cluster.node(3).url();
    assert_eq!(check_values(&runtime.block_on(signer.keys(&url))), keys);
}

#[test]
fn a_single_node_runs_raft_and_has_no_root() {
    let mut cluster = Cluster::start(&ClusterSpec { nodes: 1, ..ClusterSpec::default() }).unwrap();
    let status = cluster.node(1).status().unwrap();
    assert_eq!((&status["state"]["pk_prf"], &status["share"]), (&Value::Null, &Value::Null));
    assert_eq!(status["raft"]["voters"], serde_json::json!([1]));
    let mut init = cluster.dstack().unwrap();
    init.args(["cluster", "init", "--genesis"]).arg(cluster.genesis());
    let (status, _, error) = outcome(&mut init).unwrap();
    assert!(!status.success() && error.contains("no root"), "{error}");

    // Its log works: governance is applied and survives a kill.
    let app_id = "11".repeat(20);
    let mut propose = cluster.policy("propose").unwrap();
    propose.args(["--app-id", &app_id, "--name", "app", "--platform", "tdx", "--any-os-image", "--class", "env", "--compose-hash"]);
    assert!(run(propose.arg("22".repeat(32))).unwrap().contains("state=applied"));
    cluster.node(1).kill();
    cluster.node(1).start().unwrap();
    cluster.wait_ready(FORMING).unwrap();
    let apps = until("the app to be there", FORMING, || {
        let status = cluster.node(1).status()?;
        if status["state"]["apps"] == 1 {
            Ok(())
        } else {
            Err(ClusterError::Unexpected { from: "node 1".to_owned(), got: status.to_string() })
        }
    });
    apps.unwrap();
    audit_verifies(&mut cluster);
}

#[test]
fn a_node_with_another_binary_is_not_admitted() {
    let mut cluster = Cluster::plan(&ClusterSpec::default()).unwrap();
    let right = cluster.node(3).program.clone();
    let modified = modified_binary(cluster.dir());
    cluster.node(3).program.clone_from(&modified);
    cluster.start_all().unwrap();

    // The one of the others that leads refuses it and says so, and the cluster does not form without its third node.
    until("the leader to refuse it", FORMING, || {
        cluster.check_running()?;
        let refusals = [1, 2].map(|seat| cluster.node(seat).log_text().matches(RefusalCode::MeasurementNotAllowed.text()).count());
        if refusals.into_iter().max() > Some(0) {
            Ok(())
        } else {
            Err(ClusterError::Unexpected { from: "the logs".to_owned(), got: format!("{refusals:?} refusals") })
        }
    })
    .unwrap();
    for seat in [1, 2] {
        // One may refuse it before the other listens.
        let status = until("its status", FORMING, || cluster.node(seat).status()).unwrap();
        assert_ne!(status["state"]["formation"], "formed");
        assert_eq!(status["state"]["pk_prf"], Value::Null);
        let seats = status["state"]["seats"].as_array().cloned().unwrap_or_default();
        assert!(!seats.iter().any(|row| row["seat"] == 3), "{seats:?}");
    }

    // With the right binary, on an empty disk, it forms.
    cluster.node(3).kill();
    let data = cluster.node(3).data_dir();
    std::fs::remove_dir_all(&data).unwrap();
    cluster.node(3).program = right;
    cluster.start_all().unwrap();
    cluster.init().unwrap();
    cluster.wait_ready(FORMING).unwrap();

    // Later, on a disk that the right binary wrote, the other one finds nothing that it can open.
    cluster.node(3).kill();
    cluster.node(3).program = modified;
    cluster.node(3).start().unwrap();
    let status = cluster.node(3).wait(FORMING).unwrap().unwrap();
    assert!(!status.success());
    let log = cluster.node(3).log_text();
    assert!(log.contains("written by other code"), "{log}");
}

/// The node program with one byte more: it runs the same, and is measured as another.
pub(crate) fn modified_binary(dir: &Path) -> PathBuf {
    let copy = dir.join("dstack-kms-modified");
    std::fs::copy(Binaries::find().unwrap().path("dstack-kms").unwrap(), &copy).unwrap();
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::OpenOptions::new().append(true).open(&copy).unwrap().write_all(&[0]).unwrap();
    copy
}
