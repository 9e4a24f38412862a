//! Certificates change under running connections.

use std::sync::Arc;
use std::time::Duration;

use dstack_ratls::source::Issue;
use dstack_ratls::{CertifiedIdentity, PeerError};
use dstack_testkit::{Host, Measured};
use tokio_util::sync::CancellationToken;

use crate::world::*;

#[tokio::test(flavor = "multi_thread")]
async fn rotation_drops_nothing_and_new_connections_see_the_new_key() {
    let world = World::new();
    let server = world.server(2, Default::default()).await;
    let client_source = dstack_ratls::CertificateSource::new(world.node_certificate(60 * SECOND));
    let dialer = world.dialer_with(hello(1), Arc::clone(&client_source), Default::default());
    let kept = dialer.peer(server.address, Default::default());
    text(kept.post("/echo", "x", 5 * SECOND).await.unwrap());

    // Twenty rotations on both sides while requests run without a pause.
    let stop = CancellationToken::new();
    let load = tokio::spawn({
        let (kept, stop) = (kept.clone(), stop.clone());
        async move {
            let mut done = 0u32;
            while !stop.is_cancelled() {
                text(kept.post("/echo", "x", 5 * SECOND).await.unwrap());
                done += 1;
            }
            done
        }
    });
    for _ in 0..20 {
        server.source.rotate(world.node_certificate(3600 * SECOND));
        client_source.rotate(world.node_certificate(3600 * SECOND));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    stop.cancel();
    assert!(load.await.unwrap() > 20);
    assert_eq!(server.handle.connections(), 1, "it is still the first connection");

    // The first certificates are over; the connection made with them goes on, new ones use the new.
    world.advance(61 * SECOND);
    text(kept.post("/echo", "x", 5 * SECOND).await.unwrap());
    let fresh = dialer.peer(server.address, Default::default());
    text(fresh.post("/echo", "x", 5 * SECOND).await.unwrap());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nitro_node_renews_before_its_hour_is_over() {
    let world = Arc::new(World::new());
    let (host, executable) = (Host::nitro("enclave host", &world.roots).unwrap(), Measured::executable(NODE_BINARY));
    let issue: Issue = {
        let host = Arc::new(host);
        Arc::new(move |now| {
            CertifiedIdentity::for_node(now, 3600 * SECOND, |report_data| {
                host.evidence(&executable, &report_data, now).map_err(|error| error.to_string())
            })
        })
    };
    let source = dstack_ratls::CertificateSource::new(issue((world.now())()).unwrap());
    let server = world.server(2, Default::default()).await;
    let client = dstack_ratls::client::ClientDialer::new(Some(Arc::clone(&source)), world.judge(), world.now()).unwrap();
    let accepted = async || match client.connect(server.address, 5 * SECOND).await {
        Ok(connection) => connection.request(get_request("/echo")).await.map(|answer| answer.0),
        Err(error) => Err(error),
    };
    assert_eq!(accepted().await, Ok(405));
    server.source.rotate(world.node_certificate(24 * 3600 * SECOND));

    world.advance(3601 * SECOND);
    let error = accepted().await.unwrap_err();
    assert!(matches!(error, PeerError::RefusedByPeer { .. } | PeerError::Unreachable { .. }), "an hour old evidence is refused: {error:?}");
    let stop = CancellationToken::new();
    let task = tokio::spawn(Arc::clone(&source).keep_fresh(issue, world.now(), 600 * SECOND, stop.clone()));
    tokio::time::timeout(10 * SECOND, async {
        while accepted().await != Ok(405) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap();
    stop.cancel();
    task.await.unwrap();
    server.stop().await;
}
