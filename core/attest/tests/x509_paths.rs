//! Certificate paths of a made-up PKI, one fault at a time: paths given in order, paths found in a pool, revocation lists.
//! Every signature is real: what is refused is refused for the rule named.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use dstack_attest::{
    AttestError, TrustRoots, Vendor,
    x509::{self, KeyKind, Purpose, Revocation, Rules, SignatureAlgorithm, Untrusted},
};
use dstack_protocol::UnixMillis;
use proptest::prelude::*;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CrlDistributionPoint, CrlIssuingDistributionPoint,
    CustomExtension, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
    PKCS_ECDSA_P384_SHA384, RevokedCertParams, SanType, SerialNumber, SignatureAlgorithm as KeyAlgorithm, date_time_ymd,
};
use x509_parser::der_parser::{Oid, oid};

/// 2026-02-01T00:00:00Z; certificates hold from 2026-01-01 to 2026-03-01.
const NOW: UnixMillis = UnixMillis(1_769_904_000_000);
const FIRST_DAY_MS: u64 = 1_767_225_600_000;
const LAST_DAY_MS: u64 = 1_772_323_200_000;

static PURPOSE: Oid<'static> = oid!(2.23.133.8.1);

static RULES: Rules = Rules {
    chain: "test chain",
    vendor: Vendor::Google,
    keys: &[KeyKind::P256, KeyKind::P384],
    signatures: &[SignatureAlgorithm::EcdsaP256Sha256, SignatureAlgorithm::EcdsaP384Sha384],
    purpose: Some(Purpose::Other(&PURPOSE)),
    alternative_names: false,
    revocation: Revocation::WhereNamed,
    intermediates_max: 3,
};

struct Ca {
    params: CertificateParams,
    key: KeyPair,
    der: Vec<u8>,
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = leaf_params(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn leaf_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    (params.not_before, params.not_after) = (date_time_ymd(2026, 1, 1), date_time_ymd(2026, 3, 1));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params
}

fn key(algorithm: &'static KeyAlgorithm) -> KeyPair {
    KeyPair::generate_for(algorithm).unwrap()
}

impl Ca {
    fn root() -> Self {
        let (params, key) = (ca_params("root"), key(&PKCS_ECDSA_P384_SHA384));
        let der = params.self_signed(&key).unwrap().der().to_vec();
        Self { params, key, der }
    }

    fn issue(&self, params: CertificateParams) -> Self {
        self.issue_for(params, key(&PKCS_ECDSA_P256_SHA256))
    }

    fn issue_for(&self, params: CertificateParams, key: KeyPair) -> Self {
        let der = params.signed_by(&key, &Issuer::from_params(&self.params, &self.key)).unwrap().der().to_vec();
        Self { params, key, der }
    }

    /// A list of this CA that names `serials`.
    fn list(&self, change: impl FnOnce(&mut CertificateRevocationListParams), serials: &[u8]) -> Vec<u8> {
        let revoked = |serial: &u8| RevokedCertParams {
            serial_number: SerialNumber::from_slice(&[*serial]),
            revocation_time: date_time_ymd(2026, 1, 2),
            reason_code: None,
            invalidity_date: None,
        };
        let mut list = CertificateRevocationListParams {
            this_update: date_time_ymd(2026, 1, 20),
            next_update: date_time_ymd(2026, 2, 20),
            crl_number: SerialNumber::from_slice(&[1]),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        change(&mut list);
        list.signed_by(&Issuer::from_params(&self.params, &self.key)).unwrap().der().to_vec()
    }
}

/// root → ca → leaf, to be spoilt.
struct World {
    root: Ca,
    ca: CertificateParams,
    leaf: CertificateParams,
    rules: Rules,
}

impl World {
    fn new() -> Self {
        let mut leaf = leaf_params("leaf");
        leaf.serial_number = Some(SerialNumber::from_slice(&[7]));
        Self { root: Ca::root(), ca: ca_params("ca"), leaf, rules: RULES }
    }

    fn made(&self) -> (Ca, Ca) {
        let ca = self.root.issue(self.ca.clone());
        let leaf = ca.issue(self.leaf.clone());
        (ca, leaf)
    }

    fn roots(&self) -> TrustRoots {
        TrustRoots::none().with_software_root(&self.root.der).unwrap()
    }

    /// What both ways of checking say, who have to agree.
    fn judge_at(&self, now: UnixMillis) -> Result<UnixMillis, AttestError> {
        let ((ca, leaf), roots) = (self.made(), self.roots());
        let walked = x509::walk(roots.iter().next().unwrap(), &[&ca.der], &leaf.der, &[], now, &self.rules);
        let pool = [ca.der.clone()];
        let built = x509::build(&leaf.der, &Untrusted { presented: &pool, ..Untrusted::default() }, &roots, now, &self.rules);
        let answer = |path: Result<x509::Path<'_, '_>, AttestError>| path.map(|path| path.earliest_expiry());
        let (walked, built) = (answer(walked), answer(built));
        assert_eq!(walked, built);
        walked
    }

    #[track_caller]
    fn refused(&self, class: &str, text: &str) {
        let error = self.judge_at(NOW).unwrap_err();
        assert_eq!((error.class().as_str(), error.to_string().as_str()), (class, text));
    }

    fn with_lists(&self, ca: &Ca, leaf: &Ca, lists: &[Vec<u8>]) -> Result<UnixMillis, AttestError> {
        let pool = [ca.der.clone()];
        let untrusted = Untrusted { pinned: &pool, crls: lists, ..Untrusted::default() };
        x509::build(&leaf.der, &untrusted, &self.roots(), NOW, &self.rules).map(|path| path.earliest_expiry())
    }
}

#[test]
fn a_good_path_is_walked_and_built() {
    assert_eq!(World::new().judge_at(NOW), Ok(UnixMillis(LAST_DAY_MS)));
}

#[test]
fn certificates_hold_from_their_first_to_their_last_second() {
    let world = World::new();
    assert!(world.judge_at(UnixMillis(FIRST_DAY_MS)).is_ok());
    assert!(world.judge_at(UnixMillis(LAST_DAY_MS + 999)).is_ok());
    assert_eq!(world.judge_at(UnixMillis(FIRST_DAY_MS - 1)).unwrap_err().class().as_str(), "time.not_yet_valid");
    assert_eq!(world.judge_at(UnixMillis(LAST_DAY_MS + 1000)).unwrap_err().class().as_str(), "time.cert_expired");
}

#[test]
fn issuers_are_cas_that_may_sign_and_allow_the_depth() {
    let mut world = World::new();
    world.ca.is_ca = IsCa::ExplicitNoCa;
    world.refused("chain.not_ca", "test chain: an issuer is not a CA");
    world.ca.is_ca = IsCa::NoCa;
    world.refused("chain.not_ca", "test chain: an issuer is not a CA");
    let mut world = World::new();
    world.ca.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    world.refused("chain.invalid", "test chain: an issuer may not sign certificates");
    world.ca.key_usages.clear();
    world.refused("chain.invalid", "test chain: an issuer may not sign certificates");

    let mut world = World::new();
    world.root.params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    world.root.der = world.root.params.self_signed(&world.root.key).unwrap().der().to_vec();
    world.refused("chain.path_length", "test chain: path of 3 certificates is too long");
    let mut world = World::new();
    world.rules.intermediates_max = 0;
    assert_eq!(world.judge_at(NOW).unwrap_err().class().as_str(), "chain.path_length");
}

#[test]
fn leaves_are_no_cas_and_may_sign() {
    let mut world = World::new();
    world.leaf.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    world.refused("chain.invalid", "test chain: the leaf is a CA");
    let mut world = World::new();
    world.leaf.key_usages = vec![KeyUsagePurpose::KeyEncipherment];
    world.refused("chain.invalid", "test chain: the leaf may not sign");
}

#[test]
fn a_named_purpose_is_the_wanted_one() {
    let mut world = World::new();
    world.leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    world.refused("chain.invalid", "test chain: extended key usage without the purpose");
    world.leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any];
    world.refused("chain.invalid", "test chain: extended key usage without the purpose");
    world.leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::Other(vec![2, 23, 133, 8, 1])];
    assert!(world.judge_at(NOW).is_ok());
    world.ca.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    world.refused("chain.invalid", "test chain: extended key usage without the purpose");
}

#[test]
fn critical_extensions_are_understood_or_refused() {
    let mut world = World::new();
    let mut unknown = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 62397, 99], vec![5, 0]);
    world.leaf.custom_extensions = vec![unknown.clone()];
    assert!(world.judge_at(NOW).is_ok());
    unknown.set_criticality(true);
    world.leaf.custom_extensions = vec![unknown];
    world.refused("chain.invalid", "test chain: a critical extension that is not understood");

    let mut world = World::new();
    let name = world.leaf.clone();
    world.leaf.distinguished_name = rcgen::DistinguishedName::new();
    world.leaf.subject_alt_names = vec![SanType::DnsName("vtpm.test".try_into().unwrap())];
    world.refused("chain.invalid", "test chain: a critical extension that is not understood");
    world.rules.alternative_names = true;
    assert!(world.judge_at(NOW).is_ok(), "an empty subject makes the alternative name critical");
    world.leaf = name;
    world.leaf.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 14], vec![4, 1, 9]); 2];
    world.refused("chain.invalid", "test chain: an extension stands twice");
}

#[test]
fn keys_and_algorithms_are_those_of_the_rules() {
    let mut world = World::new();
    world.rules.keys = &[KeyKind::P384];
    world.refused("chain.invalid", "test chain: a key is of a kind that is not allowed");
    let mut world = World::new();
    world.rules.signatures = &[SignatureAlgorithm::EcdsaP384Sha384];
    world.refused("sig.algorithm", "test chain: signature algorithm 1.2.840.10045.4.3.2 is not allowed");
}

#[test]
fn another_key_under_the_same_name_signs_nothing() {
    let world = World::new();
    let other = World::new();
    let ((ca, leaf), (other_ca, _)) = (world.made(), other.made());
    let roots = world.roots();
    let root = roots.iter().next().unwrap();
    let walked = x509::walk(root, &[&other_ca.der], &leaf.der, &[], NOW, &RULES).unwrap_err();
    assert_eq!(walked, AttestError::ChainSignature { chain: "test chain" });
    let skipped = x509::walk(root, &[], &leaf.der, &[], NOW, &RULES).unwrap_err();
    assert_eq!(skipped, AttestError::ChainInvalid { chain: "test chain", why: "a certificate names another issuer" });
    let built = |pool: &[Vec<u8>], roots: &TrustRoots| {
        let untrusted = Untrusted { presented: pool, ..Untrusted::default() };
        x509::build(&leaf.der, &untrusted, roots, NOW, &RULES).map(|path| path.intermediates())
    };
    // the right one is found wherever it stands, a root of the same name is not taken
    assert_eq!(built(&[other_ca.der.clone(), ca.der.clone()], &roots), Ok(1));
    assert_eq!(built(std::slice::from_ref(&ca.der), &other.roots()).unwrap_err().class().as_str(), "chain.signature");
    assert_eq!(built(std::slice::from_ref(&ca.der), &TrustRoots::production()).unwrap_err().class().as_str(), "chain.untrusted_root");
    let unknown = AttestError::IssuerUnknown { chain: "test chain", issuer: "CN=ca".to_owned(), from: None };
    assert_eq!(built(&[], &roots), Err(unknown));
}

#[test]
fn of_two_certificates_of_one_ca_the_good_one_is_taken() {
    let world = World::new();
    let (ca, leaf) = world.made();
    let mut old = world.ca.clone();
    old.not_after = date_time_ymd(2026, 1, 15);
    let old = world.root.issue_for(old, KeyPair::try_from(ca.key.serialize_der()).unwrap());
    let roots = world.roots();
    for pool in [[old.der.clone(), ca.der.clone()], [ca.der.clone(), old.der.clone()]] {
        let untrusted = Untrusted { presented: &pool[..1], pinned: &pool[1..], crls: &[] };
        assert!(x509::build(&leaf.der, &untrusted, &roots, NOW, &RULES).is_ok());
    }
    let untrusted = Untrusted { presented: std::slice::from_ref(&old.der), ..Untrusted::default() };
    let expired = x509::build(&leaf.der, &untrusted, &roots, NOW, &RULES).unwrap_err();
    assert_eq!(expired.class().as_str(), "time.cert_expired");
}

#[test]
fn a_circle_of_cas_and_a_crowd_of_namesakes_end() {
    let world = World::new();
    let (a, b) = (Ca::root(), Ca::root());
    let [mut a_params, mut b_params] = [ca_params("a"), ca_params("b")];
    a_params.use_authority_key_identifier_extension = false;
    b_params.use_authority_key_identifier_extension = false;
    let key_of = |ca: &Ca| KeyPair::try_from(ca.key.serialize_der()).unwrap();
    let (a, b) = (Ca { params: a_params.clone(), ..a }, Ca { params: b_params.clone(), ..b });
    let (a_by_b, b_by_a) = (b.issue_for(a_params, key_of(&a)), a.issue_for(b_params, key_of(&b)));
    let leaf = a_by_b.issue(leaf_params("leaf"));
    let pool = [a_by_b.der, b_by_a.der];
    let untrusted = Untrusted { presented: &pool, ..Untrusted::default() };
    assert!(x509::build(&leaf.der, &untrusted, &world.roots(), NOW, &RULES).is_err());

    let (_, leaf) = world.made();
    let namesakes: Vec<_> = (0..40).map(|_| Ca::root().issue(world.ca.clone()).der).collect();
    let untrusted = Untrusted { presented: &namesakes, ..Untrusted::default() };
    assert!(x509::build(&leaf.der, &untrusted, &world.roots(), NOW, &RULES).is_err());
}

#[test]
fn revocation_lists_are_needed_where_named_and_obeyed_where_given() {
    let mut world = World::new();
    world.leaf.crl_distribution_points = vec![CrlDistributionPoint { uris: vec!["http://crl.test/ca".to_owned()] }];
    let (ca, leaf) = world.made();
    let missing = AttestError::CrlMissing { chain: "test chain", issuer: "CN=ca".to_owned(), from: Some("http://crl.test/ca".to_owned()) };
    assert_eq!(world.with_lists(&ca, &leaf, &[]), Err(missing));
    let clean = ca.list(|_| {}, &[9]);
    assert_eq!(world.with_lists(&ca, &leaf, std::slice::from_ref(&clean)), Ok(UnixMillis(1_771_545_600_000)), "the list ends first");
    let naming = ca.list(|list| list.this_update = date_time_ymd(2026, 1, 10), &[7]);
    let revoked = world.with_lists(&ca, &leaf, &[clean.clone(), naming.clone()]).unwrap_err();
    assert_eq!(revoked, AttestError::Revoked { chain: "test chain", serial: "07".to_owned() });
    // a list of another CA of that name is no list of this one
    let other = world.root.issue(world.ca.clone());
    let foreign = other.list(|_| {}, &[7]);
    assert_eq!(world.with_lists(&ca, &leaf, std::slice::from_ref(&foreign)).unwrap_err().class().as_str(), "collateral.mismatch");
    world.rules.revocation = Revocation::WhereGiven;
    assert!(world.with_lists(&ca, &leaf, &[]).is_ok());
    assert_eq!(world.with_lists(&ca, &leaf, &[naming]).unwrap_err().class().as_str(), "chain.revoked");
}

#[test]
fn revocation_lists_have_their_own_time_and_signature() {
    let world = World::new();
    let (ca, leaf) = world.made();
    let class = |list: Vec<u8>| world.with_lists(&ca, &leaf, &[list]).unwrap_err().class().as_str();
    assert_eq!(class(ca.list(|list| list.next_update = date_time_ymd(2026, 1, 31), &[])), "time.collateral_expired");
    assert_eq!(class(ca.list(|list| list.this_update = date_time_ymd(2026, 2, 2), &[])), "time.not_yet_valid");
    let mut spoilt = ca.list(|_| {}, &[]);
    *spoilt.last_mut().unwrap() ^= 1;
    assert_eq!(class(spoilt), "chain.signature");
    let mut longer = ca.list(|_| {}, &[]);
    longer.push(0);
    assert_eq!(class(longer), "parse.malformed");
    let partial = ca.list(
        |list| {
            list.issuing_distribution_point = Some(CrlIssuingDistributionPoint {
                distribution_point: CrlDistributionPoint { uris: vec!["http://crl.test/part".to_owned()] },
                scope: None,
            });
        },
        &[],
    );
    assert_eq!(class(partial), "chain.invalid");
    let mut world = World::new();
    world.ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let (ca, leaf) = world.made();
    // rcgen will not sign a list without the usage, so the list is made with it
    let signer = Ca { params: ca_params("ca"), key: KeyPair::try_from(ca.key.serialize_der()).unwrap(), der: Vec::new() };
    let unsigned = world.with_lists(&ca, &leaf, &[signer.list(|_| {}, &[])]).unwrap_err();
    assert_eq!(unsigned, AttestError::ChainInvalid { chain: "test chain", why: "an issuer may not sign a crl" });
}

#[test]
fn a_root_ends_paths_of_its_vendor_only() {
    let roots = TrustRoots::production();
    let aws = roots.serving(Vendor::Aws).next().unwrap();
    let rules = Rules { keys: &[KeyKind::P384], signatures: &[SignatureAlgorithm::EcdsaP384Sha384], purpose: None, ..RULES };
    // AWS's own root as a leaf: its issuer's name is a root's, but of another vendor
    let error = x509::build(aws.der(), &Untrusted::default(), &roots, NOW, &rules).unwrap_err();
    assert!(matches!(error, AttestError::IssuerUnknown { .. }), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_are_no_path(bytes in proptest::collection::vec(any::<u8>(), 0..300), cut in 0usize..2000, at in 0usize..2000, flip in 1u8..) {
        let roots = TrustRoots::production();
        let good = roots.serving(Vendor::Google).next().unwrap().der();
        let mut changed = good.to_vec();
        let index = at % changed.len();
        changed[index] ^= flip;
        for der in [bytes, good[..cut.min(good.len() - 1)].to_vec(), changed] {
            let pool = [der.clone()];
            let untrusted = Untrusted { presented: &pool, pinned: &pool, crls: &pool };
            prop_assert!(x509::build(&der, &untrusted, &roots, NOW, &RULES).is_err());
            prop_assert!(x509::walk(roots.iter().next().unwrap(), &[&der], &der, &pool, NOW, &RULES).is_err());
        }
    }
}
