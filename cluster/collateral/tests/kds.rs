//! AMD's key service and what certificates point at, against a server that answers rightly, fails and lies.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use base64::Engine as _;
use dstack_attest::snp::{Product, Tcb, claimed_chip};
use dstack_attest::{TrustRoots, X509Pool};
use dstack_collateral::{Endpoint, FetchError, Http, Kds, KeyOf, Limits, LinkHosts, PoolSources, follow, gather};
use dstack_protocol::UnixMillis;
use dstack_protocol::collateral::{Want, Wants};
use dstack_testkit::pccs::{Fault, Pccs};

/// A self-made AMD hierarchy: `core/attest/tests/snp`.
const ARK: &[u8] = include_bytes!("../../../core/attest/tests/snp/ark.der");
const ASK: &[u8] = include_bytes!("../../../core/attest/tests/snp/ask.der");
const ASVK: &[u8] = include_bytes!("../../../core/attest/tests/snp/asvk.der");
const VCEK: &[u8] = include_bytes!("../../../core/attest/tests/snp/vcek.der");
const CRL: &[u8] = include_bytes!("../../../core/attest/tests/snp/crl-none.der");
/// 2026-06-01.
const NOW: UnixMillis = UnixMillis(1_780_272_000_000);
const CHIP: [u8; 64] = [9; 64];
const RAW_TCB: [u8; 8] = [4, 0, 0, 0, 0, 0, 0x18, 0xd5];
const DER: &str = "application/pkix-cert";

fn roots() -> TrustRoots {
    TrustRoots::none().with_software_root(ARK).unwrap()
}

fn pem(ders: &[&[u8]]) -> Vec<u8> {
    let block = |der: &&[u8]| {
        let text = base64::engine::general_purpose::STANDARD.encode(der);
        format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n")
    };
    ders.iter().map(block).collect::<String>().into_bytes()
}

/// A server as AMD's, at its documented paths.
fn amd() -> Pccs {
    let server = Pccs::start(0).unwrap();
    let chip = hex::encode(CHIP);
    server.put(&format!("/vcek/v1/Milan/{chip}?blSPL=04&teeSPL=00&snpSPL=24&ucodeSPL=213"), DER, VCEK);
    for (folder, issuer) in [("vcek", ASK), ("vlek", ASVK)] {
        server.put(&format!("/{folder}/v1/Milan/cert_chain"), "application/x-pem-file", &pem(&[issuer, ARK]));
        server.put(&format!("/{folder}/v1/Milan/crl"), "application/pkix-crl", CRL);
    }
    server
}

fn http() -> Http {
    let ms = Duration::from_millis;
    Http::new(Limits { connect: ms(500), read: ms(500), total: ms(1500), body_bytes: 64 * 1024 })
}

fn kds(url: &str) -> Kds {
    Kds::new(http(), Endpoint::parse(url).unwrap())
}

fn sources(servers: &[&str]) -> PoolSources {
    PoolSources {
        kds: servers.iter().map(|url| kds(url)).collect(),
        http: http(),
        hosts: LinkHosts::new(&["127.0.0.1".to_owned()]).unwrap(),
    }
}

fn wants(wants: &[Want]) -> Wants {
    Wants(wants.iter().cloned().collect::<BTreeSet<_>>())
}

fn pool(certificates: &[&[u8]], crls: &[&[u8]]) -> X509Pool {
    let owned = |ders: &[&[u8]]| ders.iter().map(|der| der.to_vec()).collect();
    X509Pool::new(owned(certificates), owned(crls)).unwrap()
}

#[test]
fn a_chips_certificate_and_both_chains_come_from_the_documented_paths() {
    let server = amd();
    let client = kds(&server.url());
    let tcb = Tcb::of(RAW_TCB, Product::Milan).unwrap();
    assert_eq!(client.vcek(Product::Milan, &CHIP, tcb).unwrap(), VCEK);
    assert_eq!(client.product("Milan", KeyOf::Chip).unwrap(), pool(&[ASK, ARK], &[CRL]));
    assert_eq!(client.product("Milan", KeyOf::Cloud).unwrap(), pool(&[ASVK, ARK], &[CRL]));
    assert!(matches!(client.product("../Milan", KeyOf::Chip), Err(FetchError::Endpoint { .. })));
    assert!(matches!(client.product("Genoa", KeyOf::Chip), Err(FetchError::Status { status: 404, .. })));
    // Turin: eight bytes of id, and the FMC's version first.
    let mut short = [0; 64];
    short[..8].fill(7);
    let turin = Tcb { fmc: Some(1), boot_loader: 2, tee: 3, snp: 4, microcode: 9 };
    server.put("/vcek/v1/Turin/0707070707070707?fmcSPL=01&blSPL=02&teeSPL=03&snpSPL=04&ucodeSPL=09", DER, VCEK);
    assert_eq!(client.vcek(Product::Turin, &short, turin).unwrap(), VCEK);
}

#[test]
fn every_fault_is_a_typed_refusal_and_soon() {
    type Expected = (Fault, fn(&FetchError) -> bool);
    let expect: Vec<Expected> = vec![
        (Fault::Status(429), |error| matches!(error, FetchError::Status { status: 429, .. })),
        (Fault::Slow(Duration::from_secs(4)), |error| matches!(error, FetchError::Timeout { .. })),
        (Fault::Oversized(65 * 1024), |error| matches!(error, FetchError::TooLarge { limit_bytes: 65_536, .. })),
        (Fault::Redirect("http://169.254.169.254/latest".into()), |error| matches!(error, FetchError::Redirect { .. })),
        (Fault::WrongType, |error| matches!(error, FetchError::Content { .. })),
        (Fault::Encoded, |error| matches!(error, FetchError::Content { .. })),
        (Fault::Truncated, |error| matches!(error, FetchError::Unreachable { .. })),
        (Fault::Garbage, |error| matches!(error, FetchError::Content { .. })),
    ];
    let server = amd();
    server.put("/ca.crl", "application/pkix-crl", CRL);
    let (client, tcb) = (kds(&server.url()), Tcb::of(RAW_TCB, Product::Milan).unwrap());
    let hosts = LinkHosts::new(&["127.0.0.1".to_owned()]).unwrap();
    for (fault, is_right) in expect {
        server.fault(fault.clone());
        let began = Instant::now();
        let linked = follow(&http(), &hosts, &[], &[format!("{}/ca.crl", server.url())]);
        assert!(linked.0.is_empty(), "{fault:?}");
        let refusals =
            [client.vcek(Product::Milan, &CHIP, tcb).unwrap_err(), client.product("Milan", KeyOf::Chip).unwrap_err(), linked.1[0].clone()];
        for error in refusals {
            assert!(is_right(&error), "{fault:?}: {error}");
        }
        assert!(began.elapsed() < Duration::from_secs(7), "{fault:?}");
    }
}

#[test]
fn what_evidence_lacked_is_gathered_whole() {
    let server = amd();
    let url = server.url();
    let chip = wants(&[Want::Chip { id: CHIP, tcb: RAW_TCB }]);
    let got = gather(&X509Pool::default(), &chip, false, &sources(&["http://127.0.0.1:1", &url]), &roots(), NOW);
    assert_eq!(got.pool, pool(&[ARK, ASK, VCEK], &[CRL]));
    assert_eq!((got.unanswered, got.pool.check(NOW, &roots())), (0, Vec::new()));
    assert!(got.failures.iter().any(|error| matches!(error, FetchError::Unreachable { .. })), "the dead endpoint is told");

    let cloud = wants(&[Want::Product { name: "Milan".to_owned(), vlek: true }]);
    let got = gather(&pool(&[ARK], &[CRL]), &cloud, false, &sources(&[&url]), &roots(), NOW);
    assert_eq!(got.pool, pool(&[ASVK], &[]), "only what is new");

    // Another chip: nobody has it, and it counts as unanswered.
    let other = gather(&X509Pool::default(), &wants(&[Want::Chip { id: [8; 64], tcb: RAW_TCB }]), false, &sources(&[&url]), &roots(), NOW);
    assert!(
        other.pool.is_empty()
            && other.unanswered == 1
            && other.failures.iter().all(|e| matches!(e, FetchError::Status { status: 404, .. }))
    );

    // Renewal asks for the lists of what is there.
    let asked = server.requests();
    let again = gather(&pool(&[ARK, ASK, VCEK], &[]), &Wants::default(), true, &sources(&[&url]), &roots(), NOW);
    assert_eq!(again.pool, pool(&[], &[CRL]));
    assert!(server.requests() > asked);
}

#[test]
fn one_chip_gets_so_many_certificates_and_no_more() {
    let mut names = rcgen::DistinguishedName::new();
    names.push(rcgen::DnType::CommonName, "SEV-VCEK");
    let of_chip = |serial: u64| {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = names.clone();
        params.serial_number = Some(rcgen::SerialNumber::from(serial));
        params.custom_extensions = vec![rcgen::CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 3704, 1, 4], CHIP.to_vec())];
        params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().der().to_vec()
    };
    let held: Vec<Vec<u8>> = (1..=4).map(of_chip).collect();
    assert!(held.iter().all(|der| claimed_chip(der) == Some(CHIP)));
    assert_eq!((claimed_chip(VCEK), claimed_chip(ASK), claimed_chip(b"no certificate")), (Some(CHIP), None, None));
    let server = amd();
    let wanted = wants(&[Want::Chip { id: CHIP, tcb: RAW_TCB }]);
    let ask = |count: usize| {
        let current = X509Pool::new(held[..count].to_vec(), Vec::new()).unwrap();
        gather(&current, &wanted, false, &sources(&[&server.url()]), &roots(), NOW)
    };
    assert!(ask(3).pool.certificates.contains(&VCEK.to_vec()));
    let asked = server.requests();
    let full = ask(4);
    assert!(
        full.pool.is_empty() && matches!(&full.failures[..], [FetchError::Item(why), ..] if why.contains("0909090909090909")),
        "{full:?}"
    );
    assert_eq!(server.requests(), asked, "nobody was asked");
}

#[test]
fn what_may_not_be_pinned_is_not_given_on() {
    let server = amd();
    let chip = wants(&[Want::Chip { id: CHIP, tcb: RAW_TCB }]);
    let strange = gather(&X509Pool::default(), &chip, false, &sources(&[&server.url()]), &TrustRoots::production(), NOW);
    assert!(strange.pool.is_empty(), "its root is not trusted");
    assert!(strange.failures.iter().any(|error| matches!(error, FetchError::Item(_))));

    let late = UnixMillis(1_798_761_601_000);
    let over = gather(&X509Pool::default(), &chip, false, &sources(&[&server.url()]), &roots(), late);
    assert!(over.pool.crls.is_empty() && over.unanswered == 1, "a list that is over");

    // A liar before an honest one is passed over.
    let liar = amd();
    let mut forged = ASK.to_vec();
    *forged.last_mut().unwrap() ^= 1;
    liar.put("/vcek/v1/Milan/cert_chain", "application/x-pem-file", &pem(&[&forged, ARK]));
    let got = gather(&X509Pool::default(), &chip, false, &sources(&[&liar.url(), &server.url()]), &roots(), NOW);
    assert_eq!(got.pool, pool(&[ARK, ASK, VCEK], &[CRL]));
}

/// A CA under a root of ours whose certificate names where its issuer and its list are.
#[test]
fn links_of_certificates_are_followed_to_named_hosts_only() {
    let server = Pccs::start(0).unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(rcgen::DnType::CommonName, "vendor root");
    let key = rcgen::KeyPair::generate().unwrap();
    let root = params.self_signed(&key).unwrap().der().to_vec();
    let issuer = rcgen::Issuer::new(params.clone(), key);
    let list = rcgen::CertificateRevocationListParams {
        this_update: rcgen::date_time_ymd(2026, 5, 1),
        next_update: rcgen::date_time_ymd(2026, 7, 1),
        crl_number: rcgen::SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: Vec::new(),
        key_identifier_method: rcgen::KeyIdMethod::Sha256,
    };
    let list = list.signed_by(&issuer).unwrap().der().to_vec();
    params.distinguished_name.push(rcgen::DnType::CommonName, "vendor intermediate");
    params.crl_distribution_points = vec![rcgen::CrlDistributionPoint { uris: vec![format!("{}/root.crl", server.url())] }];
    let middle = params.signed_by(&rcgen::KeyPair::generate().unwrap(), &issuer).unwrap().der().to_vec();
    server.put("/middle.crt", "application/pkix-cert", &middle);
    server.put("/root.crl", "application/pkix-crl", &list);
    // Addresses need not tell what they lead to; vendors' do not always.
    server.put("/lists/1", "application/octet-stream", &list);
    server.put("/neither", "application/octet-stream", b"\x30\x03\x02\x01\x01");

    let trusted = TrustRoots::none().with_software_root(&root).unwrap();
    let link = wants(&[Want::Link(format!("{}/middle.crt", server.url()))]);
    let got = gather(&X509Pool::default(), &link, false, &sources(&[]), &trusted, NOW);
    assert_eq!(got.pool, pool(&[&middle], &[&list]), "{:?}", got.failures);

    let by_content = wants(&["lists/1", "neither"].map(|path| Want::Link(format!("{}/{path}", server.url()))));
    let got = gather(&X509Pool::default(), &by_content, false, &sources(&[]), &trusted, NOW);
    assert_eq!(got.pool, pool(&[], &[&list]));
    assert!(matches!(&got.failures[..], [FetchError::Content { url, .. }] if url.ends_with("/neither")), "{:?}", got.failures);

    let asked = server.requests();
    let elsewhere = PoolSources { hosts: LinkHosts::new(&["pki.test".to_owned()]).unwrap(), ..sources(&[]) };
    let refused = gather(&X509Pool::default(), &link, false, &elsewhere, &trusted, NOW);
    assert!(refused.pool.is_empty() && matches!(refused.failures[..], [FetchError::Endpoint { .. }]), "{:?}", refused.failures);
    // A name that is public by its form and leads inside, where any host may be named.
    let inside = follow(&http(), &LinkHosts::any(), &[], &[format!("{}/middle.crt", server.url())]);
    assert!(
        inside.0.is_empty() && matches!(inside.1[..], [FetchError::Forbidden { .. } | FetchError::Unreachable { .. }]),
        "{:?}",
        inside.1
    );
    assert_eq!(server.requests(), asked, "nobody was asked");
    for bad in ["", "a/b", "user@host"] {
        assert!(LinkHosts::new(&[bad.to_owned()]).is_err(), "{bad}");
    }
}
