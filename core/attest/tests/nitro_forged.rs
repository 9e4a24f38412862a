//! Documents made under a root of our own, good but for one defect each, for the rules that no published vector covers.
//! Every signature is real: what is refused is refused for the rule named.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

#[path = "common/dates.rs"]
mod dates;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair};
use base64::{Engine, engine::general_purpose::STANDARD};
use ciborium::Value;
use dates::Dated;
use dstack_attest::eventlog::replay_runtime;
use dstack_attest::nitro::{self, VerifiedDocument};
use dstack_attest::wire::{Attestation, EventVersion, PlatformEvidence, RuntimeEvent};
use dstack_attest::{AttestError, CollateralBundle, TcbPolicy, Trace, TrustRoots, VerifiedIdentity, VerifyContext, verify, verify_traced};
use dstack_protocol::{Platform, UnixMillis};
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, SignatureAlgorithm, date_time_ymd,
};
use sha2::{Digest, Sha256};

/// 2026-02-01T00:00:00Z; the certificates hold from 2026-01-01 to 2026-03-01.
const NOW: UnixMillis = UnixMillis(1_769_904_000_000);
const LAST_DAY_MS: u64 = 1_772_323_200_000;

/// A chain root → CA → leaf and a document, each to be spoilt.
struct Forge {
    leaf: CertificateParams,
    leaf_algorithm: &'static SignatureAlgorithm,
    ca: CertificateParams,
    document: Vec<(&'static str, Value)>,
}

fn params(name: &str, is_ca: IsCa, usages: &[KeyUsagePurpose]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    (params.not_before, params.not_after) = (date_time_ymd(2026, 1, 1), date_time_ymd(2026, 3, 1));
    params.is_ca = is_ca;
    params.key_usages = usages.to_vec();
    params
}

fn pcrs(zero: &[u8]) -> Value {
    let value = |index: u8| Value::Bytes(vec![if zero.contains(&index) { 0 } else { index + 1 }; 48]);
    Value::Map((0..=4).map(|index| (Value::Integer(index.into()), value(index))).collect())
}

impl Forge {
    fn new() -> Self {
        let document = vec![
            ("module_id", Value::Text("i-1-enc1".into())),
            ("digest", Value::Text("SHA384".into())),
            ("timestamp", Value::Integer(NOW.0.into())),
            ("pcrs", pcrs(&[])),
            ("user_data", Value::Bytes(vec![7; 64])),
            ("nonce", Value::Null),
        ];
        Self {
            leaf: params("leaf", IsCa::NoCa, &[KeyUsagePurpose::DigitalSignature]),
            leaf_algorithm: &PKCS_ECDSA_P384_SHA384,
            ca: params("ca", IsCa::Ca(BasicConstraints::Constrained(0)), &[KeyUsagePurpose::KeyCertSign]),
            document,
        }
    }

    fn with(mut self, name: &'static str, value: Value) -> Self {
        self.document.retain(|(known, _)| *known != name);
        self.document.push((name, value));
        self
    }

    /// The signed message and the root it ends at.
    fn make(self) -> (Vec<u8>, TrustRoots) {
        let key = |algorithm| KeyPair::generate_for(algorithm).unwrap();
        let root_params = params("root", IsCa::Ca(BasicConstraints::Unconstrained), &[KeyUsagePurpose::KeyCertSign]);
        let (root_key, ca_key, leaf_key) = (key(&PKCS_ECDSA_P384_SHA384), key(&PKCS_ECDSA_P384_SHA384), key(self.leaf_algorithm));
        let root = root_params.self_signed(&root_key).unwrap();
        let ca = self.ca.signed_by(&ca_key, &Issuer::from_params(&root_params, &root_key)).unwrap();
        let leaf = self.leaf.signed_by(&leaf_key, &Issuer::from_params(&self.ca, &ca_key)).unwrap();

        let mut document = self.document;
        document.push(("certificate", Value::Bytes(leaf.der().to_vec())));
        document.push(("cabundle", Value::Array(vec![Value::Bytes(root.der().to_vec()), Value::Bytes(ca.der().to_vec())])));
        let payload = cbor(&Value::Map(document.into_iter().map(|(name, value)| (Value::Text(name.into()), value)).collect()));
        let protected = cbor(&Value::Map(vec![(Value::Integer(1.into()), Value::Integer((-35).into()))]));
        let parts = |head: Value| vec![head, Value::Bytes(protected.clone()), Value::Bytes(vec![]), Value::Bytes(payload.clone())];
        let signed = cbor(&Value::Array(parts(Value::Text("Signature1".into()))));
        let signature = match EcdsaKeyPair::from_pkcs8(&ECDSA_P384_SHA384_FIXED_SIGNING, &leaf_key.serialize_der()) {
            Ok(key) => key.sign(&SystemRandom::new(), &signed).unwrap().as_ref().to_vec(),
            Err(_) => vec![1; 96],
        };
        let message =
            Value::Array(vec![Value::Bytes(protected.clone()), Value::Map(vec![]), Value::Bytes(payload.clone()), Value::Bytes(signature)]);
        (cbor(&message), TrustRoots::none().with_software_root(root.der()).unwrap())
    }

    /// The same as the document of a NitroTPM: 24 PCRs under their other name.
    fn of_tpm(mut self) -> Self {
        self.document.retain(|(known, _)| *known != "pcrs");
        let value = |index: u8| Value::Bytes(if index == 14 { replay_runtime(&tpm_events()).to_vec() } else { vec![index + 1; 48] });
        let pcrs = Value::Map((0..24).map(|index| (Value::Integer(index.into()), value(index))).collect());
        self.with("nitrotpm_pcrs", pcrs).with("module_id", Value::Text("i-1-tpm0000000000000000".into()))
    }

    fn judge_tpm(self) -> Result<VerifiedDocument, AttestError> {
        let (message, roots) = self.make();
        nitro::tpm::verify(&message, &roots, NOW)
    }

    fn judge(self) -> Result<VerifiedDocument, AttestError> {
        let (message, roots) = self.make();
        nitro::verify(&message, &roots, NOW)
    }

    #[track_caller]
    fn refused(self, text: &str) {
        assert_eq!(self.judge().unwrap_err().to_string(), text);
    }
}

fn cbor(value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    ciborium::into_writer(value, &mut out).unwrap();
    out
}

fn tpm_events() -> Vec<RuntimeEvent> {
    let event = |name: &str, payload: Vec<u8>| RuntimeEvent { event: name.into(), payload, version: EventVersion::V1 };
    vec![event("app-id", vec![9; 20]), event("compose-hash", vec![8; 32]), event("instance-id", vec![7; 20])]
}

/// A NitroTPM's attestation around a forged document, and what judges it.
fn tpm_attestation(forge: Forge) -> (Attestation, TrustRoots) {
    let (attestation_doc, roots) = forge.make();
    let platform = PlatformEvidence::NitroTpm { attestation_doc };
    let runtime_events = tpm_events();
    (Attestation { platform, report_data: [7; 64], runtime_events, config: String::new(), report_data_payload: None }, roots)
}

fn verify_tpm(attestation: &Attestation, roots: &TrustRoots) -> Result<VerifiedIdentity, AttestError> {
    let collateral = CollateralBundle::empty();
    verify(&attestation.encode(), &VerifyContext { now: NOW, roots, collateral: &collateral, tcb: &TcbPolicy::default() })
}

#[test]
fn an_enclaves_document_is_none_of_a_tpm() {
    assert_eq!(Forge::new().judge_tpm().unwrap_err(), AttestError::Field { field: "nitrotpm_pcrs", why: "missing" });
    Forge::new().of_tpm().refused("field pcrs: missing");
    assert!(Forge::new().of_tpm().judge_tpm().is_ok());
}

#[test]
fn a_tpm_document_without_boot_pcrs_is_refused() {
    for missing in [4u8, 7, 12] {
        let value = |index: u8| (Value::Integer(index.into()), Value::Bytes(vec![1; 48]));
        let pcrs = Value::Map((0..24).filter(|index| *index != missing).map(value).collect());
        let error = Forge::new().of_tpm().with("nitrotpm_pcrs", pcrs).judge_tpm().unwrap_err();
        assert_eq!(error.class().as_str(), "parse.field");
    }
}

#[test]
fn a_document_without_its_image_is_refused() {
    let only = |indices: &[u8]| {
        Value::Map(indices.iter().map(|index| (Value::Integer((*index).into()), Value::Bytes(vec![1; 48]))).collect::<Vec<_>>())
    };
    for indices in [[0, 1], [0, 2], [1, 2]] {
        Forge::new().with("pcrs", only(&indices)).refused("field pcrs: one that is needed is missing");
    }
}

#[test]
fn a_tpm_document_ages_as_an_enclaves_does() {
    let made = |at: u64| Forge::new().of_tpm().with("timestamp", Value::Integer(at.into())).judge_tpm();
    assert!(made(NOW.0 - 3_600_000).is_ok() && made(NOW.0 + 300_000).is_ok());
    assert_eq!(made(NOW.0 - 3_600_001).unwrap_err().class().as_str(), "time.collateral_expired");
    assert_eq!(made(NOW.0 + 300_001).unwrap_err().class().as_str(), "time.not_yet_valid");
}

#[test]
fn tpm_evidence_becomes_an_identity() {
    let (attestation, roots) = tpm_attestation(Forge::new().of_tpm());
    let identity = verify_tpm(&attestation, &roots).unwrap();
    let boot = [[5; 48], [8; 48], [13; 48]].concat();
    assert_eq!(identity.platform(), Platform::NitroTpm);
    assert_eq!(identity.measurement(), [&boot[..], &[8; 32]].concat());
    assert_eq!((identity.app_id().unwrap().0, identity.compose_hash(), identity.os_image_hash()), ([9; 20], Some([8; 32]), None));
    assert_eq!(identity.instance_id(), [7; 20]);
    let hash = |parts: &[&[u8]]| <[u8; 32]>::from(Sha256::digest(parts.concat()));
    assert_eq!(identity.mr_system(), hash(&[&boot, &[0; 32]]));
    assert_eq!(identity.mr_aggregated(), hash(&[&boot, &replay_runtime(&tpm_events())]));
    assert_eq!(identity.platform_identity().len(), Platform::NitroTpm.identity_bytes());
    assert_eq!(identity.device_id(), hash(&[b"i-1-tpm0000000000000000"]), "dstack hashes the name itself");
    let v1 = Attestation::decode(&attestation.encode_v1()).unwrap();
    assert_eq!(verify_tpm(&v1, &roots).unwrap().measurement(), identity.measurement());
}

#[test]
fn tpm_evidence_is_bound_to_its_report_data() {
    let (attestation, roots) = tpm_attestation(Forge::new().of_tpm());
    let other = Attestation { report_data: [6; 64], ..attestation };
    assert_eq!(verify_tpm(&other, &roots), Err(AttestError::ReportData));
    let (absent, roots) = tpm_attestation(Forge::new().of_tpm().with("user_data", Value::Null));
    assert_eq!(verify_tpm(&absent, &roots), Err(AttestError::UserData));
}

#[test]
fn tpm_events_that_miss_pcr_14_are_refused() {
    let (mut attestation, roots) = tpm_attestation(Forge::new().of_tpm());
    attestation.runtime_events.swap(0, 1);
    assert_eq!(verify_tpm(&attestation, &roots), Err(AttestError::ReplayMismatch { register: 14 }));
    attestation.runtime_events.clear();
    assert_eq!(verify_tpm(&attestation, &roots), Err(AttestError::ReplayMismatch { register: 14 }));
}

#[test]
fn a_tpm_image_that_was_not_booted_is_refused() {
    let config = |boot: [u8; 32]| {
        let cbor = [&b"\xa1\x6fboot_pcr_digest\x58\x20"[..], &boot].concat();
        let checksums = format!("{}  measurement.aws.cbor\n", hex::encode(Sha256::digest(&cbor)));
        let hash: [u8; 32] = Sha256::digest(&checksums).into();
        let document = serde_json::json!({ "checksum_file": STANDARD.encode(checksums), "measurement": STANDARD.encode(cbor) });
        (serde_json::json!({ "os_image_hash": hex::encode(hash), "aws_measurement": document }).to_string(), hash)
    };
    let boot = Sha256::digest([[5; 48], [8; 48], [13; 48]].concat()).into();
    let (attestation, roots) = tpm_attestation(Forge::new().of_tpm());
    let with = |config: String| verify_tpm(&Attestation { config, ..attestation.clone() }, &roots);
    let (good, hash) = config(boot);
    assert_eq!(with(good).unwrap().os_image_hash(), Some(hash));
    assert_eq!(with(config([1; 32]).0).unwrap_err().class().as_str(), "policy.measurement");
    assert_eq!(with(format!("{{\"os_image_hash\":\"{}\"}}", "aa".repeat(32))).unwrap_err().class().as_str(), "policy.measurement");
}

#[test]
fn the_checks_of_both_kinds_are_entered_in_order() {
    let entered = |evidence: &[u8], roots: &TrustRoots| {
        let (collateral, trace) = (CollateralBundle::empty(), Trace::new());
        verify_traced(evidence, &VerifyContext { now: NOW, roots, collateral: &collateral, tcb: &TcbPolicy::default() }, &trace).unwrap();
        trace.entered()
    };
    let (attestation, roots) = tpm_attestation(Forge::new().of_tpm());
    assert!(entered(&attestation.encode(), &roots).ends_with(nitro::TPM_CHECKS));
    let (nsm_quote, roots) = Forge::new().make();
    let enclave = Attestation { platform: PlatformEvidence::NitroEnclave { nsm_quote }, runtime_events: Vec::new(), ..attestation };
    assert!(entered(&enclave.encode(), &roots).ends_with(nitro::CHECKS));
}

#[test]
fn an_unspoilt_document_is_good() {
    let verified = Forge::new().judge().unwrap();
    assert_eq!((verified.module_id(), verified.software_root()), ("i-1-enc1", true));
    assert_eq!(verified.earliest_expiry(), NOW.plus_ms(3_600_000));
    let (message, roots) = Forge::new().with("timestamp", Value::Integer(LAST_DAY_MS.into())).make();
    assert_eq!(nitro::verify(&message, &roots, UnixMillis(LAST_DAY_MS)).unwrap().earliest_expiry(), UnixMillis(LAST_DAY_MS));
    assert!(nitro::verify(&message, &roots, UnixMillis(LAST_DAY_MS + 999)).is_ok(), "the last second counts whole");
    let expired = nitro::verify(&message, &roots, UnixMillis(LAST_DAY_MS + 1000)).unwrap_err();
    assert_eq!(expired.class().as_str(), "time.cert_expired");
}

#[test]
fn unknown_members_are_passed_over_and_double_ones_refused() {
    let deep = (0..10).fold(Value::Null, |inner, _| Value::Array(vec![inner]));
    assert!(Forge::new().with("later", deep).judge().is_ok());
    let deeper = (0..40).fold(Value::Null, |inner, _| Value::Array(vec![inner]));
    Forge::new().with("later", deeper).refused("nsm document malformed: nested too deep");
    let mut double = Forge::new();
    double.document.push(("nonce", Value::Null));
    double.refused("nsm document malformed: a member occurs twice");
}

#[test]
fn age_is_judged_after_the_signature() {
    let stale = Forge::new().with("timestamp", Value::Integer((NOW.0 - 3_600_001).into())).judge().unwrap_err();
    assert_eq!(stale.class().as_str(), "time.collateral_expired");
    let early = Forge::new().with("timestamp", Value::Integer((NOW.0 + 300_001).into())).judge().unwrap_err();
    assert_eq!(early.class().as_str(), "time.not_yet_valid");
}

/// Documents of either kind: a leaf that holds for two minutes around the document, and the document itself.
#[track_caller]
fn documents_hold(platform: &str, kind: fn(Forge) -> Forge, judge: VerifyDocument) {
    // Dates of certificates name seconds, so the last one counts whole.
    let minute_ms = 60_000;
    let mut short = kind(Forge::new());
    let at = |ms: u64| date_time_ymd(2026, 2, 1) + std::time::Duration::from_millis(ms - NOW.0);
    (short.leaf.not_before, short.leaf.not_after) = (at(NOW.0 + minute_ms), at(NOW.0 + 2 * minute_ms));
    let (short, long) = (short.make(), kind(Forge::new()).make());
    let judged = |(message, roots): &(Vec<u8>, TrustRoots), now| judge(message, roots, now).map(drop);
    dates::hold(
        platform,
        &[
            Dated {
                part: "certificate",
                moments_ms: (NOW.0 + minute_ms, dates::end_of_second(NOW.0 + 2 * minute_ms)),
                judge: Box::new(|now| judged(&short, now)),
            },
            Dated { part: "document", moments_ms: (NOW.0 - 300_000, NOW.0 + 3_600_000), judge: Box::new(|now| judged(&long, now)) },
        ],
    );
}

type VerifyDocument = fn(&[u8], &TrustRoots, UnixMillis) -> Result<VerifiedDocument, AttestError>;

#[test]
fn dates_of_enclave_documents() {
    documents_hold("nitro", |forge| forge, nitro::verify);
}

#[test]
fn dates_of_tpm_documents() {
    documents_hold("nitro-tpm", Forge::of_tpm, nitro::tpm::verify);
}

#[test]
fn one_zero_pcr_of_the_image_is_debug() {
    for index in 0..3 {
        assert_eq!(Forge::new().with("pcrs", pcrs(&[index])).judge(), Err(AttestError::Debug));
    }
    assert!(Forge::new().with("pcrs", pcrs(&[3])).judge().is_ok());
}

#[test]
fn certificates_must_be_of_their_kind() {
    let mut leaf_ca = Forge::new();
    leaf_ca.leaf.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    leaf_ca.refused("nsm certificate chain: the leaf is a CA");

    let mut leaf_usage = Forge::new();
    leaf_usage.leaf.key_usages = vec![KeyUsagePurpose::KeyAgreement];
    leaf_usage.refused("nsm certificate chain: the leaf may not sign");

    let mut server_only = Forge::new();
    server_only.leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    server_only.refused("nsm certificate chain: extended key usage without the purpose");

    let mut ca_usage = Forge::new();
    ca_usage.ca.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    ca_usage.refused("nsm certificate chain: an issuer may not sign certificates");

    let mut critical = Forge::new();
    let mut unknown = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 62397, 99], vec![5, 0]);
    unknown.set_criticality(true);
    critical.leaf.custom_extensions.push(unknown);
    critical.refused("nsm certificate chain: a critical extension that is not understood");

    let mut curve = Forge::new();
    curve.leaf_algorithm = &PKCS_ECDSA_P256_SHA256;
    curve.refused("nsm certificate chain: a key is of a kind that is not allowed");
}

#[test]
fn evidence_around_a_document_becomes_an_identity() {
    let (nsm_quote, roots) = Forge::new().make();
    let app_id = |payload: Vec<u8>| RuntimeEvent { event: "app-id".into(), payload, version: EventVersion::V1 };
    let attestation = Attestation {
        platform: PlatformEvidence::NitroEnclave { nsm_quote },
        report_data: [7; 64],
        runtime_events: vec![app_id(vec![9; 20]), app_id(vec![8; 20])],
        config: String::new(),
        report_data_payload: None,
    };
    let collateral = CollateralBundle::parse(b"{\"format\":1,\"tdx\":{}}").unwrap();
    let context = VerifyContext { now: NOW, roots: &roots, collateral: &collateral, tcb: &TcbPolicy::default() };
    let identity = verify(&attestation.encode(), &context).unwrap();
    assert_eq!(identity.platform(), Platform::Nitro);
    assert_eq!(identity.measurement(), [[1; 48], [2; 48], [3; 48]].concat());
    assert_eq!(identity.platform_identity(), [5; 48]);
    assert_eq!(identity.app_id().unwrap().0, [9; 20], "the first event counts");
    assert_eq!(identity.compose_hash(), identity.os_image_hash());
    assert_eq!(verify(&attestation.encode_v1(), &context).unwrap().measurement(), identity.measurement());

    let other = Attestation { report_data: [6; 64], ..attestation.clone() };
    assert_eq!(verify(&other.encode(), &context), Err(AttestError::ReportData));
    let short = Attestation { runtime_events: vec![app_id(vec![9; 19])], ..attestation };
    assert_eq!(verify(&short.encode(), &context).unwrap_err().class().as_str(), "parse.field");
    let (nsm_quote, roots) = Forge::new().with("user_data", Value::Bytes(vec![7; 63])).make();
    let unbound = Attestation { platform: PlatformEvidence::NitroEnclave { nsm_quote }, ..other };
    let context = VerifyContext { roots: &roots, ..context };
    assert_eq!(verify(&unbound.encode(), &context), Err(AttestError::UserData));
}
