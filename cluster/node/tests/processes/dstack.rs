//! dstack's KMS protocol over a cluster of processes: curl through the temp CA, the roots' real signatures, a killed leader.

use std::path::PathBuf;
use std::process::Command;

use dstack_attest::wire::{CONFIRM, CertificateConfig, CertificateRequest};
use dstack_attest::x509ext::CertificateEvidence;
use dstack_certificates::identity::recover;
use dstack_certificates::{PublicKey, pem, temp::temp_ca};
use dstack_protocol::env::combiner;
use dstack_protocol::sign::SignObject;
use dstack_protocol::{AppId, ClusterId, Generation, NodeIndex, binding};
use dstack_testkit::cluster::process::run;
use dstack_testkit::cluster::{App, Cluster, ClusterSpec, FORMING, MachineKind, value};
use serde_json::{Value, json};

use crate::workload::{Workload, compose_file};

const GENERATION: Generation = Generation(0);

/// Three nodes with the listener, on ports of their own.
pub(crate) fn spec() -> ClusterSpec {
    let section = "mode = \"pinned\"\n\n[dstack]\nlisten = \"127.0.0.1:0\"\nhosts = [\"kms.test\"]\ngateway_app_id = \"the-gateway\"";
    ClusterSpec { collateral: section.to_owned(), ..ClusterSpec::default() }
}

/// Guests of dstack's, as curl plays them.
pub(crate) struct Guests {
    dir: PathBuf,
    root: PathBuf,
}

impl Guests {
    /// Of a cluster whose root nobody has yet: the first look is not verified, every further one is. Also what it answered.
    pub(crate) fn new(cluster: &mut Cluster) -> (Self, Value) {
        let dir = cluster.dir().to_owned();
        let guests = Self { root: dir.join("root.pem"), dir };
        std::fs::write(&guests.root, "").unwrap();
        let meta = guests.asked(cluster, 1, "GetMeta", None, &["-k".to_owned()]);
        std::fs::write(&guests.root, meta["ca_cert"].as_str().unwrap()).unwrap();
        (guests, meta)
    }

    /// curl's answer from a node, `None` while it does not serve.
    pub(crate) fn ask(&self, cluster: &mut Cluster, seat: u16, method: &str, body: Option<&Value>, more: &[String]) -> Option<Value> {
        let port = logged_port(cluster, seat, "listening for dstack's protocol");
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--max-time", "60", "--cacert"]).arg(&self.root).args(["--resolve", &format!("kms.test:{port}:127.0.0.1")]);
        if let Some(body) = body {
            curl.args(["--data-binary", &body.to_string(), "-H", "Content-Type: application/json"]);
        }
        curl.args(more).arg(format!("https://kms.test:{port}/prpc/{method}"));
        let output = curl.output().unwrap();
        serde_json::from_slice(&output.stdout).ok()
    }

    /// The same, as soon as it is no error.
    pub(crate) fn asked(&self, cluster: &mut Cluster, seat: u16, method: &str, body: Option<&Value>, more: &[String]) -> Value {
        soon("an answer", || {
            let answer = self.ask(cluster, seat, method, body, more).unwrap_or(Value::Null);
            let good = answer.is_object() && answer.get("error").is_none();
            if good { Ok(answer) } else { Err(answer.to_string()) }
        })
    }

    /// A certificate under the temp CA with this workload's evidence, as curl's arguments.
    pub(crate) fn certificate(&self, cluster_id: &ClusterId, workload: &Workload) -> Vec<String> {
        let key = rcgen::KeyPair::generate().unwrap();
        let spki = rcgen::PublicKeyData::subject_public_key_info(&key);
        let evidence = workload.evidence(binding::ratls_certificate(&spki)).unwrap();
        let public = PublicKey::p256_from_spki("guest", &spki).unwrap();
        let der = temp_ca(cluster_id).unwrap().client(&public, &evidence, [9; 16], (workload.now)().0 / 1000).unwrap();
        let (cert, secret) = (self.dir.join("ra.pem"), self.dir.join("ra.key"));
        std::fs::write(&cert, pem::certificate(&der)).unwrap();
        std::fs::write(&secret, key.serialize_pem()).unwrap();
        vec!["--cert".into(), cert.display().to_string(), "--key".into(), secret.display().to_string()]
    }
}

/// Where a node listens for something, as it logged it last.
pub(crate) fn logged_port(cluster: &mut Cluster, seat: u16, what: &str) -> u16 {
    let node = cluster.node(seat);
    soon(what, || {
        let text = node.log_text();
        let line = text.lines().rev().find(|line| line.contains(what)).map(str::to_owned);
        let digits = line
            .as_deref()
            .and_then(|line| line.split("127.0.0.1:").nth(1))
            .map(|rest| rest.chars().take_while(char::is_ascii_digit).collect::<String>());
        let port = digits.and_then(|digits| digits.parse().ok());
        port.ok_or_else(|| "no listener yet".to_owned())
    })
}

/// Looks until there is something, for as long as a cluster takes to form.
pub(crate) fn soon<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let begun = std::time::Instant::now();
    loop {
        match look() {
            Ok(found) => return found,
            Err(seen) => assert!(begun.elapsed() < FORMING, "{what}: {seen}"),
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}

/// An app that dstack's own guests may run.
fn registered(cluster: &Cluster) -> App {
    permitted(cluster, cluster.measure("web", &compose_file(cluster.dir(), "web", "alpine:3"), MachineKind::Tdx).unwrap())
}

/// The same of an app whose env key the node with that index does not compute.
fn registered_without(cluster: &Cluster, index: u16) -> App {
    let holders: Vec<NodeIndex> = (1..=3).map(NodeIndex).collect();
    for tag in 0..64 {
        let app = cluster.measure("web", &compose_file(cluster.dir(), "web", &format!("alpine:{tag}")), MachineKind::Tdx).unwrap();
        if combiner(&app_id(&app), GENERATION, 1, &holders) != Some(NodeIndex(index)) {
            return permitted(cluster, app);
        }
    }
    panic!("64 apps, and one node is named for all of them");
}

fn app_id(app: &App) -> AppId {
    let mut id = [0; 20];
    hex::decode_to_slice(&app.app_id, &mut id).unwrap();
    AppId(id)
}

/// Registers an app for guests of dstack's.
pub(crate) fn permitted(cluster: &Cluster, app: App) -> App {
    let mut command = cluster.policy("propose").unwrap();
    command.args(["--app-id", &app.app_id, "--name", "web", "--platform", "tdx", "--any-os-image", "--allow-legacy"]);
    command.args(["--class", "disk,env,k256,p256", "--compose-hash", &app.compose_hash]);
    assert_eq!(value(&run(&mut command).unwrap(), "state").unwrap(), "applied");
    app
}

fn bytes(value: &Value) -> Vec<u8> {
    hex::decode(value.as_str().unwrap()).unwrap()
}

#[test]
fn guests_get_the_same_keys_from_every_node_and_after_the_death_of_the_leader() {
    let mut cluster = Cluster::start(&spec()).unwrap();
    let (guests, meta) = Guests::new(&mut cluster);

    let app = registered(&cluster);
    let workload = Workload::boot(&cluster, "web", &app);
    let mut id = [0; 32];
    hex::decode_to_slice(&cluster.cluster_id, &mut id).unwrap();
    let certificate = guests.certificate(&ClusterId(id), &workload);
    let ask = json!({"api_version": 1, "vm_config": ""});
    let keys = guests.asked(&mut cluster, 1, "GetAppKey", Some(&ask), &certificate);
    assert_eq!(keys["ca_cert"], meta["ca_cert"]);

    // The identity signed the app's key, as an SDK checks it.
    let mut app_id = [0; 20];
    hex::decode_to_slice(&app.app_id, &mut app_id).unwrap();
    let app_key = k256::ecdsa::SigningKey::from_slice(&bytes(&keys["k256_key"])).unwrap();
    let app_pk = app_key.verifying_key().to_sec1_point(true).as_bytes().try_into().unwrap();
    let digest = SignObject::AppKey { generation: GENERATION, app_id: AppId(app_id), app_pk }.identity_digest().unwrap();
    assert_eq!(recover(&digest, &bytes(&keys["k256_signature"])).unwrap().to_vec(), bytes(&meta["k256_pubkey"]));

    // A deployer encrypts to the key that the guest has.
    let by_id = json!({"app_id": app.app_id});
    let env = guests.asked(&mut cluster, 2, "GetAppEnvEncryptPubKey", Some(&by_id), &[]);
    let secret: [u8; 32] = bytes(&keys["env_crypt_key"]).try_into().unwrap();
    let public = x25519_dalek::x25519(secret, x25519_dalek::X25519_BASEPOINT_BYTES);
    assert_eq!(bytes(&env["public_key"]), public.to_vec());

    let temp = guests.asked(&mut cluster, 1, "GetTempCaCert", None, &[]);
    for seat in 2..=3 {
        assert_eq!(guests.asked(&mut cluster, seat, "GetMeta", None, &[]), meta, "node {seat}");
        assert_eq!(guests.asked(&mut cluster, seat, "GetTempCaCert", None, &[]), temp, "node {seat}");
        assert_eq!(guests.asked(&mut cluster, seat, "GetAppKey", Some(&ask), &certificate), keys, "node {seat}");
    }

    let leader = cluster.leader().unwrap();
    cluster.node(leader).kill();
    let other = leader % 3 + 1;
    assert_eq!(guests.asked(&mut cluster, other, "GetAppKey", Some(&ask), &certificate), keys);
    cluster.node(leader).start().unwrap();
    cluster.wait_ready(FORMING).unwrap();
    assert_eq!(guests.asked(&mut cluster, leader, "GetMeta", None, &[]), meta);
    assert_eq!(guests.asked(&mut cluster, leader, "GetAppKey", Some(&ask), &certificate), keys);
    crate::releases::audit_verifies(&mut cluster);
}

/// A CSR of this workload for a key of its own.
pub(crate) fn csr(workload: &Workload) -> Value {
    let key = rcgen::KeyPair::generate().unwrap();
    let public_key = rcgen::PublicKeyData::subject_public_key_info(&key);
    let evidence = CertificateEvidence::Versioned(workload.evidence(binding::ratls_certificate(&public_key)).unwrap());
    let alt_names = vec!["web.example.com".to_owned()];
    let config = CertificateConfig { subject: "web".to_owned(), alt_names, usage_server_auth: true, ..CertificateConfig::default() };
    let csr = CertificateRequest { confirm: CONFIRM.to_owned(), public_key, config, evidence }.encode();
    let signature = rcgen::SigningKey::sign(&key, &csr).unwrap();
    json!({"api_version": 2, "csr": hex::encode(&csr), "signature": hex::encode(signature), "vm_config": ""})
}

fn openssl(arguments: &[&str]) -> String {
    let output = Command::new("openssl").args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{arguments:?}: {text}");
    text
}

/// A cluster whose leader is dead, and an app that nobody has asked for: every signature of both roots is still to be made.
fn serves_a_new_app_without_its_leader(spec: &ClusterSpec, root_key: &str) {
    let mut cluster = Cluster::start(spec).unwrap();
    let dir = cluster.dir().to_owned();
    let (guests, meta) = Guests::new(&mut cluster);
    let root = guests.root.to_str().unwrap();
    assert!(openssl(&["x509", "-in", root, "-noout", "-text"]).contains(root_key));
    openssl(&["verify", "-CAfile", root, root]);
    // curl verifies from here on: each node's chain leads to that root.
    for seat in 1..=3 {
        assert_eq!(guests.asked(&mut cluster, seat, "GetMeta", None, &[]), meta);
    }

    let leader = cluster.leader().unwrap();
    cluster.node(leader).kill();
    let [first, second] = [leader % 3 + 1, (leader + 1) % 3 + 1];
    soon("another leader", || match cluster.leader() {
        Ok(other) if other != leader => Ok(()),
        other => Err(format!("{other:?}")),
    });
    let app = registered_without(&cluster, leader);
    let workload = Workload::boot(&cluster, "web", &app);
    let mut id = [0; 32];
    hex::decode_to_slice(&cluster.cluster_id, &mut id).unwrap();
    let certificate = guests.certificate(&ClusterId(id), &workload);
    let ask = json!({"api_version": 1, "vm_config": ""});
    let keys = guests.asked(&mut cluster, first, "GetAppKey", Some(&ask), &certificate);
    assert_eq!(guests.asked(&mut cluster, second, "GetAppKey", Some(&ask), &certificate), keys);
    let app_key = k256::ecdsa::SigningKey::from_slice(&bytes(&keys["k256_key"])).unwrap();
    let app_pk = app_key.verifying_key().to_sec1_point(true).as_bytes().try_into().unwrap();
    let digest = SignObject::AppKey { generation: GENERATION, app_id: app_id(&app), app_pk }.identity_digest().unwrap();
    assert_eq!(recover(&digest, &bytes(&keys["k256_signature"])).unwrap().to_vec(), bytes(&meta["k256_pubkey"]));

    let env = guests.asked(&mut cluster, second, "GetAppEnvEncryptPubKey", Some(&json!({"app_id": app.app_id})), &[]);
    let secret: [u8; 32] = bytes(&keys["env_crypt_key"]).try_into().unwrap();
    assert_eq!(bytes(&env["public_key"]), x25519_dalek::x25519(secret, x25519_dalek::X25519_BASEPOINT_BYTES).to_vec());
    let envpub = bytes(&env["public_key"]).try_into().unwrap();
    let timestamp_s = env["timestamp"].as_u64().unwrap();
    let dated = SignObject::EnvKeyAt { generation: GENERATION, app_id: app_id(&app), envpub, timestamp_s };
    assert_eq!(recover(&dated.identity_digest().unwrap(), &bytes(&env["signature_v1"])).unwrap().to_vec(), bytes(&meta["k256_pubkey"]));

    let signed = guests.asked(&mut cluster, first, "SignCert", Some(&csr(&workload)), &[]);
    let chain: Vec<&str> = signed["certificate_chain"].as_array().unwrap().iter().map(|pem| pem.as_str().unwrap()).collect();
    assert_eq!((chain.len(), chain[2]), (3, meta["ca_cert"].as_str().unwrap()));
    let [leaf, ca] = ["leaf.pem", "app-ca.pem"].map(|name| dir.join(name).display().to_string());
    std::fs::write(&leaf, chain[0]).unwrap();
    std::fs::write(&ca, chain[1]).unwrap();
    openssl(&["verify", "-CAfile", root, "-untrusted", &ca, &leaf]);
    cluster.node(leader).start().unwrap();
    cluster.wait_ready(FORMING).unwrap();
    crate::releases::audit_verifies(&mut cluster);
}

#[test]
fn a_new_app_gets_every_signature_while_the_leader_is_dead() {
    serves_a_new_app_without_its_leader(&spec(), "ED25519");
}

#[test]
fn a_cluster_with_a_p256_root_certifies_as_well() {
    serves_a_new_app_without_its_leader(&ClusterSpec { ca_algorithm: "p256", ..spec() }, "prime256v1");
}
