//! What strangers and lying clients may send: every lie has its refusal, nothing is recorded for it, nobody falls.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use dstack_protocol::release::{KeyClass, Mode, RelReq};
use dstack_protocol::rpc::{
    PATH_ACTION, PATH_BEACON, PATH_GENESIS_CERTIFICATE, PATH_GOVERNANCE, PATH_PEER_ASK, PATH_PEER_GO, PATH_PEER_PROPOSE, PATH_POLICY,
    PATH_RELEASE, PATH_STATUS,
};
use dstack_protocol::{AppId, ClusterId, Generation, RefusalCode, Wire as _};
use dstack_ratls::certificate::CertifiedIdentity;
use dstack_testkit::cluster::{Cluster, ClusterSpec, MachineKind};

use crate::releases::{audit_verifies, intents};
use crate::workload::{Session, Workload, check_values, get, post, refusal, registered, runtime, wish};

#[test]
fn each_lie_in_a_request_has_its_refusal() {
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let address = cluster.node(1).address;
    runtime.block_on(async {
        let session = web.session(address).await;
        type Lie = (&'static str, fn(&mut RelReq), &'static [RefusalCode]);
        let lies: &[Lie] = &[
            ("another cluster", |r| r.cluster_id = ClusterId([7; 32]), &[RefusalCode::WrongCluster]),
            ("no such generation", |r| r.generation = Generation(1), &[RefusalCode::UnknownGeneration]),
            ("no such beacon", |r| r.beacon_pos += 1, &[RefusalCode::UnknownBeacon]),
            ("another value of the beacon", |r| r.beacon[0] ^= 1, &[RefusalCode::UnknownBeacon]),
            ("a beacon from the future", |r| r.beacon_pos = u64::MAX, &[RefusalCode::UnknownBeacon]),
            ("mode L", |r| r.mode = Mode::Legacy, &[RefusalCode::BindingMismatch, RefusalCode::LegacyNotAllowed]),
            ("mode E", |r| r.mode = Mode::Env, &[RefusalCode::BadSignature]),
            ("other evidence", |r| r.evidence_hash[31] ^= 1, &[RefusalCode::EvidenceHash]),
            ("another app", |r| r.app_id = AppId([9; 20]), &[RefusalCode::AppIdMismatch, RefusalCode::AppUnknown]),
            ("a class that the policy does not list", |r| r.wishes = vec![wish(KeyClass::P256, "")], &[RefusalCode::ClassNotAllowed]),
            (
                "the disk of another instance",
                |r| {
                    r.wishes = vec![wish(
                        KeyClass::Disk,
                        "\u{1}\u{1}\u{1}\u{1}\u{1}\u{1}\u{1}\u{1}\u{1}\u{1}\u{1}\u{1}\u{1}\u{1}\u{1}\u{1}\u{1}\u{1}\u{1}\u{1}",
                    )]
                },
                &[RefusalCode::InstanceMismatch],
            ),
            ("a zero one-time key", |r| r.epk = [0; 32], &[RefusalCode::Malformed]),
            (
                "a low-order one-time key",
                |r| {
                    r.epk = {
                        let mut one = [0; 32];
                        one[0] = 1;
                        one
                    }
                },
                &[RefusalCode::Malformed],
            ),
        ];
        for (what, lie, expected) in lies {
            let mut request = session.request();
            lie(&mut request);
            match session.ask(&session.signed(request)).await {
                Err(refusal) => assert!(expected.contains(&refusal.code), "{what}: {refusal}"),
                Ok(_) => panic!("{what} was served"),
            }
        }

        let mut unsigned = session.signed(session.request());
        unsigned.sig[5] ^= 1;
        assert_eq!(session.ask(&unsigned).await.unwrap_err().code, RefusalCode::BadSignature);
        let mut zero = session.signed(session.request());
        zero.sig = [0; 64];
        assert_eq!(session.ask(&zero).await.unwrap_err().code, RefusalCode::BadSignature);

        // Another session's request, whole, over this session's connection.
        let foreign = web.session(address).await;
        let stolen = session.ask(&foreign.signed(foreign.request())).await.unwrap_err();
        assert!([RefusalCode::EvidenceHash, RefusalCode::BadSignature].contains(&stolen.code), "{stolen}");
        // Signed by another session's key, in this one's name.
        let mut forged = session.signed(session.request());
        forged.sig = foreign.signed(forged.request.clone()).sig;
        assert_eq!(session.ask(&forged).await.unwrap_err().code, RefusalCode::BadSignature);

        certificates_that_lie(&web, address).await;

        // The honest request among all this, and its replay: one answer, recorded once.
        let ask = session.signed(session.request());
        let first = session.ask(&ask).await.unwrap();
        let again = session.ask(&ask).await.unwrap();
        assert_eq!(first.receipt.record, again.receipt.record);
    });
    for seat in 1..=3 {
        assert_eq!(intents(&mut cluster, seat), (1, 0), "node {seat} recorded a lie");
    }
    audit_verifies(&mut cluster);
}

/// Certificates whose evidence is about something else than their key and this cluster.
async fn certificates_that_lie(web: &Workload, address: SocketAddr) {
    let beacon = web.beacon(address).await;
    // Evidence bound to another key.
    let elsewhere = web.connect(address, beacon, web.certificate(&beacon, |_| [0x5a; 64])).await;
    refused_session(elsewhere, RefusalCode::SessionMismatch).await;
    // A session of another cluster.
    let mut other = beacon;
    other.cluster_id = ClusterId([1; 32]);
    refused_session(web.connect(address, beacon, web.certificate(&other, |data| data)).await, RefusalCode::SessionMismatch).await;
    // A session over a beacon that never was.
    other = beacon;
    other.beacon_pos += 1_000_000;
    refused_session(web.connect(address, other, web.certificate(&other, |data| data)).await, RefusalCode::UnknownBeacon).await;
    // dstack's own binding: a connection, but no keys in mode C.
    let identity = CertifiedIdentity::for_node((web.now)(), Duration::from_secs(600), |data| web.evidence(data)).unwrap();
    let legacy = web.connect(address, beacon, identity).await.unwrap();
    let refusal = legacy.ask(&legacy.signed(legacy.request())).await.unwrap_err();
    assert_eq!(refusal.code, RefusalCode::NotASession);
    // No certificate at all.
    let session = web.session(address).await;
    let ask = session.signed(session.request()).encode();
    let (status, body) = post(&web.anonymous(address).await, PATH_RELEASE, ask).await.unwrap();
    assert_eq!((status, self::refusal(&body).code), (403, RefusalCode::NotASession));
}

/// TLS 1.3 tells a client of a refused certificate with its first request.
async fn refused_session(session: Result<Session, dstack_ratls::PeerError>, code: RefusalCode) {
    let Ok(session) = session else { return };
    match post(&session.connection, PATH_RELEASE, session.signed(session.request()).encode()).await {
        Err(_) => {}
        Ok((status, body)) => assert_eq!((status / 100, refusal(&body).code), (4, code)),
    }
}

#[test]
fn bodies_and_streams_of_any_bytes_are_refused_in_time() {
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let keys = check_values(&runtime.block_on(web.keys(&cluster.kms_urls())));
    let address = cluster.node(1).address;

    runtime.block_on(async {
        let session = web.session(address).await;
        let right = session.signed(session.request()).encode();
        for path in [PATH_RELEASE, PATH_GOVERNANCE] {
            let mut bodies = vec![Vec::new(), vec![0], b"{}".to_vec(), vec![0xff; 8 * 1024]];
            bodies.extend([1, 16, 100, right.len() - 1].map(|length| right[..length].to_vec()));
            bodies.push([right.as_slice(), &[0]].concat());
            for body in bodies {
                let length = body.len();
                let (status, answer) = post(&session.connection, path, body).await.unwrap();
                assert_eq!((status, refusal(&answer).code), (400, RefusalCode::Malformed), "{path}, {length} bytes");
            }
        }
        // Larger than a request may be, than any body may be, and than that by far.
        for length in [64 * 1024, 600 * 1024, 3 << 20] {
            match post(&web.session(address).await.connection, PATH_RELEASE, vec![1; length]).await {
                Ok((status, _)) => assert_eq!(status, 413, "{length} bytes"),
                Err(error) => assert!(!error.surely_not_done(), "{error}"),
            }
        }
        // Nodes' paths do not exist for clients; unknown ones neither.
        for path in [PATH_PEER_ASK, PATH_PEER_GO, PATH_PEER_PROPOSE, "/peer/raft/append", "/", "/v1/release/x", "/metrics"] {
            let (status, answer) = post(&session.connection, path, right.clone()).await.unwrap();
            assert_eq!((status, refusal(&answer).code), (404, RefusalCode::UnknownMethod), "{path}");
        }
        for path in [format!("{PATH_ACTION}/zz"), format!("{PATH_POLICY}/00"), format!("{PATH_POLICY}/{}", "g".repeat(5000))] {
            let (status, _) = get(&session.connection, &path).await;
            assert!((400..500).contains(&status), "{path}: {status}");
        }
        for path in [PATH_BEACON, PATH_GENESIS_CERTIFICATE, PATH_STATUS] {
            assert_eq!(get(&session.connection, path).await.0, 200, "{path}");
        }
    });

    // No TLS at all, half a ClientHello, one byte a second, nothing.
    let hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
    for bytes in [b"GET / HTTP/1.1\r\n\r\n".as_slice(), &[0xff; 512], &[0; 70_000], b"\x16\x03\x01\xff\xff"] {
        let (mut stream, begun) = connect(address);
        let _ = stream.write_all(bytes);
        ends(&mut stream, begun, Duration::from_secs(12));
    }
    let ((mut half, begun), (mut silent, _), (mut slow, _)) = (connect(address), connect(address), connect(address));
    half.write_all(hello).unwrap();
    let dripping = std::thread::spawn(move || {
        for byte in hello.iter().cycle() {
            if slow.write_all(&[*byte]).is_err() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(250));
            if begun.elapsed() > Duration::from_secs(20) {
                return false;
            }
        }
        false
    });
    ends(&mut half, begun, Duration::from_secs(12));
    ends(&mut silent, begun, Duration::from_secs(12));
    assert!(dripping.join().unwrap(), "a slow loris is cut off");

    for seat in 1..=3 {
        cluster.node(seat).check_ready().unwrap();
        assert_eq!(cluster.node(seat).metric("kms_runtime_guarded_panics_total").unwrap(), 0.0);
        assert_eq!(cluster.node(seat).metric("kms_ratls_parser_panics_total").unwrap(), 0.0);
    }
    assert_eq!(check_values(&runtime.block_on(web.keys(&cluster.kms_urls()))), keys);
}

fn connect(address: SocketAddr) -> (TcpStream, Instant) {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    (stream, Instant::now())
}

/// The node ends the connection within `limit` of its begin; an alert before that is fine.
fn ends(stream: &mut TcpStream, begun: Instant, limit: Duration) {
    let mut buffer = [0; 256];
    while let Ok(1..) = stream.read(&mut buffer) {}
    assert!(begun.elapsed() < limit, "open for {:?}", begun.elapsed());
}
