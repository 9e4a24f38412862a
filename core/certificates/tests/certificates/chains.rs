//! Chains before three judges: what is right for all, what is wrong for each.

use dstack_certificates::CertificateError;
use dstack_certificates::leaf::{AppLeaf, ServerLeaf};
use dstack_certificates::path;
use dstack_certificates::read::{AppLeafCertificate, Certificate, KmsServer, RootCa};
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyUsagePurpose, SanType};

use crate::support::{APP, NOW_S, Root, Wants, key, openssl, webpki};

fn strings(hosts: &[&str]) -> Vec<String> {
    hosts.iter().map(|host| (*host).to_owned()).collect()
}

/// What each judge says: ours, openssl, webpki.
fn judges(chain: &[&[u8]], root: &RootCa, wants: Wants<'_>, now_s: u64) -> [Result<(), String>; 3] {
    let read: Vec<Certificate> = chain.iter().map(|der| Certificate::read(der).unwrap()).collect();
    let ours = path::verify(&read.iter().collect::<Vec<_>>(), root, now_s).map_err(|error| error.to_string());
    let whole: Vec<&[u8]> = chain.iter().copied().chain([root.certificate().der()]).collect();
    [ours, openssl(&whole, wants, now_s), webpki(&whole, wants, now_s)]
}

#[track_caller]
fn all_accept(chain: &[&[u8]], root: &RootCa, wants: Wants<'_>, now_s: u64) {
    assert_eq!(judges(chain, root, wants, now_s), [const { Ok(()) }; 3]);
}

#[track_caller]
fn all_refuse(chain: &[&[u8]], root: &RootCa, wants: Wants<'_>, now_s: u64) {
    let said = judges(chain, root, wants, now_s);
    assert!(said.iter().all(Result::is_err), "{said:?}");
}

fn server(root: &Root, ca_hosts: &[&str], hosts: &[&str]) -> Result<(Vec<u8>, Vec<u8>), CertificateError> {
    let ca = root.issuing_ca(ca_hosts);
    let hosts = strings(hosts);
    let leaf = ServerLeaf { key: key(9).public(), hosts: &hosts, attestation: None, serial: [0xff; 16] }.issue(&ca, &key(3))?;
    Ok((leaf, ca.certificate().der().to_vec()))
}

/// The lists are leaked: a test may replace any of them by a shorter-lived one.
fn app_leaf<'a>(root: &Root, change: impl FnOnce(&mut AppLeaf<'a>)) -> Result<Vec<u8>, CertificateError> {
    let alt_names: &'static [String] = Box::leak(strings(&["web.example", "10.1.2.3"]).into_boxed_slice());
    let reserved: &'static [String] = Box::leak(strings(&["kms.example", "10.0.0.1", "2001:db8::7"]).into_boxed_slice());
    let public: &'static dstack_certificates::PublicKey = Box::leak(Box::new(*key(10).public()));
    let mut leaf: AppLeaf<'a> = AppLeaf {
        app_id: &APP,
        key: public,
        subject: "web.example",
        organization: Some("Acme"),
        alt_names,
        server_auth: true,
        client_auth: true,
        attestation: Some(b"attestation"),
        app_info: Some(b"info"),
        not_before_s: None,
        not_after_s: None,
        now_s: NOW_S + 1000,
        serial: [0; 16],
        reserved_hosts: reserved,
    };
    change(&mut leaf);
    leaf.issue(&root.app_ca(), &key(2))
}

#[test]
fn servers_of_a_node_are_trusted_under_the_root() {
    for root in Root::both() {
        let anchor = root.root_ca();
        let (leaf, ca) = server(&root, &["10.0.0.1", "::1", "kms.example"], &["kms.example", "10.0.0.1", "::1"]).unwrap();
        for host in ["kms.example", "10.0.0.1", "::1"] {
            all_accept(&[&leaf, &ca], &anchor, Wants::Server(host), NOW_S);
        }
        let read = KmsServer::read(&leaf).unwrap();
        assert_eq!(read.hosts(), ["kms.example", "10.0.0.1", "::1"]);
        assert_eq!(read.certificate().usages(), (true, false));
        assert_eq!(read.certificate().extension(8), None);
        // Seven days, the hour before included; then no more.
        let (begin, end) = read.certificate().validity_s();
        assert_eq!((begin, end), (NOW_S - 3600, NOW_S - 3600 + 7 * 86_400));
        all_accept(&[&leaf, &ca], &anchor, Wants::Server("kms.example"), begin);
        all_accept(&[&leaf, &ca], &anchor, Wants::Server("kms.example"), end - 1);
        all_refuse(&[&leaf, &ca], &anchor, Wants::Server("kms.example"), end + 1);
        all_refuse(&[&leaf, &ca], &anchor, Wants::Server("kms.example"), begin - 1);
        // Without its CA, under another root, with the wrong CA.
        all_refuse(&[&leaf], &anchor, Wants::Server("kms.example"), NOW_S);
        let [ed25519, p256] = Root::both();
        let other = if matches!(root, Root::P256(_)) { ed25519 } else { p256 };
        all_refuse(&[&leaf, &ca], &other.root_ca(), Wants::Server("kms.example"), NOW_S);
        all_refuse(&[&leaf, root.app_ca().certificate().der()], &anchor, Wants::Server("kms.example"), NOW_S);
    }
}

/// A leaf that our own code would not make, under the CA whose key is `key(by)`.
fn rogue(ca: &Certificate, by: u8, change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
    let mut issuer = CertificateParams::default();
    issuer.distinguished_name = rcgen::DistinguishedName::new();
    issuer.distinguished_name.push(DnType::CommonName, ca.common_name());
    issuer.distinguished_name.push(DnType::OrganizationName, ca.organization().unwrap());
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "leaf");
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.not_before = rcgen::date_time_ymd(2027, 1, 1);
    params.not_after = rcgen::date_time_ymd(2028, 1, 1);
    change(&mut params);
    params.signed_by(key(9).public(), &Issuer::from_params(&issuer, key(by))).unwrap().der().to_vec()
}

#[test]
fn a_nodes_ca_names_its_own_hosts_and_no_others() {
    for root in Root::both() {
        let anchor = root.root_ca();
        assert!(matches!(server(&root, &["kms.example"], &["other.example"]), Err(CertificateError::Field { field: "hosts", .. })));
        assert!(matches!(server(&root, &["kms.example"], &[]), Err(CertificateError::Field { field: "hosts", .. })));
        // Its node's key falls to someone who signs what it likes.
        let dns = |name: &str| SanType::DnsName(name.try_into().unwrap());
        let ip = |text: &str| SanType::IpAddress(text.parse().unwrap());
        let names_only = root.issuing_ca(&["kms.example"]);
        let addresses_only = root.issuing_ca(&["10.0.0.1"]);
        let six_only = root.issuing_ca(&["::1"]);
        for (ca, name, host, fine) in [
            (&names_only, dns("kms.example"), "kms.example", true),
            (&names_only, dns("a.kms.example"), "a.kms.example", true),
            (&names_only, dns("other.example"), "other.example", false),
            (&names_only, dns("badkms.example"), "badkms.example", false),
            (&names_only, ip("10.0.0.1"), "10.0.0.1", false),
            (&names_only, ip("::1"), "::1", false),
            (&addresses_only, ip("10.0.0.1"), "10.0.0.1", true),
            (&addresses_only, ip("10.0.0.2"), "10.0.0.2", false),
            (&addresses_only, ip("::1"), "::1", false),
            (&addresses_only, dns("kms.example"), "kms.example", false),
            (&six_only, ip("::1"), "::1", true),
            (&six_only, ip("::2"), "::2", false),
            (&six_only, ip("10.0.0.1"), "10.0.0.1", false),
            (&six_only, dns("kms.example"), "kms.example", false),
        ] {
            let leaf = rogue(ca.certificate(), 3, |params| params.subject_alt_names = vec![name]);
            let chain = [leaf.as_slice(), ca.certificate().der()];
            if fine {
                all_accept(&chain, &anchor, Wants::Server(host), NOW_S);
            } else {
                all_refuse(&chain, &anchor, Wants::Server(host), NOW_S);
            }
        }
    }
}

#[test]
fn no_ca_grows_below_a_nodes_or_an_apps() {
    for root in Root::both() {
        let anchor = root.root_ca();
        for (ca, by) in [(root.issuing_ca(&["kms.example"]).certificate().clone(), 3), (root.app_ca().certificate().clone(), 2)] {
            let below = rogue(&ca, by, |params| {
                params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
                params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
                params.extended_key_usages.clear();
                params.distinguished_name.push(DnType::OrganizationName, "x");
            });
            let below_read = Certificate::read(&below).unwrap();
            let leaf = rogue(&below_read, 9, |params| params.subject_alt_names = vec![SanType::DnsName("kms.example".try_into().unwrap())]);
            all_refuse(&[&leaf, &below, ca.der()], &anchor, Wants::Server("kms.example"), NOW_S);
        }
        // A leaf is no CA.
        let (leaf, ca) = server(&root, &["kms.example"], &["kms.example"]).unwrap();
        let leaf_read = Certificate::read(&leaf).unwrap();
        assert_eq!(leaf_read.ca(), None);
        let names = |params: &mut CertificateParams| params.subject_alt_names = vec![SanType::DnsName("kms.example".try_into().unwrap())];
        let mut issuer = CertificateParams::default();
        issuer.distinguished_name = rcgen::DistinguishedName::new();
        issuer.distinguished_name.push(DnType::CommonName, "kms.example");
        let mut params = CertificateParams::default();
        names(&mut params);
        params.use_authority_key_identifier_extension = true;
        let below = params.signed_by(key(8).public(), &Issuer::from_params(&issuer, key(9))).unwrap();
        all_refuse(&[below.der(), &leaf, &ca], &anchor, Wants::Server("kms.example"), NOW_S);
    }
}

#[test]
fn leaves_of_an_app_hang_under_its_own_ca() {
    for root in Root::both() {
        let anchor = root.root_ca();
        let ca = root.app_ca();
        let leaf = app_leaf(&root, |_| {}).unwrap();
        for wants in [Wants::Server("web.example"), Wants::Server("10.1.2.3"), Wants::Client] {
            all_accept(&[&leaf, ca.certificate().der()], &anchor, wants, NOW_S);
        }
        let read = AppLeafCertificate::read(&leaf).unwrap();
        let certificate = read.certificate();
        assert_eq!((read.app_id(), certificate.usage()), (&APP, Some("app:custom")));
        assert_eq!((certificate.extension(8), certificate.extension(9)), (Some(&b"attestation"[..]), Some(&b"info"[..])));
        assert_eq!((certificate.common_name(), certificate.organization()), ("web.example", Some("Acme")));
        assert_eq!(certificate.validity_s(), (NOW_S + 1000 - 3600, NOW_S + 1000 + 3650 * 86_400));
        assert_eq!(certificate.key_ids().1, ca.certificate().key_ids().0);
        // No usage that was not asked for.
        let plain = app_leaf(&root, |leaf| (leaf.server_auth, leaf.client_auth, leaf.attestation) = (false, false, None)).unwrap();
        let plain = AppLeafCertificate::read(&plain).unwrap();
        assert_eq!((plain.certificate().usages(), plain.certificate().extension(8)), ((false, false), None));
        let serving = app_leaf(&root, |leaf| leaf.client_auth = false).unwrap();
        let said = judges(&[&serving, ca.certificate().der()], &anchor, Wants::Client, NOW_S);
        assert!(said[1].is_err() && said[2].is_err(), "{said:?}");
        assert!(KmsServer::read(&leaf).is_err() && AppLeafCertificate::read(&server(&root, &["a"], &["a"]).unwrap().0).is_err());
    }
}

#[test]
fn an_app_asks_for_what_it_may_have() {
    let root = &Root::both()[0];
    let reserved = ["kms.example", "KMS.example", "kms.example.", "*.example", "k*.example", "*ms.EXAMPLE.", "10.0.0.1", "::ffff:10.0.0.1"];
    let spelled_otherwise = ["2001:db8::7", "2001:DB8::7", "2001:db8:0:0::7", "2001:0db8:0000:0000:0000:0000:0000:0007"];
    for name in reserved.into_iter().chain(spelled_otherwise) {
        let names = strings(&["fine.example", name]);
        let got = app_leaf(root, |leaf| leaf.alt_names = &names);
        assert_eq!(got, Err(CertificateError::ReservedHost(name.to_owned())));
        // A client that finds no alternative name reads the common name.
        let got = app_leaf(root, |leaf| (leaf.subject, leaf.alt_names) = (name, &[]));
        assert_eq!(got, Err(CertificateError::ReservedHost(name.to_owned())));
    }
    for name in ["kms.example\0.other", "a\nb", "\u{7f}"] {
        let names = strings(&[name]);
        assert!(matches!(app_leaf(root, |leaf| leaf.alt_names = &names), Err(CertificateError::Field { field: "names", .. })), "{name:?}");
    }
    let names = strings(&["a.kms.example", "*.kms.example", "*.other", "*.*.example", "kms.example.com", "2001:db8::8", "*"]);
    assert!(app_leaf(root, |leaf| leaf.alt_names = &names).is_ok());
    let other = dstack_protocol::AppId([9; 20]);
    assert!(matches!(app_leaf(root, |leaf| leaf.app_id = &other), Err(CertificateError::Field { field: "app id", .. })));
    let dates = |begin, end| app_leaf(root, |leaf| (leaf.not_before_s, leaf.not_after_s) = (Some(begin), Some(end)));
    let read = |der: Vec<u8>| Certificate::read(&der).unwrap().validity_s();
    assert_eq!(dates(NOW_S, NOW_S + 60).map(read), Ok((NOW_S, NOW_S + 60)));
    let (ca_begin, ca_end) = root.app_ca().certificate().validity_s();
    assert_eq!(dates(0, u64::MAX).map(read), Ok((ca_begin, ca_end)), "cut to those of the CA");
    assert!(matches!(dates(NOW_S + 60, NOW_S), Err(CertificateError::Field { field: "not_after", .. })));
    let unicode = strings(&["bücher.example"]);
    assert!(matches!(app_leaf(root, |leaf| leaf.alt_names = &unicode), Err(CertificateError::Build(_))));
}

#[test]
fn a_key_that_is_not_the_cas_signs_nothing() {
    let root = &Root::both()[0];
    let hosts = strings(&["kms.example"]);
    let server = key(9);
    let leaf = ServerLeaf { key: server.public(), hosts: &hosts, attestation: Some(b"evidence"), serial: [1; 16] };
    let ca = root.issuing_ca(&["kms.example"]);
    assert!(matches!(leaf.issue(&ca, &key(4)), Err(CertificateError::BadSignature { .. })));
    let with_evidence = leaf.issue(&ca, &key(3)).unwrap();
    assert_eq!(Certificate::read(&with_evidence).unwrap().extension(8), Some(&b"evidence"[..]));
}
