//! Real evidence of an Azure confidential VM on TDX: it passes, and nothing of it can change.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;
#[path = "common/dates.rs"]
mod dates;

use std::collections::BTreeMap;

use aws_lc_rs::encoding::AsDer as _;
use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize};
use base64::{Engine, engine::general_purpose::STANDARD};
use dates::Dated;
use dstack_attest::azure::{self, Parts, VerifiedVm};
use dstack_attest::tpm::{Bank, PcrValues};
use dstack_attest::{AttestError, CollateralBundle, TcbPolicy, TdxCollateral, Trace, TrustRoots, VerifyContext, X509Pool};
use dstack_protocol::UnixMillis;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod,
    KeyPair, KeyUsagePurpose, PKCS_RSA_SHA256, SerialNumber,
};
use serde_json::Value;

/// The parts, owned, so that a test can change one.
#[derive(Clone)]
struct Evidence {
    quote: Vec<u8>,
    hcl_report: Vec<u8>,
    tpm_message: Vec<u8>,
    tpm_signature: Vec<u8>,
    pcrs: Vec<Vec<u8>>,
    ak_certificate: Option<Vec<u8>>,
    ak_intermediates: Vec<Vec<u8>>,
    collateral: Vec<u8>,
    now: UnixMillis,
    roots: TrustRoots,
    /// Lists of the bundle.
    lists: Vec<Vec<u8>>,
}

fn certificates(pem: &[u8]) -> Vec<Vec<u8>> {
    let bodies = std::str::from_utf8(pem).unwrap().split("-----BEGIN CERTIFICATE-----").skip(1);
    bodies.map(|body| STANDARD.decode(body.split("-----END").next().unwrap().split_whitespace().collect::<String>()).unwrap()).collect()
}

fn real() -> Option<Evidence> {
    let vectors = common::vectors()?;
    let vector = vectors.of("azure-tdx").next().unwrap();
    let file = |role| vectors.file(vector, role);
    let pcrs: Value = serde_json::from_slice(&file("pcrs")).unwrap();
    Some(Evidence {
        quote: file("quote"),
        hcl_report: file("hcl_report"),
        tpm_message: file("tpm_message"),
        tpm_signature: file("tpm_signature"),
        pcrs: (0..24).map(|index| hex::decode(pcrs["sha256"][index.to_string()].as_str().unwrap()).unwrap()).collect(),
        ak_certificate: Some(certificates(&file("ak_cert")).remove(0)),
        ak_intermediates: certificates(&file("ak_intermediates")),
        collateral: file("collateral"),
        now: UnixMillis(common::millis(vector["valid_at"].as_str().unwrap())),
        roots: TrustRoots::production(),
        lists: Vec::new(),
    })
}

impl Evidence {
    fn verify(&self) -> Result<VerifiedVm, AttestError> {
        let mut pcrs = PcrValues::default();
        for (index, value) in (0..).zip(&self.pcrs) {
            pcrs.add(Bank::Sha256, index, value.clone()).unwrap();
        }
        let parts = Parts {
            quote: &self.quote,
            hcl_report: &self.hcl_report,
            tpm_message: &self.tpm_message,
            tpm_signature: &self.tpm_signature,
            pcrs: &pcrs,
            ak_certificate: self.ak_certificate.as_deref(),
            ak_intermediates: &self.ak_intermediates,
        };
        let pool = X509Pool::new(Vec::new(), self.lists.clone()).unwrap();
        let (collateral, tcb) = (CollateralBundle::compose(&BTreeMap::new(), &pool).unwrap(), TcbPolicy::default());
        let context = VerifyContext { now: self.now, roots: &self.roots, collateral: &collateral, tcb: &tcb };
        let trace = Trace::new();
        let result = azure::verify(&parts, &TdxCollateral::parse(&self.collateral).unwrap(), &context, &trace);
        let last = *trace.entered().last().unwrap();
        match &result {
            Ok(_) => assert_eq!(last.id, "azure.pcrs"),
            Err(error) => assert!(last.classes.contains(&error.class()), "{} of {}: {error}", error.class(), last.id),
        }
        result
    }
}

#[test]
fn a_real_vm_is_known_by_its_pcrs() {
    let Some(evidence) = real() else { return };
    let vm = evidence.verify().unwrap();
    assert_eq!((vm.measurement().len(), vm.is_certified()), (5 * 48 + 24 * 32, true));
    assert!(vm.measurement().ends_with(&evidence.pcrs.concat()));
    assert_eq!(vm.vm_configuration().unwrap()["secure-boot"], true);
    assert_eq!(vm.require_nonce(&[0; 32]), Ok(()));
    assert_eq!(vm.require_nonce(&[1; 32]), Err(AttestError::Nonce));
    let claimed = azure::claimed_report(&evidence.hcl_report).unwrap();
    assert_eq!(claimed.vm_configuration.as_ref(), vm.vm_configuration());
    let bare = Evidence { ak_certificate: None, ..evidence };
    assert!(!bare.verify().unwrap().is_certified());
}

#[test]
fn no_byte_of_a_part_can_change_unnoticed() {
    let Some(evidence) = real() else { return };
    let flipped = |part: fn(&mut Evidence) -> &mut Vec<u8>, at: usize| {
        let mut changed = evidence.clone();
        part(&mut changed)[at] ^= 1;
        changed.verify().map(drop).map_err(|error| error.class().as_str())
    };
    for at in 0..evidence.tpm_message.len() {
        assert!(flipped(|evidence| &mut evidence.tpm_message, at).is_err(), "message {at}");
    }
    for at in 0..evidence.tpm_signature.len() {
        assert_eq!(flipped(|evidence| &mut evidence.tpm_signature, at), Err("sig.body"), "signature {at}");
    }
    // the hardware report inside is not signed, and nothing of it is believed; header, runtime data and padding are
    for at in (0..8).chain(1216..evidence.hcl_report.len()) {
        assert!(flipped(|evidence| &mut evidence.hcl_report, at).is_err(), "hcl report {at}");
    }
    assert_eq!(flipped(|evidence| &mut evidence.hcl_report, 1300), Err("binding.report_data"));
    // the root inside the quote is known by its key alone: it is ours that is trusted
    let begin = b"-----BEGIN CERTIFICATE-----";
    let root = evidence.quote.windows(begin.len()).rposition(|window| window == begin).unwrap();
    for at in (0..root).step_by(41).chain([evidence.quote.len() - 1]) {
        assert!(flipped(|evidence| &mut evidence.quote, at).is_err(), "quote {at}");
    }
    for index in 0..24 {
        let mut changed = evidence.clone();
        changed.pcrs[index][31] ^= 1;
        assert_eq!(changed.verify().unwrap_err(), AttestError::PcrDigest, "pcr {index}");
    }
    for at in (0..evidence.ak_certificate.as_ref().unwrap().len()).step_by(7) {
        assert!(flipped(|evidence| evidence.ak_certificate.as_mut().unwrap(), at).is_err(), "certificate {at}");
    }
    for at in (0..evidence.ak_intermediates[0].len()).step_by(29) {
        assert!(flipped(|evidence| &mut evidence.ak_intermediates[0], at).is_err(), "intermediate {at}");
    }
}

#[test]
fn every_part_is_needed_whole() {
    let Some(evidence) = real() else { return };
    let class = |changed: Evidence| changed.verify().unwrap_err().class().as_str();
    for part in [
        (|evidence| &mut evidence.quote) as fn(&mut Evidence) -> &mut Vec<u8>,
        |evidence| &mut evidence.hcl_report,
        |evidence| &mut evidence.tpm_message,
        |evidence| &mut evidence.tpm_signature,
    ] {
        let mut changed = evidence.clone();
        let half = part(&mut changed).len() / 2;
        part(&mut changed).truncate(half);
        assert!(changed.verify().is_err());
        part(&mut changed).clear();
        assert!(changed.verify().is_err());
    }
    let mut fewer = evidence.clone();
    fewer.pcrs.pop();
    assert_eq!(class(fewer), "pcr.selection");
    let alone = Evidence { ak_intermediates: Vec::new(), ..evidence.clone() };
    assert_eq!(class(alone), "chain.untrusted_root");
    let late = Evidence { now: UnixMillis(evidence.now.0 + 400 * 86_400_000), ..evidence.clone() };
    assert!(class(late).starts_with("time."));
    let unknown = Evidence { roots: TrustRoots::none(), ..evidence };
    assert_eq!(class(unknown), "chain.untrusted_root");
}

#[test]
fn the_certificate_is_of_the_key_that_the_quote_binds() {
    let Some(evidence) = real() else { return };
    let roots = TrustRoots::production().with_software_root(include_bytes!("azure/root.der")).unwrap();
    let ak_certificate = Some(include_bytes!("azure/ak.der").to_vec());
    let other = Evidence { roots, ak_certificate, ..evidence };
    let error = other.verify().unwrap_err();
    assert_eq!(error, AttestError::TpmQuote);
}

/// An RSA key as rcgen takes it.
fn rsa_key() -> KeyPair {
    let key = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
    let pkcs8: aws_lc_rs::encoding::Pkcs8V1Der<'_> = key.as_der().unwrap();
    KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8.as_ref().to_vec().into(), &PKCS_RSA_SHA256).unwrap()
}

#[test]
fn dates_of_azure_evidence() {
    let Some(evidence) = real() else { return };
    // A certificate of another key under a root of ours: its path is judged first, and then the key is not the bound one.
    let around = |ms: u64| std::time::UNIX_EPOCH + std::time::Duration::from_millis(ms);
    let now_ms = evidence.now.0;
    let hour_ms = 3_600_000;
    let (first_ms, last_ms) = (now_ms - hour_ms, now_ms + hour_ms);
    let params = |name: &str, is_ca: IsCa, usages: &[KeyUsagePurpose], days: u64| {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        let ms = days * 86_400_000;
        (params.not_before, params.not_after) = (around(now_ms - ms).into(), around(now_ms + ms).into());
        (params.is_ca, params.key_usages) = (is_ca, usages.to_vec());
        params
    };
    let root_usages = [KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let (root_params, root_key) = (params("root", IsCa::Ca(BasicConstraints::Unconstrained), &root_usages, 3000), rsa_key());
    let root = root_params.self_signed(&root_key).unwrap().der().to_vec();
    let issuer = Issuer::from_params(&root_params, &root_key);
    let mut leaf = params("ak", IsCa::NoCa, &[KeyUsagePurpose::DigitalSignature], 2000);
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::Other(vec![2, 23, 133, 8, 3])];
    let leaf_key = rsa_key();
    let mut short = leaf.clone();
    (short.not_before, short.not_after) = (around(first_ms).into(), around(last_ms).into());
    let list = CertificateRevocationListParams {
        this_update: around(first_ms).into(),
        next_update: around(last_ms).into(),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: Vec::new(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let list = list.signed_by(&issuer).unwrap().der().to_vec();
    let certified = |params: &CertificateParams, lists: Vec<Vec<u8>>| Evidence {
        ak_certificate: Some(params.signed_by(&leaf_key, &issuer).unwrap().der().to_vec()),
        roots: TrustRoots::production().with_software_root(&root).unwrap(),
        lists,
        ..evidence.clone()
    };
    let at = |evidence: &Evidence, now| match (Evidence { now, ..evidence.clone() }).verify() {
        Err(AttestError::TpmQuote) => Ok(()),
        other => other.map(drop),
    };
    let (short, listed) = (certified(&short, Vec::new()), certified(&leaf, vec![list]));
    let moments_ms = (first_ms, dates::end_of_second(last_ms));
    dates::hold(
        "azure",
        &[
            Dated { part: "certificate of the attestation key", moments_ms, judge: Box::new(|now| at(&short, now)) },
            Dated { part: "revocation list of its issuer", moments_ms, judge: Box::new(|now| at(&listed, now)) },
            Dated {
                part: "collateral of the TD",
                moments_ms: common::moments_ms(&evidence.collateral),
                judge: Box::new(|now| Evidence { now, ak_certificate: None, ..evidence.clone() }.verify().map(drop)),
            },
        ],
    );
}
