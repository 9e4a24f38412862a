//! Strangers at the two plain listeners of dstack's operators: every field of `Onboard` and `Admin`, everything that is no credential,
//! bodies that are too large. Owns: what is shown there. Never: finds a secret in an answer or in the log.

use std::io::{Read as _, Result, Write as _};
use std::net::{SocketAddr, TcpStream};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use dstack_prpc::kms::{Admin, Onboard};
use dstack_testkit::bad_requests::{BadRequest, bad_requests};
use dstack_testkit::cluster::{Cluster, ClusterSpec};
use dstack_testkit::raw_http::{Answer, Asking};
use dstack_testkit::raw_tls::{is_silence, socket};
use serde_json::{Value, json};

use super::{resident, unharmed};
use crate::dstack::logged_port;
use crate::onboard::{TOKEN, bootstrapped, call, curl, error, meta, onboarding, spec};

const PASSWORD: &str = "correct-horse";
/// A part of every wrong secret that is shown: people mistype right ones, so those are no log's business either.
const GUESS: &str = "guessed-wrongly";

/// Sends all of them with these fields in the head, and gives the answers to `judge`: what is wrong with each.
fn matrix(
    address: SocketAddr,
    cases: &[BadRequest],
    fields: &str,
    judge: impl Fn(&BadRequest, &Answer) -> std::result::Result<(), String>,
) {
    let mut asking = Asking::new(|| socket(address));
    let mut wrong = Vec::new();
    for case in cases {
        let outcome = asking.ask(&case.bytes_with("/prpc/", fields));
        let outcome = outcome.map_err(|error| format!("{} ({:?}), {}: {error}", case.method, case.form, case.what));
        wrong.extend(outcome.and_then(|answer| silent_on_secrets(&answer).and_then(|()| judge(case, &answer))).err());
    }
    assert!(wrong.is_empty(), "{} of {} with {fields:?}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

fn silent_on_secrets(answer: &Answer) -> std::result::Result<(), String> {
    let said = format!("{}{}", answer.head, String::from_utf8_lossy(&answer.body));
    match [TOKEN, PASSWORD, GUESS, "$2b$"].into_iter().find(|secret| said.contains(secret)) {
        None => Ok(()),
        Some(secret) => Err(format!("{secret} is in the answer: {said}")),
    }
}

/// 401 without a word, on every path.
fn stopped(answer: &Answer) -> std::result::Result<(), String> {
    let challenge = answer.field("www-authenticate") == Some("Basic realm=\"dstack-kms admin\"");
    if answer.status == 401 && answer.body.is_empty() && challenge { Ok(()) } else { Err(format!("expected 401, got {answer:?}")) }
}

/// Everything that is said to these bytes until the connection ends; nothing where it is reset.
fn said(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream: TcpStream = socket(address).unwrap();
    // It may hang up before it has read all.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if is_silence(&error) => panic!("the node neither answers nor closes: {}", String::from_utf8_lossy(&answer)),
        _ => String::from_utf8_lossy(&answer).into_owned(),
    }
}

/// Bodies of many times the limit, announced and in chunks, and heads without end.
fn oversized(address: SocketAddr, path: &str, fields: &str) {
    let large = vec![b' '; 10 << 20];
    let head = format!("POST {path} HTTP/1.1\r\nHost: k\r\nConnection: close\r\nContent-Type: application/json\r\n{fields}");
    let announced = [format!("{head}Content-Length: {}\r\n\r\n", large.len()).as_bytes(), &large].concat();
    let chunk = [format!("{:x}\r\n", large.len()).as_bytes(), &large, b"\r\n0\r\n\r\n"].concat();
    let chunked = [format!("{head}Transfer-Encoding: chunked\r\n\r\n").as_bytes(), &chunk].concat();
    for _ in 0..3 {
        for request in [&announced, &chunked] {
            // The refusal may be lost with the connection, which ends with bytes unread.
            let answer = said(address, request);
            assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 413 ") || answer.starts_with("HTTP/1.1 401 "), "{answer}");
        }
    }
    let ends = |what: &str, request: String| {
        let answer = said(address, request.as_bytes());
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        assert!([0, 400, 401, 414, 431].contains(&status), "{what}: {answer}");
    };
    ends("fields", format!("{head}{}\r\n", (0..1000).map(|index| format!("x-{index}: y\r\n")).collect::<String>()));
    ends("a field", format!("{head}X: {}\r\n\r\n", "y".repeat(100_000)));
    ends("a query", format!("GET {path}?a={} HTTP/1.1\r\nHost: k\r\nConnection: close\r\n\r\n", "0".repeat(2 << 20)));
    ends("TLS", "\u{16}\u{3}\u{1}\u{2}\0\u{1}\0".repeat(100));
}

/// Heads that show nothing right. What cannot stand in a head at all is refused as HTTP.
fn wrong_credentials() -> Vec<(&'static str, Vec<u8>)> {
    let basic = |text: &[u8]| [b"Authorization: Basic ".as_slice(), STANDARD.encode(text).as_bytes()].concat();
    let bearer = |text: &str| format!("Authorization: Bearer {text}").into_bytes();
    let join = |parts: &[&str]| parts.concat().into_bytes();
    vec![
        ("nothing", b"Accept: */*".to_vec()),
        ("another token", bearer(GUESS)),
        ("a start of the token", bearer(&TOKEN[..TOKEN.len() - 1])),
        ("more than the token", bearer(&format!("{TOKEN}x"))),
        ("the token in capitals", bearer(&TOKEN.to_uppercase())),
        ("the token in quotes", bearer(&format!("\"{TOKEN}\""))),
        ("the token twice", bearer(&format!("{TOKEN} {TOKEN}"))),
        ("the token in two fields", join(&["Authorization: Bearer ", TOKEN, "\r\nAuthorization: Bearer ", TOKEN])),
        ("the token in two fields of its own", join(&["X-Admin-Token: ", TOKEN, "\r\nX-Admin-Token: ", GUESS])),
        ("the token folded", join(&["Authorization: Bearer\r\n ", TOKEN])),
        ("no scheme", join(&["Authorization: ", TOKEN])),
        ("another scheme", join(&["Authorization: Digest ", TOKEN])),
        ("a scheme alone", b"Authorization: Bearer".to_vec()),
        ("an empty token", b"Authorization: Bearer ".to_vec()),
        ("an empty field", b"X-Admin-Token:".to_vec()),
        ("the scheme in its own field", join(&["X-Admin-Token: Bearer ", TOKEN])),
        ("another field", join(&["X-Auth-Token: ", TOKEN])),
        ("a cookie", join(&["Cookie: token=", TOKEN])),
        ("an overlong token", bearer(&GUESS.repeat(600))),
        ("an overlong token that begins rightly", bearer(&format!("{TOKEN}{}", "x".repeat(9000)))),
        ("an overlong field", format!("X-Admin-Token: {}", "t".repeat(5000)).into_bytes()),
        ("a field of 100 kB", format!("X-Admin-Token: {}", "t".repeat(100_000)).into_bytes()),
        ("no UTF-8", [b"Authorization: Bearer ".as_slice(), &[0xff, 0xfe, 0x80], TOKEN.as_bytes()].concat()),
        ("no UTF-8 behind it", [b"X-Admin-Token: ".as_slice(), TOKEN.as_bytes(), &[0xc3]].concat()),
        (
            "no UTF-8 in the scheme",
            [&[b'A', b'u', b't', b'h', b'o', b'r', b'i', b'z', b'a', b't', b'i', b'o', b'n', b':', 0xff], b" x".as_slice()].concat(),
        ),
        ("a zero", [b"Authorization: Bearer ".as_slice(), TOKEN.as_bytes(), &[0]].concat()),
        ("no base64", b"Authorization: Basic !!!!".to_vec()),
        ("half a base64", b"Authorization: Basic dTp".to_vec()),
        ("the token as base64", basic(TOKEN.as_bytes())),
        ("nothing as base64", basic(b"")),
        ("a colon", basic(b":")),
        ("a user alone", basic(b"alice:")),
        ("noise as base64", basic(&[0xff; 90])),
        ("overlong base64", basic(&vec![b'a'; 8000])),
        ("a password with a zero", basic(format!("alice:{PASSWORD}\0{PASSWORD}").as_bytes())),
        ("a password of 73 bytes", basic(format!("alice:{}", PASSWORD.repeat(6)).as_bytes())),
    ]
}

/// Passwords that cost a hash: beyond a burst they are not looked at.
fn wrong_passwords() -> Vec<Vec<u8>> {
    let texts = ["alice:guessed-wrongly", "bob:correct-horse", ":correct-horse", "\u{ff}:guessed-wrongly", "alice:correct-horse "];
    texts.iter().cycle().take(30).map(|text| format!("Authorization: Basic {}", STANDARD.encode(text)).into_bytes()).collect()
}

fn asked(address: SocketAddr, credentials: &[u8]) -> Result<Answer> {
    let head = b"POST /prpc/ClearImageCache?json HTTP/1.1\r\nHost: k\r\nContent-Length: 0\r\n";
    Asking::new(|| socket(address)).ask(&[head.as_slice(), credentials, b"\r\n\r\n"].concat())
}

fn admin(cluster: &mut Cluster) {
    let address = SocketAddr::from(([127, 0, 0, 1], logged_port(cluster, 1, "listening for dstack's admin service")));
    let cases = bad_requests(Admin::SERVICE, &[]);
    assert!(cases.len() > 80, "{}", cases.len());
    let basic = |text: String| format!("Authorization: Basic {}\r\n", STANDARD.encode(text));
    let right = [
        format!("Authorization: Bearer {TOKEN}\r\n"),
        format!("X-Admin-Token: {TOKEN}\r\n"),
        basic(format!("alice:{PASSWORD}")),
        basic(format!("whoever:{TOKEN}")),
    ];
    for fields in &right {
        matrix(address, &cases, fields, BadRequest::judge);
    }
    let before = resident(cluster);
    for fields in ["", &format!("Authorization: Bearer {GUESS}\r\n"), &format!("X-Admin-Token: {GUESS}\r\n"), &basic(format!("{GUESS}:"))] {
        matrix(address, &cases, fields, |_, answer| stopped(answer));
    }
    for (what, credentials) in wrong_credentials() {
        match asked(address, &credentials) {
            // As HTTP: obsolete folding, bytes that no field may have, too large a head.
            Ok(answer) if [400, 431].contains(&answer.status) => silent_on_secrets(&answer).unwrap_or_else(|why| panic!("{what}: {why}")),
            Ok(answer) => stopped(&answer).and_then(|()| silent_on_secrets(&answer)).unwrap_or_else(|why| panic!("{what}: {why}")),
            Err(error) => assert!(!is_silence(&error), "{what}: {error}"),
        }
    }
    let in_the_query = format!("GET /prpc/ClearImageCache?token={TOKEN}&json HTTP/1.1\r\nHost: k\r\nConnection: close\r\n\r\n");
    assert!(said(address, in_the_query.as_bytes()).starts_with("HTTP/1.1 401 "));
    let mut too_many = 0;
    for credentials in wrong_passwords() {
        let answer = asked(address, &credentials).unwrap();
        silent_on_secrets(&answer).unwrap();
        if answer.status == 429 {
            too_many += 1;
            assert!(answer.field("retry-after").is_some_and(|after| after.parse::<u32>().is_ok()) && answer.body.is_empty(), "{answer:?}");
        } else {
            stopped(&answer).unwrap();
        }
        // Who knows something right is not held up.
        for fields in &right {
            assert_eq!(asked(address, fields.trim_end().as_bytes()).unwrap().status, 200);
        }
    }
    assert!(too_many > 0, "every guess was hashed");
    for fields in ["", &right[0]] {
        oversized(address, "/prpc/Admin.ClearImageCache", fields);
    }
    matrix(address, &cases, &right[0], BadRequest::judge);
    unharmed(cluster, before);
}

#[test]
fn every_field_of_onboard_and_admin_may_be_wrong_and_every_credential() {
    let dir = tempfile::tempdir().unwrap();
    let htpasswd = dir.path().join("htpasswd");
    std::fs::write(&htpasswd, format!("alice:{}\n", bcrypt::hash(PASSWORD, 4).unwrap())).unwrap();
    let spec = spec(&format!("htpasswd_file = {:?}", htpasswd.display().to_string()));
    let mut cluster = Cluster::plan(&ClusterSpec { more_config: "log_level = \"debug\"".to_owned(), ..spec }).unwrap();
    cluster.start_all().unwrap();
    let bases: Vec<String> = (1..=3).map(|seat| onboarding(&mut cluster, seat)).collect();
    let address: SocketAddr = bases[0].trim_start_matches("http://").parse().unwrap();

    let cases = bad_requests(Onboard::SERVICE, &[]);
    assert!(cases.len() > 200, "{}", cases.len());
    matrix(address, &cases, "", BadRequest::judge);
    let before = resident(&mut cluster);
    for _ in 0..2 {
        matrix(address, &cases, "", BadRequest::judge);
        oversized(address, "/prpc/Onboard.Bootstrap", "");
    }
    // Sources that are none: nothing is dialled but https, and no answer of theirs is shown.
    let long = format!("https://{}", "a".repeat(60_000));
    let sources = [
        "",
        "x",
        "http://127.0.0.1:1",
        "https://",
        "https://:0",
        "https://127.0.0.1:99999",
        "https://user:secret@127.0.0.1:1",
        "file:///etc/passwd",
        "https://127.0.0.1:1/\r\nX: y",
        "https://[::1",
        "https://\u{202e}",
        &bases[0].replace("http:", "https:"),
        &long,
    ];
    for source in sources {
        let refused = call(&bases[0], "Onboard", &json!({"domain": "kms.test", "source_url": source}));
        assert!(
            refused.0 == 400 && error(&refused).starts_with("Failed to onboard: ") && error(&refused).len() < 1200,
            "{source}: {refused:?}"
        );
    }
    let info = call(&bases[0], "GetAttestationInfo", &json!({}));
    assert_eq!((info.0, &info.1["site_name"]), (200, &Value::from("here")));
    // None of it was the operator's word.
    let (status, text) = curl(&format!("{}/finish", bases[0]), &[]);
    assert!(status == 409 && text.contains("call Bootstrap or Onboard first"), "{text}");
    assert_eq!(cluster.node(1).status().unwrap()["raft"]["votes"], json!(false));
    unharmed(&mut cluster, before);

    // The node's own operator is served after all that, and then so are guests.
    let made = bootstrapped(&bases);
    for base in &bases {
        assert_eq!(curl(&format!("{base}/finish"), &[]), (200, "OK".to_owned()));
    }
    let (_, served) = meta(&mut cluster, 1);
    assert_eq!(served["bootstrap_info"], made[0]);
    admin(&mut cluster);
    assert_eq!(meta(&mut cluster, 1).1, served);
    for seat in 1..=3 {
        let log = cluster.node(seat).log_text();
        for secret in [TOKEN, PASSWORD, GUESS, "$2b$", "user:secret"] {
            let line = log.lines().find(|line| line.contains(secret));
            assert!(line.is_none(), "{secret} is in the log of node {seat}: {line:?}");
        }
    }
}
