//! Judging evidence: collateral and all, with collateral checked before, from the cache of verdicts; beside it the signature
//! verifications alone and `dcap-qvl` alone. Software evidence, and real where the vectors are.

use std::cell::LazyCell;
use std::sync::Arc;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair,
    EcdsaSigningAlgorithm, EcdsaVerificationAlgorithm, KeyPair as _, RSA_PSS_2048_8192_SHA384, RSA_PSS_SHA384, UnparsedPublicKey,
};
use criterion::{BatchSize, Criterion};
use dcap_qvl::QuoteCollateralV3;
use dcap_qvl::verify::QuoteVerifier;
use dstack_attest::snp::Endorsement;
use dstack_attest::tdx::{CheckedCollateral, verify_quote, verify_quote_checked};
use dstack_attest::{CollateralBundle, TcbPolicy, TdxCollateral, Trace, TrustRoots, VerifyContext, nitro, snp, verify, verify_legacy};
use dstack_benches::clock::CpuTime;
use dstack_benches::tls_world::{NOW, material, roots};
use dstack_benches::vectors::{real_document, real_report, real_td};
use dstack_ratls::AttestJudge;
use dstack_testkit::{Host, Measured};

use crate::measure;

const REPORT_DATA: [u8; 64] = [5; 64];

pub(crate) fn all(criterion: &mut Criterion<CpuTime>) {
    // What a verifier cannot do without, in the same run. TDX: PCK certificate, QE report and quote; cold also the PCK CA, both
    // CRLs, TCB info and QE identity with one certificate each. NSM: four certificates and the document.
    let p256 = signed(&ECDSA_P256_SHA256_ASN1_SIGNING);
    let p384 = signed(&ECDSA_P384_SHA384_ASN1_SIGNING);
    measure(criterion, "attest/ecdsa_p256/3", |bencher| bencher.iter(|| verify_each(&ECDSA_P256_SHA256_ASN1, &p256, 3)));
    measure(criterion, "attest/ecdsa_p256/10", |bencher| bencher.iter(|| verify_each(&ECDSA_P256_SHA256_ASN1, &p256, 10)));
    measure(criterion, "attest/ecdsa_p384/5", |bencher| bencher.iter(|| verify_each(&ECDSA_P384_SHA384_ASN1, &p384, 5)));
    software(criterion);
    real(criterion);
}

/// Public key, message of a certificate's size, signature.
type Signed = (Vec<u8>, Vec<u8>, Vec<u8>);

fn signed(algorithm: &'static EcdsaSigningAlgorithm) -> Signed {
    let key = EcdsaKeyPair::generate(algorithm).unwrap();
    let message = vec![7; 1024];
    let signature = key.sign(&SystemRandom::new(), &message).unwrap();
    (key.public_key().as_ref().to_vec(), message, signature.as_ref().to_vec())
}

/// P-256 verifications and nothing else.
pub(crate) struct EcdsaP256(Signed);

impl EcdsaP256 {
    pub(crate) fn new() -> Self {
        Self(signed(&ECDSA_P256_SHA256_ASN1_SIGNING))
    }

    pub(crate) fn verify_each(&self, count: usize) {
        verify_each(&ECDSA_P256_SHA256_ASN1, &self.0, count);
    }
}

fn verify_each(algorithm: &'static EcdsaVerificationAlgorithm, (key, message, signature): &Signed, count: usize) {
    for _ in 0..count {
        UnparsedPublicKey::new(algorithm, key).verify(message, signature).unwrap();
    }
}

fn software(criterion: &mut Criterion<CpuTime>) {
    let roots = roots();
    let trust = material(&roots);
    let context = VerifyContext { now: NOW, roots: &trust.roots, collateral: &trust.collateral, tcb: &trust.tcb };
    let app = Measured::compose(br#"{"manifest_version":2,"name":"app"}"#);
    let td = Host::tdx("machine", &roots).unwrap();
    let evidence = td.evidence(&app, &REPORT_DATA, NOW).unwrap();
    let unused = trust.collateral.clone();
    measure(criterion, "attest/verify_tdx_cold/testkit", |bencher| {
        let judge = |collateral: &mut CollateralBundle| verify(&evidence, &VerifyContext { collateral, ..context }).unwrap();
        bencher.iter_batched_ref(|| unused.clone(), judge, BatchSize::SmallInput);
    });
    measure(criterion, "attest/verify_tdx/testkit", |bencher| bencher.iter(|| verify(&evidence, &context).unwrap()));

    let quote = td.attest(&app, &REPORT_DATA, NOW).unwrap().quote;
    let fmspc = dstack_attest::tdx::claimed_fmspc(&quote).unwrap();
    let collateral = library_form(trust.collateral.tdx(&fmspc).unwrap());
    let verifier = QuoteVerifier::new(roots.tdx_root_der().to_vec());
    measure(criterion, "attest/dcap_qvl/testkit", |bencher| {
        bencher.iter(|| verifier.verify(&quote, &collateral, NOW.0 / 1000).unwrap());
    });

    let judge = AttestJudge::new(material(&roots));
    judge.identity(&evidence, NOW).unwrap();
    measure(criterion, "attest/verdict_cached/testkit", |bencher| bencher.iter(|| judge.identity(&evidence, NOW).unwrap()));

    let enclave = Host::nitro("enclave", &roots).unwrap().evidence(&app, &REPORT_DATA, NOW).unwrap();
    measure(criterion, "attest/verify_nsm/testkit", |bencher| bencher.iter(|| verify(&enclave, &context).unwrap()));
}

fn real(criterion: &mut Criterion<CpuTime>) {
    let (trust, tcb) = (TrustRoots::production(), TcbPolicy::default());
    if let Some(td) = real_td() {
        let context = VerifyContext { now: td.now, roots: &trust, collateral: &td.bundle, tcb: &tcb };
        let unused = td.bundle.clone();
        measure(criterion, "attest/verify_tdx_cold/real", |bencher| {
            let judge = |collateral: &mut CollateralBundle| {
                verify_legacy(&td.quote, &td.event_log, &VerifyContext { collateral, ..context }).unwrap()
            };
            bencher.iter_batched_ref(|| unused.clone(), judge, BatchSize::SmallInput);
        });
        measure(criterion, "attest/verify_tdx/real", |bencher| {
            bencher.iter(|| verify_legacy(&td.quote, &td.event_log, &context).unwrap());
        });
        let checked = CheckedCollateral::new(Arc::new(td.collateral.clone()), &trust);
        measure(criterion, "attest/tdx_quote_cold/real", |bencher| {
            bencher.iter(|| verify_quote(&td.quote, &td.collateral, td.now.0, &trust).unwrap());
        });
        measure(criterion, "attest/tdx_quote/real", |bencher| {
            bencher.iter(|| verify_quote_checked(&td.quote, &checked, td.now.0, &trust).unwrap());
        });
        let (collateral, verifier) = (library_form(&td.collateral), LazyCell::new(QuoteVerifier::new_prod));
        measure(criterion, "attest/dcap_qvl/real", |bencher| {
            let verifier = &*verifier;
            bencher.iter(|| verifier.verify(&td.quote, &collateral, td.now.0 / 1000).unwrap());
        });
    }
    if let Some(enclave) = real_document() {
        measure(criterion, "attest/verify_nsm/real", |bencher| {
            bencher.iter(|| nitro::verify(&enclave.document, &trust, enclave.now).unwrap());
        });
    }
    if let Some(guest) = real_report() {
        snp_signatures(criterion);
        // AMD's revocation lists are not among the vectors
        let (none, tcb) = (CollateralBundle::empty(), TcbPolicy::default().accepting_missing_crl());
        let context = VerifyContext { now: guest.now, roots: &trust, collateral: &none, tcb: &tcb };
        measure(criterion, "attest/verify_snp/real", |bencher| {
            bencher.iter(|| {
                let endorsement = Endorsement::with_chain(&guest.vek, &guest.issuers, &trust).unwrap();
                snp::verify(&guest.report, &endorsement, &context, &Trace::new()).unwrap()
            });
        });
    }
}

/// What a report cannot be judged without: two signatures of AMD's RSA-4096 keys, and the report's own.
fn snp_signatures(criterion: &mut Criterion<CpuTime>) {
    let issuer = RsaKeyPair::generate(KeySize::Rsa4096).unwrap();
    let message = vec![7; 1024];
    let mut signature = vec![0; issuer.public_modulus_len()];
    issuer.sign(&RSA_PSS_SHA384, &SystemRandom::new(), &message, &mut signature).unwrap();
    let key = issuer.public_key().as_ref().to_vec();
    let report = signed(&ECDSA_P384_SHA384_ASN1_SIGNING);
    measure(criterion, "attest/snp_signatures/3", |bencher| {
        bencher.iter(|| {
            for _ in 0..2 {
                UnparsedPublicKey::new(&RSA_PSS_2048_8192_SHA384, &key).verify(&message, &signature).unwrap();
            }
            verify_each(&ECDSA_P384_SHA384_ASN1, &report, 1);
        });
    });
}

fn library_form(collateral: &TdxCollateral) -> QuoteCollateralV3 {
    QuoteCollateralV3 {
        pck_crl_issuer_chain: collateral.pck_crl_issuer_chain.clone(),
        root_ca_crl: collateral.root_ca_crl.clone(),
        pck_crl: collateral.pck_crl.clone(),
        tcb_info_issuer_chain: collateral.tcb_info_issuer_chain.clone(),
        tcb_info: collateral.tcb_info.clone(),
        tcb_info_signature: collateral.tcb_info_signature.clone(),
        qe_identity_issuer_chain: collateral.qe_identity_issuer_chain.clone(),
        qe_identity: collateral.qe_identity.clone(),
        qe_identity_signature: collateral.qe_identity_signature.clone(),
        pck_certificate_chain: None,
    }
}
