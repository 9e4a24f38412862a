//! Looking at a server's certificate.

use dstack_attest::x509ext::CertificateClaims;
use dstack_protocol::binding;
use dstack_ratls::PeerError;
use dstack_ratls::probe::server_certificates;
use dstack_testkit::Measured;
use rustls::version::{TLS12, TLS13};
use std::time::Duration;

use crate::raw::{RawCertificate, serve_once};
use crate::world::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_sees_the_evidence_of_a_node() {
    let world = World::new();
    let server = world.server(2, Default::default()).await;
    let certificates = server_certificates(server.address, 5 * SECOND).await.unwrap();
    let claims = CertificateClaims::read(&certificates[0]).unwrap();
    assert!(claims.evidence.is_some() && certificates.len() == 1);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_takes_any_certificate_whose_key_signs() {
    for version in [&TLS12, &TLS13] {
        let plain = RawCertificate::with_evidence(|_| None);
        let shown = plain.chain[0].clone();
        let (address, _task) = serve_once(version, plain, b"http/1.1").await;
        assert_eq!(server_certificates(address, 5 * SECOND).await.unwrap(), vec![shown.to_vec()]);
    }
    let world = World::new();
    let mut stolen = RawCertificate::with_evidence(|spki| {
        Some(world.evidence(&Measured::executable(NODE_BINARY), binding::ratls_certificate(spki)).unwrap())
    });
    stolen.key = RawCertificate::with_evidence(|_| None).key;
    let (address, _task) = serve_once(&TLS13, stolen, b"http/1.1").await;
    let error = server_certificates(address, 5 * SECOND).await.unwrap_err();
    assert!(matches!(error, PeerError::Untrusted { .. } | PeerError::Protocol { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_of_silence_and_of_other_protocols_ends() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let error = server_certificates(silent.local_addr().unwrap(), Duration::from_millis(200)).await.unwrap_err();
    assert!(matches!(error, PeerError::Timeout { .. }), "{error:?}");
    let closed = silent.local_addr().unwrap();
    drop(silent);
    assert!(matches!(server_certificates(closed, SECOND).await.unwrap_err(), PeerError::Unreachable { .. }));
    let other = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = other.local_addr().unwrap();
    let task = tokio::spawn(async move {
        let (mut stream, _) = other.accept().await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut stream, b"SSH-2.0-x\r\n").await.unwrap();
        stream
    });
    assert!(matches!(server_certificates(address, 5 * SECOND).await.unwrap_err(), PeerError::Protocol { .. }));
    drop(task.await.unwrap());
}
