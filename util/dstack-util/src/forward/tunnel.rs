//! One tunnel: CONNECT, the allow-list, bytes both ways. Owns: its limits in bytes and time. Never: connects to what is not allowed.

use std::pin::Pin;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::listen::Stream;
use super::target::Target;

/// Largest question, bytes.
const QUESTION_BYTES_MAX: usize = 1024;
/// For the question, and for connecting to the target.
const OPENING: Duration = Duration::from_secs(10);
/// A tunnel ends after this long; sessions of clients last less.
const TUNNEL_LIFE: Duration = Duration::from_secs(2 * 3600);

/// What a tunnel carried.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) target: Target,
    pub(super) up_bytes: u64,
    pub(super) down_bytes: u64,
}

/// Why there was none.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum TunnelError {
    /// Peer's fault.
    #[error("no question within {OPENING:?}")]
    Silent,
    /// Peer's fault.
    #[error("the question {why}")]
    Question { why: &'static str },
    /// Peer's fault, or ours when a node is missing in the list.
    #[error("{target} is not allowed")]
    NotAllowed { target: String },
    /// Ours: raise the limit, or look who connects.
    #[error("too many tunnels")]
    Full,
    /// The target's fault.
    #[error("{target} unreachable: {reason}")]
    Unreachable { target: String, reason: String },
    /// The network's.
    #[error("the connection broke: {0}")]
    Broken(String),
}

/// Serves one connection to its end.
pub(super) async fn run(mut stream: Pin<Box<dyn Stream>>, allowed: &[Target], has_place: bool) -> Result<Done, TunnelError> {
    let opened = match has_place {
        true => open(&mut stream, allowed).await,
        false => Err(TunnelError::Full),
    };
    let (target, mut node) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            let answer = format!("HTTP/1.1 {}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n", status(&error));
            let _ = timeout(OPENING, async {
                stream.write_all(answer.as_bytes()).await?;
                stream.shutdown().await
            })
            .await;
            return Err(error);
        }
    };
    let broken = |error: std::io::Error| TunnelError::Broken(error.to_string());
    stream.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.map_err(broken)?;
    match timeout(TUNNEL_LIFE, tokio::io::copy_bidirectional(&mut stream, &mut node)).await {
        Ok(carried) => carried.map(|(up_bytes, down_bytes)| Done { target, up_bytes, down_bytes }).map_err(broken),
        Err(_elapsed) => Err(TunnelError::Broken(format!("ended after {TUNNEL_LIFE:?}"))),
    }
}

async fn open(stream: &mut Pin<Box<dyn Stream>>, allowed: &[Target]) -> Result<(Target, TcpStream), TunnelError> {
    let head = timeout(OPENING, question(stream)).await.map_err(|_| TunnelError::Silent)??;
    let asked = asked(&head)?;
    let target = asked.parse::<Target>().ok().filter(|target| allowed.contains(target));
    let target = target.ok_or_else(|| TunnelError::NotAllowed { target: asked.chars().take(200).collect() })?;
    let unreachable = |reason: String| TunnelError::Unreachable { target: target.to_string(), reason };
    let node = timeout(OPENING, TcpStream::connect(target.authority())).await;
    let node = node.map_err(|_| unreachable(format!("no answer within {OPENING:?}")))?.map_err(|error| unreachable(error.to_string()))?;
    node.set_nodelay(true).map_err(|error| unreachable(error.to_string()))?;
    Ok((target, node))
}

/// The head of the request, without a byte of what follows.
async fn question(stream: &mut Pin<Box<dyn Stream>>) -> Result<Vec<u8>, TunnelError> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() >= QUESTION_BYTES_MAX {
            return Err(TunnelError::Question { why: "has more than 1024 bytes" });
        }
        head.push(stream.read_u8().await.map_err(|error| TunnelError::Broken(error.to_string()))?);
    }
    Ok(head)
}

/// The authority that a CONNECT asks for.
fn asked(head: &[u8]) -> Result<String, TunnelError> {
    let head = std::str::from_utf8(head).map_err(|_| TunnelError::Question { why: "is no text" })?;
    let mut words = head.lines().next().unwrap_or_default().split(' ');
    match (words.next(), words.next(), words.next(), words.next()) {
        (Some("CONNECT"), Some(authority), Some("HTTP/1.1" | "HTTP/1.0"), None) => Ok(authority.to_owned()),
        (Some("CONNECT"), ..) => Err(TunnelError::Question { why: "is no HTTP/1 CONNECT" }),
        _ => Err(TunnelError::Question { why: "is no CONNECT" }),
    }
}

fn status(error: &TunnelError) -> &'static str {
    match error {
        TunnelError::Silent => "408 Request Timeout",
        TunnelError::Question { .. } | TunnelError::Broken(_) => "400 Bad Request",
        TunnelError::NotAllowed { .. } => "403 Forbidden",
        TunnelError::Full => "503 Service Unavailable",
        TunnelError::Unreachable { .. } => "502 Bad Gateway",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_connect_is_understood() {
        assert_eq!(asked(b"CONNECT kms-1:12001 HTTP/1.1\r\nhost: x\r\n\r\n"), Ok("kms-1:12001".to_owned()));
        for (head, why) in [
            (&b"GET http://kms-1/ HTTP/1.1\r\n\r\n"[..], "is no CONNECT"),
            (b"CONNECT kms-1:12001\r\n\r\n", "is no HTTP/1 CONNECT"),
            (b"CONNECT kms-1:12001 HTTP/1.1 x\r\n\r\n", "is no HTTP/1 CONNECT"),
            (b"\xff\r\n\r\n", "is no text"),
            (b"\r\n\r\n", "is no CONNECT"),
        ] {
            assert_eq!(asked(head), Err(TunnelError::Question { why }));
        }
    }

    async fn answer_to(ask: &[u8], allowed: &[Target], has_place: bool) -> (String, Option<TunnelError>) {
        let (mut ours, theirs) = tokio::io::duplex(8192);
        ours.write_all(ask).await.unwrap();
        ours.shutdown().await.unwrap();
        let outcome = run(Box::pin(theirs), allowed, has_place).await;
        let mut answer = Vec::new();
        ours.read_to_end(&mut answer).await.unwrap();
        (String::from_utf8_lossy(&answer).into_owned(), outcome.err())
    }

    #[tokio::test]
    async fn bytes_go_both_ways_to_an_allowed_target_only() {
        let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr().unwrap();
        let echo = tokio::spawn(async move {
            let (mut stream, _) = server.accept().await.unwrap();
            let mut said = [0; 4];
            stream.read_exact(&mut said).await.unwrap();
            stream.write_all(&said).await.unwrap();
        });
        let allowed = [address.to_string().parse::<Target>().unwrap()];
        let ask = format!("CONNECT {address} HTTP/1.1\r\n\r\nping");
        let (answer, error) = answer_to(ask.as_bytes(), &allowed, true).await;
        assert_eq!((answer.as_str(), error), ("HTTP/1.1 200 Connection established\r\n\r\nping", None));
        echo.await.unwrap();

        let (answer, error) = answer_to(b"CONNECT 127.0.0.1:22 HTTP/1.1\r\n\r\n", &allowed, true).await;
        assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
        assert_eq!(error, Some(TunnelError::NotAllowed { target: "127.0.0.1:22".into() }));
        // Nobody listens there any more.
        let (answer, error) = answer_to(ask.as_bytes(), &allowed, true).await;
        assert!(answer.starts_with("HTTP/1.1 502 ") && matches!(error, Some(TunnelError::Unreachable { .. })), "{answer}");
        let (answer, error) = answer_to(ask.as_bytes(), &allowed, false).await;
        assert!(answer.starts_with("HTTP/1.1 503 ") && error == Some(TunnelError::Full), "{answer}");
        let (answer, error) = answer_to(&[b'x'; 2000], &allowed, true).await;
        assert!(answer.starts_with("HTTP/1.1 400 ") && matches!(error, Some(TunnelError::Question { .. })), "{answer}");
        assert!(matches!(answer_to(b"CONN", &allowed, true).await.1, Some(TunnelError::Broken(_))));
    }
}
