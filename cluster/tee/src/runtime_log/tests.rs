//! The runtime event log against a register in memory.

use super::*;
use dstack_attest::eventlog::{Digest384, replay_runtime, runtime_digest};
use sha2::{Digest as _, Sha384};
use std::sync::Mutex;

/// RTMR3 as hardware does it.
struct Memory(Mutex<Digest384>);

impl Memory {
    fn new() -> Self {
        Self(Mutex::new([0; 48]))
    }
}

impl Register for Memory {
    fn require(&self, log: &[RuntimeEvent]) -> Result<(), TeeError> {
        if *self.0.lock().unwrap() == replay_runtime(log) { Ok(()) } else { Err(TeeError::LogDiverged { register: "memory" }) }
    }

    fn measure(&self, event: &RuntimeEvent) -> Result<(), TeeError> {
        let mut value = self.0.lock().unwrap();
        *value = Sha384::new().chain_update(*value).chain_update(runtime_digest(event)).finalize().into();
        Ok(())
    }
}

fn event(name: &str, payload: &[u8], version: EventVersion) -> RuntimeEvent {
    RuntimeEvent { event: name.to_owned(), payload: payload.to_vec(), version }
}

fn log() -> (tempfile::TempDir, RuntimeLog) {
    let dir = tempfile::tempdir().unwrap();
    let log = RuntimeLog::at(&dir.path().join("log/dstack/runtime_events.log"));
    (dir, log)
}

#[test]
fn what_is_appended_is_read_again_and_leads_to_the_register() {
    let (_dir, log) = log();
    assert_eq!(log.read(), Ok(Vec::new()));
    let register = Memory::new();
    let events = [
        event("system-preparing", &[], EventVersion::V1),
        event("app-id", &[0x11; 20], EventVersion::V1),
        event("gpu:attestation", b"{}", EventVersion::V2),
    ];
    for event in &events {
        log.append(event, &[&register]).unwrap();
    }
    assert_eq!(log.read().unwrap(), events);
    assert_eq!(replay_runtime(&events), *register.0.lock().unwrap());
    let text = std::fs::read_to_string(&log.path).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[1], r#"{"event":"app-id","payload":"ERERERERERERERERERERERERERE="}"#);
    assert_eq!(lines[2], r#"{"event":"gpu:attestation","payload":"e30=","version":2}"#);
}

#[test]
fn a_register_that_is_ahead_stops_every_append() {
    let (_dir, log) = log();
    let register = Memory::new();
    log.append(&event("a", &[], EventVersion::V1), &[&register]).unwrap();
    // as after an end between the two steps
    register.measure(&event("b", &[], EventVersion::V1)).unwrap();
    let refused = log.append(&event("c", &[], EventVersion::V1), &[&register]);
    assert_eq!(refused, Err(TeeError::LogDiverged { register: "memory" }));
    assert_eq!(log.read().unwrap().len(), 1);
}

#[test]
fn a_failing_register_leaves_no_line() {
    struct Failing;
    impl Register for Failing {
        fn require(&self, _: &[RuntimeEvent]) -> Result<(), TeeError> {
            Ok(())
        }
        fn measure(&self, _: &RuntimeEvent) -> Result<(), TeeError> {
            Err(TeeError::NoRegister { path: "x".into() })
        }
    }
    let (_dir, log) = log();
    assert!(log.append(&event("a", &[], EventVersion::V1), &[&Failing]).is_err());
    assert_eq!(log.read(), Ok(Vec::new()));
}

#[test]
fn events_that_verifiers_refuse_are_never_measured() {
    let (_dir, log) = log();
    let register = Memory::new();
    let bad = [
        event("a:b", b"c", EventVersion::V1),
        event("", &[], EventVersion::V1),
        event(&"n".repeat(NAME_BYTES_MAX + 1), &[], EventVersion::V1),
        event("a", &vec![0; PAYLOAD_BYTES_MAX + 1], EventVersion::V1),
    ];
    for bad in &bad {
        assert!(matches!(log.append(bad, &[&register]), Err(TeeError::BadEvent { .. })));
    }
    assert_eq!(*register.0.lock().unwrap(), [0; 48]);
    log.append(&event("system-ready", &[], EventVersion::V1), &[&register]).unwrap();
    log.append(&bad[0], &[&register]).unwrap();
}

#[test]
fn a_line_that_is_no_event_is_named() {
    let (_dir, log) = log();
    std::fs::create_dir_all(log.path.parent().unwrap()).unwrap();
    for (line, why) in [
        ("{\"event\":\"a\"}", "no object with event and payload"),
        ("{\"event\":\"a\",\"payload\":\"*\"}", "its payload is not base64"),
        ("{\"event\":\"a\",\"payload\":\"\",\"version\":3}", "its version is neither 1 nor 2"),
        ("{\"event\":\"a\",\"payl", "no object with event and payload"),
    ] {
        std::fs::write(&log.path, format!("{{\"event\":\"x\",\"payload\":\"\"}}\n{line}\n")).unwrap();
        let path = log.path.display().to_string();
        assert_eq!(log.read(), Err(TeeError::BadEvents { path, line: 2, why }));
    }
    std::fs::write(&log.path, [0xff, 0xfe]).unwrap();
    assert!(matches!(log.read(), Err(TeeError::BadEvents { line: 0, .. })));
}

#[test]
fn appends_from_several_threads_stay_one_chain() {
    let (_dir, log) = log();
    let register = Memory::new();
    std::thread::scope(|scope| {
        for name in ["a", "b", "c", "d"] {
            let (log, register) = (&log, &register);
            scope.spawn(move || {
                for payload in 0..10u8 {
                    log.append(&event(name, &[payload], EventVersion::V1), &[register]).unwrap();
                }
            });
        }
    });
    let events = log.read().unwrap();
    assert_eq!(events.len(), 40);
    assert_eq!(replay_runtime(&events), *register.0.lock().unwrap());
}
