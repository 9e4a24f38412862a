//! dstack's protocol over real TLS and HTTP: curl, as an operator or a guest's script uses it, and certificates as upstream's tools make
//! them. Every answer that a client can check is checked the way that client does it.

mod sign_cert;
mod world;

use std::io::Write as _;

use dstack_certificates::identity::recover;
use dstack_protocol::policy::AppPolicy;
use dstack_protocol::sign::SignObject;
use dstack_protocol::{AppId, UnixMillis};
use dstack_testkit::raw_tls;
use serde_json::{Value, json};

use super::GENERATION;
use crate::support::cluster::{APP, Cluster};
use crate::support::{run, until};
use world::{ENVPUB, Guest, World, parsed};

fn bytes(value: &Value) -> Vec<u8> {
    hex::decode(value.as_str().unwrap()).unwrap()
}

fn strs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

fn error(answer: &(u16, Value)) -> (u16, &str) {
    (answer.0, answer.1["error"].as_str().unwrap_or_default())
}

#[test]
fn every_node_answers_the_same() {
    run(async {
        let w = World::new().await;
        let guest = Guest::new(&w, "guest");
        let certificate = guest.under_temp_ca(&w);
        let none = json!({});
        let (status, meta) = w.post(1, "GetMeta", &none, &[]).await;
        assert_eq!(status, 200);
        assert_eq!(meta["ca_cert"].as_str().unwrap(), std::fs::read_to_string(w.root()).unwrap());
        assert_eq!(bytes(&meta["k256_pubkey"]), w.roots.identity());
        assert_eq!(
            (meta["is_dev"].clone(), meta["allow_any_upgrade"].clone(), meta["bootstrap_info"].clone()),
            (json!(true), json!(false), Value::Null)
        );
        assert_eq!(meta["gateway_app_id"], "the-gateway");
        let (_, temp) = w.post(1, "GetTempCaCert", &none, &[]).await;
        let (status, keys) = w.post(1, "GetAppKey", &json!({"api_version": 1, "vm_config": ""}), &strs(&certificate)).await;
        assert_eq!(status, 200, "{keys}");
        assert_eq!(
            (bytes(&keys["disk_crypt_key"]).len(), bytes(&keys["env_crypt_key"]).len(), bytes(&keys["k256_key"]).len()),
            (32, 32, 32)
        );
        assert_eq!(
            (keys["ca_cert"].clone(), keys["gateway_app_id"].clone(), keys["tproxy_app_id"].clone()),
            (meta["ca_cert"].clone(), json!("the-gateway"), json!("the-gateway"))
        );
        // As an SDK checks it: the signer of the app's key, recovered, is the KMS.
        let app_key = k256::ecdsa::SigningKey::from_slice(&bytes(&keys["k256_key"])).unwrap();
        let app_pk = app_key.verifying_key().to_sec1_point(true).as_bytes().try_into().unwrap();
        let digest = SignObject::AppKey { generation: GENERATION, app_id: APP, app_pk }.identity_digest().unwrap();
        assert_eq!(recover(&digest, &bytes(&keys["k256_signature"])).unwrap().to_vec(), w.roots.identity());

        // In every form, over both TLS versions and both HTTP versions; the temp CA of one node, the key of another.
        for seat in 1..=3 {
            assert_eq!(w.get(seat, "KMS.GetMeta", &[]).await.1, meta);
            assert_eq!(w.get(seat, "GetMeta", &["--tlsv1.2", "--tls-max", "1.2", "--http1.1"]).await.1, meta);
            assert_eq!(w.get(seat, "GetMeta", &["--tlsv1.3", "--http2"]).await.1, meta);
            assert_eq!(w.get(seat, "GetTempCaCert", &[]).await.1, temp);
            assert_eq!(w.post(seat, "GetAppKey", &none, &strs(&certificate)).await.1, keys, "node {seat}");
        }
        let mut tls12 = strs(&certificate);
        tls12.extend(["--tlsv1.2", "--tls-max", "1.2"]);
        assert_eq!(w.get(2, "GetAppKey?api_version=1", &tls12).await.1, keys);
        // Protobuf: field 3 of the answer is the env key.
        let file = w.dir.path().join("empty");
        std::fs::write(&file, b"").unwrap();
        let data = format!("@{}", file.display());
        let mut protobuf = strs(&certificate);
        protobuf.extend(["-H", "Content-Type: application/octet-stream", "--data-binary", &data]);
        let raw = w.curl(1, "GetAppKey", &protobuf).await.stdout;
        let wanted = [&[0x1a, 32][..], &bytes(&keys["env_crypt_key"])].concat();
        assert!(raw.windows(34).any(|window| window == wanted));
        // Another instance: its own disk, the app's other keys.
        let neighbour = Guest::new(&w, "neighbour").under_temp_ca(&w);
        let (_, others) = w.post(2, "GetAppKey", &none, &strs(&neighbour)).await;
        assert_ne!(others["disk_crypt_key"], keys["disk_crypt_key"]);
        assert_eq!(
            (&others["k256_key"], &others["env_crypt_key"], &others["k256_signature"]),
            (&keys["k256_key"], &keys["env_crypt_key"], &keys["k256_signature"])
        );
    });
}

#[test]
fn a_self_signed_certificate_and_the_legacy_pair_are_as_good() {
    run(async {
        let w = World::new().await;
        let guest = Guest::new(&w, "guest");
        let (_, keys) = w.post(1, "GetAppKey", &json!({}), &strs(&guest.under_temp_ca(&w))).await;
        assert!(keys["k256_key"].is_string(), "{keys}");
        let own = guest.self_signed(&w, "own", vec![(8, guest.evidence(&guest.spki()))], 2025);
        assert_eq!(w.post(1, "GetAppKey", &json!({}), &strs(&own)).await.1, keys);
        let (quote, event_log) = guest.legacy_pair();
        let pair = guest.self_signed(&w, "pair", vec![(1, quote.clone()), (2, event_log)], 2025);
        assert_eq!(w.post(3, "GetAppKey", &json!({}), &strs(&pair)).await.1, keys);
    });
}

#[test]
fn the_death_of_a_node_changes_nothing() {
    run(async {
        let w = World::new().await;
        let guest = Guest::new(&w, "guest");
        let certificate = guest.under_temp_ca(&w);
        let (_, keys) = w.post(1, "GetAppKey", &json!({}), &strs(&certificate)).await;
        let alone = w.listen(2, &[1]).await;
        let mut last = Value::Null;
        for _ in 0..50 {
            last = parsed(&w.curl_at(alone, 2, "GetAppKey", &strs(&certificate)).await).1;
            if last == keys {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        panic!("{last}");
    });
}

#[test]
fn who_shows_nothing_or_something_else_gets_nothing() {
    run(async {
        let w = World::new().await;
        let (guest, other) = (Guest::new(&w, "guest"), Guest::new(&w, "other"));
        let none = json!({});
        assert_eq!(error(&w.post(1, "GetAppKey", &none, &[]).await), (400, "App not allowed: No attestation provided"));
        assert_eq!(error(&w.post(1, "GetAppKey", &json!({"api_version": 2}), &[]).await), (400, "Unsupported API version: 2"));
        // A handshake ends where a certificate is out of date, carries nothing, or nothing that decodes.
        let good = guest.evidence(&guest.spki());
        for (name, extensions, year) in [
            ("expired", vec![(8, good.clone())], 2010),
            ("future", vec![(8, good.clone())], 2040),
            ("bare", vec![], 2025),
            ("noise", vec![(8, vec![0xff; 40])], 2025),
            ("half-pair", vec![(1, vec![1, 2, 3])], 2025),
        ] {
            let certificate = guest.self_signed(&w, name, extensions, year);
            for tls in [&["--tlsv1.3"][..], &["--tlsv1.2", "--tls-max", "1.2"]] {
                let args = [strs(&certificate), tls.to_vec()].concat();
                let output = w.curl(1, "GetMeta", &args).await;
                assert!(!output.status.success(), "{name} {tls:?}: {}", String::from_utf8_lossy(&output.stdout));
            }
        }
        // Evidence for another key, and evidence with a byte changed: no method answers, public ones neither.
        let mut forged = good.clone();
        let middle = forged.len() / 2;
        forged[middle] ^= 1;
        for (name, evidence) in [("foreign", other.evidence(&other.spki())), ("forged", forged)] {
            let certificate = guest.self_signed(&w, name, vec![(8, evidence)], 2025);
            let answers = [w.get(1, "GetMeta", &strs(&certificate)).await, w.post(1, "GetAppKey", &none, &strs(&certificate)).await];
            for answer in &answers {
                let (status, text) = error(answer);
                assert!(status == 400 && text.starts_with("invalid quote: "), "{name}: {answer:?}");
            }
        }
        // An app that nobody registered, and one that does not allow it.
        let stranger = Guest::of_app(&w, "stranger", AppId([9; 20])).under_temp_ca(&w);
        let answer = w.post(1, "GetAppKey", &none, &strs(&stranger)).await;
        assert!(error(&answer).1.starts_with("App not allowed: Boot denied: APP_UNKNOWN"), "{answer:?}");
        w.set_policy(&AppPolicy { allow_legacy: false, ..Cluster::legacy_policy() });
        let answer = w.post(1, "GetAppKey", &none, &strs(&guest.under_temp_ca(&w))).await;
        let (status, text) = error(&answer);
        assert!(status == 400 && text.starts_with("App not allowed: Boot denied: LEGACY_NOT_ALLOWED"), "{answer:?}");
    });
}

#[test]
fn bad_requests_are_told_what_is_wrong() {
    run(async {
        let w = World::new().await;
        assert_eq!(error(&w.get(1, "Nope", &[]).await), (404, "Service not found: Nope"));
        assert_eq!(error(&w.get(1, "getmeta", &[]).await), (404, "Service not found: getmeta"));
        let (status, text) = (w.post(1, "GetKmsKey", &json!({}), &[]).await.0, w.post(1, "GetKmsKey", &json!({}), &[]).await);
        assert!(status == 403 && error(&text).1.contains("only as shares"), "{text:?}");
        for body in [json!([]), json!({"app_id": 7}), json!({"app_id": "xyz"}), json!("text")] {
            assert_eq!(w.post(1, "GetAppEnvEncryptPubKey", &body, &[]).await.0, 400, "{body}");
        }
        for (mebibytes, answered) in [(3, true), (10, false)] {
            let file = w.dir.path().join("large");
            std::fs::write(&file, vec![b' '; mebibytes << 20]).unwrap();
            let data = format!("@{}", file.display());
            let status = parsed(&w.curl(1, "GetAppKey?json", &["--data-binary", &data]).await).0;
            // What is far too large is not read to its end: curl may see the connection close before it has the answer.
            assert!(status == 413 || (!answered && status == 0), "{mebibytes} MiB: {status}");
        }
        let chunked = ["-H", "Transfer-Encoding: chunked", "-H", "Content-Type: application/json", "--http1.1", "--data-binary", "{}"];
        assert_eq!(parsed(&w.curl(1, "GetMeta", &chunked).await).0, 200);
        assert_eq!(parsed(&w.curl(1, "GetMeta", &["-X", "PUT"]).await).0, 405);
        assert_eq!(parsed(&w.curl(1, "/elsewhere", &[]).await).0, 404);
        let health = w.curl(1, "/health", &["-i"]).await;
        let text = String::from_utf8_lossy(&health.stdout).to_lowercase();
        assert!(text.contains("x-app-version: v") && text.contains("\r\n\r\nok\n200"), "{text}");
        let counters = String::from_utf8_lossy(&w.curl(1, "/metrics", &[]).await.stdout).into_owned();
        assert!(
            counters.contains("dstack_kms_attestation_requests_total 4") && counters.contains("dstack_kms_attestation_failures_total 4"),
            "{counters}"
        );
    });
}

#[test]
fn the_env_key_is_signed_as_sdks_verify_it() {
    run(async {
        let w = World::new().await;
        let app = hex::encode(APP.0);
        let (status, answer) = w.get(2, &format!("GetAppEnvEncryptPubKey?app_id={app}"), &[]).await;
        assert_eq!((status, bytes(&answer["public_key"])), (200, ENVPUB.to_vec()), "{answer}");
        let timestamp_s = answer["timestamp"].as_u64().unwrap();
        assert_eq!(timestamp_s, w.cluster.log_time().0 / 1000);
        let signer =
            |object: SignObject, signature: &Value| recover(&object.identity_digest().unwrap(), &bytes(signature)).unwrap().to_vec();
        let plain = SignObject::EnvKey { generation: GENERATION, app_id: APP, envpub: ENVPUB };
        assert_eq!(signer(plain, &answer["signature"]), w.roots.identity());
        let dated = SignObject::EnvKeyAt { generation: GENERATION, app_id: APP, envpub: ENVPUB, timestamp_s };
        assert_eq!(signer(dated, &answer["signature_v1"]), w.roots.identity());

        // For a minute of log time the same one, at every node.
        let with_prefix = json!({"app_id": format!("0x{}", app.to_uppercase())});
        for seat in 1..=3 {
            assert_eq!(w.post(seat, "GetAppEnvEncryptPubKey", &with_prefix, &[]).await.1, answer);
        }
        // Then a newer one is there before anybody asks for it.
        let later = UnixMillis(w.cluster.log_time().0 + 61_000);
        assert_eq!(w.cluster.beacon(later), None);
        until("the signature to be renewed", || (w.roots.dated() == Some(later.0 / 1000)).then_some(())).await;
        let (_, renewed) = w.post(1, "GetAppEnvEncryptPubKey", &with_prefix, &[]).await;
        assert_eq!(renewed["timestamp"], later.0 / 1000);
        assert_eq!(renewed["signature"], answer["signature"]);
        // Where nobody renewed it, who asks after two minutes gets a new one all the same.
        let last = UnixMillis(later.0 + 121_000);
        assert_eq!(w.cluster.beacon(last), None);
        let (_, newest) = w.post(3, "GetAppEnvEncryptPubKey", &with_prefix, &[]).await;
        assert_eq!(newest["timestamp"], last.0 / 1000);

        assert_eq!(error(&w.post(1, "GetAppEnvEncryptPubKey", &json!({"app_id": "11"}), &[]).await), (400, "app_id must be 20 bytes"));
        let unknown = w.post(1, "GetAppEnvEncryptPubKey", &json!({"app_id": "11".repeat(20)}), &[]).await;
        assert!(error(&unknown).1.starts_with("APP_UNKNOWN"), "{unknown:?}");
    });
}

#[test]
fn bodies_that_never_end_hold_up_their_senders_alone() {
    run(async {
        let w = World::new().await;
        let address = w.address(1);
        let begun = tokio::task::spawn_blocking(move || {
            let begin = |_| {
                let mut stream = raw_tls::connect(address, &[&rustls::version::TLS13], None, &[b"http/1.1"]).unwrap();
                let head = b"POST /prpc/GetMeta?json HTTP/1.1\r\nHost: kms.test\r\nContent-Length: 1000\r\n\r\n{";
                stream.write_all(head).and_then(|()| stream.flush()).unwrap();
                stream
            };
            (0..150).map(begin).collect::<Vec<_>>()
        });
        let begun = begun.await.unwrap();
        // Another source: a stranger, and a guest.
        let elsewhere = ["--interface", "127.0.0.9"];
        let guest = Guest::new(&w, "guest").under_temp_ca(&w);
        for _ in 0..5 {
            assert_eq!(w.get(1, "GetMeta", &elsewhere).await.0, 200);
        }
        let (status, keys) = w.post(1, "GetAppKey", &json!({}), &[strs(&guest), elsewhere.to_vec()].concat()).await;
        assert_eq!(status, 200, "{keys}");
        drop(begun);
        // And their own, once they are gone.
        assert_eq!(w.get(1, "GetMeta", &[]).await.0, 200);
    });
}
