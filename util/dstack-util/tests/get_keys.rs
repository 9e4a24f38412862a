//! The binary `dstack-util` between an emulated enclave and nodes on loopback: arguments, files, exit status.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, unreachable_pub, dead_code, reason = "tests")]

#[path = "../../../agent/client/tests/release/cluster.rs"]
mod cluster;

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;

use dstack_protocol::RefusalCode;
use dstack_testkit::{SoftwareRoots, World};
use k256::ecdsa::{RecoveryId, Signature, SigningKey, VerifyingKey};
use serde_json::{Value, json};
use sha3::{Digest as _, Keccak256};

use crate::cluster::{APP, Cluster, Conduct, IDENTITY, Node, PK_PRF};

/// threshold.md §1.5: known keys of this cluster and app, the disk key without instance.
const DISK: &str = "cd68c7a54eecf9921bee2c39bd9762493093e8f496021e5e4f3eb603a7929d17";
const ENV: &str = "a89faa62b8e2acb479a6c6404b78350fe3fd37ef8877091c425dbdd542c125e3";
const K256: &str = "261da6e22ebc221c13a04488b797e9b0aaa3d94ef21965bb76fa71b78828158b";

struct Setting {
    world: World,
    cluster: Arc<Cluster>,
    nodes: [Node; 2],
    device: String,
}

impl Setting {
    async fn new() -> Self {
        let mut world = World::new().unwrap();
        let device = world.nitro("enclave").unwrap();
        let cluster = Cluster::under(SoftwareRoots::load(world.dir()).unwrap());
        let nodes = [cluster.node().await, cluster.node().await];
        let compose = json!({ "name": "signer", "dstack_kms": { "cluster_id": "11".repeat(32), "pk_prf": PK_PRF } });
        std::fs::write(world.dir().join("app-compose.json"), compose.to_string()).unwrap();
        Self { world, cluster, nodes, device }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.world.dir().join(name)
    }

    fn command(&self, more: &[&str]) -> Command {
        let [tdx_root, nitro_root, collateral, _] = self.world.public_files();
        let mut command = Command::new(env!("CARGO_BIN_EXE_dstack-util"));
        command.args(["get-keys", "--patience-s", "0", "--device", &self.device, "--app-id", &format!("0x{APP}")]);
        command.arg("--compose").arg(self.file("app-compose.json"));
        command.arg("--software-root").arg(tdx_root).arg("--software-root").arg(nitro_root).arg("--collateral").arg(collateral);
        for node in &self.nodes {
            command.args(["-k", &node.url.to_string()]);
        }
        command.args(more);
        command
    }

    fn run(&self, more: &[&str]) -> Output {
        self.command(more).output().unwrap()
    }
}

/// Who signed the app's key (KMS API reference §6.1).
fn signer_of(keys: &Value) -> VerifyingKey {
    let signature = hex::decode(keys["k256_signature"].as_str().unwrap()).unwrap();
    let app_key = SigningKey::from_slice(&hex::decode(K256).unwrap()).unwrap();
    let app_pk = app_key.verifying_key().to_sec1_point(true);
    let claim = Keccak256::new().chain_update(b"dstack-kms-issued:").chain_update(APP.0).chain_update(app_pk.as_bytes()).finalize();
    let recovery = RecoveryId::from_byte(signature[64]).unwrap();
    VerifyingKey::recover_from_prehash(&claim, &Signature::from_slice(&signature[..64]).unwrap(), recovery).unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_the_known_keys_as_dstacks_document() {
    let setting = Setting::new().await;
    tokio::task::spawn_blocking(move || {
        let file = setting.file("appkeys.json");
        let output = setting.run(&["-o", &file.display().to_string()]);
        assert!(output.status.success(), "{}", said(&output));
        assert!(output.stdout.is_empty());
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        let keys: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        assert_eq!((&keys["disk_crypt_key"], &keys["env_crypt_key"], &keys["k256_key"]), (&json!(DISK), &json!(ENV), &json!(K256)));
        assert_eq!(signer_of(&keys), *SigningKey::from_slice(&IDENTITY).unwrap().verifying_key());
        assert_eq!(keys["key_provider"]["Kms"]["url"], format!("{}/prpc", setting.nodes[0].url));
        let kcvs = std::fs::read_to_string(setting.file("appkeys.json.kcv.json")).unwrap();
        assert!(kcvs.contains("3b5a013555e489b8db89cd34ad46c5bc"), "{kcvs}");

        // The first node fails: the second serves. Standard output without a file.
        setting.nodes[0].conducts(Conduct::Status(500));
        let output = setting.run(&["--key-class", "k256"]);
        assert!(output.status.success(), "{}", said(&output));
        let keys: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&keys["disk_crypt_key"], &keys["k256_key"]), (&json!(""), &json!(K256)));
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_status_tells_why_there_are_no_keys() {
    let setting = Setting::new().await;
    tokio::task::spawn_blocking(move || {
        let file = setting.file("keys.json");
        let ends = |more: &[&str], status: i32, part: &str| {
            let output = setting.run(more);
            assert_eq!(output.status.code(), Some(status), "{}", said(&output));
            assert!(said(&output).contains(part), "{}", said(&output));
            assert!(output.stdout.is_empty() && !file.exists());
        };
        setting.nodes.iter().for_each(|node| node.conducts(Conduct::Refuses(RefusalCode::OsImageNotAllowed)));
        ends(&["-o", file.to_str().unwrap()], 3, RefusalCode::OsImageNotAllowed.fix());
        setting.nodes.iter().for_each(|node| node.conducts(Conduct::Refuses(RefusalCode::NoQuorum)));
        ends(&[], 4, "NO_QUORUM");
        setting.nodes.iter().for_each(|node| node.conducts(Conduct::Status(500)));
        ends(&[], 4, "no node served");
        setting.nodes.iter().for_each(|node| node.conducts(Conduct::Honest));
        let kcv = setting.file("kcv.json");
        std::fs::write(&kcv, json!({ "generation": 0, "kcvs": { "k256": "00".repeat(16) } }).to_string()).unwrap();
        ends(&["--kcv-file", kcv.to_str().unwrap()], 5, "differs from the one used before");
        ends(&["--node-measurement", "00"], 4, "node measurement");
        ends(&["--key-class", "custom"], 1, "key_classes");
        ends(&["--nonsense"], 2, "--nonsense");
        let other = setting.file("other.json");
        std::fs::write(&other, "{}").unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_dstack-util"))
            .args(["get-keys", "--mode", "native", "-k", "https://127.0.0.1:1", "--device", &setting.device])
            .args(["--compose", other.to_str().unwrap()])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(said(&output).contains("no member `dstack_kms`"), "{}", said(&output));
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_come_from_file_environment_and_flags() {
    let setting = Setting::new().await;
    tokio::task::spawn_blocking(move || {
        let config = setting.file("util.toml");
        std::fs::write(&config, "kms_urls = [\"https://from-file:1\"]\npatience_s = 7\n").unwrap();
        let config = config.to_str().unwrap();
        let output =
            setting.command(&["--check-config", "--config", config]).env("DSTACK_UTIL__KCV_FILE", "/from/environment").output().unwrap();
        let shown = String::from_utf8(output.stdout.clone()).unwrap();
        assert!(output.status.success(), "{}", said(&output));
        assert!(shown.contains("/from/environment") && !shown.contains("from-file") && shown.contains("patience_s = 0"), "{shown}");
        std::fs::write(setting.file("util.toml"), "unknown = 1\n").unwrap();
        let output = setting.run(&["--config", config]);
        assert_eq!(output.status.code(), Some(1));
        assert!(said(&output).contains("unknown"), "{}", said(&output));
    })
    .await
    .unwrap();
}
