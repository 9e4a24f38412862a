//! Good days: quotes that verify, events measured into RTMR3, the firmware's log in the event log.

use super::guest::{Td, event, runtime_events};
use dstack_attest::eventlog::{ccel, prove_json};
use dstack_attest::tdx::Quote;
use dstack_attest::wire::{Attestation, Encoding, EventVersion, PlatformEvidence, RUNTIME_EVENT_TYPE, TdxEvent};
use dstack_protocol::Platform;
use dstack_tee::{Boot, Device, TeeError, open};
use dstack_testkit::tsm::SoftwareTd;
use std::time::Instant;

#[test]
fn evidence_of_the_kernels_files_verifies() {
    let Some(td) = Td::new() else { return };
    let device = open(&td.text("")).unwrap();
    assert_eq!((device.platform(), device.is_software()), (Platform::Tdx, false));
    let evidence = device.evidence([7; 64]).unwrap();
    assert_eq!(Encoding::of(&evidence), Ok(Encoding::ScaleV0));
    let identity = td.verify(&evidence).unwrap();
    assert_eq!((identity.platform(), identity.report_data()), (Platform::Tdx, &[7; 64]));
    assert_eq!(identity.measurement(), device.describe().unwrap().measurement);
    assert_eq!(identity.measurement()[192..], [0; 32], "a node has no compose hash");
    assert!(identity.software_root(), "the root is the testkit's");
    assert!(device.platform_key(b"shares").unwrap().is_none(), "a plain TD seals nothing");
    let boot = Boot { compose: dstack_tee::software::protocol::HexBytes(vec![]), app_id: None, instance_seed: None, key_provider: None };
    assert_eq!(device.boot_app(boot), Err(TeeError::NoGuests));
    assert!(td.mounted.entries().is_empty(), "requests stay behind");
}

#[test]
fn what_is_measured_is_what_a_verifier_reads() {
    let Some(td) = Td::new() else { return };
    let device = td.device("");
    for (name, payload) in
        [("system-preparing", &[][..]), ("app-id", &[0x11; 20]), ("compose-hash", &[0x44; 32]), ("instance-id", &[0x22; 20])]
    {
        device.measure(&event(name, payload, EventVersion::V1)).unwrap();
    }
    let evidence = device.evidence([1; 64]).unwrap();
    let identity = td.verify(&evidence).unwrap();
    assert_eq!(identity.app_id().unwrap().0, [0x11; 20]);
    assert_eq!((identity.compose_hash(), identity.instance_id()), (Some([0x44; 32]), &[0x22; 20][..]));
    assert_eq!(identity.measurement(), device.describe().unwrap().measurement);

    // a version 2 event: SCALE V0 cannot carry it
    device.measure(&event("gpu:attestation", b"{}", EventVersion::V2)).unwrap();
    let evidence = device.evidence([2; 64]).unwrap();
    assert_eq!((Encoding::of(&evidence), runtime_events(&evidence)), (Ok(Encoding::MsgpackV1), 5));
    assert_eq!(td.verify(&evidence).unwrap().app_id().unwrap().0, [0x11; 20]);

    // another process of the guest measured without the log: nothing is handed out, nothing is measured on top
    std::fs::write(td.mounted.measurements().join("rtmr3:sha384"), [9; 48]).unwrap();
    assert_eq!(device.evidence([3; 64]), Err(TeeError::LogDiverged { register: "RTMR3" }));
    assert_eq!(device.measure(&event("late", &[], EventVersion::V1)), Err(TeeError::LogDiverged { register: "RTMR3" }));
    assert_eq!(device.guest().log().read().unwrap().len(), 5);
}

#[test]
fn the_firmwares_log_explains_the_boot_registers() {
    let area = firmware_log();
    let [rtmr0, rtmr1, rtmr2, _] = ccel::replay(&area).unwrap().registers;
    let Some(td) = Td::booted(|td: SoftwareTd| td.booted([rtmr0, rtmr1, rtmr2])) else { return };
    let (log, config) = (td.dir.path().join("CCEL"), td.dir.path().join("vm.json"));
    std::fs::write(&log, &area).unwrap();
    std::fs::write(&config, r#"{"cpu_count":1}"#).unwrap();
    let device = td.device(&format!(";ccel={};vm-config={}", log.display(), config.display()));
    device.measure(&event("app-id", &[0x11; 20], EventVersion::V1)).unwrap();

    let quote = device.quote([5; 64]).unwrap();
    assert_eq!(quote.vm_config, r#"{"cpu_count":1}"#);
    let body = Quote::parse(&quote.quote).unwrap().body;
    assert_eq!((body.report_data, body.rtmr[0], body.rtmr[3]), ([5; 64], rtmr0, td.mounted.registers()[3]));
    let logged = |evidence: Vec<u8>| match Attestation::decode(&evidence).unwrap().platform {
        PlatformEvidence::Tdx(evidence) => evidence.event_log,
        _ => panic!("another platform"),
    };
    let whole = logged(device.whole_evidence([8; 64]).unwrap());
    assert_eq!(TdxEvent::log_to_json(&whole), quote.event_log, "nothing is stripped");
    assert!(logged(device.evidence([8; 64]).unwrap()).len() < whole.len());
    let proven = prove_json(quote.event_log.as_bytes(), &body.rtmr).unwrap();
    assert_eq!(proven.all().len(), 1);
    assert!(quote.event_log.contains(&format!("\"event_type\":{RUNTIME_EVENT_TYPE}")));
    assert!(td.verify(&device.evidence([6; 64]).unwrap()).is_ok(), "the stripped form verifies as well");

    std::fs::write(&log, b"not a log").unwrap();
    let refused = open(&td.text(&format!(";ccel={}", log.display()))).unwrap_err();
    assert!(matches!(&refused, TeeError::BadFirmwareLog { option: "ccel", .. }), "{refused}");
    let missing = open(&td.text(";ccel=/nonexistent")).unwrap_err();
    assert!(matches!(missing, TeeError::File { .. }), "{missing}");
}

#[test]
fn without_register_files_quotes_go_on_and_measuring_is_refused() {
    let Some(td) = Td::new() else { return };
    let device = td.device(";rtmr=/nonexistent/measurements");
    assert_eq!(device.guest().rtmr().value(), Ok(None));
    let refused = device.measure(&event("a", &[], EventVersion::V1)).unwrap_err();
    assert_eq!(refused, TeeError::NoRegister { path: "/nonexistent/measurements/rtmr3:sha384".into() });
    assert!(device.guest().log().read().unwrap().is_empty(), "nothing is written that was not measured");
    assert!(td.verify(&device.evidence([1; 64]).unwrap()).is_ok());
}

#[test]
fn registers_take_48_bytes_in_one_write() {
    let Some(td) = Td::new() else { return };
    let rtmr3 = td.mounted.measurements().join("rtmr3:sha384");
    for bytes in [47, 49, 96] {
        let error = std::fs::write(&rtmr3, vec![1; bytes]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(22), "{bytes} bytes");
    }
    assert_eq!(std::fs::read(&rtmr3).unwrap(), [0; 48]);
    assert!(std::fs::write(td.mounted.measurements().join("mrtd:sha384"), [1; 48]).is_err());
    let device = td.device("");
    device.guest().rtmr().extend(&[1; 48]).unwrap();
    assert_eq!(device.guest().rtmr().value().unwrap(), Some(td.mounted.registers()[3]));
    assert_ne!(td.mounted.registers()[3], [0; 48]);
}

#[test]
fn two_hundred_quotes_and_concurrent_readers() {
    let Some(td) = Td::new() else { return };
    let tsm = td.tsm();
    let begun = Instant::now();
    for count in 0..200u8 {
        let quote = tsm.quote(&[count; 64]).unwrap();
        assert_eq!(quote[568..632], [count; 64]);
    }
    eprintln!("200 quotes: {} ms", begun.elapsed().as_millis());
    std::thread::scope(|scope| {
        for reader in 0..8u8 {
            let tsm = &tsm;
            scope.spawn(move || {
                for count in 0..25u8 {
                    let mut report_data = [reader; 64];
                    report_data[63] = count;
                    let quote = tsm.quote(&report_data).unwrap();
                    assert_eq!(quote[568..632], report_data, "a reader got another reader's quote");
                }
            });
        }
    });
    assert_eq!(td.mounted.quotes(), 400);
    assert!(td.mounted.entries().is_empty());
}

/// A firmware log of two events per register, SHA-384 bank, followed by fill.
fn firmware_log() -> Vec<u8> {
    let mut spec = b"Spec ID Event03\0".to_vec();
    spec.extend([0, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0, 0, 0x0c, 0, 48, 0, 0]);
    let mut log = [&1u32.to_le_bytes()[..], &3u32.to_le_bytes(), &[0; 20]].concat();
    log.extend((spec.len() as u32).to_le_bytes());
    log.extend(spec);
    for (register, event_type, fill, data) in [
        (1u32, 10u32, 1u8, &b"ACPI DATA"[..]),
        (1, 4, 2, b"boot"),
        (2, 4, 3, b"kernel"),
        (2, 4, 4, b""),
        (3, 13, 5, b"cmdline"),
        (3, 13, 6, b"initrd"),
    ] {
        log.extend([register.to_le_bytes(), event_type.to_le_bytes(), 1u32.to_le_bytes()].concat());
        log.extend([0x0c, 0]);
        log.extend([fill; 48]);
        log.extend((data.len() as u32).to_le_bytes());
        log.extend(data);
    }
    log.resize(4096, 0xff);
    log
}
