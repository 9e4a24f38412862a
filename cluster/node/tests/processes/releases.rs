//! The main path: keys, the same at every node and after every restart; who is refused.

use std::process::Command;

use dstack_protocol::RefusalCode;
use dstack_testkit::cluster::process::{outcome, run};
use dstack_testkit::cluster::{Cluster, ClusterSpec, ENDING, FORMING, MachineKind, until};

use crate::workload::{Workload, check_values, compose_file, registered, runtime};

#[test]
fn keys_are_the_same_everywhere_and_after_the_death_of_the_leader() {
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    let runtime = runtime();
    let web = registered(&cluster, "web", MachineKind::Tdx);
    let signer = registered(&cluster, "signer", MachineKind::Nitro);
    let web = Workload::boot(&cluster, "web", &web);
    let signer = Workload::boot(&cluster, "signer", &signer);

    let first = runtime.block_on(web.keys(&cluster.kms_urls()));
    let (first_keys, signers_keys) = (check_values(&first), check_values(&runtime.block_on(signer.keys(&cluster.kms_urls()))));
    assert_eq!(first_keys.len(), 3);
    assert!(first_keys.iter().all(|key| !signers_keys.contains(key)), "each app has its own keys");
    assert!(first.holders.len() >= 2 && first.bad.is_empty(), "{:?}", first.bad);

    // Any node coordinates, and all give the same.
    for seat in 1..=3 {
        let url = cluster.node(seat).url();
        assert_eq!(check_values(&runtime.block_on(web.keys(&url))), first_keys, "through node {seat}");
    }

    let leader = cluster.leader().unwrap();
    cluster.node(leader).kill();
    let urls = cluster.kms_urls();
    assert_eq!(check_values(&runtime.block_on(web.keys(&urls))), first_keys);
    assert_eq!(check_values(&runtime.block_on(signer.keys(&urls))), signers_keys);
    let next = cluster.leader().unwrap();
    assert_ne!(next, leader);

    // The one that was killed comes back with its share.
    cluster.node(leader).start().unwrap();
    cluster.wait_ready(FORMING).unwrap();
    let url = cluster.node(leader).url();
    assert_eq!(check_values(&runtime.block_on(web.keys(&url))), first_keys);
}

#[test]
fn keys_survive_a_restart_of_all_nodes() {
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let keys = check_values(&runtime.block_on(web.keys(&cluster.kms_urls())));

    for seat in 1..=3 {
        assert!(cluster.node(seat).terminate(ENDING).unwrap().unwrap().success());
    }
    cluster.start_all().unwrap();
    cluster.wait_ready(FORMING).unwrap();
    assert_eq!(check_values(&runtime.block_on(web.keys(&cluster.kms_urls()))), keys);

    // Killed, not asked: what was acknowledged is there.
    for seat in 1..=3 {
        cluster.node(seat).kill();
    }
    cluster.start_all().unwrap();
    cluster.wait_ready(FORMING).unwrap();
    assert_eq!(check_values(&runtime.block_on(web.keys(&cluster.kms_urls()))), keys);
    audit_verifies(&mut cluster);
}

#[test]
fn sled_serves_and_restarts_as_well() {
    let mut cluster = Cluster::start(&ClusterSpec { engine: "sled", ..ClusterSpec::default() }).unwrap();
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let keys = check_values(&runtime.block_on(web.keys(&cluster.kms_urls())));
    cluster.node(2).kill();
    cluster.node(2).start().unwrap();
    cluster.wait_ready(FORMING).unwrap();
    let url = cluster.node(2).url();
    assert_eq!(check_values(&runtime.block_on(web.keys(&url))), keys);
    audit_verifies(&mut cluster);
}

#[test]
fn refuses_other_code_unknown_apps_and_revoked_ones() {
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    let (runtime, urls) = (runtime(), cluster.kms_urls());
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let keys = check_values(&runtime.block_on(web.keys(&urls)));

    // The same app id, one byte of the compose file changed.
    let changed = cluster.measure("web2", &compose_file(cluster.dir(), "web2", "alpine:4"), MachineKind::Tdx).unwrap();
    let modified = Workload::boot_document(&cluster, "web", &std::fs::read(&changed.compose).unwrap(), &app.app_id);
    let refusal = runtime.block_on(modified.refusal(&urls));
    assert_eq!(refusal.code, RefusalCode::ComposeNotAllowed);
    assert!(refusal.got.contains(&changed.compose_hash), "{refusal}");

    // Its own app id, which nobody registered.
    let unknown = Workload::boot(&cluster, "web", &changed);
    assert_eq!(runtime.block_on(unknown.refusal(&urls)).code, RefusalCode::AppUnknown);

    // Operators allow it: the same keys, for they belong to the app, not to its code.
    assert_eq!(cluster.register(&app, &[&app.compose_hash, &changed.compose_hash]).unwrap(), "applied");
    assert_eq!(check_values(&runtime.block_on(modified.keys(&urls))), keys);

    assert_eq!(cluster.revoke(&app.app_id).unwrap(), "applied");
    assert_eq!(runtime.block_on(web.refusal(&urls)).code, RefusalCode::AppRevoked);
    for seat in 1..=3 {
        let url = cluster.node(seat).url();
        assert_eq!(runtime.block_on(web.refusal(&url)).code, RefusalCode::AppRevoked, "through node {seat}");
    }
    let explained = run(cluster.dstack().unwrap().args(["explain", "APP_REVOKED"])).unwrap();
    assert!(explained.contains("undo the revocation"), "{explained}");
    audit_verifies(&mut cluster);
}

#[test]
fn a_retried_request_is_recorded_once() {
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let addresses: Vec<_> = cluster.nodes().iter().map(|node| node.address).collect();

    let positions = runtime.block_on(async {
        let session = web.session(addresses[0]).await;
        let ask = session.signed(session.request());
        let mut positions = Vec::new();
        for _ in 0..3 {
            positions.push(session.ask(&ask).await.unwrap().receipt.record.pos);
        }
        // Through other nodes too.
        for address in &addresses[1..] {
            let elsewhere = session.elsewhere(&web, *address).await;
            positions.push(elsewhere.ask(&ask).await.unwrap().receipt.record.pos);
        }
        positions
    });
    assert!(positions.iter().all(|pos| pos == &positions[0]), "{positions:?}");
    audit_verifies(&mut cluster);
    for seat in 1..=3 {
        assert_eq!(intents(&mut cluster, seat), (1, 0), "node {seat}");
    }
}

/// Intents of mode C in a node's log: applied and rejected. The cluster makes intents of its own, for the env keys of registered apps.
pub(crate) fn intents(cluster: &mut Cluster, seat: u16) -> (u64, u64) {
    let report = audited(cluster, seat);
    let count = |outcome: &str| report["intents"]["client"][outcome].as_u64().unwrap_or(0);
    (count("applied"), count("rejected"))
}

/// What `dstack audit verify` says of a node's log, which it accepts.
pub(crate) fn audited(cluster: &mut Cluster, seat: u16) -> serde_json::Value {
    let data = cluster.node(seat).data_dir();
    // While a batch is being written its end may look torn.
    let verified = until("the log to verify", FORMING, || {
        let mut command = cluster.dstack()?;
        command.args(["audit", "verify", "--json", "--data"]).arg(&data).arg("--genesis").arg(cluster.genesis());
        run(&mut command)
    });
    serde_json::from_str(&verified.unwrap()).unwrap()
}

/// `dstack audit verify` accepts the log of every node, also while it runs.
pub(crate) fn audit_verifies(cluster: &mut Cluster) {
    for seat in 1..=u16::try_from(cluster.nodes().len()).unwrap() {
        let data = cluster.node(seat).data_dir();
        let verify = |cluster: &Cluster| {
            let mut command = cluster.dstack().unwrap();
            command.args(["audit", "verify", "--data"]).arg(&data).arg("--genesis").arg(cluster.genesis());
            command
        };
        // While a batch is being written its end may look torn.
        let verified = until("the log to verify", FORMING, || run(&mut verify(cluster)));
        assert!(verified.is_ok(), "node {seat}: {}", verified.unwrap_err());
    }
    let mut wrong: Command = cluster.dstack().unwrap();
    wrong.args(["audit", "verify", "--data"]).arg(cluster.dir()).arg("--genesis").arg(cluster.genesis());
    assert!(!outcome(&mut wrong).unwrap().0.success(), "a folder without a log is no verified log");
}
