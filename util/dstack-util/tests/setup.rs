//! The binary `dstack-util setup` on emulated machines: files, events, keys, what a second run and a second boot find, what a hostile host
//! is told.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::expect_used, unreachable_pub, dead_code, reason = "tests")]

#[path = "../../../agent/client/tests/release/cluster.rs"]
mod cluster;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use dstack_attest::VerifiedIdentity;
use dstack_protocol::codec::sha256;
use dstack_testkit::local_provider::{LocalProvider, mr_enclave};
use dstack_testkit::{SoftwareRoots, World};
use dstack_util::machine::{Machine, events_below};
use serde_json::{Value, json};

use crate::cluster::{APP, CLUSTER, Cluster, PK_PRF};

/// One emulated machine with a host's share.
struct Guest {
    world: World,
    device: String,
}

impl Guest {
    fn new() -> Self {
        let mut world = World::new().unwrap();
        let device = world.tdx("guest").unwrap();
        let guest = Self { world, device };
        fs::create_dir(guest.path("share")).unwrap();
        guest.share(".sys-config.json", "{}");
        fs::write(guest.path("os-release"), "NAME=test\nVERSION_ID=\"0.6.1\"\n").unwrap();
        fs::write(guest.path("cmdline"), "console=ttyS0 dstack.storage_fs=ext4\n").unwrap();
        guest
    }

    fn path(&self, name: &str) -> PathBuf {
        self.world.dir().join(name)
    }

    fn share(&self, name: &str, content: &str) {
        fs::write(self.path("share").join(name), content).unwrap();
    }

    fn compose(&self, more: Value) -> Vec<u8> {
        let mut compose = json!({ "manifest_version": "3", "name": "app", "runner": "docker-compose", "secure_time": false });
        compose.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.share("app-compose.json", &compose.to_string());
        compose.to_string().into_bytes()
    }

    /// `boot`: name of its work directory.
    fn command(&self, boot: &str, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dstack-util"));
        let file = |name: &str| self.path(name).display().to_string();
        command.args(["setup", "--tee", &self.device, "--work-dir", &file(boot), "--host-shared", &file("share")]);
        command.args(["--os-release", &file("os-release"), "--kernel-command-line", &file("cmdline")]);
        command.args(["--engine-config", &file("daemon.json"), "--patience-s", "0"]).args(more);
        command
    }

    fn run(&self, boot: &str, more: &[&str]) -> Output {
        self.command(boot, more).output().unwrap()
    }

    fn succeeds(&self, boot: &str, more: &[&str]) -> Value {
        let output = self.run(boot, more);
        assert!(output.status.success(), "{}", said(&output));
        let file = self.path(boot).join(".host-shared/.appkeys.json");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
    }

    fn fails(&self, boot: &str, more: &[&str], words: &[&str]) {
        let output = self.run(boot, more);
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        words.iter().for_each(|words| assert!(said(&output).contains(words), "{words:?} in {}", said(&output)));
    }

    /// Names and payloads of a boot's events, and what our own judge says of its evidence.
    fn judged(&self, boot: &str) -> (Vec<(String, Vec<u8>)>, VerifiedIdentity) {
        let machine = Machine::open(Some(&self.device), Some(&events_below(&self.path(boot)))).unwrap();
        let events = machine.events().unwrap().into_iter().map(|event| (event.event, event.payload)).collect();
        (events, self.world.verify(&machine.device().evidence([7; 64]).unwrap()).unwrap())
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn names(events: &[(String, Vec<u8>)]) -> Vec<&str> {
    events.iter().map(|(name, _)| name.as_str()).collect()
}

#[test]
fn a_guest_without_a_provider_boots_once_and_again() {
    let guest = Guest::new();
    let compose =
        guest.compose(json!({ "key_provider": "none", "init_script": ["echo 1", "echo 2"], "requirements": { "os_version": ">=0.6" } }));
    let keys = guest.succeeds("one", &[]);
    let (events, identity) = guest.judged("one");
    let expected = [
        "system-preparing",
        "app-id",
        "compose-hash",
        "init-script-hash",
        "init-script-hash",
        "gpu-policy-hash",
        "instance-id",
        "boot-mr-done",
        "key-provider",
        "storage-fs",
        "system-ready",
    ];
    assert_eq!(names(&events), expected);
    let hash = sha256(&[&compose]);
    assert_eq!((identity.app_id().unwrap().0.as_slice(), identity.compose_hash()), (&hash[..20], Some(hash)));
    assert_eq!(identity.key_provider(), br#"{"name":"none","id":""}"#);
    assert_eq!((events[3].1.as_slice(), events[5].1.as_slice()), (&sha256(&[b"echo 1"])[..], &sha256(&[b"{}"])[..]));
    assert_eq!(events[9].1, b"ext4");
    let info: Value = serde_json::from_slice(&fs::read(guest.path("one/.host-shared/.instance_info")).unwrap()).unwrap();
    let seed = hex::decode(info["instance_id_seed"].as_str().unwrap()).unwrap();
    assert_eq!(identity.instance_id(), &sha256(&[&seed, &hash[..20]])[..20], "SHA-256(seed ‖ app id)[..20]");
    assert_eq!(info["instance_id"], hex::encode(identity.instance_id()));
    assert_eq!(keys["env_crypt_key"], "");
    assert!(
        keys["key_provider"]["None"]["key"].as_str().unwrap().contains("PRIVATE KEY")
            && keys["ca_cert"].as_str().unwrap().contains("BEGIN")
    );
    assert_eq!(fs::read_to_string(guest.path("one/agent.json")).unwrap(), r#"{"default":{"core":{"data_disks":["/"]}}}"#);
    assert_eq!(fs::read(guest.path("one/.host-shared/.decrypted-env")).unwrap(), b"");

    // again in the same boot: the same instance and keys, nothing measured twice
    assert_eq!(guest.succeeds("one", &[]), keys);
    let (again, same) = guest.judged("one");
    assert_eq!((again, same.instance_id()), (events, identity.instance_id()));
    // the host changed its file in between: the registers cannot follow
    guest.compose(json!({ "key_provider": "none", "name": "another" }));
    guest.fails("one", &[], &["setup step 4 (measured events)", "boot anew"]);
    // the next boot is another instance: provider none
    guest.compose(json!({ "key_provider": "none", "init_script": ["echo 1", "echo 2"], "requirements": { "os_version": ">=0.6" } }));
    assert_ne!(guest.succeeds("two", &[])["disk_crypt_key"], keys["disk_crypt_key"]);
}

#[test]
fn a_local_provider_gives_the_same_keys_to_the_same_measurements() {
    let guest = Guest::new();
    let provider = LocalProvider::start("provider", guest.world.roots()).unwrap();
    let (address, unverified) = (provider.address(), "--insecure-unverified-provider");
    guest.compose(json!({ "key_provider": "local" }));
    guest.share(".instance_info", &json!({ "instance_id_seed": "01".repeat(20), "app_id": "11".repeat(20) }).to_string());
    guest.fails("no", &["--local-key-provider", &address], &["setup step 5 (keys)", &hex::encode(mr_enclave("provider")), unverified]);
    // verified under the software root with SGX collateral; neither without the root, nor with the collateral of TDs
    let [tdx_root, _, _, _] = guest.world.public_files();
    let (root, collateral) = (tdx_root.display().to_string(), guest.path("sgx.json").display().to_string());
    fs::write(&collateral, guest.world.roots().sgx_collateral().unwrap().json().to_string()).unwrap();
    let more = ["--local-key-provider", &address, "--provider-collateral", &collateral, "--software-root", &root];
    guest.fails("zero", &more[..4], &["setup step 5 (keys)", "the key provider's quote"]);
    let keys = guest.succeeds("one", &more);
    let (_, identity) = guest.judged("one");
    let id = hex::encode(mr_enclave("provider"));
    assert_eq!(identity.key_provider(), format!(r#"{{"name":"local-sgx","id":"{id}"}}"#).as_bytes());
    assert_eq!(keys["key_provider"]["Local"]["mr"], id);
    let again = guest.succeeds("two", &["--local-key-provider", &address, unverified]);
    assert_eq!((&again["disk_crypt_key"], &again["k256_key"]), (&keys["disk_crypt_key"], &keys["k256_key"]));
    // a pin of another provider, and another app
    guest.compose(json!({ "key_provider": "local", "key_provider_id": "00".repeat(32) }));
    guest.fails("three", &more, &["setup step 7 (verify app)", "key_provider_id"]);
    guest.compose(json!({ "key_provider": "local", "key_provider_id": id }));
    assert_ne!(guest.succeeds("four", &more)["disk_crypt_key"], keys["disk_crypt_key"]);
    drop(provider);
    guest.fails("five", &more, &["setup step 5 (keys)", "cannot be reached"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_gives_keys_environment_and_disk() {
    let guest = Guest::new();
    let cluster = Cluster::under(SoftwareRoots::load(guest.world.dir()).unwrap());
    let nodes = [cluster.node().await, cluster.node().await];
    tokio::task::spawn_blocking(move || {
        let pin = json!({ "cluster_id": hex::encode(CLUSTER.0), "pk_prf": PK_PRF, "ca_pub": hex::encode(cluster::ca_pub()) });
        guest.compose(json!({ "key_provider": "kms", "allowed_envs": ["TOKEN"], "dstack_kms": pin }));
        let urls: Vec<String> = nodes.iter().map(|node| format!("{}/prpc", node.url)).collect();
        guest.share(".sys-config.json", &json!({ "kms_urls": urls, "pccs_url": "https://pccs" }).to_string());
        guest.share(".instance_info", &json!({ "instance_id_seed": "01".repeat(20), "app_id": hex::encode(APP.0) }).to_string());
        // threshold.md §1.5: the environment's key of this cluster and app
        let env_key = hex::decode("a89faa62b8e2acb479a6c6404b78350fe3fd37ef8877091c425dbdd542c125e3").unwrap();
        fs::write(
            guest.path("share/.encrypted-env"),
            sealed(&env_key, br#"{"env":[{"key":"TOKEN","value":"a b"},{"key":"PATH","value":"/evil"}]}"#),
        )
        .unwrap();
        let [tdx_root, _, collateral, _] = guest.world.public_files();
        let (root, collateral) = (tdx_root.display().to_string(), collateral.display().to_string());
        let more = ["--software-root", &root, "--collateral", &collateral];
        let keys = guest.succeeds("one", &more);
        assert_eq!(keys["env_crypt_key"], hex::encode(&env_key));
        // what the cluster publishes of it, as dstack's tools expect to find it
        let (root, spki) = (cluster::root_ca(), dstack_client::CaPub::P256(cluster::ca_pub()).spki().unwrap());
        assert_eq!(keys["ca_cert"], dstack_certificates::pem::certificate(&root));
        assert_eq!(keys["key_provider"]["Kms"]["pubkey"], hex::encode(spki));
        signed_by_identity(&keys);
        assert_eq!(fs::read(guest.path("one/.host-shared/.decrypted-env")).unwrap(), b"TOKEN=\"a b\"\n");
        let json = guest.path("one/.host-shared/.decrypted-env.json");
        assert_eq!(fs::read(&json).unwrap(), br#"{"TOKEN":"a b"}"#);
        assert_eq!(fs::metadata(json).unwrap().permissions().mode() & 0o777, 0o600);
        let (_, identity) = guest.judged("one");
        let provider = format!(r#"{{"name":"kms","id":"{}"}}"#, hex::encode(CLUSTER.0));
        assert_eq!((identity.app_id(), identity.key_provider()), (Some(APP), provider.as_bytes()));
        // the cluster is not asked again in this boot
        let asked = cluster.asked.load(std::sync::atomic::Ordering::SeqCst);
        assert_eq!(guest.succeeds("one", &more), keys);
        assert_eq!(cluster.asked.load(std::sync::atomic::Ordering::SeqCst), asked);

        // the next boot finds instance, keys and disk; a kernel without device-mapper stops at opening it
        let disk = guest.path("disk");
        fs::File::create(&disk).unwrap().set_len(32 << 20).unwrap();
        let disk = disk.display().to_string();
        let with_disk: Vec<&str> = more.iter().copied().chain(["--device", &disk, "--mount-point", "/nonexistent/never"]).collect();
        if !Path::new("/dev/mapper/control").exists() {
            guest.fails("two", &with_disk, &["setup step 9 (data disk)", "device-mapper"]);
            let (events, _) = guest.judged("two");
            assert_eq!(names(&events).last(), Some(&"storage-fs"), "system-ready is not measured");
            guest.fails("two", &with_disk, &["setup step 9 (data disk)", "device-mapper"]);
            // another instance's key does not open it
            guest.share(".instance_info", &json!({ "instance_id_seed": "02".repeat(20), "app_id": hex::encode(APP.0) }).to_string());
            guest.fails("three", &with_disk, &["setup step 9 (data disk)", "does not open"]);
        }

        // nobody there; an environment to another key
        nodes.iter().for_each(cluster::Node::stop);
        guest.fails("four", &more, &["setup step 5 (keys)"]);
    })
    .await
    .unwrap();
}

/// `k256_signature` is the identity's over the public half of `k256_key` (threshold.md §5.1).
fn signed_by_identity(keys: &Value) {
    let bytes = |name: &str| hex::decode(keys[name].as_str().unwrap()).unwrap();
    let app_key = k256::ecdsa::SigningKey::from_slice(&bytes("k256_key")).unwrap();
    let app_pk: [u8; 33] = app_key.verifying_key().to_sec1_point(true).as_bytes().try_into().unwrap();
    let object = dstack_protocol::sign::SignObject::AppKey { generation: dstack_protocol::Generation(0), app_id: APP, app_pk };
    let identity = k256::ecdsa::SigningKey::from_slice(&cluster::IDENTITY).unwrap();
    let by = dstack_certificates::identity::recover(&object.identity_digest().unwrap(), &bytes("k256_signature"));
    assert_eq!(by.unwrap(), *identity.verifying_key().to_sec1_point(true).as_bytes());
}

/// An environment as dstack's tools encrypt it.
fn sealed(secret: &[u8], text: &[u8]) -> Vec<u8> {
    use aes_gcm::aead::{Aead as _, KeyInit as _};
    let public = x25519_dalek::x25519(secret.try_into().unwrap(), x25519_dalek::X25519_BASEPOINT_BYTES);
    let ephemeral = [9; 32];
    let shared = x25519_dalek::x25519(ephemeral, public);
    let cipher = aes_gcm::Aes256Gcm::new_from_slice(&shared).unwrap();
    let body = cipher.encrypt(&aes_gcm::Nonce::from([3; 12]), text).unwrap();
    [&x25519_dalek::x25519(ephemeral, x25519_dalek::X25519_BASEPOINT_BYTES)[..], &[3; 12], &body].concat()
}

#[test]
fn a_hostile_host_is_told_which_step_refuses() {
    let guest = Guest::new();
    guest.compose(json!({ "key_provider": "none" }));
    let step_1 = "setup step 1 (host-shared files)";
    guest.share(".sys-config.json", &" ".repeat(33 << 10));
    guest.fails("a", &[], &[step_1, "more than the 32768 bytes allowed"]);
    guest.share(".sys-config.json", &"[".repeat(30_000));
    guest.fails("b", &[], &[step_1, ".sys-config.json"]);
    guest.share(".sys-config.json", "{}");
    guest.share("app-compose.json", &format!("{{\"manifest_version\":\"3\",\"requirements\":{{\"gpu_policy\":{}", "[".repeat(1_000_000)));
    guest.fails("c", &[], &["setup step 2 (requirements)", "recursion"]);
    fs::remove_file(guest.path("share/app-compose.json")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", guest.path("share/app-compose.json")).unwrap();
    guest.fails("d", &[], &[step_1, "is no regular file"]);
    fs::remove_file(guest.path("share/app-compose.json")).unwrap();
    guest.fails("e", &[], &[step_1, "is missing"]);
    guest.compose(json!({ "key_provider": "none" }));
    guest.share(".instance_info", "{\"app_id\":\"00\"}");
    guest.fails("f", &[], &["setup step 4 (measured events)", "app_id", "40 hex digits"]);
    fs::remove_file(guest.path("share/.instance_info")).unwrap();
    guest.share(".encrypted-env", "junk");
    guest.fails("g", &[], &["setup step 11 (environment, agent and gateway)", "60 are needed"]);
    fs::remove_file(guest.path("share/.encrypted-env")).unwrap();
    guest.compose(json!({ "key_provider": "none", "requirements": { "platforms": ["dstack-amd-sev-snp"] } }));
    guest.fails("h", &[], &["setup step 2 (requirements)", "dstack-tdx"]);
    guest.compose(json!({ "key_provider": "kms" }));
    guest.fails("i", &[], &["setup step 5 (keys)"]);
    guest.compose(json!({ "key_provider": "none", "secure_time": true }));
    if Command::new("chronyc").arg("--version").output().is_err() {
        guest.fails("j", &[], &["setup step 3 (secure time)", "`chronyc` is not installed"]);
    }
}

#[test]
fn the_host_is_told_of_progress_and_errors() {
    use std::io::{Read as _, Write as _};
    let guest = Guest::new();
    guest.compose(json!({ "key_provider": "none" }));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/api", listener.local_addr().unwrap());
    guest.share(".sys-config.json", &json!({ "host_api_url": url }).to_string());
    let told = Arc::new(std::sync::Mutex::new(Vec::new()));
    let host = {
        let told = Arc::clone(&told);
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let (mut question, mut chunk) = (Vec::new(), [0; 4096]);
                loop {
                    let count = stream.read(&mut chunk).unwrap();
                    question.extend_from_slice(&chunk[..count]);
                    let text = String::from_utf8_lossy(&question).into_owned();
                    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_default();
                    if let Ok(body) = serde_json::from_str::<Value>(body) {
                        assert!(head.starts_with("POST /api/Notify?json HTTP/1.1\r\n"), "{head}");
                        told.lock().unwrap().push(body);
                        break;
                    }
                    if count == 0 {
                        return;
                    }
                }
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nnull").unwrap();
            }
        })
    };
    guest.succeeds("one", &[]);
    guest.share(".instance_info", "[]");
    guest.fails("two", &[], &["step 4"]);
    guest.share("app-compose.json", r#"{"manifest_version":9}"#);
    guest.fails("three", &[], &["step 2", "manifest_version"]);
    let told = told.lock().unwrap();
    let of =
        |event: &str| told.iter().filter(|said| said["event"] == event).map(|said| said["payload"].as_str().unwrap()).collect::<Vec<_>>();
    assert!(of("boot.progress").contains(&"measured events") && of("boot.progress").contains(&"done"));
    let info: Value = serde_json::from_str(of("instance.info")[0]).unwrap();
    assert_eq!(info["instance_id"].as_str().unwrap().len(), 40);
    assert!(of("boot.error")[0].contains("setup step 4"));
    assert!(of("boot.error")[1].contains("setup step 2") && of("boot.error")[1].contains("manifest_version"), "a bad document, too");
    drop(host);
}

#[cfg(feature = "tpm")]
mod tpm {
    use super::*;
    use dstack_tee::tpm::Tpm;
    use std::net::TcpListener;
    use std::process::{Child, Stdio};
    use std::time::{Duration, Instant};

    /// One start of a TPM whose state stays: a machine's power cycle.
    struct Powered {
        child: Child,
        tcti: String,
    }

    impl Powered {
        fn on(state: &Path) -> Option<Self> {
            if Command::new("swtpm").arg("--version").output().is_err() {
                #[allow(clippy::disallowed_methods, reason = "whether tests may be left out is CI's to say")]
                let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
                assert!(!ci, "swtpm is not installed; CI has to have it");
                eprintln!("left out: swtpm is not installed");
                return None;
            }
            (0..5).find_map(|_| Self::at_free_ports(state)).or_else(|| panic!("swtpm does not start"))
        }

        fn at_free_ports(state: &Path) -> Option<Self> {
            let first = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = first.local_addr().unwrap().port();
            if port == u16::MAX || TcpListener::bind(("127.0.0.1", port + 1)).is_err() {
                return None;
            }
            drop(first);
            let mut child = Command::new("swtpm")
                .args(["socket", "--tpm2", "--tpmstate", &format!("dir={}", state.display())])
                .args(["--server", &format!("type=tcp,port={port},bindaddr=127.0.0.1")])
                .args(["--ctrl", &format!("type=tcp,port={},bindaddr=127.0.0.1", port + 1)])
                .args(["--flags", "not-need-init,startup-clear"])
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            let tcti = format!("swtpm:host=127.0.0.1,port={port}");
            let deadline = Instant::now() + Duration::from_secs(30);
            while Instant::now() < deadline && child.try_wait().unwrap().is_none() {
                if std::net::TcpStream::connect(("127.0.0.1", port + 1)).is_ok() && Tpm::open(&tcti).is_ok() {
                    return Some(Self { child, tcti });
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = child.kill();
            let _ = child.wait();
            None
        }
    }

    impl Drop for Powered {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    #[test]
    fn a_tpm_gives_its_seed_to_the_same_app_alone() {
        let guest = Guest::new();
        let state = guest.path("tpm");
        fs::create_dir(&state).unwrap();
        guest.compose(json!({ "key_provider": "tpm" }));
        guest.share(".instance_info", &json!({ "instance_id_seed": "01".repeat(20), "app_id": "11".repeat(20) }).to_string());
        let Some(tpm) = Powered::on(&state) else { return };
        let keys = guest.succeeds("one", &["--tpm", &tpm.tcti]);
        assert_eq!(guest.succeeds("one", &["--tpm", &tpm.tcti]), keys, "a second run in this boot");
        assert_eq!(guest.judged("one").1.key_provider(), br#"{"name":"tpm","id":""}"#);
        assert!(keys["key_provider"]["Tpm"]["pubkey"].as_str().unwrap().starts_with("3059"));
        // a new boot on the same TPM: it does not start from zero, so nothing may be measured on top
        guest.fails("two", &["--tpm", &tpm.tcti], &["PCR14"]);
        drop(tpm);
        let tpm = Powered::on(&state).unwrap();
        assert_eq!(guest.succeeds("three", &["--tpm", &tpm.tcti])["disk_crypt_key"], keys["disk_crypt_key"], "the next boot");
        drop(tpm);
        let tpm = Powered::on(&state).unwrap();
        guest.compose(json!({ "key_provider": "tpm", "name": "another" }));
        guest.fails("four", &["--tpm", &tpm.tcti], &["setup step 5 (keys)", "sealed to another firmware, image or app-compose.json"]);
        drop(tpm);
    }
}
