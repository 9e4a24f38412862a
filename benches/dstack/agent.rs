//! Apps that ask their guest agent over its socket, as SDKs do: HTTP/1.1, kept alive. Owns: the questions. Never: prints a key.

use std::path::PathBuf;
use std::time::Duration;

use dstack_benches::series::{self, Series};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

/// Largest answer: a quote with its log, in hex.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Question {
    pub(crate) method: &'static str,
    arguments: &'static str,
    /// A member that a good answer has.
    member: &'static str,
}

/// The three methods with work behind them.
pub(crate) const QUESTIONS: [Question; 3] = [
    Question { method: "GetKey", arguments: r#"{"path":"bench/1","purpose":"bench","algorithm":"secp256k1"}"#, member: "key" },
    Question {
        method: "Sign",
        arguments: r#"{"algorithm":"secp256k1","data":"616e7920646174612074686174206973207369676e6564"}"#,
        member: "signature",
    },
    Question { method: "GetQuote", arguments: r#"{"report_data":"00112233445566778899aabbccddeeff"}"#, member: "quote" },
];

/// Has `clients` connections ask.
pub(crate) async fn run(socket: PathBuf, question: Question, clients: usize, requests: usize, patience: Duration) -> Series {
    let mut connections = Vec::new();
    for _ in 0..clients {
        let mut stream = UnixStream::connect(&socket).await.unwrap();
        ask(&mut stream, question).await.unwrap();
        connections.push(stream);
    }
    series::run(connections, requests, patience, move |mut stream: UnixStream| async move {
        let outcome = ask(&mut stream, question).await;
        (stream, outcome)
    })
    .await
}

async fn ask(stream: &mut UnixStream, question: Question) -> Result<(), &'static str> {
    let Question { method, arguments, member } = question;
    let length = arguments.len();
    let request =
        format!("POST /{method} HTTP/1.1\r\nhost: dstack\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{arguments}");
    stream.write_all(request.as_bytes()).await.map_err(|_| "closed")?;
    let mut answer = Vec::new();
    let (head_bytes, body_bytes) = loop {
        if let Some(end) = answer.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = std::str::from_utf8(&answer[..end]).map_err(|_| "no HTTP")?;
            let length =
                head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse::<usize>().ok());
            let length = length.filter(|length| *length <= ANSWER_BYTES_MAX).ok_or("no length")?;
            break if head.starts_with("HTTP/1.1 200 ") { (end + 4, length) } else { return Err("refused") };
        }
        read(stream, &mut answer).await?;
    };
    while answer.len() < head_bytes + body_bytes {
        read(stream, &mut answer).await?;
    }
    let body: Value = serde_json::from_slice(&answer[head_bytes..]).map_err(|_| "no JSON")?;
    if body[member].as_str().is_some_and(|text| !text.is_empty()) { Ok(()) } else { Err("member missing") }
}

async fn read(stream: &mut UnixStream, answer: &mut Vec<u8>) -> Result<(), &'static str> {
    answer.reserve(16 * 1024);
    match stream.read_buf(answer).await {
        Ok(0) | Err(_) => Err("closed"),
        Ok(_) => Ok(()),
    }
}
