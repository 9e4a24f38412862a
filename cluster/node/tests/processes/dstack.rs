//! dstack's KMS protocol over a cluster of processes: curl through the temp CA, the roots' real signatures, a killed leader.

use std::path::PathBuf;
use std::process::Command;

use dstack_certificates::identity::recover;
use dstack_certificates::{PublicKey, pem, temp::temp_ca};
use dstack_protocol::sign::SignObject;
use dstack_protocol::{AppId, ClusterId, Generation, binding};
use dstack_testkit::cluster::process::run;
use dstack_testkit::cluster::{App, Cluster, ClusterSpec, FORMING, MachineKind, value};
use serde_json::{Value, json};

use crate::workload::{Workload, compose_file};

const GENERATION: Generation = Generation(0);

/// Three nodes with the listener, on ports of their own.
fn spec() -> ClusterSpec {
    let section = "mode = \"pinned\"\n\n[dstack]\nlisten = \"127.0.0.1:0\"\nhosts = [\"kms.test\"]\ngateway_app_id = \"the-gateway\"";
    ClusterSpec { collateral: section.to_owned(), ..ClusterSpec::default() }
}

struct Guests {
    dir: PathBuf,
    root: PathBuf,
}

impl Guests {
    /// Where a node listens, as it logged it last.
    fn port(cluster: &mut Cluster, seat: u16) -> u16 {
        let node = cluster.node(seat);
        soon("the dstack listener", || {
            let text = node.log_text();
            let line = text.lines().rev().find(|line| line.contains("listening for dstack's protocol")).map(str::to_owned);
            let digits = line
                .as_deref()
                .and_then(|line| line.split("127.0.0.1:").nth(1))
                .map(|rest| rest.chars().take_while(char::is_ascii_digit).collect::<String>());
            let port = digits.and_then(|digits| digits.parse().ok());
            port.ok_or_else(|| "no listener yet".to_owned())
        })
    }

    /// curl's answer from a node, `None` while it does not serve.
    fn ask(&self, cluster: &mut Cluster, seat: u16, method: &str, body: Option<&Value>, more: &[String]) -> Option<Value> {
        let port = Self::port(cluster, seat);
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
    fn asked(&self, cluster: &mut Cluster, seat: u16, method: &str, body: Option<&Value>, more: &[String]) -> Value {
        soon("an answer", || {
            let answer = self.ask(cluster, seat, method, body, more).unwrap_or(Value::Null);
            let good = answer.is_object() && answer.get("error").is_none();
            if good { Ok(answer) } else { Err(answer.to_string()) }
        })
    }

    /// A certificate under the temp CA with this workload's evidence, as curl's arguments.
    fn certificate(&self, cluster_id: &ClusterId, workload: &Workload) -> Vec<String> {
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

/// Looks until there is something, for as long as a cluster takes to form.
fn soon<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
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
    let app = cluster.measure("web", &compose_file(cluster.dir(), "web", "alpine:3"), MachineKind::Tdx).unwrap();
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
    let dir = cluster.dir().to_owned();
    let guests = Guests { root: dir.join("root.pem"), dir };
    // The first look at a cluster whose root nobody has yet; from then on curl verifies.
    std::fs::write(&guests.root, "").unwrap();
    let meta = guests.asked(&mut cluster, 1, "GetMeta", None, &["-k".to_owned()]);
    std::fs::write(&guests.root, meta["ca_cert"].as_str().unwrap()).unwrap();

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
