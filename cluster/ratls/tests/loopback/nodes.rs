//! Node connections: HELLO, one kept connection, its end and renewal.

use std::sync::Arc;
use std::time::Duration;

use dstack_protocol::{ClusterId, Seat};
use dstack_ratls::hello::ExpectedPeer;
use dstack_ratls::peer_client::PeerLimits;
use dstack_ratls::{HelloIdentity, HelloSigner, PeerError};

use crate::world::*;

/// Says it holds a key and cannot sign with it.
struct Pretender([u8; 32]);

impl HelloSigner for Pretender {
    fn node_key(&self) -> [u8; 32] {
        self.0
    }

    fn sign(&self, message: &[u8]) -> [u8; 64] {
        node_key(66).sign(message)
    }
}

fn hello_code(error: PeerError) -> &'static str {
    match error {
        PeerError::Hello { error, .. } => error.code(),
        PeerError::RefusedByPeer { .. } => "refused by peer",
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_hellos_are_refused_by_server_and_client() {
    let world = World::new();
    let server = world.server(2, Default::default()).await;
    let outcome = async |hello, expected| {
        let peer = world.dialer_with(hello, world.source(), PeerLimits::default()).peer(server.address, expected);
        match whoami(&peer).await {
            Ok(_) => "accepted",
            // The client had the server's HELLO before the server hung up: the refusal shows at the request.
            Err(PeerError::Unreachable { .. } | PeerError::Protocol { .. }) => "refused by peer",
            Err(error) => hello_code(error),
        }
    };
    let any = ExpectedPeer::default();
    assert_eq!(outcome(hello(1), ExpectedPeer { seat: Some(Seat(2)), node_key: Some(node_key(2).node_key()) }).await, "accepted");
    assert_eq!(outcome(hello(1), ExpectedPeer { seat: Some(Seat(3)), node_key: None }).await, "hello.seat");
    assert_eq!(outcome(hello(1), ExpectedPeer { seat: None, node_key: Some([7; 32]) }).await, "hello.node_key");
    assert_eq!(outcome(HelloIdentity { cluster_id: ClusterId([9; 32]), ..hello(1) }, any).await, "hello.cluster");
    assert_eq!(outcome(hello(2), any).await, "hello.seat");
    let pretender = HelloIdentity { signer: Arc::new(Pretender(node_key(3).node_key())), ..hello(3) };
    assert_eq!(outcome(pretender, any).await, "refused by peer");
    // The all-zero key is of small order: a signature that verifies for it exists, strict verification refuses it.
    let weak = HelloIdentity { signer: Arc::new(Pretender([0; 32])), ..hello(3) };
    assert_eq!(outcome(weak, any).await, "refused by peer");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_carries_all_requests_at_once() {
    let world = World::new();
    let server = world.server(2, Default::default()).await;
    let peer = world.dialer(1).peer(server.address, Default::default());
    let began = std::time::Instant::now();
    let requests = (0..50).map(|_| peer.post("/slow", "300", 10 * SECOND));
    for answer in futures::future::join_all(requests).await {
        assert_eq!(text(answer.unwrap()), "waited 300");
    }
    assert!(began.elapsed() < 10 * SECOND, "requests ran one after another");
    assert_eq!(server.handle.connections(), 1);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_told_apart_and_the_connection_comes_back() {
    let world = World::new();
    let limits = PeerLimits {
        backoff_min: Duration::from_millis(50),
        backoff_max: Duration::from_millis(200),
        answer_bytes_max: 1000,
        ..PeerLimits::default()
    };
    let dialer = world.dialer_with(hello(1), world.source(), limits);
    let server = world.server(2, Default::default()).await;
    let address = server.address;
    let peer = dialer.peer(address, Default::default());
    text(peer.post("/echo", "x", 5 * SECOND).await.unwrap());
    let slow = peer.post("/slow", "5000", Duration::from_millis(200)).await.unwrap_err();
    assert_eq!(slow, PeerError::Timeout { address, stage: "request", waited: Duration::from_millis(200) });
    assert_eq!(peer.post("/echo", vec![0; 1001], 5 * SECOND).await.unwrap_err(), PeerError::TooLarge { address, limit_bytes: 1000 });
    assert_eq!(peer.post("/nowhere", "", 5 * SECOND).await.unwrap().0, 404);
    server.stop().await;

    let down = peer.post("/echo", "x", 5 * SECOND).await.unwrap_err();
    assert!(matches!(down, PeerError::Unreachable { .. }), "{down:?}");
    let began = std::time::Instant::now();
    assert!(peer.post("/echo", "x", 5 * SECOND).await.is_err());
    assert!(began.elapsed() < 3 * SECOND, "a peer known to be down answers at once");

    let server = world.server_at(address, 2, Default::default(), world.source()).await;
    tokio::time::timeout(10 * SECOND, async {
        while peer.post("/echo", "x", 5 * SECOND).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_connection_is_replaced_and_its_requests_finish() {
    let world = World::new();
    let server = world.server(2, Default::default()).await;
    let limits = PeerLimits { age_max: Duration::from_millis(300), ..PeerLimits::default() };
    let peer = world.dialer_with(hello(1), world.source(), limits).peer(server.address, Default::default());
    let running = tokio::spawn({
        let peer = peer.clone();
        async move { peer.post("/slow", "4000", 20 * SECOND).await }
    });
    tokio::time::sleep(Duration::from_millis(600)).await;
    text(peer.post("/echo", "x", 5 * SECOND).await.unwrap());
    assert_eq!(server.handle.connections(), 2, "the old one is still finishing");
    assert_eq!(text(running.await.unwrap().unwrap()), "waited 4000");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_lets_requests_finish() {
    let world = World::new();
    let server = world.server(2, Default::default()).await;
    let peer = world.dialer(1).peer(server.address, Default::default());
    peer.peer().await.unwrap();
    let running = tokio::spawn({
        let peer = peer.clone();
        async move { peer.post("/slow", "3000", 20 * SECOND).await }
    });
    tokio::time::sleep(Duration::from_millis(1000)).await;
    let address = server.address;
    server.shutdown.cancel();
    // The listener is closed at once, not when the request ends.
    while tokio::net::TcpStream::connect(address).await.is_ok() {
        assert!(!running.is_finished(), "the listener outlived the request");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(text(running.await.unwrap().unwrap()), "waited 3000");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_accepting_side_ends_old_connections_without_a_failed_request() {
    let world = World::new();
    let mut limits = dstack_ratls::Limits::default();
    limits.node_http.age_max = Duration::from_millis(200);
    let server = world.server(2, limits).await;
    let peer = world.dialer(1).peer(server.address, Default::default());
    let began = std::time::Instant::now();
    let (mut done, mut failed) = (0, 0);
    while began.elapsed() < 3 * SECOND {
        match peer.post("/slow", "5", 5 * SECOND).await {
            Ok(answer) => {
                assert_eq!(text(answer), "waited 5");
                done += 1;
            }
            Err(error) => {
                println!("{error}");
                failed += 1;
            }
        }
    }
    assert!(done > 20, "{done}");
    assert_eq!(failed, 0);
    server.stop().await;
}
