//! The client against a server that answers as upstream's authorities do, and as they should not.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use dstack_authority::{Authority, AuthorityError, BootInfo, Settings, Subject};
use dstack_protocol::UnixMillis;
use dstack_secret::SecretBytes;

/// What a request looked like.
struct Seen {
    line: String,
    headers: Vec<String>,
    body: String,
}

/// Serves `answers` one after the other, each on its own connection; `None` never answers.
#[expect(clippy::unwrap_used, reason = "helper of tests")]
fn serve(answers: Vec<Option<String>>) -> (SocketAddr, Receiver<Seen>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (seen, requests) = channel();
    std::thread::spawn(move || {
        let mut silent: Vec<TcpStream> = Vec::new();
        for answer in answers {
            let Ok((stream, _)) = listener.accept() else { return };
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut lines = Vec::new();
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                match line.trim_end() {
                    "" => break,
                    text => lines.push(text.to_owned()),
                }
            }
            let length = lines.iter().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ").map(str::to_owned));
            let mut body = vec![0; length.map_or(0, |text| text.parse().unwrap())];
            reader.read_exact(&mut body).unwrap();
            let headers = lines.split_off(1);
            let _ = seen.send(Seen { line: lines.remove(0), headers, body: String::from_utf8(body).unwrap() });
            match answer {
                Some(answer) => (&stream).write_all(answer.as_bytes()).unwrap_or_default(),
                None => silent.push(stream),
            }
        }
        if !silent.is_empty() {
            std::thread::sleep(Duration::from_secs(5));
        }
    });
    (address, requests)
}

fn ok(body: &str) -> Option<String> {
    Some(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len()))
}

fn yes() -> Option<String> {
    ok(r#"{"isAllowed":true,"gatewayAppId":"any","reason":"","more":1}"#)
}

#[expect(clippy::unwrap_used, reason = "helper of tests")]
fn authority(address: SocketAddr, lease: Duration) -> Authority {
    let token = Some(SecretBytes::take(b"of-the-cluster".to_vec()));
    let timeout = Duration::from_millis(700);
    Authority::new(Settings { url: format!("http://{address}/auth"), timeout, lease, token, roots: Vec::new(), plain_http: false }).unwrap()
}

fn info() -> BootInfo {
    BootInfo {
        tee_variant: "dstack-tdx",
        mr_aggregated: "11".repeat(32),
        os_image_hash: "22".repeat(32),
        mr_system: "33".repeat(32),
        app_id: "44".repeat(20),
        compose_hash: "55".repeat(32),
        instance_id: String::new(),
        device_id: "66".repeat(32),
        key_provider_info: String::new(),
        tcb_status: "UpToDate",
        advisory_ids: vec!["INTEL-SA-00001".to_owned()],
    }
}

const NOW: UnixMillis = UnixMillis(1_000_000);

#[test]
fn asks_as_upstream_does_and_believes_a_yes_for_its_lease() {
    let (address, requests) = serve(vec![yes(), yes(), yes()]);
    let authority = authority(address, Duration::from_secs(10));
    let allowed = authority.ask(Subject::App, &info(), NOW).unwrap();
    assert_eq!((allowed.gateway_app_id.as_str(), allowed.until), ("any", NOW.plus_ms(10_000)));
    let seen = requests.recv().unwrap();
    assert_eq!(seen.line, "POST /auth/bootAuth/app HTTP/1.1");
    let has = |header: &str| seen.headers.iter().any(|line| line.eq_ignore_ascii_case(header));
    assert!(has("authorization: Bearer of-the-cluster") && has("content-type: application/json"), "{:?}", seen.headers);
    assert!(has(concat!("user-agent: dstack-kms/", env!("CARGO_PKG_VERSION"))), "{:?}", seen.headers);
    let body: serde_json::Value = serde_json::from_str(&seen.body).unwrap();
    let members: Vec<&str> = body.as_object().unwrap().keys().map(String::as_str).collect();
    let expected = [
        "teeVariant",
        "mrAggregated",
        "osImageHash",
        "mrSystem",
        "appId",
        "composeHash",
        "instanceId",
        "deviceId",
        "keyProviderInfo",
        "tcbStatus",
        "advisoryIds",
    ];
    assert_eq!(members, expected);

    // In its lease nobody is asked; another guest, another subject and a later time ask anew.
    authority.ask(Subject::App, &info(), NOW.plus_ms(9_999)).unwrap();
    assert!(requests.try_recv().is_err());
    authority.ask(Subject::Kms, &info(), NOW).unwrap();
    assert_eq!(requests.recv().unwrap().line, "POST /auth/bootAuth/kms HTTP/1.1");
    authority.ask(Subject::App, &info(), NOW.plus_ms(10_000)).unwrap();
    assert_eq!(requests.recv().unwrap().line, "POST /auth/bootAuth/app HTTP/1.1");
}

#[test]
fn an_enclave_that_is_refused_is_asked_about_under_the_device_id_of_older_kms() {
    let no = |reason: &str| ok(&format!(r#"{{"isAllowed":false,"gatewayAppId":"","reason":"{reason}"}}"#));
    let (address, requests) = serve(vec![no("first"), yes(), no("first"), no("second"), no("a TD")]);
    let authority = authority(address, Duration::from_secs(10));
    let enclave = BootInfo { tee_variant: "dstack-nitro-enclave", ..info() };
    authority.ask(Subject::App, &enclave, NOW).unwrap();
    let device = |requests: &Receiver<Seen>| {
        let body: serde_json::Value = serde_json::from_str(&requests.recv().unwrap().body).unwrap();
        body["deviceId"].as_str().unwrap().to_owned()
    };
    let older = "de7d1b721a1e0632b7cf04edf5032c8ecffa9f9a08492152b926f1a5a7e765d7";
    assert_eq!([device(&requests), device(&requests)], [enclave.device_id.clone(), older.to_owned()]);
    // Its lease is found by the guest as it is.
    assert!(authority.leased(Subject::App, &enclave, NOW.plus_ms(1)).is_some());
    assert_eq!(authority.ask_now(Subject::App, &enclave, NOW), Err(AuthorityError::Denied { reason: "first".to_owned() }));
    assert!(authority.leased(Subject::App, &enclave, NOW.plus_ms(1)).is_none(), "both forms ended");
    // Other machines have one name.
    assert!(authority.ask(Subject::App, &info(), NOW).is_err());
    assert_eq!(requests.iter().take(3).count(), 3);
    assert!(requests.try_recv().is_err());
}

#[test]
fn what_it_says_of_itself_is_asked_at_the_very_address() {
    let about = r#"{"status":"ok","kmsContractAddr":"0x1","gatewayAppId":"g","chainId":1,"appImplementation":"0x2"}"#;
    let created = format!("HTTP/1.1 201 Created\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{about}", about.len());
    let (address, requests) = serve(vec![ok(about), Some(created)]);
    for path in ["/auth/", "/auth"] {
        let (timeout, lease) = (Duration::from_millis(700), Duration::ZERO);
        let url = format!("http://{address}{path}");
        let authority = Authority::new(Settings { url, timeout, lease, token: None, roots: Vec::new(), plain_http: false }).unwrap();
        assert_eq!(authority.about().unwrap().chain_id, 1);
        assert_eq!(requests.recv().unwrap().line, format!("GET {path} HTTP/1.1"));
    }
}

#[test]
fn everything_but_a_yes_is_a_no() {
    let long = format!(r#"{{"isAllowed":true,"gatewayAppId":"{}","reason":""}}"#, "x".repeat(70_000));
    let redirect = "HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    let answers = vec![
        ok(r#"{"isAllowed":false,"gatewayAppId":"","reason":"no\nsuch app"}"#),
        ok(r#"{"isAllowed":true,"reason":""}"#),
        ok(r#"{"isAllowed":"true","gatewayAppId":"","reason":""}"#),
        ok("not json"),
        ok(&long),
        ok(r#"{"isAllowed":true,"gatewayAppId":"a\u0000b","reason":""}"#),
        Some(redirect.to_owned()),
        Some("HTTP/1.1 500 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".to_owned()),
        Some("garbage\r\n\r\n".to_owned()),
        Some("HTTP/1.1 200 OK\r\ncontent-length: 100\r\nconnection: close\r\n\r\n{".to_owned()),
        None,
    ];
    let (address, _requests) = serve(answers.clone());
    let authority = authority(address, Duration::from_secs(10));
    let refusals: Vec<AuthorityError> = answers.iter().map(|_| authority.ask(Subject::App, &info(), NOW).unwrap_err()).collect();
    assert_eq!(refusals[0], AuthorityError::Denied { reason: "no such app".to_owned() });
    assert!(!refusals[0].is_temporary());
    for refusal in &refusals[1..6] {
        assert!(matches!(refusal, AuthorityError::Answer { .. }), "{refusal}");
    }
    assert_eq!(refusals[6..8], [AuthorityError::Status { status: 302 }, AuthorityError::Status { status: 500 }]);
    for refusal in &refusals[8..10] {
        assert!(matches!(refusal, AuthorityError::Unreachable { .. }), "{refusal}");
    }
    assert_eq!(refusals[10], AuthorityError::Timeout { limit_ms: 700 });
    assert!(refusals[1..].iter().all(AuthorityError::is_temporary));
    // Nothing of it was believed.
    assert!(authority.ask(Subject::App, &info(), NOW).is_err(), "the server is gone");
}

#[test]
fn a_no_ends_an_earlier_yes_and_an_outage_only_waits_for_the_lease() {
    let (address, _requests) = serve(vec![yes(), ok(r#"{"isAllowed":false,"gatewayAppId":"","reason":"taken back"}"#)]);
    let authority = authority(address, Duration::from_secs(10));
    authority.ask(Subject::App, &info(), NOW).unwrap();
    let later = NOW.plus_ms(10_000);
    assert!(matches!(authority.ask(Subject::App, &info(), later), Err(AuthorityError::Denied { .. })));
    assert!(authority.ask(Subject::App, &info(), NOW).is_err(), "the old lease ended with the no");
}

#[test]
fn says_what_it_is() {
    let about = r#"{"status":"ok","kmsContractAddr":"0x1","gatewayAppId":"","chainId":84532,"appImplementation":"0x2","ethRpcUrl":"x"}"#;
    let (address, requests) = serve(vec![ok(about), ok("{}")]);
    let authority = authority(address, Duration::ZERO);
    let said = authority.about().unwrap();
    assert_eq!((said.chain_id, said.kms_contract_addr.as_str()), (84532, "0x1"));
    assert_eq!(requests.recv().unwrap().line, "GET /auth HTTP/1.1");
    assert!(matches!(authority.about(), Err(AuthorityError::Answer { .. })));
}
