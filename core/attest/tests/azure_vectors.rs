//! Real evidence of an Azure confidential VM on TDX: it passes, and nothing of it can change.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use base64::{Engine, engine::general_purpose::STANDARD};
use dstack_attest::azure::{self, Parts, VerifiedVm};
use dstack_attest::tpm::{Bank, PcrValues};
use dstack_attest::{AttestError, CollateralBundle, TcbPolicy, TdxCollateral, Trace, TrustRoots, VerifyContext};
use dstack_protocol::UnixMillis;
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
        let (collateral, tcb) = (CollateralBundle::empty(), TcbPolicy::default());
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
