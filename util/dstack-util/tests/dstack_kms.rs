//! `get-keys --mode dstack` and `setup` with provider `kms` against the listener of dstack's protocol: the order of calls, who is trusted,
//! several nodes, what is measured.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::extract::Extension;
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Json, Router};
use dstack_attest::{CollateralBundle, TcbPolicy, TrustRoots, VerifiedIdentity, VerifyContext, verify};
use dstack_protocol::{ClusterId, UnixMillis};
use dstack_ratls::Limits;
use dstack_ratls::dstack_server::{DstackPeer, DstackServer, DstackSetup, ServerChain, Verify};
use dstack_ratls::key::CertificateKey;
use dstack_runtime::clock::{Clock as _, SystemClock};
use dstack_testkit::World;
use dstack_util::machine::{Machine, events_below};
use rcgen::{BasicConstraints, CertificateParams, CustomExtension, DnType, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

const USAGE_OID: &[u64] = &[1, 3, 6, 1, 4, 1, 62397, 1, 4];

/// A KMS's root, shared by its nodes.
struct Kms {
    ca_pem: String,
    spki: Vec<u8>,
    issuer: Issuer<'static, KeyPair>,
}

/// What one node does and saw.
#[derive(Default)]
struct Seen {
    /// Answers this to GetAppKey instead of keys.
    status: AtomicU16,
    temp_cas: AtomicUsize,
    identities: Mutex<Vec<Arc<VerifiedIdentity>>>,
}

struct Node {
    url: String,
    seen: Arc<Seen>,
    _shutdown: tokio_util::sync::DropGuard,
}

impl Kms {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "Dstack KMS CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        let certificate = params.self_signed(&key).unwrap();
        let spki = rcgen::PublicKeyData::subject_public_key_info(&key);
        Self { ca_pem: certificate.pem(), spki, issuer: Issuer::new(params, key) }
    }

    async fn node(&self, world: &World, usage: &str) -> Node {
        let key = CertificateKey::generate().unwrap();
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, "localhost");
        let usage = [&[0x04, u8::try_from(usage.len()).unwrap()], usage.as_bytes()].concat();
        params.custom_extensions = vec![CustomExtension::from_oid_content(USAGE_OID, usage)];
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        let chain = Arc::new(ServerChain::default());
        chain.install(vec![leaf.der().to_vec()], &key);

        let roots = Arc::new(world.trust_roots().unwrap());
        let bundle = Arc::new(CollateralBundle::parse(world.roots().bundle()).unwrap());
        let verify: Verify = Arc::new(move |evidence| {
            let (roots, bundle) = (Arc::clone(&roots), Arc::clone(&bundle));
            Box::pin(async move { judged(&evidence, &roots, &bundle) })
        });
        let seen = Arc::new(Seen::default());
        let now = || SystemClock::new().now();
        let setup =
            DstackSetup { chain, verify, now: Arc::new(now), limits: Limits::default(), parser_threads: 1, router: self.router(&seen) };
        let server = DstackServer::bind("127.0.0.1:0".parse().unwrap(), setup).await.unwrap();
        let url = format!("https://127.0.0.1:{}", server.local_address().unwrap().port());
        let shutdown = CancellationToken::new();
        tokio::spawn(server.run(shutdown.clone()));
        Node { url, seen, _shutdown: shutdown.drop_guard() }
    }

    fn router(&self, seen: &Arc<Seen>) -> Router {
        let temp = dstack_certificates::temp::temp_ca(&ClusterId([7; 32])).unwrap();
        let answer = json!({ "temp_ca_cert": temp.certificate_pem(), "temp_ca_key": temp.key_pem(), "ca_cert": self.ca_pem });
        let (asked, ca_cert, seen) = (Arc::clone(seen), self.ca_pem.clone(), Arc::clone(seen));
        let temp_ca = post(move || {
            asked.temp_cas.fetch_add(1, Ordering::SeqCst);
            async move { Json(answer) }
        });
        let app_key = post(move |Extension(peer): Extension<DstackPeer>| async move {
            match (seen.status.load(Ordering::SeqCst), peer.identity) {
                (0, Some(identity)) => {
                    seen.identities.lock().unwrap().push(identity);
                    let keys = json!({
                        "ca_cert": ca_cert, "disk_crypt_key": "d1".repeat(32), "env_crypt_key": "e2".repeat(32), "k256_key": "25".repeat(32),
                        "k256_signature": "51".repeat(65), "tproxy_app_id": "any", "gateway_app_id": "any", "os_image_hash": "05".repeat(32)
                    });
                    (StatusCode::OK, Json(keys))
                }
                (0, None) => (StatusCode::BAD_REQUEST, Json(json!({ "error": "App not allowed: No attestation provided" }))),
                (status, _) => (StatusCode::from_u16(status).unwrap(), Json(json!({ "error": "Boot denied: test" }))),
            }
        });
        Router::new().route("/prpc/GetTempCaCert", temp_ca).route("/prpc/GetAppKey", app_key)
    }
}

fn judged(evidence: &[u8], roots: &TrustRoots, collateral: &CollateralBundle) -> Option<Arc<VerifiedIdentity>> {
    let now: UnixMillis = SystemClock::new().now();
    verify(evidence, &VerifyContext { now, roots, collateral, tcb: &TcbPolicy::default() }).ok().map(Arc::new)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn get_keys_asks_dstacks_way() {
    let mut world = World::new().unwrap();
    let device = world.nitro("enclave").unwrap();
    let kms = Kms::new();
    let nodes = [kms.node(&world, "kms:rpc").await, kms.node(&world, "kms:rpc").await, kms.node(&world, "app:custom").await];
    let other = Kms::new();
    tokio::task::spawn_blocking(move || {
        let path = |name: &str| world.dir().join(name);
        let root = path("root-ca.pem");
        fs::write(&root, &kms.ca_pem).unwrap();
        fs::write(path("other.pem"), &other.ca_pem).unwrap();
        let run = |urls: &[&str], more: &[&str]| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_dstack-util"));
            command.args(["get-keys", "--patience-s", "0", "--device", &device, "--app-id", &"22".repeat(20)]);
            urls.iter().for_each(|url| _ = command.args(["-k", url]));
            command.args(more).output().unwrap()
        };
        let [one, two, no_kms] = [&nodes[0].url, &nodes[1].url, &nodes[2].url].map(String::as_str);

        // an enclave without a compose file asks dstack's way; with the root, both connections are checked
        let file = path("keys.json");
        let output = run(&[&format!("{one}/prpc")], &["--root-ca", root.to_str().unwrap(), "-o", file.to_str().unwrap()]);
        assert!(output.status.success(), "{}", said(&output));
        let keys: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        assert_eq!((&keys["disk_crypt_key"], &keys["env_crypt_key"]), (&json!("d1".repeat(32)), &json!("e2".repeat(32))));
        assert_eq!((&keys["k256_signature"], &keys["gateway_app_id"]), (&json!("51".repeat(65)), &json!("any")));
        let provider = &keys["key_provider"]["Kms"];
        assert_eq!((&provider["url"], &provider["pubkey"]), (&json!(format!("{one}/prpc")), &json!(hex::encode(&kms.spki))));
        assert!(provider["tmp_ca_key"].as_str().unwrap().contains("PRIVATE KEY"));
        let identity = nodes[0].seen.identities.lock().unwrap().pop().unwrap();
        assert_eq!(identity.app_id().unwrap().0, [0x22; 20], "the app that the enclave claims");

        // without a root the first connection is checked by nothing, which is said
        let output = run(&[one], &[]);
        assert!(output.status.success() && said(&output).contains("checked by nothing"), "{}", said(&output));
        // another root: nothing is asked for
        let output = run(&[one], &["--root-ca", path("other.pem").to_str().unwrap()]);
        assert_eq!((output.status.code(), said(&output).contains("Failed to get temp CA cert")), (Some(4), true), "{}", said(&output));
        // a server that is no KMS gives no key
        let output = run(&[no_kms], &[]);
        assert!(!output.status.success() && said(&output).contains("Invalid server cert usage"), "{}", said(&output));
        assert!(nodes[2].seen.identities.lock().unwrap().is_empty() || output.stdout.is_empty());

        // the first node refuses or fails: the next one answers; all refuse: its words and status 3
        for status in [400, 503] {
            nodes[0].seen.status.store(status, Ordering::SeqCst);
            assert!(run(&["https://127.0.0.1:1", one, two], &[]).status.success());
        }
        nodes.iter().for_each(|node| node.seen.status.store(400, Ordering::SeqCst));
        let output = run(&[one, two], &[]);
        assert_eq!(output.status.code(), Some(3), "{}", said(&output));
        assert!(said(&output).contains("Failed to get app key") && said(&output).contains("Boot denied: test"), "{}", said(&output));
        nodes.iter().for_each(|node| node.seen.status.store(503, Ordering::SeqCst));
        assert_eq!(run(&[one, two], &[]).status.code(), Some(4));
        assert_eq!(run(&[one], &["--mode", "native"]).status.code(), Some(1), "native needs a pin");
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_without_our_pin_boots_by_dstacks_protocol() {
    let mut world = World::new().unwrap();
    let device = world.tdx("guest").unwrap();
    let kms = Kms::new();
    let nodes = [kms.node(&world, "kms:rpc").await, kms.node(&world, "kms:rpc").await];
    tokio::task::spawn_blocking(move || {
        let path = |name: &str| -> PathBuf { world.dir().join(name) };
        fs::create_dir(path("share")).unwrap();
        let id = hex::encode(&kms.spki);
        let compose = json!({ "manifest_version": 2, "name": "a", "secure_time": false, "key_provider": "kms", "key_provider_id": id });
        fs::write(path("share/app-compose.json"), compose.to_string()).unwrap();
        let urls: Vec<&str> = nodes.iter().map(|node| node.url.as_str()).collect();
        fs::write(path("share/.sys-config.json"), json!({ "kms_urls": urls }).to_string()).unwrap();
        let boot = |work: &str| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_dstack-util"));
            command.args(["setup", "--tee", &device, "--patience-s", "0", "--engine-config", path("daemon.json").to_str().unwrap()]);
            command.arg("--work-dir").arg(path(work)).arg("--host-shared").arg(path("share"));
            command.arg("--kernel-command-line").arg(path("none")).output().unwrap()
        };
        nodes[0].seen.status.store(503, Ordering::SeqCst);
        let output = boot("one");
        assert!(output.status.success(), "{}", said(&output));
        assert!(boot("one").status.success(), "again in the same boot");
        assert_eq!(nodes[1].seen.temp_cas.load(Ordering::SeqCst), 1, "keys are asked for once a boot");
        let machine = Machine::open(Some(&device), Some(&events_below(&path("one")))).unwrap();
        let events: Vec<(String, Vec<u8>)> = machine.events().unwrap().into_iter().map(|event| (event.event, event.payload)).collect();
        let of = |name: &str| events.iter().filter(|(event, _)| event == name).map(|(_, payload)| payload.clone()).collect::<Vec<_>>();
        assert_eq!(of("os-image-hash"), [vec![5; 32]]);
        assert_eq!(of("key-provider"), [format!(r#"{{"name":"kms","id":"{id}"}}"#).into_bytes()]);
        // the KMS saw the guest as it was after boot-mr-done
        let asked = nodes[1].seen.identities.lock().unwrap().pop().unwrap();
        assert_eq!((asked.instance_id().len(), asked.key_provider()), (20, &b""[..]));

        // a pin of another KMS: its keys are not taken
        let compose = json!({ "manifest_version": 2, "name": "a", "secure_time": false, "key_provider": "kms", "key_provider_id": "00" });
        fs::write(path("share/app-compose.json"), compose.to_string()).unwrap();
        let output = boot("two");
        assert_eq!((output.status.code(), said(&output).contains("setup step 7 (verify app)")), (Some(1), true), "{}", said(&output));
        assert!(!path("two/.host-shared/.appkeys.json").exists());
    })
    .await
    .unwrap();
}
