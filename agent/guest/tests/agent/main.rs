//! The binary `dstack-agent` between a software TEE, nodes on loopback and callers on its socket.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, unreachable_pub, dead_code, reason = "tests")]

#[path = "../../../client/tests/release/cluster.rs"]
mod cluster;
mod fields;
mod hostile;
mod kms;
mod local;
mod services;
mod supervised;
mod wiped;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dstack_protocol::RefusalCode;
use dstack_testkit::{SoftwareRoots, World};
use serde_json::{Value, json};
use sha3::Digest as _;

use crate::cluster::{Cluster, Conduct, Node, PK_PRF};

const ANY_ANSWER: Duration = Duration::from_secs(60);

struct Setting {
    world: World,
    cluster: Arc<Cluster>,
    node: Node,
    device: String,
}

impl Setting {
    async fn new(is_tdx: bool) -> Self {
        let mut world = World::new().unwrap();
        let device = if is_tdx { world.tdx("guest") } else { world.nitro("guest") }.unwrap();
        let cluster = Cluster::under(SoftwareRoots::load(world.dir()).unwrap());
        let node = cluster.node().await;
        Self { world, cluster, node, device }
    }

    fn dir(&self) -> &Path {
        self.world.dir()
    }

    fn compose(&self) -> Value {
        json!({
            "manifest_version": 2, "name": "näme", "runner": "docker-compose",
            "docker_compose_file": "services: {}",
            "dstack_kms": { "cluster_id": "11".repeat(32), "pk_prf": PK_PRF },
        })
    }

    fn socket(&self) -> PathBuf {
        self.dir().join("dstack.sock")
    }

    /// The agent's command with everything in files.
    fn agent(&self, compose: &str, more: &str) -> Command {
        let compose_file = self.dir().join("app-compose.json");
        std::fs::write(&compose_file, compose).unwrap();
        let [tdx_root, nitro_root, collateral, _] = self.world.public_files();
        let config = self.dir().join("agent.toml");
        let text = format!(
            "device = {:?}\napp_compose = {compose_file:?}\nkms_urls = [\"{}\"]\nstate_dir = {:?}\n{more}\n\
             [api]\nsocket = {:?}\n[timeouts]\npatience_ms = 300\n[log]\nformat = \"pretty\"\n\
             [trust]\nsoftware_roots = [{tdx_root:?}, {nitro_root:?}]\ncollateral = {collateral:?}\nnode_measurements = [\"{}\"]\n",
            self.device,
            self.node.url,
            self.dir().join("state"),
            self.socket(),
            hex::encode(self.cluster.node_measurement()),
        );
        std::fs::write(&config, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_dstack-agent"));
        command.arg("--config").arg(config).stdin(Stdio::null()).stderr(Stdio::piped()).stdout(Stdio::piped());
        command
    }

    fn start(&self, compose: &str, more: &str) -> Running {
        let mut running = Running(Some(self.agent(compose, more).spawn().unwrap()));
        let began = Instant::now();
        while UnixStream::connect(self.socket()).is_err() {
            if running.0.as_mut().unwrap().try_wait().unwrap().is_some() {
                panic!("agent ended: {}", String::from_utf8_lossy(&running.0.take().unwrap().wait_with_output().unwrap().stderr));
            }
            assert!(began.elapsed() < ANY_ANSWER, "the agent does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        running
    }

    fn call(&self, method: &str, body: &Value) -> (u16, Value) {
        let body = body.to_string();
        self.raw(&format!(
            "POST /{method} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ))
    }

    /// One request; checks what SDKs rely on: Content-Length, ASCII, JSON.
    fn raw(&self, request: &str) -> (u16, Value) {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(ANY_ANSWER)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(body.is_ascii());
        assert!(head.to_lowercase().contains(&format!("content-length: {}", body.len())), "{head}");
        assert!(head.to_lowercase().contains("content-type: application/json"), "{head}");
        (head.split(' ').nth(1).unwrap().parse().unwrap(), serde_json::from_str(body).unwrap())
    }
}

/// The agent's process; killed when the test ends early.
struct Running(Option<Child>);

impl Running {
    fn terminate(mut self) -> Output {
        let child = self.0.take().unwrap();
        assert!(Command::new("kill").arg("-TERM").arg(child.id().to_string()).status().unwrap().success());
        child.wait_with_output().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

async fn blocking(test: impl FnOnce() + Send + 'static) {
    tokio::task::spawn_blocking(test).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn serves_the_v0_api_from_released_keys() {
    let setting = Setting::new(true).await;
    blocking(move || {
        let compose = setting.compose().to_string();
        let agent = setting.start(&compose, "");
        let (status, info) = setting.call("Info", &json!({}));
        assert_eq!(status, 200, "{info}");
        let tcb: Value = serde_json::from_str(info["tcb_info"].as_str().unwrap()).unwrap();
        assert_eq!(tcb["app_compose"], compose, "verbatim");
        assert_eq!(info["app_name"], "näme");
        assert_eq!(info["app_cert"], "");
        for name in ["app_id", "instance_id"] {
            assert_eq!(info[name].as_str().unwrap().len(), 40, "{name}");
        }
        for name in ["mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3"] {
            assert_eq!(tcb[name].as_str().unwrap().len(), 96, "{name}");
        }
        let device_id = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!((&info["device_id"], &tcb["device_id"]), (&json!(device_id), &json!(device_id)));

        let (status, key) = setting.call("GetKey", &json!({ "path": "a/b", "purpose": "p", "algorithm": "ed25519", "more": 1 }));
        assert_eq!(status, 200, "{key}");
        assert_eq!(key["signature_chain"][0].as_str().unwrap().len(), 130);
        // The cluster's identity says whose the app key is (reference §8).
        let signature = hex::decode(key["signature_chain"][1].as_str().unwrap()).unwrap();
        assert_eq!(setting.call("Sign", &json!({ "algorithm": "k256", "data": "00" })).1["signature_chain"][2], key["signature_chain"][1]);
        let by_app = hex::decode(key["signature_chain"][0].as_str().unwrap()).unwrap();
        let seed: [u8; 32] = hex::decode(key["key"].as_str().unwrap()).unwrap().try_into().unwrap();
        let public = ed25519_dalek::SigningKey::from_bytes(&seed).verifying_key().to_bytes();
        let claim: [u8; 32] = sha3::Keccak256::digest(format!("p:{}", hex::encode(public))).into();
        let app_pk = dstack_certificates::identity::recover(&claim, &by_app).unwrap();
        let app_id = hex::decode(info["app_id"].as_str().unwrap()).unwrap();
        let issued: [u8; 32] = sha3::Keccak256::digest([b"dstack-kms-issued:".as_slice(), &app_id, &app_pk].concat()).into();
        let identity = k256::ecdsa::SigningKey::from_slice(&cluster::IDENTITY).unwrap();
        let identity: [u8; 33] = identity.verifying_key().to_sec1_point(true).as_bytes().try_into().unwrap();
        assert_eq!(dstack_certificates::identity::recover(&issued, &signature), Ok(identity));
        let (_, same) =
            setting.raw("GET /v0/GetKey?path=a%2Fb&purpose=p&algorithm=ed25519 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        assert_eq!(same, key);

        let (status, quote) = setting.call("GetQuote", &json!({ "report_data": "0xABCD" }));
        assert_eq!(status, 200, "{quote}");
        assert_eq!(quote["report_data"], format!("abcd{}", "00".repeat(62)));
        assert!(quote["quote"].as_str().unwrap().contains("abcd0000"));
        assert!(quote.get("attestation").is_none(), "omitted on TDX");
        let (_, attested) = setting.call("Attest", &json!({ "report_data": "abcd" }));
        let evidence = hex::decode(attested["attestation"].as_str().unwrap()).unwrap();
        let proven = setting.world.verify(&evidence).unwrap();
        assert_eq!(proven.app_id().unwrap().to_string(), info["app_id"]);
        assert_eq!(hex::encode(proven.report_data()), quote["report_data"]);
        assert_eq!(setting.call("Version", &json!({})).1["version"], env!("CARGO_PKG_VERSION"));

        // SIGTERM: in order, socket gone; the next start gives the same keys.
        let output = agent.terminate();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(!setting.socket().exists());
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(log.contains("no hardware protects these keys"), "{log}");
        assert!(!log.contains(key["key"].as_str().unwrap()));
        let agent = setting.start(&compose, "");
        assert_eq!(setting.call("GetKey", &json!({ "path": "a/b", "purpose": "p", "algorithm": "ed25519" })).1, key);
        assert_eq!(setting.call("Info", &json!({})).1["instance_id"], info["instance_id"], "the seed was kept");
        drop(agent);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refuses_bad_requests_and_serves_many_at_once() {
    let setting = Setting::new(true).await;
    blocking(move || {
        let _agent = setting.start(&setting.compose().to_string(), "");
        let refused = |method: &str, body: Value| setting.call(method, &body);
        let error = |text: &str| json!({ "error": text });
        assert_eq!(refused("GetQuote", json!({ "report_data": "00".repeat(65) })), (400, error("Report data is too long")));
        let (status, said) = refused("GetQuote", json!({ "report_data": "xy" }));
        assert!(status == 400 && said["error"].as_str().unwrap().contains("expected hex digits"), "{said}");
        assert_eq!(refused("GetKey", json!({ "algorithm": "rsa" })), (400, error("Unsupported algorithm")));
        assert_eq!(refused("GetKey", json!({ "path": 1 })).0, 400);
        let (status, said) = refused("GetTlsKey", json!({}));
        assert!(status == 400 && said["error"].as_str().unwrap().contains("dstack_urls"), "{said}");
        assert_eq!(refused("getkey", json!({})), (404, error("Service not found: getkey")));
        assert_eq!(refused("v2/Info", json!({})), (404, error("Service not found: v2/Info")));
        assert_eq!(refused("Info", json!([1])).0, 400);
        assert_eq!(refused("GetKey", json!({ "path": "x".repeat(300_000) })).0, 400);
        assert_eq!(refused("GetKey", json!({ "path": "x".repeat(1_200_000) })).0, 413);
        let calls: Vec<_> = std::thread::scope(|scope| {
            let one = |i: usize| match i % 3 {
                0 => setting.call("GetKey", &json!({ "path": "p" })).0,
                1 => setting.call("Info", &json!({})).0,
                _ => setting.call("GetQuote", &json!({ "report_data": "01" })).0,
            };
            let threads: Vec<_> = (0..64).map(|i| scope.spawn(move || one(i))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(calls, [200; 64]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_enclave_has_attestations_instead_of_quotes() {
    let setting = Setting::new(false).await;
    blocking(move || {
        let _agent = setting.start(&setting.compose().to_string(), "");
        let (status, info) = setting.call("Info", &json!({}));
        assert_eq!((status, &info["instance_id"]), (200, &json!("")));
        let tcb: Value = serde_json::from_str(info["tcb_info"].as_str().unwrap()).unwrap();
        assert_eq!(tcb["mrtd"], "", "a string, never null");
        let (status, quote) = setting.call("GetQuote", &json!({ "report_data": "01" }));
        assert_eq!((status, &quote["quote"]), (200, &json!("")));
        setting.world.verify(&hex::decode(quote["attestation"].as_str().unwrap()).unwrap()).unwrap();
        assert_eq!(setting.call("GetKey", &json!({ "path": "p" })).0, 200);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ends_with_the_reason_when_there_are_no_keys() {
    let setting = Setting::new(true).await;
    blocking(move || {
        let ended = |compose: &str, more: &str| {
            let output = setting.agent(compose, more).output().unwrap();
            assert_eq!(output.status.code(), Some(1));
            String::from_utf8(output.stderr).unwrap()
        };
        setting.node.conducts(Conduct::Refuses(RefusalCode::ComposeNotAllowed));
        let said = ended(&setting.compose().to_string(), "");
        for part in ["COMPOSE_NOT_ALLOWED", "something else", RefusalCode::ComposeNotAllowed.fix()] {
            assert!(said.contains(part), "{said}");
        }
        setting.node.conducts(Conduct::Honest);
        assert!(ended("{}", "").contains("no member `dstack_kms`"));
        assert!(ended(&setting.compose().to_string(), "nonsense = 1\n").contains("nonsense"));
        assert!(!setting.socket().exists());

        let mut check = setting.agent(&setting.compose().to_string(), "[boot]\ninstance_seed = \"aabb\"\n");
        let output = check.arg("--check-config").output().unwrap();
        let shown = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && shown.contains("state_dir") && !shown.contains("aabb"), "{shown}");
    })
    .await;
}

/// With `DSTACK_SDK_PYTHON` naming an interpreter that has `dstack-sdk`, the published SDK reads the socket.
#[tokio::test(flavor = "multi_thread")]
async fn the_published_python_sdk_reads_the_socket() {
    let Some(python) = std::env::var_os("DSTACK_SDK_PYTHON") else {
        println!("skipped: DSTACK_SDK_PYTHON is not set");
        return;
    };
    for is_tdx in [true, false] {
        let (setting, python) = (Setting::new(is_tdx).await, python.clone());
        blocking(move || {
            let _agent = setting.start(&setting.compose().to_string(), "");
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk/check.py");
            let output = Command::new(&python).arg(script).arg(setting.socket()).output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
            println!("{said}");
        })
        .await;
    }
}
