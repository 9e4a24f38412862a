//! Calls of dstack's operators that cannot have their answer yet, or not any more: 503 with what is missing, 409 before the end, upstream's
//! texts the second time; in all three forms of a request.

use std::net::SocketAddr;

use dstack_testkit::cluster::{Cluster, FORMING};
use dstack_testkit::raw_http::{Answer, Asking};
use dstack_testkit::raw_tls::socket;
use serde_json::{Value, json};

use crate::dstack::{logged_port, soon};
use crate::onboard::{bootstrapped, call, curl, meta, onboarding, spec};

/// `method` in JSON, in protobuf and as a query: one status, and one text. `fields`: of the message, in order.
fn refused(base: &str, method: &str, fields: &[(&str, &str)]) -> (u16, String) {
    let body: serde_json::Map<String, Value> = fields.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
    let (status, answer) = call(base, method, &Value::Object(body));
    let text = answer["error"].as_str().unwrap_or_else(|| panic!("{method} has no error: {answer}")).to_owned();

    let length = |text: &str| u8::try_from(text.len()).unwrap();
    // Field numbers: source_url is 1 and domain 2 of Onboard's, domain is 1 of Bootstrap's.
    let message: Vec<u8> =
        (1_u8..).zip(fields).flat_map(|(tag, (_, value))| [&[tag << 3 | 2, length(value)], value.as_bytes()].concat()).collect();
    let head = format!("POST /prpc/{method} HTTP/1.1\r\nHost: k\r\nContent-Length: {}\r\n\r\n", message.len());
    let protobuf = asked(base, &[head.as_bytes(), &message].concat());
    assert_eq!((protobuf.status, protobuf.field("content-type")), (status, Some("application/octet-stream")), "{method}");
    assert!(
        protobuf.body.first() == Some(&0x0a) && protobuf.body.ends_with(text.as_bytes()),
        "{method}: {:?}",
        String::from_utf8_lossy(&protobuf.body)
    );

    let query: Vec<String> = fields.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let query = asked(base, format!("GET /prpc/Onboard.{method}?{} HTTP/1.1\r\nHost: k\r\n\r\n", query.join("&")).as_bytes());
    let said: Value = serde_json::from_slice(&query.body).unwrap();
    assert_eq!((query.status, said["error"].as_str()), (status, Some(text.as_str())), "{method}");
    (status, text)
}

fn asked(base: &str, request: &[u8]) -> Answer {
    let address: SocketAddr = base.trim_start_matches("http://").parse().unwrap();
    Asking::new(|| socket(address)).ask(request).unwrap()
}

#[test]
fn calls_say_what_they_wait_for_and_what_is_over() {
    let mut spec = spec("");
    // Of the last section.
    spec.collateral.push_str("wait_s = 1\n");
    let mut cluster = Cluster::plan(&spec).unwrap();
    cluster.node(1).start().unwrap();
    let alone = onboarding(&mut cluster, 1);
    let domain = [("domain", "kms.test")];

    // Before anything, and with the operator's word but without the other nodes.
    let finish = refused(&alone, "Finish", &[]);
    assert!(finish.0 == 409 && finish.1.starts_with("onboarding has not ended: call Bootstrap or Onboard first; "), "{finish:?}");
    let (status, text) = refused(&alone, "Bootstrap", &domain);
    assert_eq!(status, 503);
    assert!(text.starts_with("KMS is not bootstrapped yet: ") && text.ends_with("; then call Bootstrap again"), "{text}");
    let finish = refused(&alone, "Finish", &[]);
    assert!(finish.0 == 409 && finish.1.starts_with("onboarding has not ended: ") && !finish.1.contains("first"), "{finish:?}");
    assert_eq!(curl(&format!("{alone}/finish"), &[]), (409, format!("{}\n", finish.1)));
    let source = [("source_url", "https://127.0.0.1:1"), ("domain", "kms.test")];
    assert_eq!(refused(&alone, "Onboard", &source), (400, "KMS has already been bootstrapped".to_owned()));

    // With them it is what it always was, and the second time over.
    cluster.start_all().unwrap();
    let bases: Vec<String> = (1..=3).map(|seat| onboarding(&mut cluster, seat)).collect();
    bootstrapped(&bases);
    for base in &bases {
        assert_eq!(refused(base, "Bootstrap", &domain), (400, "KMS has already been bootstrapped".to_owned()));
        assert_eq!(call(base, "Finish", &json!({})), (200, Value::Null));
    }
    let (source, before) = meta(&mut cluster, 1);
    cluster.wait_ready(FORMING).unwrap();

    // A node that comes back without its disk, to a cluster that cannot let it in: one of three lives.
    cluster.node(2).kill();
    cluster.node(3).kill();
    std::fs::remove_dir_all(cluster.node(3).data_dir()).unwrap();
    // Where it listened before is in its log.
    std::fs::remove_file(cluster.node(3).log()).unwrap();
    cluster.node(3).start().unwrap();
    let base = onboarding(&mut cluster, 3);
    let ask = [("source_url", source.as_str()), ("domain", "kms.test")];
    let (status, text) = refused(&base, "Onboard", &ask);
    assert_eq!(status, 503, "{text}");
    assert!(text.starts_with("Failed to onboard: ") && text.ends_with("; then call Onboard again"), "{text}");
    assert_eq!(refused(&base, "Bootstrap", &domain), (400, "KMS has already been onboarded".to_owned()));
    assert_eq!(refused(&base, "Finish", &[]).0, 409);

    // The same call goes through when there is a majority again.
    cluster.node(2).start().unwrap();
    let onboarded = json!({"domain": "kms.test", "source_url": source});
    let joined = soon("Onboard", || match call(&base, "Onboard", &onboarded) {
        (200, joined) => Ok(joined),
        (503, other) => Err(other.to_string()),
        other => panic!("{other:?}"),
    });
    assert_eq!(joined, json!({"k256_pubkey": before["k256_pubkey"]}));
    assert_eq!(refused(&base, "Onboard", &ask), (400, "KMS has already been onboarded".to_owned()));
    assert_eq!(call(&base, "Finish", &json!({})), (200, Value::Null));
    logged_port(&mut cluster, 3, "listening for dstack's protocol");
    cluster.check_running().unwrap();
}
