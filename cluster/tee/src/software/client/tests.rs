//! The client against devices that misbehave; the testkit's own device is in `tests/`.

use super::*;
use crate::software::frame::{read_frame, write_frame};
use crate::software::protocol::Refused;
use crate::software::protocol::{Description, EmulatedPlatform};
use dstack_attest::wire::PlatformEvidence;
use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixListener;
use std::sync::mpsc;
use std::thread::JoinHandle;

/// What a scripted device does with the next request.
enum Act {
    Answer(Response),
    Raw(Vec<u8>),
    Close,
    /// Says nothing until the client has gone.
    Hang,
}

struct Scripted {
    path: PathBuf,
    asked: mpsc::Receiver<Request>,
    thread: JoinHandle<()>,
    _dir: tempfile::TempDir,
}

/// A device that accepts one connection for each list and acts on its requests in order.
fn scripted(connections: Vec<Vec<Act>>) -> Scripted {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tee.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let (tell, asked) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        for acts in connections {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            for act in acts {
                let Ok(Some(frame)) = read_frame(&mut stream) else { break };
                tell.send(serde_json::from_slice(&frame).unwrap()).unwrap();
                match act {
                    Act::Answer(response) => write_frame(&mut stream, &serde_json::to_vec(&response).unwrap()).unwrap(),
                    Act::Raw(bytes) => stream.write_all(&bytes).unwrap(),
                    Act::Close => break,
                    Act::Hang => {
                        let _ = read_frame(&mut stream);
                    }
                }
            }
        }
    });
    Scripted { path, asked, thread, _dir: dir }
}

fn description(version: u32) -> Response {
    let bytes = |length| HexBytes(vec![0; length]);
    let platform = EmulatedPlatform::Nitro;
    Response::Description(Description {
        version,
        platform,
        root_der: bytes(3),
        measurement: bytes(144),
        platform_identity: bytes(48),
        collateral: None,
    })
}

fn described() -> Act {
    Act::Answer(description(PROTOCOL_VERSION))
}

fn evidence(report_data: [u8; 64]) -> Act {
    let platform = PlatformEvidence::NitroEnclave { nsm_quote: vec![1; 10] };
    let attestation = Attestation { platform, report_data, runtime_events: vec![], config: String::new(), report_data_payload: None };
    Act::Answer(Response::Evidence { evidence: HexBytes(attestation.encode()) })
}

fn booted(app: u8) -> Booted {
    Booted { app_id: HexArray([app; 20]), compose_hash: HexArray([2; 32]), instance_id: HexBytes(vec![]) }
}

fn boot() -> Boot {
    Boot { compose: HexBytes(b"{}".to_vec()), app_id: None, instance_seed: None, key_provider: None }
}

#[test]
fn refuses_a_device_of_another_version() {
    let device = scripted(vec![vec![Act::Answer(description(2))]]);
    assert_eq!(SoftwareDevice::open(&device.path).unwrap_err(), TeeError::Version { got: 2, want: 1 });
    device.thread.join().unwrap();
}

#[test]
fn refuses_frames_and_answers_that_are_not_the_protocols() {
    let open = |bytes: &[u8]| {
        let device = scripted(vec![vec![Act::Raw(bytes.to_vec())]]);
        let error = SoftwareDevice::open(&device.path).unwrap_err();
        device.thread.join().unwrap();
        error
    };
    assert_eq!(open(&[0xff; 8]), TeeError::Protocol { why: "a frame's length is out of bounds" });
    assert_eq!(open(b"\0\0\0\x02{}"), TeeError::Protocol { why: "a response is not of this protocol" });
    assert_eq!(open(b"\0\0\0\x09{}"), TeeError::Broken { kind: ErrorKind::UnexpectedEof });
    let device = scripted(vec![vec![Act::Answer(Response::Booted(booted(1)))]]);
    assert_eq!(SoftwareDevice::open(&device.path).unwrap_err(), OTHER_ANSWER);
}

#[test]
fn refuses_evidence_that_is_not_what_was_asked_for() {
    let junk = Act::Answer(Response::Evidence { evidence: HexBytes(vec![0, 9]) });
    let map = Act::Answer(Response::Evidence { evidence: HexBytes(vec![0x83]) });
    let device = scripted(vec![vec![described(), evidence([1; 64]), junk, map, evidence([2; 64])]]);
    let client = SoftwareDevice::open(&device.path).unwrap();
    assert_eq!(client.evidence([2; 64]), Err(TeeError::BadEvidence { why: "is bound to other report data" }));
    assert!(matches!(client.evidence([2; 64]), Err(TeeError::UndecodableEvidence(_))));
    assert_eq!(client.evidence([2; 64]), Err(TeeError::BadEvidence { why: "is not SCALE V0" }));
    assert!(client.evidence([2; 64]).is_ok());
}

#[test]
fn a_silent_device_costs_the_limit_and_no_more() {
    let device = scripted(vec![vec![described(), Act::Hang], vec![evidence([3; 64])]]);
    let client = SoftwareDevice::open_within(&device.path, Duration::from_millis(100)).unwrap();
    assert_eq!(client.evidence([3; 64]), Err(TeeError::Timeout { limit_ms: 100 }));
    // the late answer of the first connection can never be taken for an answer to this
    assert!(client.evidence([3; 64]).is_ok());
}

#[test]
fn a_lost_guest_is_booted_again_before_the_next_request() {
    let first = vec![described(), Act::Answer(Response::Booted(booted(1))), Act::Close];
    let device = scripted(vec![first, vec![Act::Answer(Response::Booted(booted(1))), evidence([4; 64])]]);
    let client = SoftwareDevice::open(&device.path).unwrap();
    assert_eq!(client.boot_app(boot()), Ok(booted(1)));
    assert!(client.evidence([4; 64]).is_ok());
    device.thread.join().unwrap();
    let asked: Vec<Request> = device.asked.try_iter().collect();
    let ask = || Request::Evidence { report_data: HexArray([4; 64]) };
    assert_eq!(asked, [Request::Describe, Request::Boot(boot()), ask(), Request::Boot(boot()), ask()]);
}

#[test]
fn another_identity_after_a_lost_connection_is_refused() {
    let first = vec![described(), Act::Answer(Response::Booted(booted(1))), Act::Close];
    let device = scripted(vec![first, vec![Act::Answer(Response::Booted(booted(2)))]]);
    let client = SoftwareDevice::open(&device.path).unwrap();
    client.boot_app(boot()).unwrap();
    assert_eq!(client.evidence([4; 64]), Err(TeeError::OtherIdentity));
}

#[test]
fn refusals_are_told_and_leave_the_connection() {
    let refused = Refused { code: RefusedCode::Internal, message: "no entropy".into() };
    let device = scripted(vec![vec![described(), Act::Answer(Response::Refused(refused)), evidence([5; 64])]]);
    let client = SoftwareDevice::open(&device.path).unwrap();
    let error = TeeError::Refused { code: RefusedCode::Internal, message: "no entropy".into() };
    assert_eq!(client.evidence([5; 64]), Err(error));
    assert!(client.evidence([5; 64]).is_ok(), "on the same connection");
}

#[test]
fn too_much_is_refused_before_it_is_sent() {
    let device = scripted(vec![vec![described()]]);
    let client = SoftwareDevice::open(&device.path).unwrap();
    let refused = client.platform_key(&[0; 257]).unwrap_err();
    assert_eq!(refused, TeeError::TooLarge { what: "the purpose", have_bytes: 257, limit_bytes: 256 });
    let compose = HexBytes(vec![b' '; COMPOSE_BYTES_MAX + 1]);
    let refused = client.boot_app(Boot { compose, ..boot() }).unwrap_err();
    assert_eq!(
        refused,
        TeeError::TooLarge { what: "the compose document", have_bytes: COMPOSE_BYTES_MAX + 1, limit_bytes: COMPOSE_BYTES_MAX }
    );
}
