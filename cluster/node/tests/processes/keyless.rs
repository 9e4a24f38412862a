//! Nodes whose device has no key bound to its measurement, as plain TDX, GCP and AWS: what they know is in memory only (threshold.md §6).

use std::time::Duration;

use dstack_testkit::cluster::{Cluster, ClusterError, ClusterSpec, FORMING, MachineKind, until};

use crate::releases::audit_verifies;
use crate::workload::{Workload, check_values, registered, runtime};

fn unexpected(got: impl ToString) -> ClusterError {
    ClusterError::Unexpected { from: "node".to_owned(), got: got.to_string() }
}

#[test]
fn a_node_without_a_platform_key_starts_empty_and_votes_only_by_the_others_word() {
    let mut cluster = Cluster::start(&ClusterSpec { platform_key: false, ..ClusterSpec::default() }).unwrap();
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let keys = check_values(&runtime.block_on(web.keys(&cluster.kms_urls())));
    let leader = cluster.leader().unwrap();
    let (other, lost) = (leader % 3 + 1, (leader + 1) % 3 + 1);
    for seat in 1..=3 {
        let data = cluster.node(seat).data_dir();
        assert!(!data.join("node-key.sealed").exists() && !data.join("shares").exists(), "nothing can be sealed");
        let status = cluster.node(seat).status().unwrap();
        assert_eq!((&status["seals"], &status["raft"]["votes"]), (&false.into(), &true.into()));
    }

    // It restarts while the leader hangs: the one that is left asks for its vote, and must not get it.
    cluster.node(lost).kill();
    assert_eq!(check_values(&runtime.block_on(web.keys(&cluster.kms_urls()))), keys);
    cluster.node(leader).pause().unwrap();
    cluster.node(lost).start().unwrap();
    until("its vote to be asked for and refused", FORMING, || {
        let abstained = cluster
            .node(lost)
            .metrics()?
            .lines()
            .any(|line| line.starts_with("kms_raft_rpc_refused_total") && line.contains("raft.abstaining") && !line.ends_with(" 0"));
        if abstained { Ok(()) } else { Err(unexpected("no vote was asked for yet")) }
    })
    .unwrap();
    // Several elections long.
    std::thread::sleep(Duration::from_secs(3));
    let status = cluster.node(lost).status().unwrap();
    assert_eq!(status["raft"]["votes"], false, "{status}");
    assert!(status["raft"]["voting"].as_str().unwrap().contains("asks the others"), "{status}");
    assert_eq!(status["state"]["formation"], "awaiting-genesis", "it starts empty: {status}");
    let status = cluster.node(other).status().unwrap();
    assert_ne!(status["raft"]["is_leader"], true, "elected by a node that lost its votes: {status}");
    let log = cluster.node(lost).log_text();
    assert!(log.contains("key was in memory only, so this node starts empty") && log.contains("does not vote yet"), "{log}");

    // The others are there again: it is admitted with its new key, has the whole log, and votes.
    cluster.node(leader).resume().unwrap();
    until("it to be admitted, caught up and confirmed", FORMING, || {
        let (own, another) = (cluster.node(lost).status()?, cluster.node(other).status()?);
        let row = own["state"]["seats"].as_array().and_then(|seats| seats.iter().find(|row| row["seat"] == lost)).cloned();
        let admitted = row.is_some_and(|row| row["index"] == 4);
        let ready = admitted && own["state"]["size"] == another["state"]["size"] && own["raft"]["votes"] == true;
        if ready { Ok(()) } else { Err(unexpected(own)) }
    })
    .unwrap();

    // What is lost, it says: in status, in readiness.
    let status = cluster.node(lost).status().unwrap();
    assert!(status["share"].is_null() && status["share_lost"].as_str().unwrap().contains("no key to seal it"), "{status}");
    let lacking = cluster.node(lost).check_ready().unwrap_err().to_string();
    assert!(lacking.contains("no share") && lacking.contains("resharing"), "{lacking}");

    // The two others hold enough, whoever coordinates, the node without a share too.
    for seat in [other, lost] {
        let url = cluster.node(seat).url();
        assert_eq!(check_values(&runtime.block_on(web.keys(&url))), keys);
    }

    // Its vote counts now: without the leader, it and the other one elect.
    let leader = cluster.leader().unwrap();
    let gone = if leader == lost { other } else { leader };
    cluster.node(gone).pause().unwrap();
    until("a leader without the one that hangs", FORMING, || {
        let leads =
            (1..=3).filter(|seat| *seat != gone).any(|seat| cluster.node(seat).status().is_ok_and(|s| s["raft"]["is_leader"] == true));
        if leads { Ok(()) } else { Err(unexpected("no leader")) }
    })
    .unwrap();
    cluster.node(gone).resume().unwrap();
    until("keys again", FORMING, || {
        let again = check_values(&runtime.block_on(web.keys(&cluster.kms_urls())));
        if again == keys { Ok(()) } else { Err(unexpected("other keys")) }
    })
    .unwrap();
    audit_verifies(&mut cluster);
}
