//! One question to a unix socket inside: HTTP/1.1, the connection closed after the answer. Owns: what is reported of it: the status, the
//! members of a JSON answer that are no key, the answer's hash. Never: prints the whole answer, which may hold a key.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use sha2::{Digest as _, Sha256};

use crate::say;

/// For the socket to be there.
const PATIENCE: Duration = Duration::from_secs(120);
/// Longest answer.
const ANSWER_BYTES_MAX: u64 = 4 << 20;
/// Members whose value is shown.
const SHOWN: &[&str] = &["app_id", "instance_id", "quote", "attestation", "version", "error", "report_data"];

/// `words`: socket, path, body.
pub(crate) fn ask(words: &[&str]) -> anyhow::Result<()> {
    let [socket, path, body] = words else { bail!("ask: a socket, a path and a body, not {words:?}") };
    let begun = Instant::now();
    let mut stream = loop {
        match UnixStream::connect(Path::new(socket)) {
            Ok(stream) => break stream,
            Err(error) if begun.elapsed() > PATIENCE => return Err(error).with_context(|| format!("nobody at {socket}")),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    };
    let head = "Host: agent\r\nConnection: close\r\nContent-Type: application/json";
    write!(stream, "POST {path} HTTP/1.1\r\n{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
    let answer = String::from_utf8(answer).context("the answer is no text")?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer has no end of its head")?;
    say("answered", &format!("{path} {}", head.lines().next().unwrap_or_default()));
    say("answer-hash", &format!("{path} {}", hex::encode(Sha256::digest(body))));
    for name in SHOWN {
        // dstack's answers are flat, and hex has no quotation mark
        let found = body.split_once(&format!("\"{name}\":\"")).and_then(|(_, rest)| rest.split_once('"'));
        if let Some((value, _)) = found {
            say("answer", &format!("{path} {name} {value}"));
        }
    }
    Ok(())
}
