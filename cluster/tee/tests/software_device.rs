//! The client against the testkit's own device: what it hands out is what production code verifies.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use dstack_attest::wire::{Attestation, EventVersion, PlatformEvidence, RuntimeEvent, TdxEvent};
use dstack_attest::{CollateralBundle, TcbPolicy, TrustRoots, VerifiedIdentity, VerifyContext, verify};
use dstack_protocol::Platform;
use dstack_runtime::clock::{Clock, SystemClock};
use dstack_tee::software::protocol::{HexArray, HexBytes};
use dstack_tee::{Boot, Device, KeyProvider, SoftwareDevice, TeeError, open, with_vm_config};
use dstack_testkit::device::{Executables, Serving, serve};
use dstack_testkit::{Host, SoftwareRoots};
use sha2::{Digest, Sha256};
use std::path::Path;
use std::sync::Arc;

/// A machine of each platform, and what a verifier is told of them.
struct Machines {
    roots: SoftwareRoots,
    clock: Arc<SystemClock>,
    dir: tempfile::TempDir,
}

impl Machines {
    fn new() -> Self {
        let clock = Arc::new(SystemClock::new());
        let roots = SoftwareRoots::generate(clock.now()).unwrap();
        Self { roots, clock, dir: tempfile::tempdir().unwrap() }
    }

    fn serve(&self, platform: Platform) -> Serving {
        let host = match platform {
            Platform::Nitro => Host::nitro("machine", &self.roots).unwrap(),
            _ => Host::tdx("machine", &self.roots).unwrap(),
        };
        let path = self.dir.path().join(platform.name());
        serve(host, &path, 0o600, Arc::new(Executables::default()), self.clock.clone()).unwrap()
    }

    fn verify(&self, evidence: &[u8]) -> VerifiedIdentity {
        let roots = TrustRoots::none().with_software_root(self.roots.tdx_root_der()).unwrap();
        let roots = roots.with_software_root(self.roots.nitro_root_der()).unwrap();
        let collateral = CollateralBundle::parse(self.roots.bundle()).unwrap();
        let context = VerifyContext { now: self.clock.now(), roots: &roots, collateral: &collateral, tcb: &TcbPolicy::default() };
        verify(evidence, &context).unwrap()
    }
}

fn connect(path: &Path) -> Arc<dyn Device> {
    open(&format!("software:{}", path.display())).unwrap()
}

fn boot(compose: &[u8]) -> Boot {
    let key_provider = Some(KeyProvider { name: "kms".into(), id: "00".into() });
    Boot { compose: HexBytes(compose.to_vec()), app_id: None, instance_seed: Some(HexBytes(b"seed".to_vec())), key_provider }
}

fn key(device: &dyn Device, purpose: &[u8]) -> [u8; 32] {
    device.platform_key(purpose).unwrap().unwrap().expose(|key| *key)
}

#[test]
fn whole_evidence_has_the_log_with_its_digests_and_verifies() {
    let machines = Machines::new();
    for platform in [Platform::Tdx, Platform::Nitro] {
        let serving = machines.serve(platform);
        let device = connect(serving.path());
        device.boot_app(boot(b"{}")).unwrap();
        let whole = device.whole_evidence([9; 64]).unwrap();
        let statement = |evidence: &[u8]| machines.verify(evidence).statement_id();
        assert_eq!(machines.verify(&whole).report_data(), &[9; 64]);
        let rewritten = Attestation::decode(&whole).unwrap().encode_v1();
        assert_ne!(rewritten, whole);
        assert_eq!(statement(&rewritten), statement(&whole), "another encoding");
        assert_ne!(statement(&device.whole_evidence([8; 64]).unwrap()), statement(&whole), "another statement");
        if let PlatformEvidence::Tdx(td) = Attestation::decode(&whole).unwrap().platform {
            assert_eq!(TdxEvent::log_to_json(&td.event_log), device.quote([9; 64]).unwrap().event_log);
            assert!(td.event_log.len() == 7 && td.event_log.iter().all(|event| event.digest.len() == 48));
        }
        let config = |evidence: &[u8]| Attestation::decode(evidence).unwrap().config;
        assert_eq!(config(&with_vm_config(whole.clone(), "{}").unwrap()), config(&whole), "its own stays");
        let mut bare = Attestation::decode(&whole).unwrap();
        bare.config.clear();
        let given = with_vm_config(bare.encode(), "{}").unwrap();
        assert_eq!(config(&given), "{}");
        machines.verify(&given);
        assert_eq!(with_vm_config(b"none".to_vec(), "").unwrap(), b"none");
        assert!(matches!(with_vm_config(b"none".to_vec(), "{}"), Err(TeeError::UndecodableEvidence(_))));
    }
}

#[test]
fn a_node_is_what_asks_on_both_platforms() {
    let machines = Machines::new();
    for platform in [Platform::Tdx, Platform::Nitro] {
        let serving = machines.serve(platform);
        let device = connect(serving.path());
        assert_eq!((device.platform(), device.is_software()), (platform, true));
        let report_data = [platform.byte(); 64];
        let identity = machines.verify(&device.evidence(report_data).unwrap());
        assert_eq!(identity.platform(), platform);
        assert_eq!(identity.report_data(), &report_data);
        assert!(identity.software_root());
        let described = device.describe().unwrap();
        assert_eq!(identity.measurement(), described.measurement);
        assert_eq!(identity.platform_identity(), described.platform_identity);
        assert_eq!(described.measurement.len(), if platform == Platform::Tdx { 224 } else { 144 });
        let again = connect(serving.path());
        assert_eq!(key(&*device, b"seal"), key(&*again, b"seal"));
        assert_ne!(key(&*device, b"seal"), key(&*device, b"other"));
    }
}

#[test]
fn a_guest_is_its_compose_document() {
    let machines = Machines::new();
    let serving = machines.serve(Platform::Tdx);
    let device = connect(serving.path());
    let of_node = key(&*device, b"seal");
    let compose = br#"{"name":"web"}"#;
    let booted = device.boot_app(boot(compose)).unwrap();
    let compose_hash: [u8; 32] = Sha256::digest(compose).into();
    assert_eq!(booted.compose_hash, HexArray(compose_hash));
    assert_eq!(booted.app_id.0, compose_hash[..20]);
    assert_eq!(booted.instance_id.0, Sha256::digest([b"seed", &booted.app_id.0[..]].concat())[..20]);

    let identity = machines.verify(&device.evidence([9; 64]).unwrap());
    assert_eq!(identity.app_id().unwrap().0, booted.app_id.0);
    assert_eq!(identity.compose_hash(), Some(compose_hash));
    assert_eq!(identity.instance_id(), booted.instance_id.0);
    assert_eq!(identity.key_provider(), br#"{"name":"kms","id":"00"}"#);
    assert_ne!(key(&*device, b"seal"), of_node, "a guest has keys of its own");
    let second = device.boot_app(boot(b"{}")).unwrap_err();
    assert!(matches!(second, TeeError::Refused { .. }), "{second}");

    let quote = device.quote([9; 64]).unwrap();
    let log = TdxEvent::parse_log(quote.event_log.as_bytes()).unwrap();
    let names: Vec<&str> = log.iter().filter(|event| event.is_runtime()).map(|event| event.event.as_str()).collect();
    assert_eq!(names, ["system-preparing", "app-id", "compose-hash", "instance-id", "boot-mr-done", "key-provider", "system-ready"]);
    assert_eq!(quote.quote[568..632], [9; 64]);

    let other = connect(serving.path());
    other.boot_app(boot(br#"{"name":"evil"}"#)).unwrap();
    let other = machines.verify(&other.evidence([9; 64]).unwrap());
    assert_ne!(other.measurement(), identity.measurement());
}

#[test]
fn an_enclave_names_its_app_and_is_its_image() {
    let machines = Machines::new();
    let serving = machines.serve(Platform::Nitro);
    let device = connect(serving.path());
    let booted = device.boot_app(boot(b"{}")).unwrap();
    let identity = machines.verify(&device.evidence([1; 64]).unwrap());
    assert_eq!(identity.app_id().unwrap().0, booted.app_id.0);
    let image: [u8; 32] = Sha256::digest(identity.measurement()).into();
    assert_eq!((identity.compose_hash(), identity.os_image_hash()), (Some(image), Some(image)));
    assert!(identity.instance_id().is_empty());
}

#[test]
fn a_guest_outlives_a_restart_of_the_device_process() {
    let machines = Machines::new();
    let serving = machines.serve(Platform::Tdx);
    let device = SoftwareDevice::open(serving.path()).unwrap();
    device.boot_app(boot(b"{}")).unwrap();
    let before = machines.verify(&device.evidence([2; 64]).unwrap());
    serving.stop();
    assert!(matches!(device.evidence([2; 64]), Err(TeeError::Connect { .. })));
    let serving = machines.serve(Platform::Tdx);
    let after = machines.verify(&device.evidence([2; 64]).unwrap());
    assert_eq!(after.measurement(), before.measurement());
    assert_eq!(after.app_id(), before.app_id());
    drop(serving);
}

#[test]
fn a_started_guest_measures_its_own_boot_also_over_a_lost_connection() {
    let machines = Machines::new();
    let serving = machines.serve(Platform::Tdx);
    let path = serving.path().to_owned();
    let device = connect(&path);
    assert_eq!(device.measure(&event("early", b"")), Err(TeeError::NoEvents), "a node has no register of events");
    device.start_app().unwrap();
    assert!(matches!(device.start_app(), Err(TeeError::Refused { .. })));
    for (name, payload) in
        [("system-preparing", &[][..]), ("app-id", &[0x11; 20]), ("compose-hash", &[0x44; 32]), ("instance-id", &[0x22; 20])]
    {
        device.measure(&event(name, payload)).unwrap();
    }
    let refused = device.measure(&event("a:b", b"")).unwrap_err();
    assert!(matches!(refused, TeeError::BadEvent { .. }), "{refused}");
    let before = device.evidence([1; 64]).unwrap();
    serving.stop();
    let _again = machines.serve(Platform::Tdx);
    device.measure(&event("boot-mr-done", b"")).unwrap();
    let evidence = device.evidence([1; 64]).unwrap();
    assert_ne!(evidence, before);
    let identity = machines.verify(&evidence);
    assert_eq!((identity.app_id().unwrap().0, identity.compose_hash()), ([0x11; 20], Some([0x44; 32])));
    assert_eq!(identity.instance_id(), [0x22; 20]);
    assert_eq!(identity.measurement(), device.describe().unwrap().measurement);
    let names: Vec<String> = device.runtime_events().unwrap().into_iter().map(|event| event.event).collect();
    assert_eq!(names, ["system-preparing", "app-id", "compose-hash", "instance-id", "boot-mr-done"]);

    let device = connect(&path);
    let booted = device.boot_app(boot(b"{}")).unwrap();
    device.measure(&event("an:app's own", b"payload")).unwrap();
    let evidence = device.evidence([2; 64]).unwrap();
    assert_eq!(machines.verify(&evidence).app_id().unwrap().0, booted.app_id.0);
    assert_eq!(device.runtime_events().unwrap().last().unwrap().payload, b"payload");
    let enclave = machines.serve(Platform::Nitro);
    let device = connect(enclave.path());
    assert!(matches!(device.start_app(), Err(TeeError::NoEvents | TeeError::Refused { .. })));
}

fn event(name: &str, payload: &[u8]) -> RuntimeEvent {
    RuntimeEvent { event: name.to_owned(), payload: payload.to_vec(), version: EventVersion::V1 }
}
