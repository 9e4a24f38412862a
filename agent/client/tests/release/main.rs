//! Keys over real sockets: RA-TLS on both sides, evidence of software TEEs, shares of the known answers of threshold.md §1.5.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, unreachable_pub, reason = "tests")]

mod cluster;

use std::sync::atomic::Ordering;
use std::time::Duration;

use dstack_audit::AuditError;
use dstack_client::error::BadPartialFault;
use dstack_client::{CaPub, ClientError, KcvError, KcvStore, KmsClient, NodeFault, Pin, ReleasedKeys, Settings};
use dstack_protocol::release::{KeyClass, Wish};
use dstack_protocol::{AppId, ClusterId, Generation, NodeIndex, RefusalCode};
use dstack_ratls::{JudgeError, PeerError};
use dstack_threshold::combine::PartialFault;

use crate::cluster::*;

const ENV: &str = "a89faa62b8e2acb479a6c6404b78350fe3fd37ef8877091c425dbdd542c125e3";
const ENV_KCV: &str = "b41a354772d9adbcce5eb3a4780aca88";
const K256: &str = "261da6e22ebc221c13a04488b797e9b0aaa3d94ef21965bb76fa71b78828158b";
const DISK_WITHOUT_INSTANCE: &str = "cd68c7a54eecf9921bee2c39bd9762493093e8f496021e5e4f3eb603a7929d17";

fn pin() -> Pin {
    Pin {
        cluster_id: CLUSTER,
        pk_prf: hex::decode(PK_PRF).unwrap().try_into().unwrap(),
        generation: Generation(0),
        ca_pub: None,
        id_pub: None,
    }
}

fn wishes() -> Vec<Wish> {
    [KeyClass::Disk, KeyClass::Env, KeyClass::K256].map(|class| Wish::new(class, Vec::new()).unwrap()).to_vec()
}

async fn release(client: &KmsClient) -> Result<ReleasedKeys, ClientError> {
    tokio::time::timeout(std::time::Duration::from_secs(60), client.release(&APP, &wishes())).await.unwrap()
}

fn hex_of(released: &ReleasedKeys) -> Vec<String> {
    released.keys.iter().map(|key| key.bytes().expose(|bytes| hex::encode(bytes))).collect()
}

fn known_answers() -> [String; 3] {
    [DISK_WITHOUT_INSTANCE, ENV, K256].map(str::to_owned)
}

fn bad(released: &ReleasedKeys) -> Vec<(NodeIndex, BadPartialFault)> {
    released.bad.iter().map(|one| (one.index, one.fault.clone())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn gives_the_known_keys_in_one_session_each_request_recorded_once() {
    let cluster = Cluster::new();
    let node = cluster.node().await;
    let client = cluster.client(pin(), &[&node], vec![cluster.node_measurement()], None);
    for round in 1..=3 {
        let released = release(&client).await.unwrap();
        assert_eq!(hex_of(&released), known_answers());
        assert_eq!(released.holders, [NodeIndex(1), NodeIndex(2)]);
        assert_eq!(bad(&released), []);
        assert_eq!(released.committed.pos(), 6 + round, "7 leaves were there before");
        assert_eq!(released.receipt.record.pos, released.committed.pos());
        assert_eq!(cluster.recorded() as u64, round);
        assert_eq!(cluster.request_ids.lock().unwrap().last(), Some(&released.request_id));
    }
    assert_eq!(cluster.session_keys.lock().unwrap().len(), 1, "one session");
    // Custom secrets by path, many at once, side by side.
    let paths: Vec<Wish> = (0..16).map(|i| Wish::new(KeyClass::Custom, format!("path/{i}").into_bytes()).unwrap()).collect();
    let (one, two) = tokio::join!(client.release(&APP, &paths), client.release(&APP, &paths));
    let (one, two) = (hex_of(&one.unwrap()), hex_of(&two.unwrap()));
    assert_eq!(one, two);
    assert_eq!(one.iter().collect::<std::collections::BTreeSet<_>>().len(), 16);
    for wrong in [vec![], vec![wishes().remove(0); 2], (0..17).map(|i| Wish::new(KeyClass::Custom, vec![b'a' + i]).unwrap()).collect()] {
        assert!(matches!(client.release(&APP, &wrong).await, Err(ClientError::Wishes(_))));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_with_a_wrong_element_is_named_and_the_keys_come_all_the_same() {
    let cluster = Cluster::new();
    let nodes = [cluster.node().await, cluster.node().await];
    for liar in 1..=2 {
        cluster.holds(liar, Holding::WrongElement);
        let released = release(&cluster.client(pin(), &[&nodes[0], &nodes[1]], Vec::new(), None)).await.unwrap();
        assert_eq!(hex_of(&released), known_answers());
        assert_eq!(bad(&released), [(NodeIndex(liar), BadPartialFault::Evaluation(PartialFault::Proof))]);
        assert!(!released.holders.contains(&NodeIndex(liar)));
        cluster.holds(liar, Holding::Honest);
    }
    assert_eq!(cluster.recorded(), 2, "asking again is the same request");
    assert_eq!(cluster.asked.load(Ordering::SeqCst), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_of_another_share_is_found_by_the_sum() {
    let cluster = Cluster::new();
    let nodes = [cluster.node().await, cluster.node().await];
    for liar in 1..=2 {
        cluster.holds(liar, Holding::WrongShare);
        let released = release(&cluster.client(pin(), &[&nodes[0], &nodes[1]], Vec::new(), None)).await.unwrap();
        assert_eq!(hex_of(&released), known_answers());
        assert_eq!(bad(&released), [(NodeIndex(liar), BadPartialFault::OffThePolynomial)]);
        cluster.holds(liar, Holding::Honest);
    }
    assert_eq!(cluster.recorded(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_lying_holders_give_no_key() {
    let cluster = Cluster::new();
    let node = cluster.node().await;
    let client = cluster.client(pin(), &[&node], Vec::new(), None);
    cluster.holds(1, Holding::WrongShare);
    cluster.holds(2, Holding::WrongShare);
    assert!(matches!(release(&client).await.unwrap_err(), ClientError::Partials { .. }));
    cluster.holds(1, Holding::WrongElement);
    cluster.holds(2, Holding::WrongElement);
    let error = release(&client).await.unwrap_err();
    assert_eq!(error.culprits(), [NodeIndex(1), NodeIndex(2)], "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_pin_gives_no_key() {
    let cluster = Cluster::new();
    let node = cluster.node().await;
    // Another element than the cluster's key.
    let pk_prf = hex::decode("d249fcc46ff7b2340980ff6fe0058bdfd6822b3442443be20c8d82d813fa8109").unwrap().try_into().unwrap();
    let client = cluster.client(Pin { pk_prf, ..pin() }, &[&node], Vec::new(), None);
    assert!(matches!(release(&client).await.unwrap_err(), ClientError::Partials { .. }));
    // Another cluster: found out before a session is made.
    let client = cluster.client(Pin { cluster_id: ClusterId([7; 32]), ..pin() }, &[&node], Vec::new(), None);
    let fault = NodeFault::WrongCluster { pinned: ClusterId([7; 32]), got: CLUSTER };
    assert_eq!(release(&client).await.unwrap_err(), ClientError::NoNode { faults: vec![(node.url.to_string(), fault)] });
    assert_eq!(cluster.session_keys.lock().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_receipts_are_refused_and_the_next_node_serves() {
    let cluster = Cluster::new();
    let nodes = [cluster.node().await, cluster.node().await];
    for conduct in [Conduct::ReceiptOfAnother, Conduct::ReceiptOfItsOwnLog] {
        nodes[0].conducts(conduct);
        let released = release(&cluster.client(pin(), &[&nodes[0], &nodes[1]], Vec::new(), None)).await.unwrap();
        assert_eq!(hex_of(&released), known_answers());
        let ClientError::NoNode { faults } = release(&cluster.client(pin(), &[&nodes[0]], Vec::new(), None)).await.unwrap_err() else {
            panic!("keys or another error for {conduct:?}");
        };
        let expected = |fault: &NodeFault| match conduct {
            Conduct::ReceiptOfAnother => matches!(fault, NodeFault::Receipt(AuditError::OtherIntent)),
            _ => matches!(fault, NodeFault::Receipt(AuditError::HolderDisagrees { .. })),
        };
        assert!(
            !faults.is_empty() && faults.iter().all(|(node, fault)| *node == nodes[0].url.to_string() && expected(fault)),
            "{faults:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_spoils_partials_is_passed_by() {
    let cluster = Cluster::new();
    let nodes = [cluster.node().await, cluster.node().await];
    nodes[0].conducts(Conduct::SpoilsOthers);
    let released = release(&cluster.client(pin(), &[&nodes[0], &nodes[1]], Vec::new(), None)).await.unwrap();
    assert_eq!(hex_of(&released), known_answers());
    assert_eq!(cluster.recorded(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_node_costs_one_retry_and_is_asked_last_from_then_on() {
    let cluster = Cluster::new();
    let nodes = [cluster.node().await, cluster.node().await];
    let client = cluster.client(pin(), &[&nodes[0], &nodes[1]], Vec::new(), None);
    release(&client).await.unwrap();
    for conduct in [Conduct::Status(500), Conduct::Refuses(RefusalCode::NoLeader), Conduct::Silent] {
        cluster.asked.store(0, Ordering::SeqCst);
        let before = cluster.recorded();
        // Both were asked well before; make the first the last good one again.
        let client = cluster.client(pin(), &[&nodes[0], &nodes[1]], Vec::new(), None);
        release(&client).await.unwrap();
        nodes[0].conducts(conduct);
        assert_eq!(hex_of(&release(&client).await.unwrap()), known_answers());
        assert_eq!(cluster.asked.load(Ordering::SeqCst), 3, "{conduct:?}: one request well, then one try lost");
        release(&client).await.unwrap();
        assert_eq!(cluster.asked.load(Ordering::SeqCst), 4, "{conduct:?}: the failing node is asked last");
        assert_eq!(cluster.recorded(), before + 3);
        nodes[0].conducts(Conduct::Honest);
    }
    // A node that is gone altogether.
    let client = cluster.client(pin(), &[&nodes[0], &nodes[1]], Vec::new(), None);
    release(&client).await.unwrap();
    nodes[0].stop();
    assert_eq!(hex_of(&release(&client).await.unwrap()), known_answers());
    let nobody = cluster.client(pin(), &[&nodes[0]], Vec::new(), None);
    assert!(matches!(release(&nobody).await.unwrap_err(), ClientError::NoNode { .. }));
}

/// Until `holds` does, a minute at most.
async fn until(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..6000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_nodes_that_the_pin_does_not_prove_leads_nowhere() {
    let cluster = Cluster::new();
    let nodes = [cluster.node().await, cluster.node().await];
    let bait = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    bait.set_nonblocking(true).unwrap();
    let address = bait.local_addr().unwrap().to_string();
    *cluster.given_out.lock().unwrap() = vec![address, "169.254.169.254:80".to_owned(), "10.0.0.1:1".to_owned()];
    let settings = Settings { discover_every: Some(Duration::ZERO), patience: Duration::from_millis(100), ..Settings::default() };
    let client = cluster.client_with(pin(), &[&nodes[0], &nodes[1]], Vec::new(), None, settings);
    let configured: Vec<String> = nodes.iter().map(|node| node.url.to_string()).collect();
    let known = || client.nodes().tallies().into_iter().map(|tally| tally.url.to_string()).collect::<Vec<_>>();
    for looks in [2, 4] {
        assert_eq!(hex_of(&release(&client).await.unwrap()), known_answers());
        until("both are asked for the list", || cluster.lists.load(Ordering::SeqCst) >= looks).await;
        assert_eq!(known(), configured);
    }
    // No list at all, from one and from both: keys come all the same.
    for node in &nodes {
        node.conducts(Conduct::Refuses(RefusalCode::UnknownMethod));
    }
    client.beacon().await.unwrap();
    nodes.iter().for_each(|node| node.conducts(Conduct::Honest));
    assert_eq!(hex_of(&release(&client).await.unwrap()), known_answers());
    assert_eq!(known(), configured);
    assert_eq!(bait.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "nobody came");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_answer_is_disbelieved_is_asked_last_from_then_on() {
    let cluster = Cluster::new();
    let nodes = [cluster.node().await, cluster.node().await];
    let client = cluster.client(pin(), &[&nodes[0], &nodes[1]], Vec::new(), None);
    nodes[0].conducts(Conduct::OtherCluster);
    client.beacon().await.unwrap();
    client.beacon().await.unwrap();
    let tallies: Vec<(u64, u64)> = client.nodes().tallies().iter().map(|tally| (tally.asked, tally.faults)).collect();
    assert_eq!(tallies, [(1, 1), (2, 0)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_surface_whole() {
    let cluster = Cluster::new();
    let nodes = [cluster.node().await, cluster.node().await];
    let client = cluster.client(pin(), &[&nodes[0], &nodes[1]], Vec::new(), None);
    nodes[0].conducts(Conduct::Refuses(RefusalCode::ComposeNotAllowed));
    assert_eq!(hex_of(&release(&client).await.unwrap()), known_answers(), "one node alone is not believed");
    nodes[1].conducts(Conduct::Refuses(RefusalCode::ComposeNotAllowed));
    let error = release(&client).await.unwrap_err();
    assert_eq!(error.code(), "COMPOSE_NOT_ALLOWED");
    let refusal = error.refusal().unwrap();
    assert_eq!((refusal.expected.as_str(), refusal.got.as_str()), ("something else", "this"));
    assert!(error.to_string().contains(RefusalCode::ComposeNotAllowed.fix()), "{error}");
    nodes.iter().for_each(|node| node.conducts(Conduct::Honest));
    let error = client.release(&AppId([3; 20]), &wishes()).await.unwrap_err();
    assert_eq!(error.code(), "APP_ID_MISMATCH");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_used_for_fifty_minutes() {
    let cluster = Cluster::new();
    let node = cluster.node().await;
    let client = cluster.client(pin(), &[&node], Vec::new(), None);
    for (minutes, sessions) in [(0, 1), (49, 1), (2, 2), (1, 2)] {
        cluster.advance(std::time::Duration::from_secs(minutes * 60));
        assert_eq!(hex_of(&release(&client).await.unwrap()), known_answers());
        assert_eq!(cluster.session_keys.lock().unwrap().len(), sessions);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_session_is_replaced() {
    let cluster = Cluster::new();
    let node = cluster.node().await;
    let client = cluster.client(pin(), &[&node], Vec::new(), None);
    release(&client).await.unwrap();
    node.conducts(Conduct::Refuses(RefusalCode::SessionExpired));
    let error = release(&client).await.unwrap_err();
    assert_eq!(error.code(), "SESSION_EXPIRED", "new sessions were tried and refused as well");
    node.conducts(Conduct::Honest);
    release(&client).await.unwrap();
    assert_eq!(cluster.session_keys.lock().unwrap().len(), 2, "a new key, not the old one again");
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_of_another_measurement_are_not_asked() {
    let cluster = Cluster::new();
    let node = cluster.node().await;
    let mut other = cluster.node_measurement();
    other[0] ^= 1;
    let client = cluster.client(pin(), &[&node], vec![other], None);
    let ClientError::NoNode { faults } = release(&client).await.unwrap_err() else { panic!("asked a node of another measurement") };
    assert!(
        matches!(&faults[..], [(_, NodeFault::Connection(PeerError::Untrusted { error: JudgeError::NotAccepted { .. }, .. }))]),
        "{faults:?}"
    );
    assert_eq!(cluster.asked.load(Ordering::SeqCst), 0);
    assert_eq!(cluster.session_keys.lock().unwrap().len(), 0, "no session key without a verified node");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_differs_from_the_one_before_is_refused() {
    let cluster = Cluster::new();
    let node = cluster.node().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("kcv.json");
    let client = |file: &std::path::Path| cluster.client(pin(), &[&node], Vec::new(), Some(KcvStore::new(file)));
    release(&client(&file)).await.unwrap();
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains(ENV_KCV), "{text}");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    release(&client(&file)).await.unwrap();
    assert_eq!(std::fs::read_to_string(&file).unwrap(), text);

    let other = ENV_KCV.replace('b', "c");
    std::fs::write(&file, text.replace(ENV_KCV, &other)).unwrap();
    let error = release(&client(&file)).await.unwrap_err();
    let expected = KcvError::Mismatch { name: "env".to_owned(), kept: other, got: ENV_KCV.to_owned(), file: file.clone() };
    assert_eq!(error, ClientError::Kcv(expected));
    std::fs::write(&file, text.replace("\"generation\": 0", "\"generation\": 1")).unwrap();
    let error = release(&client(&file)).await.unwrap_err();
    assert!(matches!(error, ClientError::Kcv(KcvError::OtherGeneration { kept: Generation(1), got: Generation(0), .. })), "{error}");
    for damaged in ["", "{}", "[1]", &text.replace(ENV_KCV, "zz"), &" ".repeat(1 << 21)] {
        std::fs::write(&file, damaged).unwrap();
        assert!(matches!(release(&client(&file)).await, Err(ClientError::Kcv(KcvError::Damaged { .. }))));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), damaged, "never overwritten");
    }
    let nowhere = dir.path().join("none/kcv.json");
    assert!(matches!(release(&client(&nowhere)).await, Err(ClientError::Kcv(KcvError::Io { .. }))));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_succeed_later_is_asked_again_with_the_same_bytes() {
    let cluster = Cluster::new();
    let node = cluster.node().await;
    let client = cluster.patient_client(pin(), &[&node], Vec::new(), None, std::time::Duration::from_secs(30));
    node.conducts(Conduct::RecordsOnly);
    let later = async {
        while cluster.asked.load(Ordering::SeqCst) < 2 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        node.conducts(Conduct::Honest);
    };
    let (released, ()) = tokio::join!(release(&client), later);
    assert_eq!(hex_of(&released.unwrap()), known_answers());
    assert_eq!(cluster.recorded(), 1, "the same request each time");
    assert!(cluster.asked.load(Ordering::SeqCst) >= 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_a_false_beacon_keeps_nobody_from_the_keys() {
    let cluster = Cluster::new();
    let nodes = [cluster.node().await, cluster.node().await];
    nodes[0].conducts(Conduct::FalseBeacon);
    let client = cluster.client(pin(), &[&nodes[0], &nodes[1]], Vec::new(), None);
    assert_eq!(hex_of(&release(&client).await.unwrap()), known_answers());
    let alone = cluster.client(pin(), &[&nodes[0]], Vec::new(), None);
    assert!(matches!(release(&alone).await.unwrap_err(), ClientError::NoNode { .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_identity_signs_the_apps_key_and_no_other_does() {
    let cluster = Cluster::new();
    let node = cluster.node().await;
    let key = dstack_secret::Locked::new(dstack_secret::Secret::take(&mut [7; 32]));
    let identity = k256::ecdsa::SigningKey::from_slice(&cluster::IDENTITY).unwrap();
    let identity: [u8; 33] = identity.verifying_key().to_sec1_point(true).as_bytes().try_into().unwrap();
    let signed = async |id_pub| cluster.client(Pin { id_pub, ..pin() }, &[&node], Vec::new(), None).app_key_signature(&APP, &key).await;
    let signature = signed(None).await.unwrap();
    assert_eq!(signed(Some(identity)).await.unwrap(), signature);
    let refused = signed(Some([2; 33])).await.unwrap_err();
    assert!(refused.to_string().contains("id_pub"), "{refused}");
    node.conducts(Conduct::Status(404));
    assert!(signed(Some(identity)).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_certificate_is_the_pinned_ones_or_none() {
    let cluster = Cluster::new();
    let node = cluster.node().await;
    let root = async |ca_pub| cluster.client(Pin { ca_pub, ..pin() }, &[&node], Vec::new(), None).root_ca().await;
    let pinned = CaPub::P256(cluster::ca_pub());
    let got = root(Some(pinned)).await.unwrap().unwrap();
    assert_eq!(got.pem, dstack_certificates::pem::certificate(&cluster::root_ca()));
    assert_eq!(Some(got.spki), pinned.spki());
    assert_eq!(root(None).await.unwrap(), None, "nothing to hold it against");
    let mut other = cluster::ca_pub();
    other[0] ^= 1;
    let refused = root(Some(CaPub::P256(other))).await.unwrap_err();
    assert!(refused.to_string().contains("it is of another key"), "{refused}");
    assert_eq!(root(Some(CaPub::P256([9; 33]))).await.unwrap_err().code(), "client.ca_pub");
    node.conducts(Conduct::Status(404));
    assert!(root(Some(pinned)).await.is_err());
}
