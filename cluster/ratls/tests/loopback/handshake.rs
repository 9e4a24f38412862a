//! What a handshake accepts and refuses.

use dstack_protocol::binding;
use dstack_ratls::attest_judge::TrustMaterial;
use dstack_ratls::{ALPN_NODE, CERTIFICATE_BYTES_MAX, JudgeError, PeerError};
use dstack_testkit::tdx::{CollateralSpec, bundle_json};
use dstack_testkit::{Host, Measured};
use rustls::version::{TLS12, TLS13};

use crate::raw::{self, RawCertificate, serve_once, verdict_on};
use crate::world::*;

fn bound_evidence(world: &World, spki: &[u8]) -> Option<Vec<u8>> {
    Some(world.evidence(&Measured::executable(NODE_BINARY), binding::ratls_certificate(spki)).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_learn_each_other() {
    let world = World::new();
    let server = world.server(2, Default::default()).await;
    let peer = world.dialer(1).peer(server.address, Default::default());
    let measurement = hex::encode(world.tdx().measurement(&Measured::executable(NODE_BINARY)));
    let key = hex::encode(node_key(1).verifying_key().to_bytes());
    assert_eq!(whoami(&peer).await.unwrap(), format!("seat 1 key {key} measurement {measurement}"));
    let (hello, identity) = peer.peer().await.unwrap();
    assert_eq!((hello.seat.0, hello.node_key), (2, node_key(2).verifying_key().to_bytes()));
    assert_eq!(hex::encode(identity.measurement()), measurement);
    assert!(identity.software_root());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nitro_evidence_serves_as_well() {
    let world = World::new();
    let server = world.server(2, Default::default()).await;
    let host = Host::nitro("enclave host", &world.roots).unwrap();
    let app = Measured::compose(COMPOSE);
    let evidence_of = |report_data: [u8; 64]| host.evidence(&app, &report_data, (world.now())()).map_err(|error| error.to_string());
    let certificate = dstack_ratls::CertifiedIdentity::for_node((world.now())(), 60 * SECOND, evidence_of).unwrap();
    let spki = hex::encode(certificate.spki());
    let connection = world.client(Some(certificate)).connect(server.address, 5 * SECOND).await.unwrap();
    let answer = text(connection.request(get_request("/whoami")).await.unwrap());
    assert!(answer.ends_with(&format!("session None spki {spki}")), "{answer}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_exchange_is_hybrid_and_nothing_can_be_resumed() {
    let world = World::new();
    let server = world.server(2, Default::default()).await;
    let mut stream = raw::connect(server.address, &TLS13, None, b"http/1.1").await.unwrap();
    let group = stream.get_ref().1.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
    // A ticket would come with the first bytes after the handshake.
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    stream.write_all(b"GET /whoami HTTP/1.1\r\nhost: n\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("anonymous"), "{answer}");
    assert_eq!(stream.get_ref().1.tls13_tickets_received(), 0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_12_is_refused_by_server_and_client() {
    let world = World::new();
    let server = world.server(2, Default::default()).await;
    let error = raw::connect(server.address, &TLS12, None, b"http/1.1").await.unwrap_err();
    assert!(error.to_string().contains("ProtocolVersion"), "{error}");
    let certificate = RawCertificate::with_evidence(|spki| bound_evidence(&world, spki));
    let (address, _task) = serve_once(&TLS12, certificate, ALPN_NODE).await;
    let error = whoami(&world.dialer(1).peer(address, Default::default())).await.unwrap_err();
    assert!(matches!(error, PeerError::Protocol { .. } | PeerError::RefusedByPeer { .. } | PeerError::Unreachable { .. }), "{error:?}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_certificates_are_judged() {
    let world = World::new();
    let server = world.server(2, Default::default()).await;
    let accepted = |certificate| verdict_on(server.address, Some(certificate), b"http/1.1");

    let good = RawCertificate::with_evidence(|spki| bound_evidence(&world, spki));
    assert_eq!(accepted(good).await, Ok("HTTP/1.1 200".to_owned()), "the raw client itself is right");

    let none = RawCertificate::with_evidence(|_| None);
    assert!(accepted(none).await.is_err());

    let other_key = RawCertificate::with_evidence(|_| bound_evidence(&world, b"another key"));
    assert!(accepted(other_key).await.is_err());

    let garbage = RawCertificate::with_evidence(|_| Some(vec![0xff; 4000]));
    assert!(accepted(garbage).await.is_err());

    // A certificate seen on the wire, shown by someone without its key.
    let mut stolen = RawCertificate::with_evidence(|spki| bound_evidence(&world, spki));
    stolen.key = RawCertificate::with_evidence(|_| None).key;
    assert!(accepted(stolen).await.is_err());

    let mut chain = RawCertificate::with_evidence(|spki| bound_evidence(&world, spki));
    chain.chain.push(chain.chain[0].clone());
    assert!(accepted(chain).await.is_err());

    for size in [CERTIFICATE_BYTES_MAX, 65_000, 70_000, 1 << 20] {
        let oversized = RawCertificate::with_evidence(|_| Some(vec![0; size]));
        assert!(accepted(oversized).await.is_err(), "{size}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_must_show_a_certificate() {
    let world = World::new();
    let server = world.server(2, Default::default()).await;
    assert!(verdict_on(server.address, None, ALPN_NODE).await.is_err());
    assert!(verdict_on(server.address, None, b"unknown/1").await.is_err());
    let certificate = RawCertificate::with_evidence(|spki| bound_evidence(&world, spki));
    assert!(verdict_on(server.address, Some(certificate), ALPN_NODE).await.unwrap().starts_with("DKMS-V1-HELL"));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_certificates_are_judged() {
    let world = World::new();
    let outcome = async |certificate| {
        let (address, _task) = serve_once(&TLS13, certificate, ALPN_NODE).await;
        match whoami(&world.dialer(1).peer(address, Default::default())).await.unwrap_err() {
            PeerError::Untrusted { error, .. } => error,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(outcome(RawCertificate::with_evidence(|_| None)).await, JudgeError::NoEvidence);
    assert_eq!(outcome(RawCertificate::with_evidence(|_| bound_evidence(&world, b"another key"))).await, JudgeError::Binding);
    assert!(matches!(outcome(RawCertificate::with_evidence(|_| Some(vec![1; 99]))).await, JudgeError::Evidence { .. }));
    let oversized = RawCertificate::with_evidence(|_| Some(vec![0; CERTIFICATE_BYTES_MAX]));
    assert!(matches!(outcome(oversized).await, JudgeError::TooLarge { .. }));
    let other_binary = RawCertificate::with_evidence(|spki| {
        Some(world.evidence(&Measured::executable(b"another binary"), binding::ratls_certificate(spki)).unwrap())
    });
    assert!(matches!(outcome(other_binary).await, JudgeError::NotAccepted { .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_another_executable_is_refused() {
    let world = World::new();
    let server = world.server(2, Default::default()).await;
    let source = dstack_ratls::CertificateSource::new(world.certificate_of(b"another binary", 60 * SECOND));
    let peer = world.dialer_with(hello(1), source, Default::default()).peer(server.address, Default::default());
    assert!(matches!(whoami(&peer).await.unwrap_err(), PeerError::RefusedByPeer { .. } | PeerError::Unreachable { .. }));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_expire() {
    let world = World::new();
    let server = world.server(2, Default::default()).await;
    let client = world.client(Some(world.node_certificate(60 * SECOND)));
    let before = client.connect(server.address, 5 * SECOND).await.unwrap();
    text(before.request(get_request("/whoami")).await.unwrap());
    world.advance(61 * SECOND);
    let after = client.connect(server.address, 5 * SECOND).await.unwrap();
    let error = after.request(get_request("/whoami")).await.unwrap_err();
    assert!(matches!(error, PeerError::RefusedByPeer { .. } | PeerError::Unreachable { .. }), "{error:?}");
    // What was open when the certificate ended goes on.
    text(before.request(get_request("/whoami")).await.unwrap());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn verdicts_are_kept_until_expiry_or_new_collateral() {
    let world = World::new();
    let judge = world.judge();
    let evidence = world.evidence(&Measured::executable(NODE_BINARY), [1; 64]).unwrap();
    let now = (world.now())();
    let first = judge.identity(&evidence, now).unwrap();
    assert!(std::sync::Arc::ptr_eq(&first, &judge.identity(&evidence, now).unwrap()));
    // The second that a date names is the last one that counts.
    let expired = first.earliest_expiry().plus_ms(1000);
    assert!(judge.identity(&evidence, expired).is_err(), "at its expiry the verdict is asked for anew, and the collateral is past its end");
    let again = judge.identity(&evidence, now).unwrap();
    assert!(!std::sync::Arc::ptr_eq(&first, &again));
    judge.replace(world.material());
    assert!(!std::sync::Arc::ptr_eq(&again, &judge.identity(&evidence, now).unwrap()));
    let mut strict = world.material();
    strict.roots = dstack_attest::TrustRoots::production();
    judge.replace(strict);
    assert!(matches!(judge.identity(&evidence, now), Err(JudgeError::Evidence { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verdict_in_grace_ends_with_it_and_with_another_policy() {
    const DAY_MS: u64 = 86_400_000;
    let world = World::new();
    let judge = world.judge();
    let evidence = world.evidence(&Measured::executable(NODE_BINARY), [1; 64]).unwrap();
    let now = (world.now())();
    let recovery = dstack_protocol::UnixMillis(now.0 / 1000 * 1000 - 10 * DAY_MS);
    let spec = CollateralSpec::new(world.roots.validity()).recovered(recovery.0 / 1000, "SOFTWARE-SA-00009");
    let recovered = || {
        let bundle = bundle_json(&[world.roots.collateral(&spec).unwrap()]);
        dstack_attest::CollateralBundle::parse(&bundle).unwrap()
    };
    let under = |grace_days: u64| TrustMaterial {
        collateral: recovered(),
        tcb: dstack_attest::TcbPolicy::default().with_grace_ms(grace_days * DAY_MS),
        ..world.material()
    };
    assert!(judge.identity(&evidence, now).unwrap().tcb_grace_until().is_none());
    judge.replace(under(30));
    let marked = judge.identity(&evidence, now).unwrap();
    let until = recovery.plus_ms(30 * DAY_MS);
    assert_eq!(marked.tcb_grace_until(), Some(until));
    assert!(std::sync::Arc::ptr_eq(&marked, &judge.identity(&evidence, until).unwrap()), "kept to the last moment of the grace");
    let over = judge.identity(&evidence, until.plus_ms(1)).unwrap_err();
    assert!(over.to_string().contains("grace"), "{over}");
    assert!(judge.identity(&evidence, now).is_ok());
    judge.replace(under(5));
    assert!(matches!(judge.identity(&evidence, now), Err(JudgeError::Evidence { .. })), "a shorter grace counts at once");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_legacy_pair_of_extensions_is_read() {
    let world = World::new();
    let server = world.server(2, Default::default()).await;
    let attest = |spki: &[u8]| {
        let attested = world.tdx().attest(&Measured::compose(COMPOSE), &binding::ratls_certificate(spki), (world.now())()).unwrap();
        (attested.quote, attested.event_log.into_bytes())
    };
    let accepted = |certificate| verdict_on(server.address, Some(certificate), b"http/1.1");
    let pair = RawCertificate::with_extensions(|spki| vec![(1, attest(spki).0), (2, attest(spki).1)]);
    assert_eq!(accepted(pair).await, Ok("HTTP/1.1 200".to_owned()));
    let foreign = RawCertificate::with_extensions(|spki| vec![(1, attest(b"another key").0), (2, attest(spki).1)]);
    assert!(accepted(foreign).await.is_err());
    let half = RawCertificate::with_extensions(|spki| vec![(1, attest(spki).0)]);
    assert!(accepted(half).await.is_err());
    let twice = RawCertificate::with_extensions(|spki| {
        vec![(8, bound_evidence(&world, spki).unwrap()), (8, bound_evidence(&world, spki).unwrap())]
    });
    assert!(accepted(twice).await.is_err());
    server.stop().await;
}

/// A judge with a bug that foreign bytes can reach.
struct Buggy;

impl dstack_ratls::EvidenceJudge for Buggy {
    fn judge(
        &self,
        certificate: &dstack_ratls::PeerCertificate<'_>,
    ) -> Result<std::sync::Arc<dstack_attest::VerifiedIdentity>, JudgeError> {
        panic!("evidence of {} bytes", certificate.evidence.len())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parser_that_panics_refuses_one_handshake_and_nothing_else() {
    // The hook of our binaries: were the panic on any other thread, this process would end here.
    dstack_runtime::hardening::install_panic_hook();
    let world = World::new();
    let server =
        world.server_judging("127.0.0.1:0".parse().unwrap(), 2, Default::default(), world.source(), std::sync::Arc::new(Buggy)).await;
    let peer = world.dialer(1).peer(server.address, Default::default());
    for _ in 0..3 {
        let certificate = RawCertificate::with_evidence(|spki| bound_evidence(&world, spki));
        assert!(verdict_on(server.address, Some(certificate), b"http/1.1").await.is_err());
        whoami(&peer).await.unwrap();
    }
    server.stop().await;
}
