//! Administration and Unix sockets.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use axum::extract::Extension;
use axum::routing::get;
use axum::{Router, body::Body};
use dstack_ratls::plain::{PlainLimits, PlainServer, UnixPeer, UnixServer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

use crate::world::*;

fn router() -> Router {
    async fn who(Extension(peer): Extension<UnixPeer>) -> String {
        format!("{:?} {}", peer.pid, peer.uid)
    }
    Router::new().route("/who", get(who)).route("/health", get(async || Body::from("ok")))
}

async fn ask(stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin), path: &str) -> String {
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn unix_sockets_know_the_process_and_go_with_the_server() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    // Left behind by a process that was killed.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let shutdown = CancellationToken::new();
    let server = UnixServer::bind(&path, 0o660, PlainLimits::default()).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
    let second = UnixServer::bind(&path, 0o660, PlainLimits::default()).unwrap_err();
    assert!(second.to_string().contains("another process"), "{second}");
    let task = tokio::spawn(server.run(router(), shutdown.clone()));
    let mut stream = tokio::net::UnixStream::connect(&path).await.unwrap();
    let answer = ask(&mut stream, "/who").await;
    assert!(
        answer.ends_with(&format!(
            "{:?} {}",
            Some(std::process::id() as i32),
            std::fs::metadata(directory.path()).map(|m| std::os::unix::fs::MetadataExt::uid(&m)).unwrap()
        )),
        "{answer}"
    );
    shutdown.cancel();
    tokio::time::timeout(10 * SECOND, task).await.unwrap().unwrap();
    assert!(!path.exists());

    std::fs::write(&path, "not a socket").unwrap();
    assert!(UnixServer::bind(&path, 0o660, PlainLimits::default()).is_err());
    assert!(path.exists(), "a file that is no socket is left alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_listener_sheds_idle_connections() {
    let mut limits = PlainLimits { connections_max: 8, ..PlainLimits::default() };
    limits.http.header_timeout = Duration::from_millis(300);
    let server = PlainServer::bind("127.0.0.1:0".parse().unwrap(), limits).await.unwrap();
    let (address, shutdown) = (server.local_address().unwrap(), CancellationToken::new());
    let task = tokio::spawn(server.run(router(), shutdown.clone()));
    let mut silent = Vec::new();
    for _ in 0..40 {
        silent.push(tokio::net::TcpStream::connect(address).await.unwrap());
    }
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let answer = tokio::time::timeout(10 * SECOND, ask(&mut stream, "/health")).await.unwrap();
    assert!(answer.ends_with("ok"), "{answer}");
    shutdown.cancel();
    tokio::time::timeout(10 * SECOND, task).await.unwrap().unwrap();
}

/// Follows a body that goes on for three times the idle timeout, a piece at a time; `None` where this machine stood still for so long
/// between two pieces that the server had a right to hang up.
async fn followed(idle: Duration) -> Option<String> {
    let mut limits = PlainLimits::default();
    limits.http.idle_timeout = idle;
    let server = PlainServer::bind("127.0.0.1:0".parse().unwrap(), limits).await.unwrap();
    let (address, shutdown) = (server.local_address().unwrap(), CancellationToken::new());
    let (pieces, body) = tokio::sync::mpsc::channel::<&str>(1);
    let body = std::sync::Arc::new(std::sync::Mutex::new(Some(body)));
    let log = async move || {
        let body = body.lock().unwrap().take().unwrap();
        let pieces = futures::stream::unfold(body, async |mut body| body.recv().await.map(|piece| (Ok::<_, std::io::Error>(piece), body)));
        Body::from_stream(pieces)
    };
    let task = tokio::spawn(server.run(Router::new().route("/log", get(log)), shutdown.clone()));
    let reader = tokio::spawn(async move {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        ask(&mut stream, "/log").await
    });
    let (began, mut last, mut gap) = (Instant::now(), Instant::now(), Duration::ZERO);
    while last - began < 3 * idle {
        tokio::time::sleep(idle / 8).await;
        if pieces.send("piece ").await.is_err() {
            break;
        }
        gap = gap.max(last.elapsed());
        last = Instant::now();
    }
    let _ = pieces.send("end").await;
    drop(pieces);
    let answer = tokio::time::timeout(30 * SECOND, reader).await.unwrap().unwrap();
    shutdown.cancel();
    tokio::time::timeout(10 * SECOND, task).await.unwrap().unwrap();
    (gap < idle / 2).then_some(answer)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_goes_on_keeps_its_connection() {
    for idle in [1, 2, 4, 8] {
        if let Some(answer) = followed(idle * SECOND).await {
            assert!(answer.contains("end\r\n0\r\n"), "{answer}");
            return;
        }
    }
    panic!("this machine stood still each time");
}
