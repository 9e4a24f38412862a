//! Session certificates of clients (threshold.md §2.2).

use dstack_protocol::ClusterId;
use dstack_ratls::certificate::SessionBinding;
use dstack_ratls::client::ClientDialer;
use dstack_ratls::{CertificateSource, CertifiedIdentity, PeerError};
use dstack_testkit::Measured;

use crate::world::*;

const SESSION: SessionBinding = SessionBinding { cluster_id: CLUSTER, beacon_pos: BEACON_POS, beacon: BEACON };

fn certificate(world: &World, session: SessionBinding) -> CertifiedIdentity {
    let app = Measured::compose(COMPOSE);
    CertifiedIdentity::for_session((world.now())(), 3600 * SECOND, &session, |report_data| world.evidence(&app, report_data)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_reaches_the_routes_over_both_http_versions() {
    let world = World::new();
    let server = world.server(2, Default::default()).await;
    let source = CertificateSource::new(certificate(&world, SESSION));
    let spki = hex::encode(source.current().spki());
    let dialers = [
        ClientDialer::new(Some(source.clone()), world.judge(), world.now()).unwrap(),
        ClientDialer::http1(Some(source), world.judge(), world.now()).unwrap(),
    ];
    for dialer in dialers {
        let connection = dialer.connect(server.address, 5 * SECOND).await.unwrap();
        let answer = text(connection.request(get_request("/whoami")).await.unwrap());
        assert!(answer.ends_with(&format!("session Some({BEACON_POS}) spki {spki}")), "{answer}");
        let mut request = get_request("/echo");
        request.method = hyper::Method::POST;
        request.body = vec![7; 100_000].into();
        assert_eq!(connection.request(request).await.unwrap(), (200, vec![7; 100_000].into()));
        assert!(!connection.is_closed());
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_of_other_clusters_and_unknown_beacons_are_refused() {
    let world = World::new();
    let server = world.server(2, Default::default()).await;
    let foreign = SessionBinding { cluster_id: ClusterId([9; 32]), ..SESSION };
    let unknown = SessionBinding { beacon_pos: BEACON_POS + 1, ..SESSION };
    let guessed = SessionBinding { beacon: [0; 32], ..SESSION };
    for session in [foreign, unknown, guessed] {
        let connection = world.client(Some(certificate(&world, session))).connect(server.address, 5 * SECOND).await;
        let error = match connection {
            Ok(connection) => connection.request(get_request("/whoami")).await.unwrap_err(),
            Err(error) => error,
        };
        assert!(matches!(error, PeerError::RefusedByPeer { .. } | PeerError::Unreachable { .. }), "{error:?}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_no_node() {
    let world = World::new();
    let server = world.server(2, Default::default()).await;
    let node = Measured::executable(NODE_BINARY);
    let session =
        CertifiedIdentity::for_session((world.now())(), 60 * SECOND, &SESSION, |report_data| world.evidence(&node, report_data)).unwrap();
    let peer = world.dialer_with(hello(1), CertificateSource::new(session), Default::default()).peer(server.address, Default::default());
    assert!(matches!(whoami(&peer).await.unwrap_err(), PeerError::RefusedByPeer { .. } | PeerError::Unreachable { .. }));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_are_capped() {
    let world = World::new();
    let mut limits = dstack_ratls::Limits::default();
    limits.client_http.body_bytes_max = 1000;
    let server = world.server(2, limits).await;
    let connection = world.client(None).connect(server.address, 5 * SECOND).await.unwrap();
    let mut request = get_request("/echo");
    request.method = hyper::Method::POST;
    request.body = vec![7; 1001].into();
    assert_eq!(connection.request(request.clone()).await.unwrap().0, 413);
    request.body = vec![7; 1000].into();
    assert_eq!(connection.request(request.clone()).await.unwrap().0, 200);
    request.answer_bytes_max = 999;
    assert_eq!(connection.request(request).await.unwrap_err().code(), "peer.too_large");
    server.stop().await;
}
