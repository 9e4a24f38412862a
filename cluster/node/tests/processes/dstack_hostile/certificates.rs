//! Requests for certificates that lie, in both versions, and client certificates whose time is not now or whose key is not theirs. Owns: the
//! lies, and upstream's words for each. Source: KMS API reference §2, §7; threshold.md §5.2.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use dstack_attest::wire::{Attestation, CONFIRM, CertificateConfig, CertificateRequest, PlatformEvidence, TdxEvent};
use dstack_attest::x509ext::{CertificateEvidence, wrap};
use dstack_certificates::PublicKey;
use dstack_certificates::read::{AppCa, AppLeafCertificate};
use dstack_certificates::temp::{TempCa, temp_ca};
use dstack_protocol::{AppId, ClusterId, binding};
use dstack_testkit::cluster::MachineKind;
use dstack_testkit::raw_http::Asking;
use dstack_testkit::raw_tls::{Shown, is_silence};
use rcgen::{CertificateParams, CustomExtension, KeyPair, PublicKeyData as _, SigningKey as _};
use rustls::SupportedProtocolVersion;
use rustls::pki_types::CertificateDer;
use rustls::version::{TLS12, TLS13};
use serde_json::{Value, json};

use super::{BOTH, Target, connect, signing};
use crate::workload::{Workload, registered};

const YEAR_S: u64 = 365 * 86_400;

/// A method's answer in JSON; nothing where the handshake or the connection ended.
fn ask(
    address: SocketAddr,
    versions: &[&'static SupportedProtocolVersion],
    shown: Option<&Shown>,
    method: &str,
    body: &Value,
) -> Option<(u16, Value)> {
    let body = body.to_string();
    let head = format!("POST /prpc/{method}?json HTTP/1.1\r\nHost: kms.test\r\nContent-Length: {}\r\n\r\n", body.len());
    match Asking::new(|| connect(address, versions, shown.cloned())).ask(format!("{head}{body}").as_bytes()) {
        Ok(answer) => Some((answer.status, serde_json::from_slice(&answer.body).unwrap())),
        Err(error) => {
            assert!(!is_silence(&error) && error.kind() != ErrorKind::ConnectionRefused, "{method}: {error}");
            None
        }
    }
}

/// A request for a certificate, all of it right until a test changes it.
struct Request<'a> {
    version: u32,
    key: &'a KeyPair,
    signer: &'a KeyPair,
    confirm: &'a str,
    config: CertificateConfig,
    /// Versioned, for `key`.
    evidence: Vec<u8>,
}

impl<'a> Request<'a> {
    fn right(version: u32, key: &'a KeyPair, target: &Target) -> Self {
        let config = CertificateConfig { subject: "web".into(), usage_server_auth: true, ..CertificateConfig::default() };
        Self { version, key, signer: key, confirm: CONFIRM, config, evidence: target.evidence(&key.subject_public_key_info()) }
    }

    /// The evidence in the form of the version.
    fn shown(&self) -> CertificateEvidence {
        if self.version == 2 {
            return CertificateEvidence::Versioned(self.evidence.clone());
        }
        match Attestation::decode(&self.evidence).unwrap().platform {
            PlatformEvidence::Tdx(td) => {
                CertificateEvidence::Legacy { quote: td.quote, event_log: TdxEvent::log_to_json(&td.event_log).into_bytes() }
            }
            other => panic!("{other:?}"),
        }
    }

    fn csr(&self, evidence: CertificateEvidence) -> Vec<u8> {
        let (confirm, public_key) = (self.confirm.to_owned(), self.key.subject_public_key_info());
        CertificateRequest { confirm, public_key, config: self.config.clone(), evidence }.encode()
    }

    fn body(&self) -> Value {
        let csr = self.csr(self.shown());
        body(self.version, &csr, &self.signer.sign(&csr).unwrap())
    }
}

fn body(version: u32, csr: &[u8], signature: &[u8]) -> Value {
    json!({"api_version": version, "csr": hex::encode(csr), "signature": hex::encode(signature), "vm_config": ""})
}

fn chain(answer: &Value) -> Vec<CertificateDer<'static>> {
    let pems = answer["certificate_chain"].as_array().unwrap_or_else(|| panic!("{answer}"));
    let der = |pem: &Value| {
        let text: String = pem.as_str().unwrap().lines().filter(|line| !line.starts_with("-----")).collect();
        CertificateDer::from(STANDARD.decode(text).unwrap())
    };
    pems.iter().map(der).collect()
}

fn replaced(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let (mut out, mut at, mut count) = (bytes.to_vec(), 0, 0);
    while let Some(found) = memchr::memmem::find(&out[at..], from) {
        out[at + found..at + found + to.len()].copy_from_slice(to);
        (at, count) = (at + found + to.len(), count + 1);
    }
    assert!(count > 0, "nothing to replace");
    out
}

#[test]
fn requests_for_certificates_that_lie() {
    let mut target = Target::start();
    let keys = target.keys();
    let resident = target.resident();
    let address = target.address;
    let other_app = registered(&target.cluster, "other", MachineKind::Tdx);
    let mut other_id = [0; 20];
    hex::decode_to_slice(&other_app.app_id, &mut other_id).unwrap();
    let own_id = target.guest.app_id;
    let [key, other] = [(); 2].map(|()| KeyPair::generate().unwrap());
    let sign = |body: &Value| ask(address, BOTH, None, "SignCert", body).unwrap();
    let refused = |what: &str, body: &Value, expected: &str| {
        let (status, answer) = sign(body);
        let text = answer["error"].as_str().unwrap_or_else(|| panic!("{what}: {status} {answer}"));
        assert!(status == 400 && text.contains(expected) && text.len() < 1200, "{what}: {status} {text}");
        assert!(!text.contains(&other_app.app_id) || what.contains("other app"), "{what}: {text}");
    };
    for version in [1, 2] {
        let right = || Request::right(version, &key, &target);
        let (status, answer) = sign(&right().body());
        assert_eq!(status, 200, "{answer}");
        let certificates = chain(&answer);
        assert_eq!(AppLeafCertificate::read(&certificates[0]).unwrap().app_id(), &own_id);

        refused("signed by another key", &Request { signer: &other, ..right() }.body(), "signature does not verify");
        refused("the key of another request", &Request { key: &other, signer: &other, ..right() }.body(), "Quote verification failed");
        refused("another purpose", &Request { confirm: "please sign this:", ..right() }.body(), "Invalid confirm word");
        refused("no purpose", &Request { confirm: "", ..right() }.body(), "Invalid confirm word");
        let csr = right().csr(right().shown());
        let signature = key.sign(&csr).unwrap();
        for at in [0, 5, signature.len() - 1] {
            let mut wrong = signature.clone();
            wrong[at] ^= 1;
            refused("a bit of the signature", &body(version, &csr, &wrong), "signature does not verify");
        }
        for wrong in [&[][..], &[0; 64], &[0x30, 6, 2, 1, 0, 2, 1, 0], &signature[..signature.len() - 1], &vec![0xff; 5000]] {
            refused("no signature", &body(version, &csr, wrong), "signature does not verify");
        }
        let mut changed = csr.clone();
        let middle = changed.len() / 2;
        changed[middle] ^= 1;
        refused("a bit of the request", &body(version, &changed, &signature), "");
        for end in [0, 1, 17, 18, 60, 120] {
            refused("a part of the request", &body(version, &csr[..end], &key.sign(&csr[..end]).unwrap()), "certificate request: ");
        }
        refused("the other version", &body(3 - version, &csr, &signature), "");
        refused("version 0", &body(0, &csr, &signature), "Unsupported API version: 0");
        refused("the largest version", &body(u32::MAX, &csr, &signature), "Unsupported API version: 4294967295");
        for algorithm in [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519] {
            let foreign = KeyPair::generate_for(algorithm).unwrap();
            refused("a key of another kind", &Request { key: &foreign, signer: &foreign, ..right() }.body(), "P-256");
        }

        // Names of the node, as an alternative name and as the common one.
        for name in ["127.0.0.1", "::ffff:127.0.0.1", "localhost", "LOCALHOST.", "l*host", "*"] {
            let config = CertificateConfig { alt_names: vec!["fine.example".into(), name.into()], ..right().config };
            refused(name, &Request { config, ..right() }.body(), "is a node's");
            let config = CertificateConfig { subject: name.into(), ..right().config };
            refused(name, &Request { config, ..right() }.body(), "is a node's");
        }
        for name in ["localhost\0.example", "a\nb", "b\u{fc}cher.example"] {
            let config = CertificateConfig { alt_names: vec![name.into()], ..right().config };
            refused(name, &Request { config, ..right() }.body(), "");
        }
        // A name with another app's id is only a name: the leaf and its CA say whose it is.
        let config = CertificateConfig { alt_names: vec![format!("{}.apps.example", other_app.app_id)], ..right().config };
        let (status, answer) = sign(&Request { config, ..right() }.body());
        let certificates = chain(&answer);
        assert_eq!((status, AppLeafCertificate::read(&certificates[0]).unwrap().app_id()), (200, &own_id));
        assert_eq!(AppCa::read(&certificates[1]).unwrap().app_id(), &own_id);

        // Evidence of this app under the id of the other.
        let raw = replaced(&right().evidence, &own_id.0, &other_id);
        refused("the other app's id", &Request { evidence: raw, ..right() }.body(), "Quote verification failed");
        let mut flipped = right().evidence;
        flipped[400] ^= 1;
        refused("a bit of the quote", &Request { evidence: flipped, ..right() }.body(), "");
    }
    let not_after = CertificateConfig { not_before: Some(0), not_after: Some(1), ..Request::right(2, &key, &target).config };
    refused("a life that is over", &Request { config: not_after, ..Request::right(2, &key, &target) }.body(), "not_after");

    // A machine that runs this app's document and says to be the other app: measured, so it holds; its policy says no.
    let compose = std::fs::read(target.cluster.dir().join("web-app-compose.json")).unwrap();
    let impostor = Workload::boot_document(&target.cluster, "other", &compose, &other_app.app_id);
    assert_eq!(impostor.app_id, AppId(other_id));
    let evidence = impostor.evidence(binding::ratls_certificate(&key.subject_public_key_info())).unwrap();
    for version in [1, 2] {
        let request = Request { evidence: evidence.clone(), version, ..Request::right(2, &key, &target) };
        refused("the other app's id, measured", &request.body(), "Boot denied: ");
    }
    target.still_serves(&keys, resident);
}

/// Signed by the temp CA, whose key is everybody's.
fn under_temp_ca(ca: &TempCa, key: &KeyPair, evidence: &[u8], now_s: u64) -> CertificateDer<'static> {
    let public = PublicKey::p256_from_spki("guest", &key.subject_public_key_info()).unwrap();
    CertificateDer::from(ca.client(&public, evidence, [9; 16], now_s).unwrap())
}

#[test]
fn client_certificates_whose_time_or_key_is_another() {
    let mut target = Target::start();
    let keys = target.keys();
    let resident = target.resident();
    let address = target.address;
    let mut id = [0; 32];
    hex::decode_to_slice(&target.cluster.cluster_id, &mut id).unwrap();
    let ca = temp_ca(&ClusterId(id)).unwrap();
    let now_s = (target.guest.now)().0 / 1000;
    let [key, thief] = [(); 2].map(|()| KeyPair::generate().unwrap());
    let evidence = target.evidence(&key.subject_public_key_info());
    let get_key = |versions: &[&'static SupportedProtocolVersion], shown: &Shown| {
        ask(address, versions, Some(shown), "GetAppKey", &json!({"api_version": 1}))
    };

    // An app's certificate carries evidence, so that it is a client's too.
    let app_chain = |config: CertificateConfig| {
        let right = Request::right(2, &key, &target);
        let config = CertificateConfig {
            ext_quote: true,
            usage_client_auth: true,
            ..CertificateConfig { subject: right.config.subject.clone(), ..config }
        };
        let (status, answer) = ask(address, BOTH, None, "SignCert", &Request { config, ..right }.body()).unwrap();
        assert_eq!(status, 200, "{answer}");
        chain(&answer)
    };
    let lives = app_chain(CertificateConfig::default());
    let soon_over = now_s + 2;
    let ends = app_chain(CertificateConfig { not_after: Some(soon_over), ..CertificateConfig::default() });
    let begins = app_chain(CertificateConfig {
        not_before: Some(now_s + 86_400),
        not_after: Some(now_s + 2 * 86_400),
        ..CertificateConfig::default()
    });

    let dated = |[begin, end]: [i32; 2], make: &dyn Fn(&mut CertificateParams)| {
        let mut params = CertificateParams::default();
        params.not_before = rcgen::date_time_ymd(begin, 1, 1);
        params.not_after = rcgen::date_time_ymd(end, 1, 1);
        make(&mut params);
        params.self_signed(&key).unwrap().der().clone()
    };
    let with_evidence = |params: &mut CertificateParams| {
        params.custom_extensions = vec![CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 62397, 1, 8], wrap(&evidence))];
    };
    let is_ca = |params: &mut CertificateParams| params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let valid = under_temp_ca(&ca, &key, &evidence, now_s);
    let of = |chain: Vec<CertificateDer<'static>>| signing(chain, &key);
    while (target.guest.now)().0 / 1000 <= soon_over {
        std::thread::sleep(Duration::from_millis(100));
    }
    let refused = [
        ("under the temp CA, expired", of(vec![under_temp_ca(&ca, &key, &evidence, now_s - 20 * YEAR_S)])),
        ("under the temp CA, of the future", of(vec![under_temp_ca(&ca, &key, &evidence, now_s + YEAR_S)])),
        (
            "under the temp CA, expired, with its CA",
            of(vec![under_temp_ca(&ca, &key, &evidence, now_s - 20 * YEAR_S), ca.der().to_vec().into()]),
        ),
        ("self-signed, expired", of(vec![dated([2010, 2020], &with_evidence)])),
        ("self-signed, of the future", of(vec![dated([2100, 2110], &with_evidence)])),
        ("self-signed, over before it began", of(vec![dated([2040, 2020], &with_evidence)])),
        ("an app's, expired", of(ends)),
        ("an app's, of the future", of(begins)),
        ("a CA without evidence, expired, as leaf", of(vec![dated([2010, 2020], &is_ca), valid.clone()])),
        // A replay by somebody else: the certificate is public, its key is not.
        ("another's, with a key of one's own", signing(vec![valid.clone()], &thief)),
    ];
    for version in [&TLS13, &TLS12] {
        for (what, shown) in &refused {
            assert_eq!(get_key(&[version], shown), None, "{what}");
            assert_eq!(ask(address, &[version], Some(shown), "GetMeta", &json!({})), None, "{what}: not even what everybody may ask");
        }
        // Who issued it does not matter, so neither does the time of that: nothing above the leaf is looked at.
        for (what, above) in [
            ("alone", vec![]),
            ("its CA", vec![ca.der().to_vec().into()]),
            ("an expired CA", vec![dated([2010, 2020], &is_ca)]),
            ("a CA of the future", vec![dated([2100, 2110], &is_ca)]),
            ("noise", vec![CertificateDer::from(vec![0xff; 300])]),
        ] {
            let shown = of([vec![valid.clone()], above].concat());
            assert_eq!(get_key(&[version], &shown), Some((200, keys.clone())), "{what}");
        }
        // Once more on another connection, by who has the key: a guest may ask as often as it likes.
        assert_eq!(get_key(&[version], &of(vec![valid.clone()])), Some((200, keys.clone())));
        assert_eq!(get_key(&[version], &of(lives.clone())).map(|(status, _)| status), Some(200), "an app's certificate");
        // Another's evidence in a certificate of one's own.
        let stolen = signing(vec![under_temp_ca(&ca, &thief, &evidence, now_s)], &thief);
        for method in ["GetAppKey", "GetMeta", "GetTempCaCert"] {
            let (status, answer) = ask(address, &[version], Some(&stolen), method, &json!({})).unwrap();
            assert!(status == 400 && answer["error"].as_str().unwrap().starts_with("invalid quote: "), "{method}: {answer}");
        }
    }
    target.still_serves(&keys, resident);
}
