//! `SignCert` against what clients check: the chain, names, extensions; and everything that makes it refuse.

use dstack_attest::wire::{AppInfo, Attestation, CertificateConfig, CertificateRequest};
use dstack_attest::x509ext::CertificateEvidence;
use dstack_certificates::path;
use dstack_certificates::read::{AppCa, AppLeafCertificate, Certificate, RootCa};
use dstack_protocol::policy::AppPolicy;
use dstack_protocol::release::KeyClass;
use rcgen::SigningKey as _;
use serde_json::{Value, json};

use super::error;
use super::world::{Guest, World};
use crate::support::cluster::{APP, Cluster};
use crate::support::{run, system_now};

fn config() -> CertificateConfig {
    CertificateConfig {
        subject: "web.example.com".to_owned(),
        org_name: Some("Example".to_owned()),
        alt_names: vec!["web.example.com".to_owned(), "10.1.2.3".to_owned()],
        usage_server_auth: true,
        ..CertificateConfig::default()
    }
}

fn request(api_version: u32, (csr, signature): (Vec<u8>, Vec<u8>)) -> Value {
    json!({"api_version": api_version, "csr": hex::encode(csr), "signature": hex::encode(signature), "vm_config": ""})
}

fn versioned(guest: &Guest) -> CertificateEvidence {
    CertificateEvidence::Versioned(guest.evidence(&guest.spki()))
}

fn der(pem: &str) -> Vec<u8> {
    use base64::Engine as _;
    let text: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
    base64::engine::general_purpose::STANDARD.decode(text).unwrap()
}

fn chain(answer: &(u16, Value)) -> Vec<Vec<u8>> {
    assert_eq!(answer.0, 200, "{answer:?}");
    answer.1["certificate_chain"].as_array().unwrap().iter().map(|pem| der(pem.as_str().unwrap())).collect()
}

#[test]
fn the_chain_is_leaf_app_ca_root_and_verifies() {
    run(async {
        let w = World::new().await;
        let guest = Guest::new(&w, "guest");
        let wanted = CertificateConfig { ext_quote: true, ext_app_info: true, usage_client_auth: true, ..config() };
        let answer = w.post(1, "SignCert", &request(2, guest.csr(wanted, versioned(&guest))), &[]).await;
        let ders = chain(&answer);
        let [leaf, ca, root] = ders.as_slice() else { panic!("{} certificates", ders.len()) };
        assert_eq!(dstack_certificates::pem::certificate(root), std::fs::read_to_string(w.root()).unwrap());
        let root = RootCa::read(root).unwrap();
        let certificates = [Certificate::read(leaf).unwrap(), Certificate::read(ca).unwrap()];
        path::verify(&certificates.iter().collect::<Vec<_>>(), &root, system_now().0 / 1000).unwrap();
        assert_eq!(AppCa::read(ca).unwrap().app_id(), &APP);
        let leaf = AppLeafCertificate::read(leaf).unwrap();
        let leaf = leaf.certificate();
        assert_eq!((leaf.common_name(), leaf.organization()), ("web.example.com", Some("Example")));
        assert_eq!((leaf.dns_names(), leaf.addresses()), (&["web.example.com".to_owned()][..], &["10.1.2.3".parse().unwrap()][..]));
        assert_eq!((leaf.usages(), leaf.app_id(), leaf.usage()), ((true, true), Some(APP), Some("app:custom")));
        assert_eq!(leaf.key().spki(), guest.spki());
        // What is said of the app is what was verified; the evidence inside still verifies the key.
        let info = AppInfo::decode(leaf.extension(9).unwrap()).unwrap();
        assert_eq!((info.app_id, info.instance_id), (APP.0.to_vec(), guest.instance.clone()));
        assert_eq!(info.compose_hash, dstack_protocol::codec::sha256(&[crate::support::cluster::COMPOSE]));
        assert_ne!(info.device_id, dstack_protocol::codec::sha256(&[b""]));
        let inside = Attestation::decode(leaf.extension(8).unwrap()).unwrap();
        assert_eq!(inside.report_data, dstack_protocol::binding::ratls_certificate(&guest.spki()));

        // V1 with the legacy pair; at another node; the same app CA.
        let (quote, event_log) = guest.legacy_pair();
        let legacy = guest.csr(config(), CertificateEvidence::Legacy { quote, event_log });
        let old = chain(&w.post(3, "SignCert", &request(1, legacy), &[]).await);
        assert_eq!(old[1..], ders[1..]);
        assert!(Certificate::read(&old[0]).unwrap().extension(8).is_none());
        // Mode L is not needed for it: the class is listed.
        w.set_policy(&AppPolicy { allow_legacy: false, ..Cluster::legacy_policy() });
        let again = chain(&w.post(2, "SignCert", &request(2, guest.csr(config(), versioned(&guest))), &[]).await);
        assert_eq!(again[1..], ders[1..]);
        w.set_policy(&AppPolicy { classes: vec![KeyClass::Disk], ..Cluster::legacy_policy() });
        let refused = w.post(2, "SignCert", &request(2, guest.csr(config(), versioned(&guest))), &[]).await;
        assert!(error(&refused).1.starts_with("Boot denied: CLASS_NOT_ALLOWED"), "{refused:?}");
    });
}

#[test]
fn a_guest_measures_what_it_was_told_of_its_image_and_goes_on() {
    run(async {
        let w = World::new().await;
        // What it says itself goes into no certificate: no register ties it to an image.
        let liar = Guest::booting(&w, "liar");
        liar.measure("os-image-hash", &[7; 32]);
        let with_info = CertificateConfig { ext_app_info: true, ..config() };
        let signed = chain(&w.post(1, "SignCert", &request(2, liar.csr(with_info, versioned(&liar))), &[]).await);
        let info = AppInfo::decode(Certificate::read(&signed[0]).unwrap().extension(9).unwrap()).unwrap();
        assert_eq!(info.os_image_hash, Vec::<u8>::new());

        // Upstream's guests measure the answer's hash whatever it is, here none, and then the rest of their boot.
        let guest = Guest::booting(&w, "guest");
        let certificate = guest.under_temp_ca(&w);
        let (status, keys) = w.post(1, "GetAppKey", &json!({"api_version": 1}), &super::strs(&certificate)).await;
        assert_eq!((status, &keys["os_image_hash"]), (200, &json!("")), "{keys}");
        guest.measure("os-image-hash", &super::bytes(&keys["os_image_hash"]));
        guest.measure("key-provider", br#"{"name":"kms","id":"00"}"#);
        guest.measure("storage-fs", b"ext4");
        guest.measure("system-ready", b"");
        for api_version in [1, 2] {
            let evidence = match api_version {
                1 => {
                    let (quote, event_log) = guest.legacy_pair();
                    CertificateEvidence::Legacy { quote, event_log }
                }
                _ => versioned(&guest),
            };
            chain(&w.post(2, "SignCert", &request(api_version, guest.csr(config(), evidence)), &[]).await);
        }
        let again = w.post(3, "GetAppKey", &json!({}), &super::strs(&guest.under_temp_ca(&w))).await;
        assert_eq!(again, (200, keys));
    });
}

#[test]
fn whatever_is_wrong_with_a_csr_is_refused_in_upstreams_words() {
    run(async {
        let w = World::new().await;
        let (guest, other) = (Guest::new(&w, "guest"), Guest::new(&w, "other"));
        let good = || guest.csr(config(), versioned(&guest));
        for version in [0, 3] {
            let answer = w.post(1, "SignCert", &request(version, good()), &[]).await;
            assert_eq!(error(&answer), (400, format!("Unsupported API version: {version}").as_str()));
        }
        // Signed by another key; a confirm word for something else.
        let (csr, _) = good();
        let foreign = (csr.clone(), other.key.sign(&csr).unwrap());
        let answer = w.post(1, "SignCert", &request(2, foreign), &[]).await;
        assert!(error(&answer).1.contains("signature does not verify"), "{answer:?}");
        let mut decoded = CertificateRequest::decode(2, &csr).unwrap();
        decoded.confirm = "please sign something".to_owned();
        let csr = decoded.encode();
        let signature = guest.key.sign(&csr).unwrap();
        assert_eq!(error(&w.post(1, "SignCert", &request(2, (csr, signature)), &[]).await), (400, "Invalid confirm word"));
        // Evidence of another key; evidence that was changed; no request at all.
        let mut forged = guest.evidence(&guest.spki());
        let middle = forged.len() / 2;
        forged[middle] ^= 1;
        for evidence in [other.evidence(&other.spki()), forged] {
            let answer = w.post(1, "SignCert", &request(2, guest.csr(config(), CertificateEvidence::Versioned(evidence))), &[]).await;
            assert!(error(&answer).1.starts_with("Quote verification failed: "), "{answer:?}");
        }
        assert_eq!(w.post(1, "SignCert", &request(2, (vec![1, 2, 3], vec![])), &[]).await.0, 400);
        // Names that would print as something else.
        let lines = |text: &str| CertificateConfig { org_name: Some(text.to_owned()), ..config() };
        for wanted in [CertificateConfig { subject: "a\nCN=b".to_owned(), ..config() }, lines("a\r\nb"), lines("\u{7f}")] {
            let answer = w.post(1, "SignCert", &request(2, guest.csr(wanted, versioned(&guest))), &[]).await;
            assert!(answer.0 == 400 && error(&answer).1.contains("no control characters"), "{answer:?}");
        }
        // Names of nodes, spelled otherwise too.
        for name in ["kms-1.test", "KMS-2.TEST", "kms-3.test.", "*.test", "127.0.0.1"] {
            let wanted = CertificateConfig { alt_names: vec![name.to_owned()], ..config() };
            let answer = w.post(1, "SignCert", &request(2, guest.csr(wanted, versioned(&guest))), &[]).await;
            assert!(answer.0 == 400 && error(&answer).1.contains("is a node's"), "{name}: {answer:?}");
        }
    });
}
