//! Real SEV-SNP evidence as dstack's guest wrote it: certificates from the bundle, identity from the document, launch recomputed.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::collections::BTreeMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use dstack_attest::wire::{Attestation, PlatformEvidence};
use dstack_attest::{AttestError, CollateralBundle, TcbPolicy, TrustRoots, VerifiedIdentity, VerifyContext, X509Pool, verify};
use dstack_protocol::{AppId, TcbStatus, UnixMillis};

/// The first certificate of a PEM text.
fn first_certificate(pem: &[u8]) -> Vec<u8> {
    let text = std::str::from_utf8(pem).unwrap();
    let body = text.split("-----BEGIN CERTIFICATE-----").nth(1).unwrap().split("-----END").next().unwrap();
    STANDARD.decode(body.split_ascii_whitespace().collect::<String>()).unwrap()
}

struct Real {
    evidence: Vec<u8>,
    now: UnixMillis,
    vek: Vec<u8>,
    ask: Vec<u8>,
}

impl Real {
    fn read() -> Option<Self> {
        let vectors = common::vectors()?;
        let vector = vectors.of("sev-snp").find(|vector| vector["id"] == "snp-milan-dstack").unwrap();
        let ask = first_certificate(&vectors.file(vector, "ca_chain"));
        let now = UnixMillis(common::millis(vector["valid_at"].as_str().unwrap()));
        Some(Self { evidence: vectors.file(vector, "wrapped"), now, vek: vectors.file(vector, "vek"), ask })
    }

    fn verify(&self, pool: Vec<Vec<u8>>, tcb: &TcbPolicy) -> Result<VerifiedIdentity, AttestError> {
        self.verify_other(&self.evidence, pool, tcb)
    }

    fn verify_other(&self, evidence: &[u8], pool: Vec<Vec<u8>>, tcb: &TcbPolicy) -> Result<VerifiedIdentity, AttestError> {
        let collateral = CollateralBundle::compose(&BTreeMap::new(), &X509Pool::new(pool, Vec::new()).unwrap()).unwrap();
        verify(evidence, &VerifyContext { now: self.now, roots: &TrustRoots::production(), collateral: &collateral, tcb })
    }

    fn pool(&self) -> Vec<Vec<u8>> {
        vec![self.vek.clone(), self.ask.clone()]
    }
}

/// AMD's lists are not among the vectors, and the host reports older firmware than it runs.
fn lenient() -> TcbPolicy {
    TcbPolicy::allowing(&[TcbStatus::UpToDate, TcbStatus::OutOfDate]).accepting_missing_crl()
}

#[test]
fn a_real_guest_is_known_by_its_document() {
    let Some(real) = Real::read() else { return };
    let identity = real.verify(real.pool(), &lenient()).unwrap();
    let bytes = |text| hex::decode(text).unwrap();
    assert_eq!(identity.app_id(), Some(AppId(bytes("86e59625be93207bc2351c4d1bba20037cec8e16").try_into().unwrap())));
    let compose = bytes("86e59625be93207bc2351c4d1bba20037cec8e168da6b18f559af5af657b7a23");
    assert_eq!(identity.compose_hash().unwrap(), compose.as_slice());
    assert_eq!(identity.instance_id(), bytes("d378c00e65112c4235bfeb46c6a0f98fd02145a3"));
    assert!(identity.key_provider().starts_with(br#"{"name":"kms","id":"3059301306072a86"#));
    assert_eq!((identity.tcb_status(), identity.software_root()), (TcbStatus::OutOfDate, false));
    assert_eq!(identity.os_image_hash(), None, "its document explains the launch and names no image: the claim beside it stays one");
    let default = real.verify(real.pool(), &TcbPolicy::default().accepting_missing_crl());
    assert_eq!(default, Err(AttestError::TcbStatus { status: "OutOfDate".to_owned() }));
}

#[test]
fn real_evidence_needs_certificates_and_a_list() {
    let Some(real) = Real::read() else { return };
    assert!(matches!(real.verify(Vec::new(), &lenient()), Err(AttestError::VekMissing { .. })));
    assert!(matches!(real.verify(vec![real.vek.clone()], &lenient()), Err(AttestError::IssuerUnknown { .. })));
    let strict = TcbPolicy::allowing(&[TcbStatus::UpToDate, TcbStatus::OutOfDate]);
    assert!(matches!(real.verify(real.pool(), &strict), Err(AttestError::CrlMissing { .. })));
}

#[test]
fn no_byte_of_real_evidence_can_change_unnoticed() {
    let Some(real) = Real::read() else { return };
    let whole = Attestation::decode(&real.evidence).unwrap();
    let PlatformEvidence::SevSnp { report, cert_chain, mr_config } = whole.platform.clone() else { unreachable!("it is of SEV-SNP") };
    for at in 0..report.len() {
        let mut changed = report.clone();
        changed[at] ^= 0x10;
        let platform = PlatformEvidence::SevSnp { report: changed, cert_chain: cert_chain.clone(), mr_config: mr_config.clone() };
        let evidence = Attestation { platform, ..whole.clone() }.encode();
        assert!(real.verify_other(&evidence, real.pool(), &lenient()).is_err(), "byte {at:#x} of the report");
    }
    for at in 0..mr_config.len() {
        let mut changed = mr_config.clone().into_bytes();
        changed[at] ^= 1;
        let mr_config = String::from_utf8(changed).unwrap();
        let platform = PlatformEvidence::SevSnp { report: report.clone(), cert_chain: cert_chain.clone(), mr_config };
        let evidence = Attestation { platform, ..whole.clone() }.encode();
        assert_eq!(real.verify_other(&evidence, real.pool(), &lenient()).unwrap_err().class().as_str(), "binding.user_data");
    }
    // the command line is part of the launch
    let config = whole.config.replace("panic=1", "panic=2");
    assert_ne!(config, whole.config);
    let evidence = Attestation { config, ..whole }.encode();
    let refused = real.verify_other(&evidence, real.pool(), &lenient());
    assert_eq!(refused, Err(AttestError::Measurement { register: "snp launch digest" }));
}
