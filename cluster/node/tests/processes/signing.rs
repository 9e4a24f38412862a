//! Signatures of a real cluster: the root CA's certificate is there after genesis, at every node; a file of pairwise secrets that broke is
//! made anew; apps that claim their key, and those that lie about it.

use dstack_certificates::identity::{recover, verify};
use dstack_client::app_key::PATH_APP_KEY;
use dstack_protocol::release::KeyClass;
use dstack_protocol::sign::AppPkClaim;
use dstack_protocol::{AppId, ClusterId, Generation, RefusalCode, Wire as _};
use dstack_ratls::client::ClientConnection;
use dstack_secret::{Locked, Secret};
use dstack_testkit::cluster::{Cluster, ClusterError, ClusterSpec, FORMING, MachineKind, until};
use k256::ecdsa::signature::hazmat::PrehashSigner as _;
use k256::ecdsa::{Signature, SigningKey};
use serde_json::{Value, json};

use crate::releases::audit_verifies;
use crate::workload::{Workload, post, refusal, registered, runtime, wish};

/// Waits until a node's status is as wanted.
fn until_status(cluster: &mut Cluster, seat: u16, what: &str, wanted: impl Fn(&Value) -> bool) {
    until(what, FORMING, || {
        cluster.check_running()?;
        let status = cluster.node(seat).status()?;
        if wanted(&status) { Ok(()) } else { Err(ClusterError::Unexpected { from: format!("node {seat}"), got: status.to_string() }) }
    })
    .unwrap();
}

fn signs(status: &Value) -> bool {
    ["ca", "id"].into_iter().all(|root| status["shares"][root]["signs"] == true) && status["shares"]["id"]["pairs_missing"] == json!([])
}

#[test]
fn the_root_certificate_is_signed_after_genesis() {
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    for seat in 1..=3 {
        until_status(&mut cluster, seat, "the root's certificate", |status| status["state"]["root_certificate"] == true);
        let status = cluster.node(seat).status().unwrap();
        assert!(signs(&status), "{status}");
        for root in ["ca", "id"] {
            assert_eq!(status["shares"][root]["expelled"], json!([]));
        }
        assert_eq!(status["state"]["signatures_asked"], 0);
    }
}

/// The app's key class k256, and the identity's signature over it as those nodes make it.
fn claimed(cluster: &mut Cluster, name: &str, urls: &str) {
    let app = registered(cluster, name, MachineKind::Tdx);
    let guest = Workload::boot(cluster, "web", &app);
    let (key, signature) = runtime().block_on(async {
        let client = guest.client(urls);
        let released = client.release(&guest.app_id, &[wish(KeyClass::K256, "")]).await.unwrap();
        let key = Locked::new(released.keys[0].bytes().expose(|bytes| Secret::from_fn(|copy| *copy = *bytes)));
        let signature = client.app_key_signature(&guest.app_id, &key).await.unwrap();
        (key, signature)
    });
    let app_pk = key.expose(|bytes| SigningKey::from_slice(bytes).unwrap()).verifying_key().to_sec1_point(true);
    let app_pk = app_pk.as_bytes().try_into().unwrap();
    let object = dstack_protocol::sign::SignObject::AppKey { generation: Generation(0), app_id: guest.app_id, app_pk };
    let seat = (1..=3).find(|seat| cluster.node(*seat).pid().is_some()).unwrap();
    let identity = hex::decode(cluster.node(seat).status().unwrap()["state"]["id_pub"].as_str().unwrap()).unwrap();
    verify(&identity, &object.identity_digest().unwrap(), &signature).unwrap();
}

#[test]
fn a_damaged_file_of_pairwise_secrets_is_made_anew_and_the_node_signs_again() {
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    (1..=3).for_each(|seat| until_status(&mut cluster, seat, "roots that sign", signs));
    cluster.node(3).kill();
    let file = cluster.node(3).data_dir().join("shares/root-3-generation-0-epoch-1.pairs.sealed");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    cluster.node(3).start().unwrap();
    until("node 3 to notice", FORMING, || {
        let noticed = cluster.node(3).log_text().contains("secrets of pairs are lost");
        if noticed { Ok(()) } else { Err(ClusterError::Unexpected { from: "node 3".to_owned(), got: "not yet".to_owned() }) }
    })
    .unwrap();
    // Said when it is sealed, with each of the others.
    let made = |cluster: &mut Cluster| cluster.node(3).log_text().matches("secrets of a pair made anew").count();
    until("node 3 to make both pairs anew", FORMING, || match made(&mut cluster) {
        2 => Ok(()),
        other => Err(ClusterError::Unexpected { from: "node 3".to_owned(), got: format!("{other} pairs") }),
    })
    .unwrap();
    until_status(&mut cluster, 3, "node 3 to sign again", signs);
    assert_ne!(std::fs::read(&file).unwrap(), bytes, "sealed anew");

    // With node 1 gone, nobody signs without node 3.
    cluster.node(1).kill();
    let urls = [2, 3].map(|seat| cluster.node(seat).url()).join(",");
    claimed(&mut cluster, "web", &urls);
    // What was sealed opens at the next start.
    cluster.node(1).start().unwrap();
    cluster.wait_ready(FORMING).unwrap();
    cluster.node(3).kill();
    cluster.node(3).start().unwrap();
    until_status(&mut cluster, 3, "node 3 to sign after another start", signs);
    assert_eq!(made(&mut cluster), 2, "and nothing was made again");
    cluster.node(2).kill();
    let urls = [1, 3].map(|seat| cluster.node(seat).url()).join(",");
    claimed(&mut cluster, "other", &urls);
    cluster.node(2).start().unwrap();
    cluster.wait_ready(FORMING).unwrap();
    audit_verifies(&mut cluster);
}

/// What a node says to a claim.
async fn say(connection: &ClientConnection, body: Vec<u8>) -> Result<Vec<u8>, (RefusalCode, u32)> {
    let (status, answer) = post(connection, PATH_APP_KEY, body).await.unwrap();
    if status == 200 {
        return Ok(answer);
    }
    let refusal = refusal(&answer);
    Err((refusal.code, refusal.retry_after_ms))
}

#[test]
fn a_claim_to_an_apps_key_is_judged_before_anything_is_recorded_and_has_a_rate() {
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    (1..=3).for_each(|seat| until_status(&mut cluster, seat, "roots that sign", signs));
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let guest = Workload::boot(&cluster, "web", &app);
    let address = cluster.node(1).address;
    let rows = |cluster: &mut Cluster| {
        let state = cluster.node(1).status().unwrap()["state"].clone();
        (state["signatures"].clone(), state["signatures_asked"].clone())
    };
    let cluster_id = guest.pin.cluster_id;
    let key = SigningKey::from_slice(&[0x33; 32]).unwrap();
    let runtime = runtime();
    let claim_over = |cluster_id: &ClusterId, beacon: &dstack_protocol::rpc::BeaconAnswer, key: &SigningKey, app_id: AppId| {
        let app_pk = key.verifying_key().to_sec1_point(true).as_bytes().try_into().unwrap();
        let (beacon_pos, beacon) = (beacon.beacon_pos, beacon.beacon);
        let mut claim = AppPkClaim { generation: Generation(0), app_id, app_pk, beacon_pos, beacon, sig: [0; 64], evidence: vec![] };
        let signature: Signature = key.sign_prehash(&claim.digest(cluster_id)).unwrap();
        claim.sig = signature.normalize_s().to_bytes().into();
        claim.evidence = guest.evidence(claim.report_data(cluster_id)).unwrap();
        claim
    };
    let before = rows(&mut cluster);
    runtime.block_on(async {
        let beacon = guest.beacon(address).await;
        let connection = guest.anonymous(address).await;
        let right = claim_over(&cluster_id, &beacon, &key, guest.app_id);
        let said = async |claim: &AppPkClaim| say(&connection, claim.encode()).await.map_err(|(code, _)| code).map(drop);
        for garbage in [vec![], vec![0; 300], right.encode()[..80].to_vec(), [right.encode(), vec![0]].concat()] {
            assert_eq!(say(&connection, garbage).await.unwrap_err().0, RefusalCode::Malformed);
        }
        let unsigned = AppPkClaim { sig: [1; 64], ..right.clone() };
        assert_eq!(said(&unsigned).await, Err(RefusalCode::ClaimInvalid));
        let other = SigningKey::from_slice(&[0x44; 32]).unwrap();
        let foreign = AppPkClaim { evidence: claim_over(&cluster_id, &beacon, &other, guest.app_id).evidence, ..right.clone() };
        assert_eq!(said(&foreign).await, Err(RefusalCode::ClaimInvalid), "evidence of another key");
        let unknown = claim_over(&cluster_id, &beacon, &key, AppId([9; 20]));
        assert_eq!(said(&unknown).await, Err(RefusalCode::AppUnknown));
        let elsewhere = claim_over(&ClusterId([7; 32]), &beacon, &key, guest.app_id);
        assert_eq!(said(&elsewhere).await, Err(RefusalCode::ClaimInvalid), "for another cluster");
        let mut old = beacon;
        old.beacon[0] ^= 1;
        assert_eq!(said(&claim_over(&cluster_id, &old, &key, guest.app_id)).await, Err(RefusalCode::ClaimInvalid));
        let broken = AppPkClaim { evidence: vec![3; 5000], ..right.clone() };
        assert!(said(&broken).await.is_err());
    });
    assert_eq!(rows(&mut cluster), before, "none of it came into the log");

    let by = runtime.block_on(async {
        let beacon = guest.beacon(address).await;
        let connection = guest.anonymous(address).await;
        let right = claim_over(&cluster_id, &beacon, &key, guest.app_id);
        let signature = say(&connection, right.encode()).await.unwrap();
        let digest = right.object().identity_digest().unwrap();
        let by = recover(&digest, &signature).unwrap();
        assert_eq!(say(&connection, right.encode()).await.as_ref(), Ok(&signature), "stored: the same for ever");
        // Another key of the app: pinned by a claim before.
        let other = SigningKey::from_slice(&[0x44; 32]).unwrap();
        let second = claim_over(&cluster_id, &beacon, &other, guest.app_id);
        assert_eq!(say(&connection, second.encode()).await.unwrap_err().0, RefusalCode::SignPinned);

        // One source sends more than its share: told when to come again. What is stored is answered all the same.
        let bad = AppPkClaim { sig: [1; 64], ..second }.encode();
        let mut limited = None;
        for _ in 0..40 {
            let burst = futures::future::join_all((0..25).map(|_| say(&connection, bad.clone()))).await;
            limited = burst.into_iter().filter_map(Result::err).find(|(code, _)| *code == RefusalCode::RateLimited);
            if limited.is_some() {
                break;
            }
        }
        let (_, retry_after_ms) = limited.expect("a limit");
        assert!(retry_after_ms > 0);
        assert_eq!(say(&connection, right.encode()).await, Ok(signature.clone()));
        by
    });
    assert_eq!(hex::encode(by), cluster.node(1).status().unwrap()["state"]["id_pub"].as_str().unwrap());
    audit_verifies(&mut cluster);
}
