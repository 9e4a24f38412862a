//! Wrong requests over a right connection: every field of every method, and HTTP as no library writes it.

use std::io::{Read as _, Write as _};

use dstack_prpc::kms::Kms;
use dstack_testkit::bad_requests::bad_requests;
use dstack_testkit::raw_http::{Answer, Asking};
use dstack_testkit::raw_tls::is_silence;

use super::{BOTH, Target, connect, get};

#[test]
fn every_field_of_every_method_may_be_wrong() {
    let mut target = Target::start();
    let keys = target.keys();
    let cases = bad_requests(Kms::SERVICE, &[]);
    assert!(cases.len() > 500, "{}", cases.len());
    let mut wrong = Vec::new();
    let mut pass = |asking: &mut dyn FnMut(&[u8]) -> std::io::Result<Answer>| {
        for case in &cases {
            match asking(&case.bytes("/prpc/")) {
                Ok(answer) => wrong.extend(case.judge(&answer).err()),
                Err(error) => wrong.push(format!("{} ({:?}), {}: {error}", case.method, case.form, case.what)),
            }
        }
    };
    let mut anonymous = target.anonymous();
    pass(&mut |bytes| anonymous.ask(bytes));
    let resident = target.resident();
    // With evidence: the methods that need some go further.
    let (shown, address) = (target.shown(), target.address);
    let mut attested = Asking::new(|| connect(address, BOTH, Some(shown.clone())));
    pass(&mut |bytes| attested.ask(bytes));
    for _ in 0..2 {
        pass(&mut |bytes| anonymous.ask(bytes));
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    target.still_serves(&keys, resident);
}

/// Sends bytes, and reads until the node closes: everything it said.
fn said(target: &Target, bytes: &[u8]) -> String {
    let mut stream = connect(target.address, BOTH, None).unwrap();
    // It may hang up before it has read all.
    let _ = stream.write_all(bytes).and_then(|()| stream.flush());
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if is_silence(&error) => {
            panic!("the node neither answers nor closes: {}", String::from_utf8_lossy(bytes).chars().take(200).collect::<String>())
        }
        _ => String::from_utf8_lossy(&answer).into_owned(),
    }
}

#[test]
fn http_that_no_library_writes() {
    let mut target = Target::start();
    let keys = target.keys();
    let large = vec![b' '; 10 << 20];
    let head = "POST /prpc/GetMeta HTTP/1.1\r\nHost: kms.test\r\nContent-Type: application/json\r\n";
    let last = "Connection: close\r\n";
    let _ = said(&target, &[format!("{head}{last}Content-Length: {}\r\n\r\n", large.len()).as_bytes(), &large].concat());
    let resident = target.resident();
    for _ in 0..8 {
        // Announced, it is refused before it is read; the refusal may be lost with the connection.
        let answer = said(&target, &[format!("{head}{last}Content-Length: {}\r\n\r\n", large.len()).as_bytes(), &large].concat());
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 413 "), "{answer}");
        let chunk = [format!("{:x}\r\n", large.len() / 10).as_bytes(), &large[..large.len() / 10], b"\r\n"].concat();
        let chunks = [format!("{head}{last}Transfer-Encoding: chunked\r\n\r\n").as_bytes(), &chunk.repeat(10), b"0\r\n\r\n"].concat();
        let answer = said(&target, &chunks);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 413 "), "{answer}");
    }
    let one_byte_chunks = format!("{head}{last}Transfer-Encoding: chunked\r\n\r\n{}0\r\n\r\n", "1\r\n \r\n".repeat(100_000));
    assert!(said(&target, one_byte_chunks.as_bytes()).starts_with("HTTP/1.1 200 "));

    // Pipelined: all are answered, in order.
    let pipelined = [get("/prpc/GetMeta"), get("/prpc/Nope"), get("/health")].concat().repeat(50);
    let answer = said(&target, &[pipelined.as_slice(), format!("GET /health HTTP/1.1\r\nHost: k\r\n{last}\r\n").as_bytes()].concat());
    assert_eq!((answer.matches("HTTP/1.1 200 ").count(), answer.matches("HTTP/1.1 404 ").count()), (101, 50));

    let fields = |count: usize, size: usize| (0..count).map(|index| format!("x-{index}: {}\r\n", "y".repeat(size))).collect::<String>();
    let query = |size: usize| format!("GET /prpc/GetAppEnvEncryptPubKey?app_id={} HTTP/1.1\r\nHost: k\r\n{last}\r\n", "0".repeat(size));
    let json = "Content-Type: application/json\r\n";
    let post = |method: &str, fields: &str, body: &str| {
        format!("POST /prpc/{method} HTTP/1.1\r\nHost: k\r\n{last}{fields}Content-Length: {}\r\n\r\n{body}", body.len())
    };
    // Bytes, and the statuses that are right; 0 is a closed connection without a word.
    let cases: Vec<(String, &[u16])> = vec![
        (format!("{head}{last}{}\r\n", fields(1000, 1)), &[0, 400, 431]),
        (format!("{head}{last}{}\r\n", fields(1, 100_000)), &[0, 400, 431]),
        (format!("{head}{last}{}\r\n", fields(60, 10_000)), &[0, 400, 431]),
        (query(8_000), &[400]),
        (query(2 << 20), &[0, 400, 414, 431]),
        (format!("GET /{} HTTP/1.1\r\nHost: k\r\n{last}\r\n", "a/".repeat(4000)), &[404]),
        ("POST /prpc/GetMeta HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}".to_owned(), &[200]),
        ("GET /health HTTP/1.0\r\n\r\n".to_owned(), &[200]),
        ("GET /health HTTP/0.9\r\n\r\n".to_owned(), &[0, 400, 505]),
        ("GET /health\r\n\r\n".to_owned(), &[0, 400]),
        ("GET /health HTTP/9.9\r\nHost: k\r\n\r\n".to_owned(), &[0, 400, 505]),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), &[0, 400, 505]),
        ("\r\n\r\n\r\n".to_owned(), &[0, 400]),
        ("\u{16}\u{3}\u{1}\u{2}\0".to_owned(), &[0, 400]),
        (format!("GET /prpc/../health HTTP/1.1\r\nHost: k\r\n{last}\r\n"), &[400, 404]),
        (format!("GET http://elsewhere/health HTTP/1.1\r\nHost: k\r\n{last}\r\n"), &[200]),
        (format!("GET /prpc/Get%4deta HTTP/1.1\r\nHost: k\r\n{last}\r\n"), &[200]),
        (format!("GET /prpc/%ff%fe HTTP/1.1\r\nHost: k\r\n{last}\r\n"), &[400, 404]),
        (format!("GET /prpc/GetMeta%00 HTTP/1.1\r\nHost: k\r\n{last}\r\n"), &[404]),
        (format!("GET /prpc/GetMeta\0 HTTP/1.1\r\nHost: k\r\n{last}\r\n"), &[0, 400]),
        (format!("GET /health HTTP/1.1\r\nHost: k\r\n{last}a b: c\r\n\r\n"), &[0, 400]),
        (format!("GET /health HTTP/1.1\r\nHost: k\r\n{last}: c\r\n\r\n"), &[0, 400]),
        (format!("DELETE /prpc/GetMeta HTTP/1.1\r\nHost: k\r\n{last}\r\n"), &[405]),
        (format!("PUT /prpc/GetMeta HTTP/1.1\r\nHost: k\r\n{last}Content-Length: 2\r\n\r\n{{}}"), &[405]),
        (format!("HEAD /prpc/GetMeta HTTP/1.1\r\nHost: k\r\n{last}\r\n"), &[405]),
        (format!("OPTIONS * HTTP/1.1\r\nHost: k\r\n{last}\r\n"), &[400, 404, 405]),
        (format!("CONNECT kms.test:443 HTTP/1.1\r\nHost: k\r\n{last}\r\n"), &[0, 400, 404, 405]),
        (format!("POST /health HTTP/1.1\r\nHost: k\r\n{last}Content-Length: 0\r\n\r\n"), &[405]),
        // Two lengths, two ways to say one (chunks win: RFC 9112 §6.3), and chunks that are none.
        (format!("{head}{last}Content-Length: 2\r\nContent-Length: 40\r\n\r\n{{}}"), &[0, 400]),
        (format!("{head}{last}Content-Length: -1\r\n\r\n"), &[0, 400]),
        (format!("{head}{last}Content-Length: 99999999999999999999\r\n\r\n"), &[0, 400, 413]),
        (format!("{head}{last}Transfer-Encoding: chunked\r\nContent-Length: 60\r\n\r\n0\r\n\r\n"), &[0, 200, 400]),
        (format!("{head}{last}Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n"), &[0, 400]),
        (format!("{head}{last}Transfer-Encoding: chunked\r\n\r\nzz\r\n"), &[0, 400, 413]),
        (format!("{head}{last}Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n"), &[0, 400, 413]),
        (format!("{head}{last}Transfer-Encoding: chunked\r\n\r\n2;{}\r\n{{}}\r\n0\r\n\r\n", "x".repeat(100_000)), &[0, 400, 413]),
        // Other types than JSON's are protobuf.
        (post("GetMeta", "Content-Type: text/plain\r\n", "{}"), &[400]),
        (post("GetMeta", "Content-Type: application/jsonx\r\n", "{}"), &[400]),
        (post("GetMeta", "Content-Type: multipart/form-data; boundary=x\r\n", "--x"), &[400]),
        (post("GetMeta", "Content-Type: \u{7f}\u{e9}\r\n", "{}"), &[0, 400]),
        (post("GetMeta", "Content-Type: APPLICATION/JSON ; charset=utf-8\r\n", "{}"), &[200]),
        (post("GetMeta", "", ""), &[200]),
        (post("GetMeta?json=1", "", "{}"), &[200]),
        (post("GetMeta?json=0", "", "{}"), &[400]),
        (post("SignCert", json, r#"{"api_version":3,"csr":"00"}"#), &[400]),
        (post("KMS.KMS.GetMeta", json, "{}"), &[200]),
        (post("Admin.ClearImageCache", json, "{}"), &[404]),
    ];
    let mut wrong = Vec::new();
    for (request, right) in &cases {
        let answer = said(&target, request.as_bytes());
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        if !right.contains(&status) {
            let start: String = request.chars().take(160).collect();
            wrong.push(format!("{start:?}: {status}, right are {right:?}: {}", answer.chars().take(300).collect::<String>()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    // Bodies that never come, from as many connections as one address may have by far not: the others are served meanwhile.
    let silent: Vec<_> = (0..60)
        .map(|_| {
            let mut stream = connect(target.address, BOTH, None).unwrap();
            stream.write_all(format!("{head}Content-Length: 1000\r\n\r\n{{").as_bytes()).and_then(|()| stream.flush()).unwrap();
            stream
        })
        .collect();
    assert_eq!(target.anonymous().ask(&get("/prpc/GetMeta")).unwrap().status, 200);
    target.still_serves(&keys, resident);
    drop(silent);
}
