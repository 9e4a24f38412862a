//! Certificates, certificate requests and signatures of the dstack surface. No root signs what a fuzzer makes, so nothing may verify.

use dstack_attest::wire::CertificateRequest;
use dstack_attest::x509ext::CertificateEvidence;
use dstack_certificates::read::{AppCa, AppLeafCertificate, Certificate, IssuingCa, KmsServer, RootCa};
use dstack_certificates::{PublicKey, identity, issue, path};

/// The base point of P-256, compressed: a key whose secret is known, but to no fuzzer.
const POINT: [u8; 33] = [
    0x03, 0x6b, 0x17, 0xd1, 0xf2, 0xe1, 0x2c, 0x42, 0x47, 0xf8, 0xbc, 0xe6, 0xe5, 0x63, 0xa4, 0x40, 0xf2, 0x77, 0x03, 0x7d, 0x81, 0x2d,
    0xeb, 0x33, 0xa0, 0xf4, 0xa1, 0x39, 0x45, 0xd8, 0x98, 0xc2, 0x96,
];
/// 2026-01-01, seconds.
const NOW_S: u64 = 1_767_225_600;

/// See the module text.
pub(crate) fn run(data: &[u8]) {
    let Some((way, bytes)) = data.split_first() else { return };
    let foreign = PublicKey::p256("the target's", &POINT).expect("a point of P-256");
    match way % 6 {
        0 => certificate(bytes, &foreign),
        1 | 2 => {
            let version = u32::from(way % 6);
            if let Ok(request) = CertificateRequest::decode(version, bytes) {
                assert_eq!(request.api_version(), version);
                assert_eq!(CertificateRequest::decode(version, &request.encode()).as_ref(), Ok(&request), "what is read can be written");
                assert_eq!(matches!(request.evidence, CertificateEvidence::Legacy { .. }), version == 1);
                let _ = request.check(bytes, &bytes[bytes.len() / 2..]);
            }
        }
        3 => {
            let _ = PublicKey::p256_from_spki("the input's", bytes).map(|key| assert_eq!(key.spki(), bytes, "a key has one form"));
            let _ = PublicKey::p256("the input's", bytes).map(|key| assert!(key.p256_compressed().is_some()));
        }
        4 => {
            let digest = [7; 32];
            let point = identity::recover(&digest, bytes);
            if let Ok(point) = point {
                assert!(identity::is_point(&point), "what is recovered is a key");
                assert!(identity::verify(&point, &digest, bytes).is_ok(), "and the signature is its own");
            }
            assert!(identity::verify(&POINT, &digest, bytes).is_err(), "the target's key signed nothing");
        }
        _ => {
            let (signature, tbs) = bytes.split_at(bytes.len().min(64));
            if let Ok(signature) = signature.try_into() {
                assert!(issue::assemble(tbs, &foreign, signature).is_err(), "the target's key signed nothing");
            }
        }
    }
}

fn certificate(der: &[u8], foreign: &PublicKey) {
    let Ok(read) = Certificate::read(der) else { return };
    assert_eq!(read.der(), der);
    assert!(read.signed_by(foreign).is_err(), "the target's key signed nothing");
    let _ = (read.app_id(), read.usage(), read.key_ids(), read.validity_s());
    drop((IssuingCa::read(der), KmsServer::read(der), AppCa::read(der), AppLeafCertificate::read(der)));
    if let Ok(root) = RootCa::read(der) {
        // a root is under no other, and a chain of it alone proves nothing
        let _ = path::verify(&[&read], &root, NOW_S);
    }
}
