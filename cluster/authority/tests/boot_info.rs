//! What authorities are told, byte by byte, of guests on emulated machines; the formulas are written out here, apart from the code.

use dstack_attest::{CollateralBundle, TcbPolicy, TrustRoots, VerifiedIdentity, VerifyContext, verify};
use dstack_authority::BootInfo;
use dstack_protocol::UnixMillis;
use dstack_secret::Secret;
use dstack_testkit::eventlog::{RuntimeEvent, replay};
use dstack_testkit::{Host, Measured, SoftwareRoots, Validity};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

const NOW: UnixMillis = UnixMillis(1_790_000_000_000);
const APP: [u8; 20] = [0xAB; 20];
const PROVIDER: &[u8] = br#"{"name":"kms","id":"ab"}"#;

#[expect(clippy::unwrap_used, reason = "helper of tests")]
fn roots() -> SoftwareRoots {
    SoftwareRoots::from_seed(&Secret::from_fn(|bytes| bytes.fill(1)), Validity::around(NOW.0 / 1000)).unwrap()
}

#[expect(clippy::unwrap_used, reason = "helper of tests")]
fn verified(roots: &SoftwareRoots, evidence: &[u8]) -> VerifiedIdentity {
    let trust = TrustRoots::production().with_software_root(roots.tdx_root_der()).unwrap();
    let trust = trust.with_software_root(roots.nitro_root_der()).unwrap();
    let collateral = CollateralBundle::parse(roots.bundle()).unwrap();
    verify(evidence, &VerifyContext { now: NOW, roots: &trust, collateral: &collateral, tcb: &TcbPolicy::default() }).unwrap()
}

fn hash(parts: &[&[u8]]) -> String {
    hex::encode(Sha256::digest(parts.concat()))
}

#[expect(clippy::unwrap_used, reason = "helper of tests")]
fn told(info: Option<BootInfo>) -> Value {
    serde_json::to_value(info.unwrap()).unwrap()
}

#[test]
fn of_a_td() {
    let (roots, compose_hash, instance) = (roots(), [0x44; 32], [0x22; 20]);
    let boot: Vec<RuntimeEvent> = [
        ("system-preparing", &b""[..]),
        ("app-id", &APP),
        ("compose-hash", &compose_hash),
        ("instance-id", &instance),
        ("boot-mr-done", b""),
    ]
    .map(|(name, payload)| RuntimeEvent::new(name, payload))
    .into();
    let later = [("os-image-hash", &[7; 32][..]), ("key-provider", PROVIDER), ("system-ready", b"")];
    let events = [boot.clone(), later.map(|(name, payload)| RuntimeEvent::new(name, payload)).into()].concat();
    let measured = Measured::Started(events.clone());
    let host = Host::tdx("m", &roots).unwrap();
    let identity = verified(&roots, &host.evidence(&measured, &[0; 64], NOW).unwrap());
    let registers = &measured.tdx_measurement()[..192];
    let expected = json!({
        "teeVariant": "dstack-tdx",
        "mrAggregated": hash(&[registers, &replay(&events)]),
        "osImageHash": "",
        "mrSystem": hash(&[registers, &Sha256::digest(PROVIDER)]),
        "appId": "ab".repeat(20),
        "composeHash": "44".repeat(32),
        "instanceId": "22".repeat(20),
        "deviceId": hash(&[&host.identity()]),
        "keyProviderInfo": hex::encode(PROVIDER),
        "tcbStatus": "UpToDate",
        "advisoryIds": [],
    });
    assert_eq!(told(BootInfo::of(&identity, identity.os_image_hash())), expected, "its own word on its image is not told");
    assert_eq!(told(BootInfo::of(&identity, Some([0xEF; 32])))["osImageHash"], "ef".repeat(32));

    // As it had booted, for `SignCert`.
    let mut at_boot = expected;
    at_boot["mrAggregated"] = json!(hash(&[registers, &replay(&boot)]));
    at_boot["mrSystem"] = json!(hash(&[registers, &[0; 32]]));
    at_boot["keyProviderInfo"] = json!("");
    assert_eq!(told(BootInfo::at_boot(&identity, None)), at_boot);

    // Without an app nobody can decide.
    let node = verified(&roots, &host.evidence(&Measured::executable(b"node"), &[0; 64], NOW).unwrap());
    assert_eq!(BootInfo::of(&node, None), None);
}

#[test]
fn of_an_enclave() {
    let roots = roots();
    let host = Host::nitro("m", &roots).unwrap();
    let measured = Measured::compose(b"{}");
    let identity = verified(&roots, &host.evidence(&measured, &[0; 64], NOW).unwrap());
    let image = hash(&[&measured.nitro_measurement()]);
    let expected = json!({
        "teeVariant": "dstack-nitro-enclave",
        "mrAggregated": image,
        "osImageHash": image,
        "mrSystem": image,
        "appId": hex::encode(&Sha256::digest(b"{}")[..20]),
        "composeHash": image,
        "instanceId": "",
        "deviceId": hash(&[&host.identity()]),
        "keyProviderInfo": "",
        "tcbStatus": "",
        "advisoryIds": [],
    });
    assert_eq!(told(BootInfo::of(&identity, identity.os_image_hash())), expected);
    assert_eq!(told(BootInfo::at_boot(&identity, identity.os_image_hash())), expected);
}
