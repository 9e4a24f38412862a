//! SEV-SNP evidence signed by a hierarchy of our own: what passes, and one refusal for each check that published reports cannot reach,
//! because nobody has AMD's keys to sign a bad one.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

#[path = "common/dates.rs"]
mod dates;

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair},
};
use dates::Dated;
use dstack_attest::snp::{self, host_data};
use dstack_attest::wire::{Attestation, PlatformEvidence};
use dstack_attest::{
    AttestError, CollateralBundle, TcbPolicy, Trace, TrustRoots, VerifiedIdentity, VerifyContext, X509Pool, verify_traced,
};
use dstack_protocol::{AppId, Platform, TcbStatus, UnixMillis};
use sha2::{Digest, Sha256};

const ARK: &[u8] = include_bytes!("snp/ark.der");
const ASK: &[u8] = include_bytes!("snp/ask.der");
const ASVK: &[u8] = include_bytes!("snp/asvk.der");
const VCEK: &[u8] = include_bytes!("snp/vcek.der");
const VLEK: &[u8] = include_bytes!("snp/vlek.der");
const VCEK_KEY: &[u8] = include_bytes!("snp/vcek.pk8");
const VLEK_KEY: &[u8] = include_bytes!("snp/vlek.pk8");
const CRL: &[u8] = include_bytes!("snp/crl-none.der");
const CRL_WITH_ASK: &[u8] = include_bytes!("snp/crl-ask.der");

/// 2026-06-01.
const NOW: UnixMillis = UnixMillis(1_780_272_000_000);
/// 2027-01-01 00:00:01, the second after the lists' next update.
const AFTER_CRL: UnixMillis = UnixMillis(1_798_761_601_000);
const TCB: [u8; 8] = [4, 0, 0, 0, 0, 0, 0x18, 0xd5];
const DOCUMENT: &str = r#"{"app_id":"1111111111111111111111111111111111111111","compose_hash":"4444444444444444444444444444444444444444444444444444444444444444","instance_id":"2222222222222222222222222222222222222222","key_provider":"kms","key_provider_id":"aa01","version":3}"#;

/// A guest and what judges it; each test changes one thing.
struct Guest {
    report: Vec<u8>,
    key: &'static [u8],
    cert_chain: Vec<Vec<u8>>,
    mr_config: String,
    config: String,
    report_data: [u8; 64],
    pool: (Vec<Vec<u8>>, Vec<Vec<u8>>),
    tcb: TcbPolicy,
    now: UnixMillis,
    trace: Trace,
}

impl Guest {
    fn new() -> Self {
        let mut guest = Self {
            report: vec![0; 1184],
            key: VCEK_KEY,
            cert_chain: vec![ASK.to_vec(), VCEK.to_vec()],
            mr_config: DOCUMENT.to_owned(),
            config: String::new(),
            report_data: [5; 64],
            pool: (Vec::new(), vec![CRL.to_vec()]),
            tcb: TcbPolicy::default(),
            now: NOW,
            trace: Trace::new(),
        };
        guest.put(0, &[3]).put(0x8, &0x30000_u64.to_le_bytes()).put(0x34, &[1]).put(0x50, &[5; 64]).put(0x90, &[7; 48]);
        guest.put(0xc0, &host_data(DOCUMENT.as_bytes())).put(0x160, &[0xff; 32]).put(0x188, &[0x19, 0x01, 1]).put(0x1a0, &[9; 64]);
        for at in [0x38, 0x180, 0x1e0, 0x1f0] {
            guest.put(at, &TCB);
        }
        guest
    }

    fn vlek() -> Self {
        let mut guest = Self::new();
        guest.put(0x48, &[4]).put(0x1a0, &[0; 64]);
        guest.key = VLEK_KEY;
        guest.cert_chain = vec![ASVK.to_vec(), VLEK.to_vec()];
        guest.tcb = guest.tcb.accepting_vlek();
        guest
    }

    fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.report[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// As the firmware signs: r and s little-endian, 72 bytes each.
    fn signed(&self) -> Vec<u8> {
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P384_SHA384_FIXED_SIGNING, self.key).unwrap();
        let signature = key.sign(&SystemRandom::new(), &self.report[..0x2a0]).unwrap();
        let mut report = self.report.clone();
        for (component, at) in signature.as_ref().chunks(48).zip([0x2a0, 0x2a0 + 72]) {
            let turned: Vec<u8> = component.iter().rev().copied().collect();
            report[at..at + 48].copy_from_slice(&turned);
        }
        report
    }

    fn evidence(&self) -> Vec<u8> {
        self.carrying(self.signed())
    }

    /// Evidence around that report.
    fn carrying(&self, report: Vec<u8>) -> Vec<u8> {
        let (cert_chain, mr_config) = (self.cert_chain.clone(), self.mr_config.clone());
        let platform = PlatformEvidence::SevSnp { report, cert_chain, mr_config };
        let (report_data, config) = (self.report_data, self.config.clone());
        Attestation { platform, report_data, runtime_events: Vec::new(), config, report_data_payload: None }.encode()
    }

    fn verify(&self) -> Result<VerifiedIdentity, AttestError> {
        self.judge(&self.evidence())
    }

    fn judge(&self, evidence: &[u8]) -> Result<VerifiedIdentity, AttestError> {
        let roots = TrustRoots::none().with_software_root(ARK).unwrap();
        let pool = X509Pool::new(self.pool.0.clone(), self.pool.1.clone()).unwrap();
        let collateral = CollateralBundle::compose(&std::collections::BTreeMap::new(), &pool).unwrap();
        let context = VerifyContext { now: self.now, roots: &roots, collateral: &collateral, tcb: &self.tcb };
        verify_traced(evidence, &context, &self.trace)
    }

    /// The refusal, which the named check has to have made.
    fn refused(&self, check: &str) -> AttestError {
        let error = self.verify().unwrap_err();
        let last = *self.trace.entered().last().unwrap();
        assert_eq!(last.id, check, "{error}");
        assert!(last.classes.contains(&error.class()), "{} is not among the classes of {check}", error.class());
        error
    }
}

fn changed(change: impl FnOnce(&mut Guest)) -> Guest {
    let mut guest = Guest::new();
    change(&mut guest);
    guest
}

#[test]
fn a_guest_is_who_its_document_says() {
    let guest = Guest::new();
    let identity = guest.verify().unwrap();
    assert_eq!(identity.platform(), Platform::SevSnp);
    assert_eq!(identity.app_id(), Some(AppId([0x11; 20])));
    assert_eq!((identity.compose_hash(), identity.instance_id()), (Some([0x44; 32]), &[0x22; 20][..]));
    assert_eq!(identity.key_provider(), br#"{"name":"kms","id":"aa01"}"#);
    let measurement = [&[7; 48][..], &host_data(DOCUMENT.as_bytes())].concat();
    assert_eq!(identity.measurement(), measurement);
    assert_eq!(identity.mr_system(), <[u8; 32]>::from(Sha256::digest([7; 48])));
    assert_eq!(identity.mr_aggregated(), <[u8; 32]>::from(Sha256::digest(&measurement)));
    assert_eq!((identity.platform_identity(), identity.device_id()), (&[9; 64][..], Sha256::digest([9; 64]).into()));
    assert_eq!((identity.os_image_hash(), identity.tcb_status()), (None, TcbStatus::UpToDate));
    assert!(identity.software_root());
    assert_eq!(identity.earliest_expiry(), UnixMillis(1_798_761_600_000), "the list's next update");
    let entered: Vec<_> = guest.trace.entered().iter().skip(1).map(|check| check.id).collect();
    let all: Vec<_> = snp::CHECKS.iter().map(|check| check.id).collect();
    assert_eq!(entered, all, "every check, in the order of the table");
}

/// The report with the other signature that verifies wherever its own does: `n - s` in place of `s`, which is little-endian.
fn turned(report: &[u8]) -> Vec<u8> {
    const ORDER: &str = "ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973";
    let mut turned = report.to_vec();
    let mut borrow = 0;
    for (byte, order) in turned[0x2a0 + 72..0x2a0 + 120].iter_mut().zip(hex::decode(ORDER).unwrap().into_iter().rev()) {
        let digit = i16::from(order) - i16::from(*byte) - borrow;
        borrow = i16::from(digit < 0);
        *byte = u8::try_from(digit.rem_euclid(256)).unwrap();
    }
    turned
}

#[test]
fn a_report_keeps_its_name_and_one_signed_anew_has_another() {
    let guest = Guest::new();
    let name = |report: Vec<u8>| guest.judge(&guest.carrying(report)).unwrap().statement_id();
    let report = guest.signed();
    assert_ne!(turned(&report), report);
    assert_eq!(name(turned(&report)), name(report.clone()));
    assert_ne!(name(guest.signed()), name(report));
}

#[test]
fn certificates_travel_in_every_form() {
    let table = |entries: &[(u128, &[u8])]| {
        let (mut head, mut blobs) = (Vec::new(), Vec::new());
        for (guid, blob) in entries {
            let at = (entries.len() + 1) * 24 + blobs.len();
            head.extend(guid.to_be_bytes());
            head.extend((at as u32).to_le_bytes());
            head.extend((blob.len() as u32).to_le_bytes());
            blobs.extend(*blob);
        }
        head.extend([0; 24]);
        [head, blobs].concat()
    };
    let (vcek, ask, ark) =
        (0x63da_758d_e664_4564_adc5_f4b9_3be8_accd, 0x4ab7_b379_bbac_4fe4_a02f_05ae_f327_c782, 0xc0b4_06a4_a803_4952_9743_3fb6_014c_d0ae);
    let with = |chain: Vec<Vec<u8>>, pool: &[&[u8]]| {
        changed(|guest| {
            guest.cert_chain = chain;
            guest.pool.0 = pool.iter().map(|der| der.to_vec()).collect();
        })
    };
    for guest in [
        with(vec![VCEK.to_vec()], &[ASK]),
        with(vec![], &[ASK, VCEK]),
        with(vec![], &[ASVK, VLEK, ASK, VCEK]),
        with(vec![table(&[(vcek, VCEK), (ask, ASK), (ark, ARK)])], &[]),
        with(vec![table(&[(vcek, VCEK)])], &[ASK]),
        with(vec![table(&[])], &[ASK, VCEK]),
    ] {
        assert!(guest.verify().is_ok(), "{:?}", guest.verify());
    }
    let foreign = with(vec![table(&[(vcek, VCEK), (ask, ASK), (ark, ASVK)])], &[]);
    assert_eq!(foreign.refused("snp.endorsement").class().as_str(), "chain.untrusted_root");
    let three = with(vec![ARK.to_vec(), ASK.to_vec(), VCEK.to_vec()], &[]);
    assert_eq!(three.refused("snp.endorsement").class().as_str(), "parse.length");
    let turned = with(vec![VCEK.to_vec(), ASK.to_vec()], &[]);
    assert!(turned.verify().is_err());
    assert_eq!(with(vec![VCEK.to_vec()], &[]).refused("snp.chain").class().as_str(), "chain.untrusted_root");
}

#[test]
fn a_report_without_its_certificate_is_refused_by_the_name_of_its_chip() {
    let guest = changed(|guest| guest.cert_chain = Vec::new());
    let missing = AttestError::VekMissing { chip_id: hex::encode([9; 64]), reported_tcb: hex::encode(TCB) };
    assert_eq!(guest.refused("snp.endorsement"), missing);
    // the pinned one is of another firmware: not the key that signed
    let mut older = changed(|guest| (guest.cert_chain, guest.pool.0) = (Vec::new(), vec![VCEK.to_vec(), ASK.to_vec()]));
    older.put(0x180, &[3]);
    assert_eq!(older.refused("snp.endorsement").class().as_str(), "collateral.mismatch");
}

#[test]
fn revocation_lists_are_obeyed_and_asked_for() {
    let mut guest = changed(|guest| guest.pool.1 = Vec::new());
    let missing = guest.refused("snp.chain");
    assert!(matches!(missing, AttestError::CrlMissing { .. }), "{missing}");
    guest.tcb = TcbPolicy::default().accepting_missing_crl();
    assert!(guest.verify().is_ok());
    guest.pool.1 = vec![CRL_WITH_ASK.to_vec()];
    assert_eq!(guest.refused("snp.chain").class().as_str(), "chain.revoked", "a list that is there is obeyed");
    guest.pool.1 = vec![CRL.to_vec()];
    guest.now = AFTER_CRL;
    assert_eq!(guest.refused("snp.chain").class().as_str(), "time.collateral_expired");
    guest.now = UnixMillis(AFTER_CRL.0 - 1001);
    assert!(guest.verify().is_ok());
    let mut forged = CRL.to_vec();
    *forged.last_mut().unwrap() ^= 1;
    guest.pool.1 = vec![forged];
    guest.tcb = TcbPolicy::default();
    assert!(guest.verify().is_err(), "a list nobody signed is no list");
}

#[test]
fn a_vlek_is_taken_only_where_the_policy_says_so() {
    let mut guest = Guest::vlek();
    let identity = guest.verify().unwrap();
    assert_eq!(identity.platform_identity(), &[0; 64], "a report of a cloud's key may name no chip");
    guest.tcb = TcbPolicy::default();
    let why = "signed by a VLEK, which the policy does not take";
    assert_eq!(guest.refused("snp.signing-key"), AttestError::GuestPolicy { why });
    let masked = changed(|guest| {
        guest.put(0x48, &[2]);
    });
    assert_eq!(masked.refused("snp.signing-key").class().as_str(), "binding.chip_id");
    let none = changed(|guest| {
        guest.put(0x48, &[7 << 2]);
    });
    assert_eq!(none.refused("snp.signing-key").class().as_str(), "parse.field");
}

#[test]
fn a_vlek_certificate_does_not_stand_for_a_vcek() {
    let mut guest = Guest::vlek();
    guest.put(0x48, &[0]);
    let refused = AttestError::ChainInvalid { chain: "amd certificate chain", why: "of another kind of key than the report names" };
    assert_eq!(guest.refused("snp.product"), refused);
    let mut other_way = Guest::new();
    other_way.put(0x48, &[4]);
    other_way.tcb = TcbPolicy::default().accepting_vlek();
    assert_eq!(other_way.refused("snp.product"), refused);
}

#[test]
fn refuses_a_report_that_another_key_signed() {
    let guest = changed(|guest| guest.key = VLEK_KEY);
    assert_eq!(guest.refused("snp.signature"), AttestError::BodySignature);
}

#[test]
fn refuses_a_report_of_another_chip_or_product() {
    let chip = changed(|guest| {
        guest.put(0x1a0 + 63, &[8]);
    });
    assert_eq!(chip.refused("snp.chip"), AttestError::ChipId { why: "the certificate names another chip" });
    let product = changed(|guest| {
        guest.put(0x189, &[0x11]);
    });
    assert_eq!(product.refused("snp.chip"), AttestError::ChipId { why: "the processor is of another product than its root" });
    // a version 2 report names no processor: its root says which product it is of
    let unnamed = changed(|guest| {
        guest.put(0, &[2]).put(0x188, &[0; 3]);
    });
    assert!(unnamed.verify().is_ok());
}

#[test]
fn refuses_firmware_versions_that_contradict_the_certificate() {
    let why = |guest: Guest| match guest.refused("snp.reported-tcb") {
        AttestError::FirmwareVersion { why } => why,
        other => unreachable!("{other}"),
    };
    let others = "the certificate stands for others than the reported ones";
    for (at, value) in [(0, 3), (1, 1), (6, 0x17), (7, 0xd4)] {
        assert_eq!(
            why(changed(|guest| {
                guest.put(0x180 + at, &[value]);
            })),
            others
        );
    }
    assert_eq!(
        why(changed(|guest| {
            guest.put(0x38 + 7, &[0xd4]);
        })),
        "the reported ones are above the running ones"
    );
    let above = "the committed ones are above the running ones";
    assert_eq!(
        why(changed(|guest| {
            guest.put(0x1e0 + 7, &[0xd6]);
        })),
        above
    );
    assert_eq!(
        why(changed(|guest| {
            guest.put(0x1ed, &[1]);
        })),
        above
    );
    let reserved = changed(|guest| {
        guest.put(0x1f0 + 3, &[1]);
    });
    assert_eq!(reserved.refused("snp.reported-tcb").class().as_str(), "parse.field");
}

#[test]
fn firmware_that_is_not_committed_is_out_of_date() {
    for at in [0x1e0 + 7, 0x1f0 + 7] {
        let mut guest = changed(|guest| {
            guest.put(at, &[0xd4]);
        });
        assert_eq!(guest.refused("snp.tcb-status"), AttestError::TcbStatus { status: "OutOfDate".to_owned() });
        guest.tcb = TcbPolicy::allowing(&[TcbStatus::UpToDate, TcbStatus::OutOfDate]);
        assert_eq!(guest.verify().unwrap().tcb_status(), TcbStatus::OutOfDate);
    }
    let newer = changed(|guest| {
        guest.put(0x38 + 7, &[0xd6]);
    });
    assert_eq!(newer.refused("snp.tcb-status").class().as_str(), "policy.tcb_status");
}

#[test]
fn genuine_reports_of_guests_that_may_not_be_trusted_are_refused() {
    let debug = changed(|guest| {
        guest.put(0x8, &0xb0000_u64.to_le_bytes());
    });
    assert_eq!(debug.refused("snp.debug"), AttestError::Debug);
    let migratable = changed(|guest| {
        guest.put(0x8, &0x70000_u64.to_le_bytes());
    });
    assert_eq!(migratable.refused("snp.migration").class().as_str(), "policy.td_attributes");
    let smt = changed(|guest| {
        guest.put(0x8, &0x20000_u64.to_le_bytes()).put(0x40, &[1]);
    });
    assert_eq!(smt.refused("snp.platform").class().as_str(), "policy.td_attributes");
    let reserved = changed(|guest| {
        guest.put(0x4c, &[1]);
    });
    assert_eq!(reserved.refused("snp.reserved").class().as_str(), "parse.field");
}

#[test]
fn refuses_a_report_of_a_lower_privilege_level() {
    for level in 1..=3 {
        let guest = changed(|guest| {
            guest.put(0x30, &[level]);
        });
        assert_eq!(guest.refused("snp.vmpl").class().as_str(), "policy.td_attributes");
    }
}

#[test]
fn refuses_report_data_that_was_not_signed() {
    let guest = changed(|guest| guest.report_data[63] ^= 1);
    assert_eq!(guest.refused("snp.report-data"), AttestError::ReportData);
}

#[test]
fn refuses_a_document_that_host_data_does_not_bind() {
    let guest = changed(|guest| guest.mr_config = DOCUMENT.replace("aa01", "aa02"));
    let refused = AttestError::Document { document: "mr-config document", field: "host_data" };
    assert_eq!(guest.refused("snp.host-data"), refused);
    let none = changed(|guest| {
        guest.mr_config = String::new();
        guest.put(0xc0, &[0; 32]);
    });
    assert_eq!(none.refused("snp.host-data"), refused, "a launch without a document names nobody");
    let unreadable = changed(|guest| {
        guest.mr_config = "{}".to_owned();
        guest.put(0xc0, &host_data(b"{}"));
    });
    assert_eq!(unreadable.refused("snp.host-data").class().as_str(), "parse.malformed");
}

#[test]
fn no_evidence_cut_short_passes() {
    let guest = Guest::new();
    let whole = guest.evidence();
    let roots = TrustRoots::none().with_software_root(ARK).unwrap();
    let pool = X509Pool::new(guest.pool.0.clone(), guest.pool.1.clone()).unwrap();
    let collateral = CollateralBundle::compose(&std::collections::BTreeMap::new(), &pool).unwrap();
    let context = VerifyContext { now: NOW, roots: &roots, collateral: &collateral, tcb: &guest.tcb };
    for end in 0..whole.len() {
        assert!(dstack_attest::verify(&whole[..end], &context).is_err(), "cut to {end}");
    }
    let amd = TrustRoots::production();
    let context = VerifyContext { roots: &amd, ..context };
    assert_eq!(dstack_attest::verify(&whole, &context), Err(AttestError::UntrustedRoot { chain: "amd certificate chain" }));
}

#[test]
fn dates_of_snp_evidence() {
    let (year_2025, year_2026, year_2027, year_2035) = (1_735_689_600_000, 1_767_225_600_000, 1_798_761_600_000, 2_051_222_400_000);
    let judge = |lists: Vec<Vec<u8>>, now| {
        let mut guest = Guest::new();
        guest.tcb = guest.tcb.accepting_missing_crl();
        guest.pool.1 = lists;
        guest.now = now;
        guest.verify().map(drop)
    };
    dates::hold(
        "snp",
        &[
            Dated {
                part: "certificate",
                moments_ms: (year_2025, dates::end_of_second(year_2035)),
                judge: Box::new(|now| judge(Vec::new(), now)),
            },
            Dated {
                part: "revocation list",
                moments_ms: (year_2026, dates::end_of_second(year_2027)),
                judge: Box::new(|now| judge(vec![CRL.to_vec()], now)),
            },
        ],
    );
}

/// What a guest under a cloud's key sends, for tests of other crates.
const VLEK_EVIDENCE: &[u8] = include_bytes!("snp/vlek-evidence.bin");

#[test]
fn the_evidence_kept_for_other_crates_is_of_a_vlek() {
    let roots = TrustRoots::none().with_software_root(ARK).unwrap();
    let pool = X509Pool::new(Vec::new(), vec![CRL.to_vec()]).unwrap();
    let collateral = CollateralBundle::compose(&std::collections::BTreeMap::new(), &pool).unwrap();
    let tcb = TcbPolicy::default().accepting_vlek();
    let context = VerifyContext { now: NOW, roots: &roots, collateral: &collateral, tcb: &tcb };
    let identity = dstack_attest::verify(VLEK_EVIDENCE, &context).unwrap();
    assert!(identity.tcb().vlek);
    assert_eq!(identity.app_id(), Some(AppId([0x11; 20])));
}

/// Run with `--ignored` to write it anew.
#[test]
#[ignore = "writes a file of the repository"]
fn writes_the_evidence_kept_for_other_crates() {
    std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/snp/vlek-evidence.bin"), Guest::vlek().evidence()).unwrap();
}
