//! `get-keys --mode dstack` and `setup` with provider `kms` against the listener of dstack's protocol: the order of calls, who is trusted,
//! several nodes, what is measured.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, unreachable_pub, dead_code, reason = "tests")]

mod kms;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::Ordering;

use dstack_testkit::World;
use dstack_util::machine::{Machine, events_below};
use serde_json::{Value, json};

use crate::kms::{Kms, said};

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

/// dstack's scripts in enclaves set these variables and no flag.
#[test]
fn the_proxy_of_the_environment_carries_get_keys() {
    use std::io::{Read as _, Write as _};
    let mut world = World::new().unwrap();
    let device = world.nitro("enclave").unwrap();
    let proxy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = proxy.local_addr().unwrap();
    let asked = std::thread::spawn(move || {
        let (mut stream, _) = proxy.accept().unwrap();
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") && stream.read_exact(&mut byte).is_ok() {
            head.push(byte[0]);
        }
        stream.write_all(b"HTTP/1.1 403 Forbidden\r\n\r\n").unwrap();
        String::from_utf8(head).unwrap()
    });
    let run = |variables: &[(&str, &str)], url: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dstack-util"));
        command.args(["get-keys", "--patience-s", "0", "--device", &device, "--app-id", &"22".repeat(20), "-k", url]);
        command.envs(variables.iter().copied()).output().unwrap()
    };
    let variables = [("HTTPS_PROXY", &*format!("http://{address}")), ("NO_PROXY", "127.0.0.1,localhost")];
    let output = run(&variables, "https://kms.invalid:12001");
    assert_eq!((output.status.code(), said(&output).contains("403")), (Some(4), true), "{}", said(&output));
    assert!(asked.join().unwrap().starts_with("CONNECT kms.invalid:12001 HTTP/1.1\r\n"), "the proxy resolves the name");
    // Nobody listens there any more: a node of this machine is not asked for through it.
    let output = run(&variables, "https://127.0.0.1:1");
    assert!(output.status.code() == Some(4) && !said(&output).contains("proxy"), "{}", said(&output));
    let output = run(&[("HTTPS_PROXY", "http://user:secret@proxy:1")], "https://kms.invalid:12001");
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("HTTPS_PROXY") && !said(&output).contains("secret"), "{}", said(&output));
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
