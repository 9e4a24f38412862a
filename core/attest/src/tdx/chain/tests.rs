//! Paths and lists of a made-up PKI, one fault at a time.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CustomExtension, DnType, IsCa, Issuer, KeyIdMethod, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, RevokedCertParams, SerialNumber, date_time_ymd,
};

use super::*;

const CHAIN: &str = "test chain";
/// 2025-07-01, inside every validity below.
const NOW_MS: u64 = 1_751_328_000_000;

struct Ca {
    params: CertificateParams,
    key: KeyPair,
    der: Vec<u8>,
}

fn key() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap()
}

fn params(name: &str, is_ca: IsCa) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = date_time_ymd(2025, 1, 1);
    params.not_after = date_time_ymd(2026, 1, 1);
    if is_ca != IsCa::NoCa {
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    }
    params.is_ca = is_ca;
    params
}

fn root() -> Ca {
    let (params, key) = (params("root", IsCa::Ca(BasicConstraints::Unconstrained)), key());
    let der = params.self_signed(&key).unwrap().der().to_vec();
    Ca { params, key, der }
}

impl Ca {
    fn issue(&self, params: CertificateParams) -> Self {
        self.issue_for(params, key())
    }

    fn issue_for(&self, params: CertificateParams, key: KeyPair) -> Self {
        let der = params.signed_by(&key, &self.issuer()).unwrap().der().to_vec();
        Self { params, key, der }
    }

    fn issuer(&self) -> Issuer<'_, &KeyPair> {
        Issuer::from_params(&self.params, &self.key)
    }

    fn parsed(&self) -> X509Certificate<'_> {
        certificate(&self.der, CHAIN).unwrap()
    }

    /// A list of this CA that names `serials`.
    fn list(&self, serials: &[&[u8]]) -> Vec<u8> {
        let revoked = |serial: &&[u8]| RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial),
            revocation_time: date_time_ymd(2025, 2, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2025, 6, 1),
            next_update: date_time_ymd(2025, 8, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer()).unwrap().der().to_vec()
    }
}

fn intermediate(root: &Ca) -> Ca {
    root.issue(params("intermediate", IsCa::Ca(BasicConstraints::Constrained(0))))
}

fn verify(chain: &[&Ca], root: &Ca) -> Result<u64, AttestError> {
    verify_at(chain, root, NOW_MS)
}

fn verify_at(chain: &[&Ca], root: &Ca, now_ms: u64) -> Result<u64, AttestError> {
    let parsed: Vec<_> = chain.iter().map(|ca| ca.parsed()).collect();
    let mut window = Window::at(now_ms);
    verify_path(&parsed, &root.parsed(), None, CHAIN, &mut window)?;
    Ok(window.earliest_expiry_ms())
}

#[test]
fn a_good_path_verifies_with_and_without_its_root() {
    let root = root();
    let ca = intermediate(&root);
    let mut short = params("leaf", IsCa::NoCa);
    short.not_after = date_time_ymd(2025, 12, 1);
    let leaf = ca.issue(short);
    let expiry_ms = 1_764_547_200_000;
    assert_eq!(verify(&[&leaf, &ca, &root], &root), Ok(expiry_ms));
    assert_eq!(verify(&[&leaf, &ca], &root), Ok(expiry_ms));
    let roots = TrustRoots::production().with_software_root(&root.der).unwrap();
    for chain in [&[&leaf, &ca, &root][..], &[&leaf, &ca]] {
        let parsed: Vec<_> = chain.iter().map(|ca| ca.parsed()).collect();
        assert!(root_of(&parsed, &roots, CHAIN).unwrap().is_software());
        assert_eq!(root_of(&parsed, &TrustRoots::production(), CHAIN), Err(AttestError::UntrustedRoot { chain: CHAIN }));
    }
}

#[test]
fn refuses_a_root_of_the_same_name() {
    let (root, other) = (root(), root());
    let ca = intermediate(&root);
    let leaf = ca.issue(params("leaf", IsCa::NoCa));
    assert_eq!(verify(&[&leaf, &ca, &root], &other), Err(AttestError::UntrustedRoot { chain: CHAIN }));
    assert_eq!(verify(&[&leaf, &ca], &other), Err(AttestError::ChainSignature { chain: CHAIN }));
}

#[test]
fn refuses_issuers_that_may_not_issue() {
    let root = root();
    let not_ca = root.issue(params("intermediate", IsCa::NoCa));
    let leaf = not_ca.issue(params("leaf", IsCa::NoCa));
    assert_eq!(verify(&[&leaf, &not_ca], &root), Err(AttestError::NotCa { chain: CHAIN }));

    let mut no_signing = params("intermediate", IsCa::Ca(BasicConstraints::Unconstrained));
    no_signing.key_usages = vec![KeyUsagePurpose::CrlSign];
    let no_signing = root.issue(no_signing);
    let leaf = no_signing.issue(params("leaf", IsCa::NoCa));
    assert_eq!(verify(&[&leaf, &no_signing], &root), Err(AttestError::NotCa { chain: CHAIN }));
}

#[test]
fn refuses_more_cas_than_one_above_allows() {
    let root = root();
    let ca = intermediate(&root);
    let below = ca.issue(params("below", IsCa::Ca(BasicConstraints::Unconstrained)));
    let leaf = below.issue(params("leaf", IsCa::NoCa));
    assert_eq!(verify(&[&leaf, &below, &ca], &root), Err(AttestError::PathLength { chain: CHAIN, count: 1 }));
}

#[test]
fn refuses_a_gap_and_a_wrong_order() {
    let root = root();
    let ca = intermediate(&root);
    let leaf = ca.issue(params("leaf", IsCa::NoCa));
    assert_eq!(verify(&[&leaf], &root), Err(AttestError::UntrustedRoot { chain: CHAIN }));
    let gap = AttestError::ChainInvalid { chain: CHAIN, why: "a certificate is not issued by the next one" };
    assert_eq!(verify(&[&ca, &leaf], &root), Err(gap));
}

#[test]
fn refuses_another_curve() {
    let root = root();
    let ca = intermediate(&root);
    let p384 = Ca {
        key: KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap(),
        params: params("intermediate", IsCa::Ca(BasicConstraints::Unconstrained)),
        der: ca.der.clone(),
    };
    let leaf = p384.issue(params("leaf", IsCa::NoCa));
    let got = "1.2.840.10045.4.3.3".to_owned();
    assert_eq!(verify(&[&leaf, &ca], &root), Err(AttestError::Algorithm { part: CHAIN, got }));
}

#[test]
fn refuses_a_critical_extension_it_does_not_understand() {
    let root = root();
    let ca = intermediate(&root);
    let mut leaf = params("leaf", IsCa::NoCa);
    let mut extension = CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]);
    leaf.custom_extensions = vec![extension.clone()];
    assert!(verify(&[&ca.issue(leaf.clone()), &ca], &root).is_ok());
    extension.set_criticality(true);
    leaf.custom_extensions = vec![extension];
    let refused = AttestError::ChainInvalid { chain: CHAIN, why: "a critical extension is not understood" };
    assert_eq!(verify(&[&ca.issue(leaf), &ca], &root), Err(refused));
}

#[test]
fn refuses_certificates_outside_their_time() {
    let root = root();
    let ca = intermediate(&root);
    let leaf = ca.issue(params("leaf", IsCa::NoCa));
    let (from_ms, until_ms) = (1_735_689_600_000, 1_767_225_600_000);
    assert!(verify_at(&[&leaf, &ca], &root, from_ms).is_ok());
    assert!(verify_at(&[&leaf, &ca], &root, until_ms).is_ok());
    let early = AttestError::NotYetValid { part: CHAIN, valid_from_ms: from_ms, now_ms: from_ms - 1 };
    assert_eq!(verify_at(&[&leaf, &ca], &root, from_ms - 1), Err(early));
    let late = AttestError::CertExpired { part: CHAIN, expired_at_ms: until_ms, now_ms: until_ms + 1000 };
    assert_eq!(verify_at(&[&leaf, &ca], &root, until_ms + 1000), Err(late));
}

#[test]
fn a_list_refuses_whom_it_names() {
    let root = root();
    let ca = intermediate(&root);
    let mut named = params("leaf", IsCa::NoCa);
    named.serial_number = Some(SerialNumber::from_slice(&[0x7f, 1, 2]));
    let (named, other) = (ca.issue(named), ca.issue(params("leaf", IsCa::NoCa)));
    let der = ca.list(&[&[0x7f, 1, 2]]);
    let mut window = Window::at(NOW_MS);
    let list = RevocationList::verify(&der, &ca.parsed(), "test crl", &mut window).unwrap();
    let revoked = AttestError::Revoked { chain: CHAIN, serial: "7f0102".to_owned() };
    assert_eq!(list.check(&named.parsed(), CHAIN), Err(revoked));
    assert_eq!(list.check(&other.parsed(), CHAIN), Ok(()));
    assert_eq!(window.earliest_expiry_ms(), 1_754_006_400_000);
}

#[test]
fn refuses_lists_of_others_altered_ones_and_old_ones() {
    let root = root();
    let ca = intermediate(&root);
    let list = |der: &[u8], issuer: &Ca, now_ms| RevocationList::verify(der, &issuer.parsed(), "test crl", &mut Window::at(now_ms)).err();
    let mut der = ca.list(&[]);
    assert_eq!(list(&der, &ca, NOW_MS), None);
    assert_eq!(list(&der, &root, NOW_MS), Some(AttestError::CrlMismatch { crl: "test crl" }));
    assert_eq!(list(&der, &intermediate(&root), NOW_MS), Some(AttestError::ChainSignature { chain: "test crl" }));
    let late = AttestError::CollateralExpired { part: "test crl", expired_at_ms: 1_754_006_400_000, now_ms: 1_754_006_401_000 };
    assert_eq!(list(&der, &ca, 1_754_006_401_000), Some(late));
    let early = AttestError::NotYetValid { part: "test crl", valid_from_ms: 1_748_736_000_000, now_ms: 0 };
    assert_eq!(list(&der, &ca, 0), Some(early));
    der.push(0);
    assert_eq!(list(&der, &ca, NOW_MS), Some(AttestError::TrailingBytes { part: "test crl", count_bytes: 1 }));
}

#[test]
fn intel_root_is_a_path_end_and_not_a_path() {
    let roots = TrustRoots::production();
    let root = roots.iter().next().unwrap();
    let anchor = certificate(root.der(), CHAIN).unwrap();
    let chain = [certificate(root.der(), CHAIN).unwrap()];
    assert_eq!(root_of(&chain, &roots, CHAIN).unwrap(), root);
    assert_eq!(
        verify_path(&chain, &anchor, None, CHAIN, &mut Window::at(NOW_MS)).err(),
        Some(AttestError::ChainInvalid { chain: CHAIN, why: "holds no certificate below the root" })
    );
    assert_eq!(root_of(&chain, &TrustRoots::none(), CHAIN), Err(AttestError::UntrustedRoot { chain: CHAIN }));
}
