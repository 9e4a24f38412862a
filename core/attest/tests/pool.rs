//! What may be pinned for platforms other than TDX: certificates that end at a root, lists that their issuer signed, all in their time.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use base64::{Engine, engine::general_purpose::STANDARD};
use dstack_attest::{AttestError, PoolFinding, PoolPart, TrustRoots, X509Pool};
use dstack_protocol::UnixMillis;

const ARK: &[u8] = include_bytes!("snp/ark.der");
const ASK: &[u8] = include_bytes!("snp/ask.der");
const ASVK: &[u8] = include_bytes!("snp/asvk.der");
const VCEK: &[u8] = include_bytes!("snp/vcek.der");
const VLEK: &[u8] = include_bytes!("snp/vlek.der");
const CRL: &[u8] = include_bytes!("snp/crl-none.der");

/// 2026-06-01.
const NOW: UnixMillis = UnixMillis(1_780_272_000_000);
/// The second after the list's next update.
const AFTER_CRL: UnixMillis = UnixMillis(1_798_761_601_000);
/// 2036: every certificate is over.
const AFTER_ALL: UnixMillis = UnixMillis(2_082_758_400_000);

fn pool(certificates: &[&[u8]], crls: &[&[u8]]) -> X509Pool {
    let owned = |ders: &[&[u8]]| ders.iter().map(|der| der.to_vec()).collect();
    X509Pool::new(owned(certificates), owned(crls)).unwrap()
}

fn roots() -> TrustRoots {
    TrustRoots::none().with_software_root(ARK).unwrap()
}

fn found(pool: &X509Pool, now: UnixMillis) -> Vec<PoolFinding> {
    pool.check(now, &roots())
}

#[test]
fn a_pool_that_ends_at_known_roots_has_no_finding() {
    let whole = pool(&[ARK, ASK, ASVK, VCEK, VLEK], &[CRL]);
    assert_eq!(found(&whole, NOW), []);
    assert_eq!(found(&pool(&[ASK], &[]), NOW), []);
    assert_eq!(found(&pool(&[], &[CRL]), NOW), [], "signed by a root that the pool need not hold");
    assert_eq!(found(&X509Pool::default(), NOW), []);
}

#[test]
fn each_item_that_may_not_be_pinned_is_named_with_its_reason() {
    let orphan = found(&pool(&[VCEK], &[]), NOW);
    assert_eq!((orphan.len(), orphan[0].part, orphan[0].name.as_str()), (1, PoolPart::Certificate, "CN=SEV-VCEK"));
    assert!(matches!(&orphan[0].error, AttestError::IssuerUnknown { issuer, .. } if issuer.contains("SEV-Milan")), "{}", orphan[0]);

    let strange = pool(&[ARK, ASK, VCEK], &[CRL]).check(NOW, &TrustRoots::production());
    assert_eq!(strange.len(), 4, "under other roots nothing of it holds, its own root included");
    assert!(strange.iter().any(|one| one.part == PoolPart::List && matches!(one.error, AttestError::IssuerUnknown { .. })));

    let mut forged = ASK.to_vec();
    *forged.last_mut().unwrap() ^= 1;
    let forged = found(&pool(&[&forged, VCEK], &[]), NOW);
    assert_eq!(forged.len(), 2, "what hangs below it falls with it");
    assert!(forged.iter().any(|one| matches!(one.error, AttestError::ChainSignature { .. })));

    // A leaf that names itself the issuer of another is no CA.
    let mut list = CRL.to_vec();
    *list.last_mut().unwrap() ^= 1;
    let list = found(&pool(&[ASK], &[&list]), NOW);
    assert!(matches!(list[..], [PoolFinding { part: PoolPart::List, error: AttestError::ChainSignature { .. }, .. }]), "{list:?}");

    for (der, part) in [(pool(&[&[0x30, 1, 2]], &[]), PoolPart::Certificate), (pool(&[], &[&[0x30, 1, 2]]), PoolPart::List)] {
        let one = found(&der, NOW);
        assert!(matches!(one[..], [PoolFinding { error: AttestError::Malformed { .. }, .. }]) && one[0].part == part, "{one:?}");
    }
}

#[test]
fn what_is_over_is_found_and_pruned() {
    let whole = pool(&[ASK, VCEK], &[CRL]);
    let late = found(&whole, AFTER_CRL);
    assert!(matches!(late[..], [PoolFinding { part: PoolPart::List, error: AttestError::CollateralExpired { .. }, .. }]), "{late:?}");
    assert_eq!(whole.pruned(AFTER_CRL), pool(&[ASK, VCEK], &[]));
    assert_eq!(found(&whole.pruned(AFTER_CRL), AFTER_CRL), []);
    let over = found(&whole, AFTER_ALL);
    assert_eq!(over.iter().filter(|one| matches!(one.error, AttestError::CertExpired { .. })).count(), 2, "{over:?}");
    assert_eq!(whole.pruned(AFTER_ALL), X509Pool::default());
    let early = found(&whole, UnixMillis(1_000_000_000_000));
    assert!(early.iter().all(|one| matches!(one.error, AttestError::NotYetValid { .. })) && early.len() == 3, "{early:?}");
    assert_eq!(whole.pruned(NOW), whole);
}

#[test]
fn a_later_list_of_the_same_issuer_replaces_one_that_still_holds() {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(rcgen::DnType::CommonName, "software vendor");
    let root = params.self_signed(&key).unwrap().der().to_vec();
    let issuer = rcgen::Issuer::new(params, key);
    let list = |day: u8| {
        let params = rcgen::CertificateRevocationListParams {
            this_update: rcgen::date_time_ymd(2026, 5, day),
            next_update: rcgen::date_time_ymd(2026, 7, day),
            crl_number: rcgen::SerialNumber::from(u64::from(day)),
            issuing_distribution_point: None,
            revoked_certs: Vec::new(),
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        params.signed_by(&issuer).unwrap().der().to_vec()
    };
    let (first, second) = (list(1), list(2));
    let both = pool(&[], &[&first, &second]);
    let trusted = TrustRoots::none().with_software_root(&root).unwrap();
    assert_eq!(both.check(NOW, &trusted), []);
    assert_eq!(both.pruned(NOW), pool(&[], &[&second]));
    assert_eq!(pool(&[], &[&first]).lost_in(&pool(&[], &[&second]), NOW), None);
    assert!(pool(&[], &[&second]).lost_in(&pool(&[], &[&first]), NOW).is_some(), "an older list replaces none");
    assert!(pool(&[], &[&first]).lost_in(&pool(&[], &[CRL]), NOW).is_some(), "nor does another issuer's");
}

/// AMD's own certificates as its service gave them, among the published vectors.
#[test]
fn real_certificates_of_amd_end_at_its_roots() {
    let Some(vectors) = common::vectors() else { return };
    let mut seen = 0;
    // Those with a slash are forged out of the others.
    for vector in vectors.of("sev-snp").filter(|vector| !vector["id"].as_str().unwrap().contains('/')) {
        let text = String::from_utf8(vectors.file(vector, "ca_chain")).unwrap();
        let blocks = text.split("-----BEGIN CERTIFICATE-----").skip(1).map(|block| {
            let body = block.split("-----END").next().unwrap();
            STANDARD.decode(body.split_ascii_whitespace().collect::<String>()).unwrap()
        });
        let certificates: Vec<Vec<u8>> = blocks.chain([vectors.file(vector, "vek")]).collect();
        let real = X509Pool::new(certificates, Vec::new()).unwrap();
        let now = UnixMillis(common::millis(vector["valid_at"].as_str().unwrap()));
        assert_eq!(real.check(now, &TrustRoots::production()), [], "{}", vector["id"]);
        seen += 1;
    }
    assert!(seen >= 2, "{seen} chains");
}
