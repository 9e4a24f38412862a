//! Callers that are wrong or mean: the agent answers or hangs up, and goes on serving.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::json;

use crate::local::Local;

fn raw(local: &Local, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(local.socket("dstack.sock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    // It may hang up before it has read all.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn every_request_ends_in_an_answer_or_a_closed_connection() {
    let local = Local::new(true);
    let _agent = local.start(&Local::compose(&json!({})));
    let head = "POST /Version HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n";
    // 10 MiB, announced and not.
    let large = [format!("{head}Connection: close\r\nContent-Length: 10485760\r\n\r\n").into_bytes(), vec![b' '; 10 << 20]].concat();
    let answer = raw(&local, &large);
    assert!(answer.is_empty() || answer.contains(" 413 "), "{answer}");
    let mut chunks = format!("{head}Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n").into_bytes();
    for _ in 0..160 {
        chunks.extend(b"10000\r\n");
        chunks.extend(vec![b' '; 65_536]);
        chunks.extend(b"\r\n");
    }
    chunks.extend(b"0\r\n\r\n");
    let answer = raw(&local, &chunks);
    assert!(answer.is_empty() || answer.contains(" 413 "), "{}", &answer[..answer.len().min(300)]);
    // A small chunked body is a body.
    let answer = raw(&local, format!("{head}Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n").as_bytes());
    assert!(answer.contains(" 200 ") && answer.contains("\"version\""), "{answer}");
    // Two requests at once, the second the last.
    let two = format!("{head}Content-Length: 2\r\n\r\n{{}}{head}Connection: close\r\nContent-Length: 2\r\n\r\n{{}}");
    assert_eq!(raw(&local, two.as_bytes()).matches(" 200 ").count(), 2);
    // HTTP/1.0 without a Host field.
    let answer = raw(&local, b"POST /Version HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}");
    assert!(answer.contains(" 200 ") && answer.contains("content-length: ") && answer.contains("\"rev\""), "{answer}");
    // Too many fields, one that is too long, no HTTP at all, another method.
    let many: String = (0..200).map(|index| format!("x-{index}: y\r\n")).collect();
    let answer = raw(&local, format!("{head}{many}\r\n").as_bytes());
    assert!(answer.is_empty() || answer.contains(" 431 "), "{answer}");
    let answer = raw(&local, format!("{head}x: {}\r\n\r\n", "y".repeat(100_000)).as_bytes());
    assert!(answer.is_empty() || answer.contains(" 431 "), "{answer}");
    let answer = raw(&local, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03");
    assert!(answer.is_empty() || answer.contains(" 400 "), "{answer}");
    let answer = raw(&local, b"DELETE /Version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(answer.contains(" 405 "), "{answer}");
    for body in ["\u{0}", "{\"path\":\"\\ud800\"}", "{\"path\":{\"a\":[[[[]]]]}}", "nul", "{\"purpose\":"] {
        let request = format!("{head}Connection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len()).replace("/Version", "/GetKey");
        let answer = raw(&local, request.as_bytes());
        assert!(answer.contains(" 400 ") && answer.contains("\"error\""), "{body}: {answer}");
    }
    // Protobuf: no content type.
    let answer = raw(&local, b"POST /GetKey HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 6\r\n\r\n\x0a\x04test");
    assert!(answer.contains(" 200 ") && answer.contains("application/octet-stream"), "{answer}");
    let answer = raw(&local, b"POST /GetKey HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3\r\n\r\n\x0a\xff\xff");
    assert!(answer.contains(" 400 ") && answer.contains("not well formed"), "{answer}");
    assert_eq!(local.guest("Version", &json!({})).0, 200, "and it serves on");
}
