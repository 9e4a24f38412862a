//! Real evidence of dstack guests through the public entry: what identity it proves, and that no changed byte proves another.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::collections::BTreeMap;

use dstack_attest::{
    AttestError, CollateralBundle, TcbPolicy, TrustRoots, VerifiedIdentity, VerifyContext, tdx, verify, verify_legacy,
    wire::{Attestation, PlatformEvidence, TdxEvent, TdxEvidence, runtime_events_of},
};
use dstack_protocol::{Platform, TcbStatus, UnixMillis};
use proptest::{prelude::*, test_runner::TestRunner};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// One guest of the vectors, ready to be verified.
struct Guest {
    id: String,
    now: UnixMillis,
    quote: Vec<u8>,
    log: Vec<u8>,
    bundle: CollateralBundle,
    compose: Option<Vec<u8>>,
    vector: Value,
}

impl Guest {
    fn verify_with<T>(&self, call: impl FnOnce(&VerifyContext<'_>) -> T) -> T {
        let (roots, tcb) = (TrustRoots::production(), TcbPolicy::default());
        call(&VerifyContext { now: self.now, roots: &roots, collateral: &self.bundle, tcb: &tcb })
    }

    fn legacy(&self) -> Result<VerifiedIdentity, AttestError> {
        self.verify_with(|context| verify_legacy(&self.quote, &self.log, context))
    }

    fn verify(&self, evidence: &[u8]) -> Result<VerifiedIdentity, AttestError> {
        self.verify_with(|context| verify(evidence, context))
    }

    fn attestation(&self) -> Attestation {
        let event_log = TdxEvent::parse_log(&self.log).unwrap();
        Attestation {
            report_data: hex::decode(self.identity("report_data")).unwrap().try_into().unwrap(),
            runtime_events: runtime_events_of(&event_log),
            platform: PlatformEvidence::Tdx(TdxEvidence { quote: self.quote.clone(), event_log }),
            config: String::new(),
            report_data_payload: None,
        }
    }

    fn identity(&self, name: &str) -> &str {
        self.vector["identity"][name].as_str().unwrap()
    }
}

/// The dstack guests that are up to date, or `None` without the vectors.
fn guests() -> Option<Vec<Guest>> {
    let vectors = common::vectors()?;
    let real = vectors.of("dstack-tdx").filter(|vector| vector["kind"] == "real" && vector["expect"]["result"] == "ok");
    let guest = |vector: &Value| Guest {
        id: vector["id"].as_str().unwrap().to_owned(),
        now: UnixMillis(common::millis(vector["valid_at"].as_str().unwrap())),
        quote: vectors.file(vector, "quote"),
        log: vectors.file(vector, "event_log"),
        bundle: common::bundle(vector["identity"]["fmspc"].as_str().unwrap(), &vectors.file(vector, "collateral")),
        compose: vector["files"].get("app_compose").map(|_| vectors.file(vector, "app_compose")),
        vector: vector.clone(),
    };
    Some(real.map(guest).collect())
}

#[test]
fn a_guest_is_what_its_registers_and_events_say() {
    let Some(guests) = guests() else { return };
    assert_eq!(guests.len(), 13);
    let mut devices = BTreeMap::new();
    for guest in guests {
        let identity = guest.legacy().unwrap();
        assert_eq!((identity.platform(), identity.tcb_status()), (Platform::Tdx, TcbStatus::UpToDate), "{}", guest.id);
        let boot = ["mr_td", "rtmr0", "rtmr1", "rtmr2"].map(|name| guest.identity(name)).concat();
        let compose_hash = identity.compose_hash().unwrap();
        assert_eq!(hex::encode(identity.measurement()), boot + &hex::encode(compose_hash), "{}", guest.id);
        assert_eq!(hex::encode(identity.report_data()), guest.identity("report_data"), "{}", guest.id);
        assert_eq!(identity.platform_identity().len(), Platform::Tdx.identity_bytes());
        assert!(!identity.software_root() && identity.earliest_expiry() > guest.now);
        if let Some(compose) = &guest.compose {
            assert_eq!(compose_hash, <[u8; 32]>::from(Sha256::digest(compose)), "{}", guest.id);
        }
        // dstack's own answers beside the evidence. Its device id then was a hash of the quote's user data; ours is of the PPID,
        // so only that the same machine stays the same can be compared.
        let app = &guest.vector["app"];
        if let Some(device) = app["device_id"].as_str().filter(|device| *device != hex::encode(Sha256::digest([]))) {
            let ours = devices.entry(device.to_owned()).or_insert_with(|| identity.device_id());
            assert_eq!(*ours, identity.device_id(), "{}", guest.id);
        }
        // Most of them measured an event `os-image-hash`: their own word, which no register ties to the image.
        assert_eq!(identity.os_image_hash(), None, "{}", guest.id);
        assert_eq!(identity.app_id().unwrap().0.len(), 20);
    }
}

#[test]
fn every_form_of_the_evidence_proves_the_same_guest() {
    let Some(guests) = guests() else { return };
    for guest in guests {
        let legacy = guest.legacy().unwrap();
        let whole = guest.attestation();
        for evidence in [whole.encode_v0().unwrap(), whole.encode_v1(), whole.clone().stripped().encode_v0().unwrap()] {
            let identity = guest.verify(&evidence).unwrap();
            assert_eq!(identity.measurement(), legacy.measurement());
            assert_eq!((identity.app_id(), identity.instance_id()), (legacy.app_id(), legacy.instance_id()));
            assert_eq!((identity.mr_system(), identity.mr_aggregated()), (legacy.mr_system(), legacy.mr_aggregated()));
            assert_ne!(identity.evidence_hash(), legacy.evidence_hash());
            assert_eq!(identity.statement_id(), legacy.statement_id(), "the same quote, whatever stands around it");
        }
    }
}

/// The quote with the other signature that verifies wherever its own does: `n - s` in place of `s`.
fn turned(quote: &[u8]) -> Vec<u8> {
    const ORDER: &str = "ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551";
    let at = dstack_attest::tdx::Quote::parse(quote).unwrap().signed.len() + 4 + 32;
    let mut turned = quote.to_vec();
    let mut borrow = 0;
    for (byte, order) in turned[at..at + 32].iter_mut().zip(hex::decode(ORDER).unwrap()).rev() {
        let digit = i16::from(order) - i16::from(*byte) - borrow;
        borrow = i16::from(digit < 0);
        *byte = u8::try_from(digit.rem_euclid(256)).unwrap();
    }
    turned
}

#[test]
fn a_quote_keeps_its_name_when_its_unsigned_parts_change() {
    let Some(guests) = guests() else { return };
    let mut names = BTreeMap::new();
    for guest in guests {
        let own = guest.legacy().unwrap();
        let quote = names.entry(own.statement_id()).or_insert_with(|| guest.quote.clone());
        assert_eq!(*quote, guest.quote, "another quote, another name: {}", guest.id);
        let mut changed = guest.attestation();
        changed.config = "{}".to_owned();
        let PlatformEvidence::Tdx(td) = &mut changed.platform else { unreachable!() };
        td.quote = turned(&td.quote);
        assert_ne!(td.quote, guest.quote);
        let identity = guest.verify(&changed.encode_v1()).unwrap();
        assert_eq!((identity.statement_id(), identity.measurement()), (own.statement_id(), own.measurement()), "{}", guest.id);
    }
}

#[test]
fn the_parts_of_an_attestation_are_bound_to_each_other() {
    let Some(guests) = guests() else { return };
    let guest = guests.first().unwrap();
    let refused = |change: fn(&mut Attestation)| {
        let mut attestation = guest.attestation();
        change(&mut attestation);
        guest.verify(&attestation.encode_v0().unwrap()).unwrap_err()
    };
    assert_eq!(refused(|attestation| attestation.report_data[63] ^= 1), AttestError::ReportData);
    assert_eq!(refused(|attestation| attestation.runtime_events[1].payload[0] ^= 1), AttestError::ReplayMismatch { register: 3 });
    assert_eq!(refused(|attestation| attestation.runtime_events.clear()), AttestError::ReplayMismatch { register: 3 });
    let other_log = |attestation: &mut Attestation| {
        let PlatformEvidence::Tdx(td) = &mut attestation.platform else { unreachable!() };
        td.event_log.last_mut().unwrap().event_payload.push(1);
    };
    assert!(matches!(refused(other_log), AttestError::EventDigest { .. }));
    let not_intel = verify(
        &guest.attestation().encode(),
        &VerifyContext { now: guest.now, roots: &TrustRoots::none(), collateral: &guest.bundle, tcb: &TcbPolicy::default() },
    );
    assert_eq!(not_intel, Err(AttestError::UntrustedRoot { chain: "pck certificate chain" }));
}

#[test]
fn a_platform_without_collateral_is_refused() {
    let Some(guests) = guests() else { return };
    let guest = guests.first().unwrap();
    let no_collateral = verify(
        &guest.attestation().encode(),
        &VerifyContext {
            now: guest.now,
            roots: &TrustRoots::production(),
            collateral: &CollateralBundle::empty(),
            tcb: &TcbPolicy::default(),
        },
    );
    assert!(matches!(no_collateral, Err(AttestError::CollateralMissing { .. })));
}

#[test]
fn no_changed_byte_proves_another_guest() {
    let Some(guests) = guests() else { return };
    let guest = guests.first().unwrap();
    let evidence = guest.attestation().encode_v0().unwrap();
    let good = guest.verify(&evidence).unwrap();
    // A change that is accepted (white space of a PEM text, the other form of a signature) must leave every fact as it was.
    let same = |got: Result<VerifiedIdentity, AttestError>| match got {
        Err(_) => true,
        Ok(got) => {
            got.measurement() == good.measurement()
                && got.report_data() == good.report_data()
                && got.app_id() == good.app_id()
                && got.mr_aggregated() == good.mr_aggregated()
                && got.platform_identity() == good.platform_identity()
                && got.tcb_status() == good.tcb_status()
        }
    };
    let mut runner = TestRunner::new(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() });
    let change = (0..evidence.len(), 1u8..=255);
    let changed = runner.run(&change, |(at, mask)| {
        let mut bytes = evidence.clone();
        bytes[at] ^= mask;
        prop_assert!(same(guest.verify(&bytes)));
        Ok(())
    });
    changed.unwrap();
    let cut = runner.run(&(0..evidence.len()), |at| {
        prop_assert!(guest.verify(&evidence[..at]).is_err());
        Ok(())
    });
    cut.unwrap();
}

/// Whatever is changed in quote or collateral: with collateral checked before the verdict is the same to the last word, and what is
/// accepted `dcap-qvl` accepts as well.
#[test]
fn checked_collateral_and_the_second_implementation_agree_on_changed_bytes() {
    let Some(guests) = guests() else { return };
    let guest = guests.first().unwrap();
    let roots = TrustRoots::production();
    let collateral = guest.bundle.tdx(&tdx::claimed_fmspc(&guest.quote).unwrap()).unwrap().clone();
    let lengths = [
        guest.quote.len(),
        collateral.root_ca_crl.len(),
        collateral.pck_crl.len(),
        collateral.tcb_info.len(),
        collateral.qe_identity.len(),
        collateral.tcb_info_signature.len(),
        collateral.tcb_info_issuer_chain.len(),
        collateral.pck_crl_issuer_chain.len(),
    ];
    let mut runner = TestRunner::new(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() });
    let judged = runner.run(&(0..16usize, any::<prop::sample::Index>(), 1u8..128, -40i64..40), |(part, at, mask, days)| {
        let (mut quote, mut changed) = (guest.quote.clone(), collateral.clone());
        let flip = |bytes: &mut [u8], at: usize| bytes[at] ^= mask;
        let flip_text = |text: &mut String, at: usize| {
            let mut bytes = std::mem::take(text).into_bytes();
            flip(&mut bytes, at);
            *text = String::from_utf8_lossy(&bytes).into_owned();
        };
        // Half of the cases change nothing but the time.
        match (part, lengths.get(part).map(|length| at.index(*length))) {
            (0, Some(at)) => flip(&mut quote, at),
            (1, Some(at)) => flip(&mut changed.root_ca_crl, at),
            (2, Some(at)) => flip(&mut changed.pck_crl, at),
            (3, Some(at)) => flip_text(&mut changed.tcb_info, at),
            (4, Some(at)) => flip_text(&mut changed.qe_identity, at),
            (5, Some(at)) => flip(&mut changed.tcb_info_signature, at),
            (6, Some(at)) => flip_text(&mut changed.tcb_info_issuer_chain, at),
            (7, Some(at)) => flip_text(&mut changed.pck_crl_issuer_chain, at),
            _ => {}
        }
        let now_ms = guest.now.0.saturating_add_signed(days * 86_400_000);
        let fresh = tdx::verify_quote(&quote, &changed, now_ms, &roots);
        let checked = tdx::CheckedCollateral::new(std::sync::Arc::new(changed.clone()), &roots);
        prop_assert_eq!(&tdx::verify_quote_checked(&quote, &checked, now_ms, &roots), &fresh);
        if let Some(remembered) = tdx::verify_quote_remembered(&quote, &changed, now_ms, &roots) {
            prop_assert_eq!(&remembered, &fresh);
        }
        if let Ok(verified) = &fresh {
            prop_assert_eq!(tdx::second_opinion(&quote, &changed, now_ms, &roots, verified), Ok(()));
        }
        Ok(())
    });
    judged.unwrap();
}

#[test]
fn a_td_of_google_cloud_without_events_has_registers_only() {
    let Some(vectors) = common::vectors() else { return };
    let vector = vectors.of("gcp-tdx").find(|vector| vector["id"] == "gcp-tdx-2025-12").unwrap();
    let quote = vectors.file(vector, "quote");
    let fact = |name: &str| vector["identity"][name].as_str().unwrap();
    let collateral = common::bundle(fact("fmspc"), &vectors.file(vector, "collateral"));
    let td = TdxEvidence { quote, event_log: Vec::new() };
    let evidence = Attestation {
        platform: PlatformEvidence::Tdx(td),
        report_data: hex::decode(fact("report_data")).unwrap().try_into().unwrap(),
        runtime_events: Vec::new(),
        config: String::new(),
        report_data_payload: None,
    };
    let (roots, tcb) = (TrustRoots::production(), TcbPolicy::default());
    let now = UnixMillis(common::millis(vector["valid_at"].as_str().unwrap()));
    let identity = verify(&evidence.encode(), &VerifyContext { now, roots: &roots, collateral: &collateral, tcb: &tcb }).unwrap();
    assert_eq!((identity.platform(), identity.app_id(), identity.compose_hash()), (Platform::Tdx, None, None));
    let boot = ["mr_td", "rtmr0", "rtmr1", "rtmr2"].map(fact).concat();
    assert_eq!(hex::encode(identity.measurement()), boot + &"00".repeat(32));
    assert_eq!(identity.require_report_data(&[1; 64]), Err(AttestError::ReportData));
    assert_eq!(identity.require_report_data(&identity.report_data().clone()), Ok(()));
}

#[test]
fn collateral_can_be_checked_before_it_is_pinned() {
    let Some(guests) = guests() else { return };
    for guest in guests {
        let dates = guest.bundle.check(guest.now, &TrustRoots::production()).unwrap();
        let expiry = guest.legacy().unwrap().earliest_expiry();
        for (fmspc, dates) in dates {
            assert!(dates.oldest_issue < guest.now && !dates.software_root);
            assert_eq!(dates.earliest_expiry, expiry, "the pck certificate outlives the collateral of {}", hex::encode(fmspc));
            let late = guest.bundle.check(dates.earliest_expiry.plus_ms(1000), &TrustRoots::production());
            assert!(matches!(late, Err(AttestError::CollateralExpired { .. })), "{late:?}");
        }
        let other = String::from_utf8(guest.bundle.bytes().to_vec()).unwrap().replacen(guest.identity("fmspc"), "0102030405ab", 1);
        let other = CollateralBundle::parse(other.as_bytes()).unwrap().check(guest.now, &TrustRoots::production());
        assert_eq!(other, Err(AttestError::CollateralMismatch { part: "tcb info", why: "of another fmspc" }));
    }
}

#[test]
fn no_changed_byte_of_the_collateral_proves_another_status() {
    let Some(guests) = guests() else { return };
    let guest = guests.first().unwrap();
    let good = guest.legacy().unwrap();
    let json = guest.bundle.bytes().to_vec();
    let mut runner = TestRunner::new(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() });
    let changed = runner.run(&(0..json.len(), 1u8..=255), |(at, mask)| {
        let mut bytes = json.clone();
        bytes[at] ^= mask;
        let Ok(collateral) = CollateralBundle::parse(&bytes) else { return Ok(()) };
        let (roots, tcb) = (TrustRoots::production(), TcbPolicy::default());
        let context = VerifyContext { now: guest.now, roots: &roots, collateral: &collateral, tcb: &tcb };
        if let Ok(identity) = verify_legacy(&guest.quote, &guest.log, &context) {
            prop_assert_eq!(identity.advisory_ids(), good.advisory_ids());
            prop_assert_eq!(identity.earliest_expiry(), good.earliest_expiry());
        }
        Ok(())
    });
    changed.unwrap();
}

#[test]
fn a_nitro_attestation_of_dstack_proves_its_image() {
    let Some(vectors) = common::vectors() else { return };
    let vector = vectors.of("nitro").find(|vector| vector["id"] == "nitro-dstack-b").unwrap();
    let evidence = vectors.file(vector, "wrapped");
    let fixture = "921d5cc7131a35d2814cfdad7d143e7dd6635d0d99cb8a8a30ecb8530c0b5576";
    assert_eq!(hex::encode(Sha256::digest(&evidence)), fixture);
    let now = UnixMillis(common::millis(vector["valid_at"].as_str().unwrap()));
    let (roots, collateral, tcb) = (TrustRoots::production(), CollateralBundle::empty(), TcbPolicy::default());
    let identity = verify(&evidence, &VerifyContext { now, roots: &roots, collateral: &collateral, tcb: &tcb }).unwrap();
    // Values of the attestation reference, section 12.
    let image = "1894b0b29e94a9db16e88a2914f0923e52bb16c08bf3bb484df786a147e2eb79";
    assert_eq!(identity.os_image_hash().map(hex::encode).as_deref(), Some(image));
    assert_eq!((identity.compose_hash(), Some(identity.mr_system())), (identity.os_image_hash(), identity.os_image_hash()));
    assert_eq!(identity.app_id().unwrap().to_string(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4");
    assert_eq!(hex::encode(identity.platform_identity()), vector["identity"]["pcrs"]["4"]);
    assert_eq!((identity.platform(), identity.tcb_status()), (Platform::Nitro, TcbStatus::None));
    assert!(identity.instance_id().is_empty() && !identity.software_root());
}
