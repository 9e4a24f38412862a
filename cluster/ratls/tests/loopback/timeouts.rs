//! Slow-loris and half-open connections end by themselves, at every step where a peer may stall.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use dstack_protocol::binding;
use dstack_ratls::{ALPN_NODE, Limits};
use dstack_testkit::Measured;
use rustls::version::TLS13;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::raw::{self, RawCertificate};
use crate::world::*;

fn impatient() -> Limits {
    let mut limits = Limits {
        greeting_timeout: Duration::from_millis(400),
        handshake_timeout: Duration::from_millis(600),
        hello_timeout: Duration::from_millis(400),
        ..Limits::default()
    };
    for http in [&mut limits.client_http, &mut limits.node_http] {
        http.header_timeout = Duration::from_millis(400);
        http.request_timeout = Duration::from_millis(600);
        http.idle_timeout = Duration::from_millis(800);
    }
    limits
}

/// Waits for the server to hang up; how long it took.
async fn until_closed(stream: &mut (impl AsyncRead + Unpin)) -> (Duration, Vec<u8>) {
    let began = Instant::now();
    let mut received = Vec::new();
    // Reset and end of stream both mean closed.
    let _ = tokio::time::timeout(30 * SECOND, stream.read_to_end(&mut received)).await.expect("the server never hung up");
    (began.elapsed(), received)
}

/// Waits until the server holds no connection.
async fn forgotten(server: &Running) {
    let empty = async {
        while server.handle.connections() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(10 * SECOND, empty).await.expect("the server still holds connections");
}

async fn tcp(address: SocketAddr) -> TcpStream {
    TcpStream::connect(address).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_before_and_within_the_client_hello() {
    let world = World::new();
    let server = world.server(2, impatient()).await;
    let mut silent = tcp(server.address).await;
    assert!(until_closed(&mut silent).await.0 < 8 * SECOND);
    // A TLS record header that promises 512 bytes, then one byte at a time.
    let mut loris = tcp(server.address).await;
    loris.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3]).await.unwrap();
    let began = Instant::now();
    while loris.write_all(&[7]).await.is_ok() && began.elapsed() < 30 * SECOND {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(began.elapsed() < 8 * SECOND);
    forgotten(&server).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_tls_is_refused_without_waiting() {
    let world = World::new();
    let server = world.server(2, Limits { greeting_timeout: 60 * SECOND, ..Limits::default() }).await;
    let mut wrong = tcp(server.address).await;
    wrong.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert!(until_closed(&mut wrong).await.0 < 8 * SECOND);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_in_the_middle_of_the_handshake() {
    let world = World::new();
    let server = world.server(2, impatient()).await;
    // A real ClientHello, relayed; the server's flight is never answered.
    let mut stream = tcp(server.address).await;
    stream.write_all(&raw::client_hello(ALPN_NODE)).await.unwrap();
    let (took, flight) = until_closed(&mut stream).await;
    assert!(flight.len() > 1000, "the server sent its flight: {}", flight.len());
    assert!(took < 8 * SECOND);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_says_no_hello() {
    let world = World::new();
    let server = world.server(2, impatient()).await;
    let certificate = RawCertificate::with_evidence(|spki| {
        Some(world.evidence(&Measured::executable(NODE_BINARY), binding::ratls_certificate(spki)).unwrap())
    });
    let mut stream = raw::connect(server.address, &TLS13, Some(certificate), ALPN_NODE).await.unwrap();
    let (took, received) = until_closed(&mut stream).await;
    assert_eq!(received.len(), dstack_protocol::hello::HELLO_BYTES, "the server's own hello and nothing more");
    assert!(took < 8 * SECOND);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_heads_slow_bodies_and_idleness() {
    let world = World::new();
    let server = world.server(2, impatient()).await;
    let open = async || raw::connect(server.address, &TLS13, None, b"http/1.1").await.unwrap();

    let mut head = open().await;
    head.write_all(b"GET /whoami HTTP/1.1\r\nhost: n\r\nx-").await.unwrap();
    let (took, _) = until_closed(&mut head).await;
    assert!(took < 8 * SECOND);

    let mut body = open().await;
    body.write_all(b"POST /echo HTTP/1.1\r\nhost: n\r\ncontent-length: 100\r\n\r\nonly this").await.unwrap();
    let (took, answer) = until_closed(&mut body).await;
    assert!(String::from_utf8_lossy(&answer).starts_with("HTTP/1.1 408"), "{}", String::from_utf8_lossy(&answer));
    assert!(took < 8 * SECOND);

    let mut idle = open().await;
    idle.write_all(b"GET /whoami HTTP/1.1\r\nhost: n\r\n\r\n").await.unwrap();
    let (took, answer) = until_closed(&mut idle).await;
    assert!(String::from_utf8_lossy(&answer).ends_with("anonymous"));
    assert!(took < 8 * SECOND);

    let mut silent_h2 = raw::connect(server.address, &TLS13, None, b"h2").await.unwrap();
    assert!(until_closed(&mut silent_h2).await.0 < 8 * SECOND);

    let mut huge = open().await;
    let _ = huge.write_all(&[b"GET / HTTP/1.1\r\nx: ", &vec![b'a'; 100_000][..], b"\r\n\r\n"].concat()).await;
    let (_, answer) = until_closed(&mut huge).await;
    assert!(!String::from_utf8_lossy(&answer).contains(" 200 "));
    forgotten(&server).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_connection_is_not_idle() {
    let world = World::new();
    let mut limits = impatient();
    limits.node_http.request_timeout = 10 * SECOND;
    let server = world.server(2, limits).await;
    let peer = world.dialer(1).peer(server.address, Default::default());
    assert_eq!(text(peer.post("/slow", "2000", 10 * SECOND).await.unwrap()), "waited 2000");
    server.stop().await;
}
