//! The vTPM half of Google Cloud evidence, made under a root of our own: good, and with one defect each. Every signature is real.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;
#[path = "common/dates.rs"]
mod dates;

use std::collections::BTreeMap;

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use dates::Dated;
use dstack_attest::{
    AttestError, CollateralBundle, TcbPolicy, Trace, TrustRoots, VerifyContext, X509Pool,
    eventlog::tpm::replay_runtime,
    gcp::{self, VerifiedVtpm},
    tpm::Bank,
    verify,
    wire::{Attestation, EventVersion, PcrValue, PlatformEvidence, RuntimeEvent, TdxEvidence, TpmEvent, TpmPlatform, TpmQuote},
};
use dstack_protocol::{Platform, UnixMillis};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, SerialNumber, date_time_ymd,
};
use sha2::{Digest, Sha256};

/// 2026-07-05, inside the validity of every certificate here and of the real quote.
const NOW: UnixMillis = UnixMillis(1_783_209_600_000);
const FIRMWARE: &str = "0cca9ec161b09288802e5a112255d21340ed5b797f5fe29cecccfd8f67b9f802";
const TD_QUOTE: &[u8] = b"a td quote, padding included";

/// A vTPM half to be spoilt.
struct Half {
    root: Vec<u8>,
    ak_cert: Vec<u8>,
    ak: EcdsaKeyPair,
    extra_data: Vec<u8>,
    /// Indices and values of the quoted PCRs.
    pcrs: Vec<(u32, Vec<u8>)>,
    event_log: Vec<TpmEvent>,
    events: Vec<RuntimeEvent>,
    config: String,
    platform: TpmPlatform,
    tcb: TcbPolicy,
    trusted: Vec<u8>,
    /// Lists of the bundle.
    lists: Vec<Vec<u8>>,
}

fn params(name: &str, is_ca: IsCa, usages: &[KeyUsagePurpose]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    (params.not_before, params.not_after) = (date_time_ymd(2026, 1, 1), date_time_ymd(2027, 1, 1));
    params.is_ca = is_ca;
    params.key_usages = usages.to_vec();
    params
}

fn extended(digests: &[[u8; 32]]) -> Vec<u8> {
    digests.iter().fold(vec![0; 32], |mut pcr, digest| {
        Bank::Sha256.extend(&mut pcr, digest);
        pcr
    })
}

impl Half {
    fn new(td_quote: &[u8], events: Vec<RuntimeEvent>) -> Self {
        Self::dated(td_quote, events, |_, _| {})
    }

    /// As [`Self::new`], with other dates of the key's certificate, or of a list of its issuer, which is then in the bundle.
    fn dated(
        td_quote: &[u8],
        events: Vec<RuntimeEvent>,
        change: impl FnOnce(&mut CertificateParams, &mut Option<CertificateRevocationListParams>),
    ) -> Self {
        let usages = [KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let root_params = params("root", IsCa::Ca(BasicConstraints::Unconstrained), &usages);
        let root_key = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
        let root = root_params.self_signed(&root_key).unwrap().der().to_vec();
        let ak_key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let (mut leaf, mut list) = (params("ak", IsCa::NoCa, &[KeyUsagePurpose::DigitalSignature]), None);
        change(&mut leaf, &mut list);
        let issuer = Issuer::from_params(&root_params, &root_key);
        let ak_cert = leaf.signed_by(&ak_key, &issuer).unwrap().der().to_vec();
        let lists = list.map(|list| list.signed_by(&issuer).unwrap().der().to_vec()).into_iter().collect();
        let boot = [[1; 32], [2; 32], [3; 32], [4; 32]];
        let pcr2 = extended(&boot);
        Self {
            trusted: root.clone(),
            root,
            ak_cert,
            ak: EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &ak_key.serialize_der()).unwrap(),
            extra_data: Sha256::digest(td_quote).to_vec(),
            pcrs: vec![(0, hex::decode(FIRMWARE).unwrap()), (2, pcr2), (14, replay_runtime(&events, Bank::Sha256))],
            event_log: boot.iter().map(|digest| TpmEvent { pcr_index: 2, digest: digest.to_vec() }).collect(),
            events,
            config: String::new(),
            platform: TpmPlatform::Gcp,
            tcb: TcbPolicy::default(),
            lists,
        }
    }

    fn quote(&self) -> TpmQuote {
        let bits = self.pcrs.iter().fold(0_u32, |bits, (index, _)| bits | 1 << index).to_le_bytes();
        let mut message = vec![0xff, 0x54, 0x43, 0x47, 0x80, 0x18, 0, 2, 0, 0x0b];
        message.extend(u16::try_from(self.extra_data.len()).unwrap().to_be_bytes());
        message.extend(&self.extra_data);
        message.extend([0; 25]);
        message.extend([0, 0, 0, 1, 0, 0x0b, 3, bits[0], bits[1], bits[2], 0, 32]);
        let values: Vec<u8> = self.pcrs.iter().flat_map(|(_, value)| value.clone()).collect();
        message.extend(Sha256::digest(values));
        let both = self.ak.sign(&SystemRandom::new(), &message).unwrap();
        let signature = [&[0, 0x18, 0, 0x0b, 0, 32], &both.as_ref()[..32], &[0, 32], &both.as_ref()[32..]].concat();
        let value = |(index, value): &(u32, Vec<u8>)| PcrValue { index: *index, algorithm: "sha256".into(), value: value.clone() };
        TpmQuote {
            message,
            signature,
            pcr_values: self.pcrs.iter().map(value).collect(),
            ak_cert: self.ak_cert.clone(),
            platform: self.platform,
            event_log: self.event_log.clone(),
        }
    }

    fn judge_quote(&self, quote: &TpmQuote, trace: &Trace) -> Result<VerifiedVtpm, AttestError> {
        self.judge_at(quote, NOW, trace)
    }

    fn judge_at(&self, quote: &TpmQuote, now: UnixMillis, trace: &Trace) -> Result<VerifiedVtpm, AttestError> {
        let roots = TrustRoots::none().with_software_root(&self.trusted).unwrap();
        let pool = X509Pool::new(Vec::new(), self.lists.clone()).unwrap();
        let collateral = CollateralBundle::compose(&BTreeMap::new(), &pool).unwrap();
        let context = VerifyContext { now, roots: &roots, collateral: &collateral, tcb: &self.tcb };
        gcp::verify(TD_QUOTE, quote, &self.events, &self.config, &context, trace)
    }

    fn judge(&self) -> Result<VerifiedVtpm, AttestError> {
        self.judge_quote(&self.quote(), &Trace::new())
    }

    /// Refused with that class, at the check of that name.
    #[track_caller]
    fn refused(&self, class: &str, check: &str) {
        self.refused_quote(&self.quote(), class, check);
    }

    #[track_caller]
    fn refused_quote(&self, quote: &TpmQuote, class: &str, check: &str) {
        let trace = Trace::new();
        let error = self.judge_quote(quote, &trace).unwrap_err();
        assert_eq!((error.class().as_str(), trace.entered().last().unwrap().id), (class, check), "{error}");
    }
}

fn event(name: &str, payload: &[u8]) -> RuntimeEvent {
    RuntimeEvent { event: name.into(), payload: payload.to_vec(), version: EventVersion::V1 }
}

fn half() -> Half {
    Half::new(TD_QUOTE, vec![event("app-id", &[7; 20]), event("compose-hash", &[8; 32])])
}

#[test]
fn a_good_half_passes_every_check_in_order() {
    let (half, trace) = (half(), Trace::new());
    let verified = half.judge_quote(&half.quote(), &trace).unwrap();
    assert_eq!(trace.entered(), gcp::CHECKS);
    assert_eq!(hex::encode(verified.firmware()), FIRMWARE);
    assert_eq!((verified.os_image_hash(), verified.software_root()), (Some([3; 32]), true), "the third event of PCR2");
    assert_eq!(verified.earliest_expiry(), UnixMillis(1_798_761_600_000));
}

#[test]
fn a_half_of_another_form_is_refused() {
    let mut other = half();
    other.platform = TpmPlatform::AwsEc2;
    other.refused("parse.field", "gcp.form");
    let half = half();
    half.refused_quote(&TpmQuote { platform: TpmPlatform::Gcp, ..TpmQuote::default() }, "parse.truncated", "gcp.form");
    let mut certify = half.quote();
    certify.message[5] = 0x17;
    half.refused_quote(&certify, "type.not_a_quote", "gcp.form");
    let mut rsapss = half.quote();
    rsapss.signature[1] = 0x16;
    half.refused_quote(&rsapss, "sig.algorithm", "gcp.form");
}

#[test]
fn an_attestation_key_under_no_root_is_refused() {
    let mut other = half();
    other.trusted = half().root;
    other.refused("chain.signature", "gcp.ak-chain");
    let good = half();
    let mut quote = good.quote();
    quote.ak_cert = good.root.clone();
    good.refused_quote(&quote, "chain.invalid", "gcp.ak-chain");
    quote.ak_cert.clear();
    good.refused_quote(&quote, "parse.malformed", "gcp.ak-chain");
}

#[test]
fn another_key_another_quote_and_other_pcrs_are_refused() {
    let mut quote = half().quote();
    let good = half();
    quote.ak_cert = good.ak_cert.clone();
    good.refused_quote(&quote, "sig.body", "gcp.tpm-signature");
    for extra_data in [Vec::new(), Sha256::digest(b"another td quote").to_vec(), Sha256::digest(TD_QUOTE)[..16].to_vec()] {
        let mut unbound = half();
        unbound.extra_data = extra_data;
        unbound.refused("binding.tpm_quote", "gcp.bound-quote");
    }
    let mut wider = half();
    wider.pcrs.push((15, vec![0; 32]));
    wider.refused("pcr.selection", "gcp.pcr-selection");
    let mut narrower = half();
    narrower.pcrs.remove(0);
    narrower.refused("pcr.selection", "gcp.pcr-selection");
    let mut claimed = good.quote();
    claimed.pcr_values[0].value = vec![0; 32];
    good.refused_quote(&claimed, "pcr.digest_mismatch", "gcp.pcr-values");
    let mut twice = good.quote();
    twice.pcr_values.push(twice.pcr_values[0].clone());
    good.refused_quote(&twice, "pcr.selection", "gcp.pcr-selection");
}

#[test]
fn boot_events_that_lead_elsewhere_are_refused() {
    let mut missing = half();
    missing.event_log.remove(1);
    missing.refused("eventlog.replay_mismatch", "gcp.boot-log");
    let mut firmware = half();
    firmware.event_log.push(TpmEvent { pcr_index: 0, digest: vec![1; 32] });
    firmware.refused("eventlog.replay_mismatch", "gcp.boot-log");
    let mut short = half();
    short.event_log[0].digest.pop();
    short.refused("eventlog.event_digest", "gcp.boot-log");
    let mut none = half();
    none.event_log[0].pcr_index = 24;
    none.refused("eventlog.bad_index", "gcp.boot-log");
}

#[test]
fn runtime_events_that_miss_pcr_14_are_refused() {
    let mut changed = half();
    changed.events[0].payload[0] ^= 1;
    changed.refused("eventlog.replay_mismatch", "gcp.runtime-log");
    let mut dropped = half();
    dropped.events.pop();
    dropped.refused("eventlog.replay_mismatch", "gcp.runtime-log");
}

#[test]
fn an_unlisted_firmware_is_refused() {
    let mut old = half();
    old.pcrs[0].1 = vec![5; 32];
    old.refused("policy.measurement", "gcp.firmware");
    old.tcb = TcbPolicy::default().with_google_firmware(&[[5; 32]]);
    assert!(old.judge().is_ok());
}

#[test]
fn an_image_that_was_not_loaded_is_refused() {
    let mut half = half();
    half.config = format!("{{\"os_image_hash\":\"{}\"}}", "03".repeat(32));
    assert_eq!(half.judge().unwrap().os_image_hash(), Some([3; 32]), "0.5.x: the kernel's own hash");
    half.config = format!("{{\"os_image_hash\":\"{}\"}}", "04".repeat(32));
    half.refused("policy.measurement", "gcp.os-image");
    half.config = "{".into();
    half.refused("parse.malformed", "gcp.os-image");

    let with_document = |uki: u8| {
        let cbor = [&b"\xa2\x67version\x01\x68uki_auth\x58\x20"[..], &[uki; 32]].concat();
        let checksums = format!("{}  measurement.gcp.cbor\n", hex::encode(Sha256::digest(&cbor)));
        let hash: [u8; 32] = Sha256::digest(&checksums).into();
        let document = serde_json::json!({ "checksum_file": STANDARD.encode(checksums), "measurement": STANDARD.encode(cbor) });
        (serde_json::json!({ "os_image_hash": hex::encode(hash), "gcp_measurement": document }).to_string(), hash)
    };
    let (config, hash) = with_document(3);
    half.config = config;
    assert_eq!(half.judge().unwrap().os_image_hash(), Some(hash), "the manifest's hash");
    half.config = with_document(9).0;
    half.refused("policy.measurement", "gcp.os-image");

    // without boot events nothing ties a claim to PCR2
    half.event_log.clear();
    half.refused("policy.measurement", "gcp.os-image");
    half.config = String::new();
    assert_eq!(half.judge().unwrap().os_image_hash(), None);
}

#[test]
fn both_halves_make_an_identity_and_neither_alone() {
    let Some(vectors) = common::vectors() else { return };
    let vector = vectors.of("gcp-tdx").find(|vector| vector["id"] == "gcp-tdx-2026-06").unwrap();
    let quote = vectors.file(vector, "quote");
    let fact = |name: &str| vector["identity"][name].as_str().unwrap();
    let collateral = common::bundle(fact("fmspc"), &vectors.file(vector, "collateral"));
    let half = Half::new(&quote, Vec::new());
    let now = UnixMillis(common::millis(vector["valid_at"].as_str().unwrap()));
    let evidence = |tpm: TpmQuote| Attestation {
        platform: PlatformEvidence::GcpTdx(TdxEvidence { quote: quote.clone(), event_log: Vec::new() }, tpm),
        report_data: hex::decode(fact("report_data")).unwrap().try_into().unwrap(),
        runtime_events: Vec::new(),
        config: String::new(),
        report_data_payload: None,
    };
    let roots = TrustRoots::production().with_software_root(&half.root).unwrap();
    let tcb = TcbPolicy::allowing(&dstack_protocol::TcbStatus::ALL);
    let context = VerifyContext { now, roots: &roots, collateral: &collateral, tcb: &tcb };
    let whole = evidence(half.quote());
    let identity = verify(&whole.encode(), &context).unwrap();
    assert_eq!((identity.platform(), identity.software_root()), (Platform::GcpTdx, true), "half software is software");
    let registers = ["mr_td", "rtmr0", "rtmr1", "rtmr2"].map(fact).concat();
    let pcrs = FIRMWARE.to_owned() + &hex::encode(&half.pcrs[1].1);
    assert_eq!(hex::encode(identity.measurement()), registers + &"00".repeat(32) + &pcrs);
    assert_eq!(identity.os_image_hash(), Some([3; 32]));
    let hash = |parts: &[&[u8]]| <[u8; 32]>::from(Sha256::digest(parts.concat()));
    assert_eq!(identity.mr_system(), hash(&[&[3; 32], &[0; 32]]));
    assert_eq!(identity.mr_aggregated(), hash(&[&hex::decode(&pcrs).unwrap(), &[0; 32]]));
    assert_eq!(verify(&whole.encode_v1(), &context).unwrap().measurement(), identity.measurement());

    assert_eq!(verify(&evidence(TpmQuote::default()).encode(), &context).unwrap_err().class().as_str(), "parse.field");
    let other = Half { extra_data: vec![1; 32], ..half };
    assert_eq!(verify(&evidence(other.quote()).encode(), &context), Err(AttestError::TpmQuote));
}

/// Evidence of both halves: a real TD's, and ours.
fn whole(quote: &[u8], vector: &serde_json::Value, tpm: TpmQuote) -> Vec<u8> {
    let report_data = hex::decode(vector["identity"]["report_data"].as_str().unwrap()).unwrap().try_into().unwrap();
    let platform = PlatformEvidence::GcpTdx(TdxEvidence { quote: quote.to_vec(), event_log: Vec::new() }, tpm);
    Attestation { platform, report_data, runtime_events: Vec::new(), config: String::new(), report_data_payload: None }.encode()
}

#[test]
fn dates_of_google_evidence() {
    let Some(vectors) = common::vectors() else { return };
    let events = || vec![event("app-id", &[7; 20])];
    let at = |half: &Half, now| half.judge_at(&half.quote(), now, &Trace::new()).map(drop);
    let (may, june) = (1_777_593_600_000, 1_780_272_000_000);
    let months = (date_time_ymd(2026, 5, 1), date_time_ymd(2026, 6, 1));
    let key = Half::dated(TD_QUOTE, events(), |leaf, _| (leaf.not_before, leaf.not_after) = months);
    let listed = Half::dated(TD_QUOTE, events(), |_, list| {
        *list = Some(CertificateRevocationListParams {
            this_update: months.0,
            next_update: months.1,
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: Vec::new(),
            key_identifier_method: KeyIdMethod::Sha256,
        });
    });
    let vector = vectors.of("gcp-tdx").find(|vector| vector["id"] == "gcp-tdx-2026-06").unwrap();
    let (quote, collateral) = (vectors.file(vector, "quote"), vectors.file(vector, "collateral"));
    let half = Half::new(&quote, Vec::new());
    let evidence = whole(&quote, vector, half.quote());
    let bundle = common::bundle(vector["identity"]["fmspc"].as_str().unwrap(), &collateral);
    let roots = TrustRoots::production().with_software_root(&half.root).unwrap();
    let tcb = TcbPolicy::allowing(&dstack_protocol::TcbStatus::ALL);
    let judge_whole = |now| verify(&evidence, &VerifyContext { now, roots: &roots, collateral: &bundle, tcb: &tcb }).map(drop);
    dates::hold(
        "gcp",
        &[
            Dated {
                part: "certificate of the attestation key",
                moments_ms: (may, dates::end_of_second(june)),
                judge: Box::new(|now| at(&key, now)),
            },
            Dated {
                part: "revocation list of its issuer",
                moments_ms: (may, dates::end_of_second(june)),
                judge: Box::new(|now| at(&listed, now)),
            },
            Dated { part: "collateral of the TD", moments_ms: common::moments_ms(&collateral), judge: Box::new(judge_whole) },
        ],
    );
}

proptest::proptest! {
    #[test]
    fn any_changed_byte_of_the_quote_is_refused(at in 0usize..200, flip in 1u8..) {
        let half = half();
        let mut quote = half.quote();
        let index = at % quote.message.len();
        quote.message[index] ^= flip;
        proptest::prop_assert!(half.judge_quote(&quote, &Trace::new()).is_err());
    }
}
