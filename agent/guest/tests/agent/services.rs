//! Every service with keys from a file: vectors of the reference, certificates that openssl verifies, what strangers may read.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::process::Command;

use dstack_attest::wire::{Attestation, PlatformEvidence, TdxEvent};
use serde_json::{Value, json};

use crate::local::{Local, write};

#[test]
fn the_references_vectors_over_the_sockets() {
    let local = Local::new(true);
    let _agent = local.start(&Local::compose(&json!({})));
    let identity = "33".repeat(65);
    // Guest API reference §14.
    let (status, key) = local.guest("GetKey", &json!({ "path": "test", "purpose": "signing" }));
    assert_eq!(status, 200, "{key}");
    assert_eq!(key["key"], "52786aa123b0971e283af97f32e25767483d099d66e6c40afeb3a49046b5379e");
    let chain = "c8a3dcf06c4e95bd78a5d7a1c8fcff171fc5848cfae804c6fc11bda4dc5d4062379995390843827444992c4c0e4bac70f0f878e01b9fc8b98cd7126fe5a3876b01";
    assert_eq!(key["signature_chain"], json!([chain, identity]));
    assert_eq!(local.guest("v0/GetKey", &json!({ "path": "test", "purpose": "signing" })).1, key);
    let (_, legacy) = local.tappd("Tappd.DeriveK256Key", &json!({ "path": "test", "purpose": "signing" }));
    assert_eq!(legacy, json!({ "k256_key": key["key"], "k256_signature_chain": key["signature_chain"] }));
    // `GetKey` under other names, whatever its algorithm.
    let edwards = json!({ "path": "test", "purpose": "signing", "algorithm": "ed25519" });
    let (_, key_of_edwards) = local.guest("GetKey", &edwards);
    let (_, legacy) = local.tappd("DeriveK256Key", &edwards);
    assert_eq!(legacy, json!({ "k256_key": key_of_edwards["key"], "k256_signature_chain": key_of_edwards["signature_chain"] }));
    assert_ne!(key_of_edwards["signature_chain"], key["signature_chain"]);
    let unsupported = (400, json!({ "error": "Unsupported algorithm" }));
    assert_eq!(local.tappd("DeriveK256Key", &json!({ "path": "test", "algorithm": "rsa" })), unsupported);
    let (_, v1) = local.guest("v1/GetKey", &json!({ "domain": "storage-encryption", "algorithm": "secp256k1" }));
    assert_eq!(v1["key"], "5510330f86902ddae38c6d89c93a8408019332c17a429e1abd01c4a28d1544a6");
    assert_eq!(v1["public_key"], "03d962450a41748021c8b02787ac36ce642ff0ae25f4c55019eb527e1112cfd764");
    assert_eq!(
        v1["signature_chain"],
        json!([
            "5b6193729ce7976ec67863f21692d4b98c69832698aae8e001a7d33a6f818b6e46ca950725b6e90e8ca9bcf394abd03ce264bf9b7eec1e91693247f9dd53c26901",
            identity
        ])
    );
    assert_eq!(local.guest("v1/GetKey", &json!({ "domain": "x" })), (400, json!({ "error": "Unsupported algorithm" })));
    assert_eq!(local.guest("v1/Sign", &json!({})), (404, json!({ "error": "Service not found: Sign" })));

    let data = hex::encode("message");
    for algorithm in ["ed25519", "secp256k1", "k256"] {
        let (_, signed) = local.guest("Sign", &json!({ "algorithm": algorithm, "data": data }));
        assert_eq!(signed["signature_chain"][0], signed["signature"], "{signed}");
        assert_eq!(signed["signature_chain"][2], identity);
        let verify = |data: &str| {
            local
                .guest(
                    "Verify",
                    &json!({ "algorithm": algorithm, "data": data, "signature": signed["signature"], "public_key": signed["public_key"] }),
                )
                .1
        };
        assert_eq!((verify(&data), verify("00")), (json!({ "valid": true }), json!({ "valid": false })));
    }
    let removed = "EmitEvent was removed in dstack 0.6.0; runtime RTMR3 events are system-owned and cannot be extended by apps";
    assert_eq!(local.guest("EmitEvent", &json!({ "event": "x", "payload": "00" })), (400, json!({ "error": removed })));
    assert_eq!(local.guest("GpuInfo", &json!({})), (200, json!({ "attestation": "" })));
    assert_eq!(local.guest("v1/AttestGpu", &json!({ "nonce": "00".repeat(32) })), (200, json!({ "bundles": [] })));
    assert_eq!(local.guest("v1/AttestGpu", &json!({ "nonce": "00" })).0, 400);

    let (_, quote) = local.tappd("TdxQuote", &json!({ "report_data": data, "prefix": "" }));
    assert_eq!((&quote["hash_algorithm"], &quote["prefix"]), (&json!("sha512"), &json!("app-data")));
    let (_, raw) = local.tappd("Tappd.TdxQuote", &json!({ "report_data": "ab".repeat(64), "hash_algorithm": "raw" }));
    assert!(raw["quote"].as_str().unwrap().contains(&"ab".repeat(64)) && raw["prefix"] == "");
    assert_eq!(local.tappd("RawQuote", &json!({ "report_data": "ab".repeat(64) })).0, 200);
    assert_eq!(local.tappd("RawQuote", &json!({ "report_data": "ab" })).0, 400);
    let (_, attested) = local.guest("v1/Attest", &json!({ "report_data": "01", "include_boottime_gpu_evidence": true }));
    let evidence = hex::decode(attested["attestation"].as_str().unwrap()).unwrap();
    assert_eq!((evidence[0], &attested["boottime_gpu_evidence"]), (0x83, &json!([])), "msgpack");
    local.world.verify(&evidence).unwrap();
    // Not stripped (guest API reference §3.4): the log that `GetQuote` gives beside its quote.
    let (_, attested) = local.guest("Attest", &json!({ "report_data": "02" }));
    let of_v0 = hex::decode(attested["attestation"].as_str().unwrap()).unwrap();
    assert_eq!(of_v0[..2], [0, 0], "SCALE V0 of a TD");
    local.world.verify(&of_v0).unwrap();
    let log = local.guest("GetQuote", &json!({ "report_data": "02" })).1["event_log"].as_str().unwrap().to_owned();
    for evidence in [&evidence, &of_v0] {
        let PlatformEvidence::Tdx(td) = Attestation::decode(evidence).unwrap().platform else { panic!("a TD") };
        assert_eq!(TdxEvent::log_to_json(&td.event_log), log);
    }
    let (_, bound) = local.worker("Worker.GetAttestationForAppKey", &json!({ "algorithm": "secp256k1" }));
    assert_eq!(bound["report_data"], hex::encode("dip1::secp256k1c-pk:A6t_JdVkVdMAocH3f1f20WGT6JzdntxcXimUtEax8zc9"));

    let (_, info) = local.guest("Info", &json!({}));
    assert_eq!((&info["vm_config"], &info["key_provider_info"]), (&json!("{\"cpu_count\":2}"), &json!("{\"name\":\"none\",\"id\":\"\"}")));
    assert_eq!(local.tappd("Info", &json!({})).1["compose_hash"], info["compose_hash"]);
    let (_, v1) = local.guest("v1/Info", &json!({}));
    assert_eq!((&v1["app_id"], &v1["compose_hash"]), (&info["app_id"], &info["compose_hash"]));
}

#[test]
fn a_local_ca_certifies_what_openssl_verifies() {
    let local = Local::new(true);
    let _agent = local.start(&Local::compose(&json!({})));
    let ca = local.path("ca.pem");
    write(&ca, &local.ca_pem);
    let openssl = |arguments: &[&str], more: &[&std::path::Path]| {
        let output = Command::new("openssl").args(arguments).args(more).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
    };
    let check = |answer: &Value| {
        let (leaf, key) = (local.path("leaf.pem"), local.path("leaf.key"));
        write(&leaf, answer["certificate_chain"][0].as_str().unwrap());
        write(&key, answer["key"].as_str().unwrap());
        let (holds, said) = openssl(&["verify", "-CAfile"], &[&ca, &leaf]);
        assert!(holds, "{said}");
        let of_certificate = openssl(&["x509", "-noout", "-pubkey", "-in"], &[&leaf]).1;
        assert_eq!(of_certificate, openssl(&["pkey", "-pubout", "-in"], &[&key]).1, "the key is the certificate's");
        openssl(&["x509", "-noout", "-text", "-in"], &[&leaf]).1
    };
    let args = json!({
        "subject": "example.com", "alt_names": ["example.com", "127.0.0.1"], "usage_ra_tls": true, "usage_server_auth": true,
        "not_before": 1_700_000_000, "not_after": 4_000_000_000_u64, "with_app_info": true,
    });
    let (status, answer) = local.guest("GetTlsKey", &args);
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["certificate_chain"].as_array().unwrap().len(), 2);
    let text = check(&answer);
    for part in [
        "CN = example.com",
        "DNS:example.com",
        "IP Address:127.0.0.1",
        "TLS Web Server Authentication",
        "1.3.6.1.4.1.62397.1.8",
        "1.3.6.1.4.1.62397.1.9",
        "Nov 14 22:13:20 2023",
    ] {
        assert!(text.contains(part) || text.replace(" = ", "=").contains(&part.replace(" = ", "=")), "{part}: {text}");
    }
    assert_ne!(local.guest("v1/IssueCert", &args).1["key"], answer["key"], "fresh each time");
    let derive = || local.tappd("Tappd.DeriveKey", &json!({ "path": "p", "subject": "s", "alt_names": [] })).1;
    let derived = derive();
    check(&derived);
    assert_eq!(derive()["key"], derived["key"], "the same path, the same key");
    let random = local.tappd("DeriveKey", &json!({ "path": "p", "random_seed": true })).1;
    assert_ne!(random["key"], derived["key"]);
    for (field, value, said) in [
        ("not_after", json!(1_600_000_000), "not_before must be earlier than not_after"),
        ("alt_names", json!([""]), "alt_names"),
        ("alt_names", json!(["ä.example"]), "alt_names"),
        ("subject", json!("x".repeat(300)), "subject"),
    ] {
        let mut bad = args.clone();
        bad[field] = value;
        let (status, answer) = local.guest("GetTlsKey", &bad);
        assert!(status == 400 && answer["error"].as_str().unwrap().contains(said), "{answer}");
    }
    // Shown once the first reader asked for it.
    let shown = || local.guest("Info", &json!({})).1["app_cert"].as_str().unwrap().to_owned();
    let began = std::time::Instant::now();
    while shown().is_empty() {
        assert!(began.elapsed() < crate::ANY_ANSWER);
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert_eq!(shown().matches("BEGIN CERTIFICATE").count(), 2);
}

#[test]
fn strangers_read_what_the_compose_file_makes_public() {
    let local = Local::new(true);
    {
        let _agent = local.start(&Local::compose(&json!({ "public_tcbinfo": false })));
        let (_, info) = local.worker("Info", &json!({}));
        assert_eq!((&info["tcb_info"], &info["vm_config"]), (&json!(""), &json!("")));
        assert_eq!(info["app_name"], "<näme>");
        let (_, v1) = local.worker("v1/Info", &json!({}));
        assert_eq!((&v1["app_compose"], &v1["vm_config"], &v1["key_provider_info"]), (&json!(""), &json!(""), &json!("")));
        assert_ne!(local.guest("Info", &json!({})).1["tcb_info"], "", "the app itself reads all");
        let (status, head, page) = local.page("/");
        assert!(status == 200 && head.contains("x-app-version: ") && head.contains("text/html"), "{head}");
        assert!(page.contains("&lt;näme&gt;") && !page.contains("MRTD") && !page.contains("Processors"), "{page}");
        assert_eq!(local.page("/metrics").0, 403);
        let (status, _, said) = local.page("/logs/app");
        assert!(status == 403 && said.contains("\"error\""), "{said}");
        for method in ["GetKey", "Sign", "GetTlsKey"] {
            assert_eq!(local.worker(method, &json!({})).0, 404, "{method}");
            assert_eq!(local.worker(&format!("v1/{method}"), &json!({})).0, 404, "{method}");
        }
        let (status, health) = local.worker("v1/Health", &json!({}));
        assert!(status == 200 && health["healthy"] == false && health["error"].as_str().unwrap().contains("docker.sock"), "{health}");
    }
    let _agent = local.start(&Local::compose(&json!({ "public_logs": true, "public_sysinfo": true })));
    let (_, info) = local.worker("v0/Worker.Info", &json!({}));
    assert!(info["tcb_info"].as_str().unwrap().contains("mrtd"));
    let (status, _, text) = local.page("/metrics");
    assert!(status == 200 && text.contains("system_memory_total ") && text.contains("disk_total_size{"), "{text}");
    assert!(local.page("/").2.contains("MRTD"));
    let (status, _, said) = local.page("/logs/app");
    assert!(status == 502 && said.contains("docker.sock"), "{said}");
    assert_eq!(local.page("/logs/..%2Fx").0, 400);
    assert_eq!(local.page("/logs/app?since=never").0, 400);
    assert_eq!(local.page("/nothing").0, 404);
}

/// A container runtime as its own documentation describes the answers.
fn runtime(socket: &std::path::Path) {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") && stream.read_exact(&mut byte).is_ok() {
                head.push(byte[0]);
            }
            let head = String::from_utf8_lossy(&head).into_owned();
            let (status, body): (u16, Vec<u8>) = if head.starts_with("GET /containers/json?all=1 ") {
                let list = json!([
                    { "Id": "aa", "Names": ["/app"], "Image": "i", "ImageID": "sha256:1", "Created": 7, "State": "running", "Status": "Up 1 hour" },
                    { "Id": "bb", "Names": ["/bad"], "Image": "i", "ImageID": "sha256:1", "Created": 7, "State": "running", "Status": "Up 1 hour (unhealthy)" },
                ]);
                (200, list.to_string().into_bytes())
            } else if head.starts_with("GET /containers/app/logs?stdout=1&stderr=1&since=0&until=0&follow=false&timestamps=false&tail=5 ") {
                (200, b"\x01\0\0\0\0\0\0\x04out\n\x02\0\0\0\0\0\0\x04err\n".to_vec())
            } else {
                (404, b"{}".to_vec())
            };
            let _ = stream.write_all(format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n", body.len()).as_bytes());
            let _ = stream.write_all(&body);
        }
    });
}

#[test]
fn the_host_asks_and_logs_are_read() {
    let local = Local::new(true);
    runtime(&local.path("docker.sock"));
    let _agent = local.start(&Local::compose(&json!({ "public_logs": true })));
    let (status, _, text) = local.page("/logs/app?tail=5&text=true");
    assert_eq!((status, text.contains("{\"channel\":\"stdout\",\"message\":\"out\\n\"}\n")), (200, true), "{text}");
    assert!(text.contains("{\"channel\":\"stderr\",\"message\":\"err\\n\"}\n"), "{text}");
    assert_eq!(local.page("/logs/none").0, 404);
    let (_, health) = local.worker("v1/Health", &json!({}));
    assert_eq!(health, json!({ "healthy": false, "unhealthy": [{ "name": "bad", "status": "Up 1 hour (unhealthy)" }], "error": "" }));

    let (_, list) = local.host("ListContainers");
    assert_eq!(
        list["containers"][0],
        json!({ "id": "aa", "names": ["/app"], "image": "i", "image_id": "sha256:1", "created": 7, "state": "running", "status": "Up 1 hour" })
    );
    let (_, info) = local.host("Info");
    assert_eq!((info["app_id"].as_str().unwrap().len(), &info["version"]), (40, &json!(env!("CARGO_PKG_VERSION"))));
    let (_, system) = local.host("SysInfo");
    assert!(system["num_cpus"].as_u64().unwrap() > 0 && system["disks"][0]["mount_point"] == "/", "{system}");
    assert!(local.host("NetworkInfo").1["interfaces"].as_array().unwrap().iter().any(|interface| interface["name"] == "lo"));
    assert!(!local.path("powered-off").exists());
    assert_eq!(local.host("Shutdown"), (200, Value::Null));
    assert!(local.path("powered-off").exists());
}

#[test]
fn an_enclave_serves_the_same_without_quotes() {
    let local = Local::new(false);
    let _agent = local.start(&Local::compose(&json!({})));
    let (status, answer) = local.tappd("TdxQuote", &json!({ "report_data": "01" }));
    assert!(status == 400 && answer["error"].as_str().unwrap().contains("use Attest"), "{answer}");
    assert_eq!(local.worker("GetAttestationForAppKey", &json!({ "algorithm": "ed25519" })).0, 400);
    let (status, answer) = local.guest("GetTlsKey", &json!({ "subject": "x", "usage_ra_tls": true }));
    assert_eq!(status, 200, "{answer}");
    let (_, attested) = local.guest("v1/Attest", &json!({ "report_data": "01" }));
    local.world.verify(&hex::decode(attested["attestation"].as_str().unwrap()).unwrap()).unwrap();
}
