//! Google Cloud's evidence: a software TD by FUSE and a real vTPM, one list of events behind RTMR3 and PCR 14.

use super::guest::{Td, event};
use super::machine::Machine;
use super::pki::AkAuthority;
use super::process::Swtpm;
use dstack_attest::Class;
use dstack_attest::eventlog::{replay_runtime, runtime_preimage};
use dstack_attest::wire::{Attestation, EventVersion, PlatformEvidence, TpmPlatform, TpmQuote};
use dstack_protocol::Platform;
use dstack_tee::tpm::TpmError;
use dstack_tee::{Device, TeeError, open};
use sha2::{Digest as _, Sha256};

/// PCR 0 of Google's firmware version 2 (dstack attestation reference §6).
fn google_firmware() -> [u8; 32] {
    hex::decode("0cca9ec161b09288802e5a112255d21340ed5b797f5fe29cecccfd8f67b9f802").unwrap().try_into().unwrap()
}

#[test]
fn both_quotes_fit_and_are_of_one_event_list() {
    let Some(machine) = Machine::new() else { return };
    let device = machine.device();
    let events = [
        event("system-preparing", &[], EventVersion::V1),
        event("app-id", &[0x11; 20], EventVersion::V1),
        event("compose-hash", &[0x44; 32], EventVersion::V1),
    ];
    for event in &events {
        device.measure(event).unwrap();
    }
    let evidence = open(&machine.text()).unwrap().evidence([3; 64]).unwrap();
    let attestation = Attestation::decode(&evidence).unwrap();
    assert_eq!((&attestation.runtime_events[..], attestation.report_data), (&events[..], [3; 64]));
    let PlatformEvidence::GcpTdx(td, tpm) = attestation.platform else { panic!("another platform") };
    assert_eq!(machine.td.mounted.registers()[3], replay_runtime(&events));

    let replay =
        |digests: &[[u8; 32]]| digests.iter().fold([0; 32], |pcr, digest| <[u8; 32]>::from(Sha256::digest([pcr, *digest].concat())));
    let digests: Vec<[u8; 32]> = events.iter().map(|event| Sha256::digest(runtime_preimage(event)).into()).collect();
    let values: Vec<(u32, &[u8])> = tpm.pcr_values.iter().map(|pcr| (pcr.index, &pcr.value[..])).collect();
    let (pcr0, pcr2, pcr14) = (google_firmware(), replay(&[[3; 32], [5; 32], [6; 32]]), replay(&digests));
    assert_eq!(values, [(0, &pcr0[..]), (2, &pcr2[..]), (14, &pcr14[..])]);
    assert!(tpm.pcr_values.iter().all(|pcr| pcr.algorithm == "sha256"));
    assert_eq!(tpm.platform, TpmPlatform::Gcp);
    let logged: Vec<(u32, u8)> = tpm.event_log.iter().map(|event| (event.pcr_index, event.digest[0])).collect();
    assert_eq!(logged, [(0, 0xfa), (0, 0xb2), (0, 0xdf), (2, 3), (2, 5), (2, 6)]);
    let nonce = Sha256::digest(&td.quote);
    assert!(tpm.message.windows(32).any(|window| window == nonce.as_slice()), "the TPM's quote is not over the TD's");

    let whole = open(&machine.text()).unwrap().whole_evidence([3; 64]).unwrap();
    assert!(whole.len() > evidence.len() && machine.verify(&whole).is_ok(), "with its log it verifies as well");
    let identity = machine.verify(&evidence).unwrap();
    assert_eq!((identity.platform(), identity.app_id().unwrap().0), (Platform::GcpTdx, [0x11; 20]));
    assert_eq!(device.platform(), Platform::GcpTdx);
    let measurement = device.describe().unwrap().measurement;
    assert_eq!((measurement.len(), &measurement[224..256], &measurement[256..]), (288, &pcr0[..], &pcr2[..]));
    assert_eq!(measurement[192..224], [0x44; 32]);
    assert_eq!(identity.measurement(), measurement);
    assert_eq!(identity.os_image_hash(), Some([6; 32]), "the third event of PCR 2");
    assert!(identity.software_root());
    assert!(device.platform_key(b"shares").unwrap().is_none(), "a vTPM of the host seals nothing");
}

#[test]
fn a_pcr_that_moved_without_the_log_stops_evidence() {
    let Some(machine) = Machine::new() else { return };
    let device = machine.device();
    device.measure(&event("a", &[], EventVersion::V1)).unwrap();
    assert!(device.evidence([1; 64]).is_ok());
    device.tpm().extend(14, [9; 32]).unwrap();
    assert_eq!(device.evidence([1; 64]), Err(TeeError::LogDiverged { register: "PCR14" }));
    // neither register moves when one of them does not fit
    let rtmr3 = machine.td.mounted.registers()[3];
    assert_eq!(device.measure(&event("b", &[], EventVersion::V1)), Err(TeeError::LogDiverged { register: "PCR14" }));
    assert_eq!(machine.td.mounted.registers()[3], rtmr3);
}

#[test]
fn halves_that_do_not_belong_together_are_refused() {
    let Some(machine) = Machine::new() else { return };
    let device = machine.device();
    device.measure(&event("app-id", &[0x11; 20], EventVersion::V1)).unwrap();
    let good = Attestation::decode(&device.evidence([3; 64]).unwrap()).unwrap();
    let other = Attestation::decode(&device.evidence([4; 64]).unwrap()).unwrap();
    let class = |change: &dyn Fn(&mut TpmQuote, &TpmQuote)| {
        let mut changed = good.clone();
        let PlatformEvidence::GcpTdx(_, ours) = &mut changed.platform else { panic!("another platform") };
        let PlatformEvidence::GcpTdx(_, theirs) = &other.platform else { panic!("another platform") };
        change(ours, theirs);
        machine.verify(&changed.encode()).map_err(|error| error.class()).err()
    };
    assert_eq!(class(&|_, _| ()), None);
    // the TPM's quote is over another TD quote
    assert_eq!(class(&|ours, theirs| *ours = theirs.clone()), Some(Class::BindingTpmQuote));
    assert_eq!(class(&|ours, _| ours.message[60] ^= 1), Some(Class::SigBody));
    assert_eq!(class(&|ours, _| ours.pcr_values[1].value[0] ^= 1), Some(Class::PcrDigestMismatch));
    assert_eq!(class(&|ours, _| ours.event_log[0].digest[0] ^= 1), Some(Class::EventlogReplayMismatch));
    // the authority's certificate, but of another key
    assert_eq!(class(&|ours, _| ours.ak_cert = machine.authority.certify(other_key())), Some(Class::SigBody));
    // a key that another authority certifies
    assert_eq!(class(&|ours, _| ours.ak_cert = AkAuthority::new().certify(other_key())), Some(Class::ChainUntrustedRoot));
}

/// x ‖ y of a key that no TPM of these tests has.
fn other_key() -> [u8; 64] {
    let key = p256::ecdsa::SigningKey::from_slice(&[7; 32]).unwrap();
    key.verifying_key().to_sec1_point(false).as_bytes()[1..].try_into().unwrap()
}

#[test]
fn a_machine_without_the_clouds_key_is_refused_at_start() {
    let (Some(td), Some(swtpm)) = (Td::new(), Swtpm::start()) else { return };
    let text = td.text(&format!(";tpm={}", swtpm.tcti())).replacen("tdx:", "gcp:", 1);
    assert_eq!(open(&text).unwrap_err(), TeeError::Tpm(TpmError::NoTemplate));
}
