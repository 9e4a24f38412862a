//! From a 32-byte seed to an app's keys, for the providers without a KMS. Owns: dstack's derivation and the self-signed app root.
//! Never: keeps the seed.
//! Source: util and deploy reference §4 (labels), KMS API reference §5 (KDF, PK8).

use dstack_attest::x509ext::wrap;
use dstack_protocol::binding;
use dstack_protocol::codec::sha256;
use dstack_secret::{Secret, SecretBytes};
use hkdf::Hkdf;
use p256::elliptic_curve::sec1::ToSec1Point as _;
use rcgen::{BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose};
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::app_keys::{AppKeys, ProviderKeys};

/// Name of the self-signed certificate.
pub const APP_ROOT: &str = "App Root Cert";
/// Extension with evidence.
const EVIDENCE_OID: &[u64] = &[1, 3, 6, 1, 4, 1, 62397, 1, 8];
/// Bytes of a P-256 key in PKCS#8 with its public half.
const PK8_BYTES: usize = 138;

/// Why a seed gives no keys.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SeedError {
    /// The derived number is no private key: one seed in 2^32. Ours to fix: another seed.
    #[error("the seed gives no valid {label} key: remove the seed and make another")]
    Scalar {
        /// Of which key.
        label: &'static str,
    },
    /// The device makes no evidence.
    #[error("no evidence for the app root certificate: {reason}")]
    Evidence {
        /// The device's words.
        reason: String,
    },
    /// The certificate cannot be made.
    #[error("the app root certificate cannot be made: {reason}")]
    Certificate {
        /// The library's words.
        reason: String,
    },
}

/// `HKDF-SHA256(salt "RATLS", IKM = seed, info = parts joined, 32)`.
#[must_use]
pub fn kdf(seed: &[u8], parts: &[&[u8]]) -> Secret<32> {
    // 32 bytes are far below HKDF's limit
    Secret::from_fn(|out| _ = Hkdf::<Sha256>::new(Some(b"RATLS"), seed).expand(&parts.concat(), out))
}

/// A P-256 key in the 138-byte PKCS#8 form that dstack hashes.
#[must_use]
pub fn pk8(scalar: &Secret<32>) -> Option<(SecretBytes, [u8; 65])> {
    let key = scalar.expose(|scalar| p256::SecretKey::from_slice(scalar)).ok()?;
    let point: [u8; 65] = key.public_key().to_sec1_point(false).as_bytes().try_into().ok()?;
    let head: [u8; 36] = [
        0x30, 0x81, 0x87, 0x02, 0x01, 0x00, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48,
        0xce, 0x3d, 0x03, 0x01, 0x07, 0x04, 0x6d, 0x30, 0x6b, 0x02, 0x01, 0x01, 0x04, 0x20,
    ];
    let mut der = Vec::with_capacity(PK8_BYTES);
    der.extend_from_slice(&head);
    scalar.expose(|scalar| der.extend_from_slice(scalar));
    der.extend_from_slice(&[0xa1, 0x44, 0x03, 0x42, 0x00]);
    der.extend_from_slice(&point);
    Some((SecretBytes::take(der), point))
}

/// `SHA-256(PK8(P256(seed, parts)))`.
#[must_use]
pub fn derived_hash(seed: &[u8], parts: &[&[u8]]) -> Option<SecretBytes> {
    let (der, _) = pk8(&kdf(seed, parts))?;
    let mut digest = Zeroizing::new(der.expose(|der| sha256(&[der])));
    Some(Secret::<32>::take(&mut digest).expose(|digest| SecretBytes::from_fn(32, |out| out.copy_from_slice(digest))))
}

/// SubjectPublicKeyInfo of a P-256 point, DER.
#[must_use]
pub fn spki(point: &[u8; 65]) -> Vec<u8> {
    let head = [
        0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01,
        0x07, 0x03, 0x42, 0x00,
    ];
    [&head[..], point].concat()
}

/// Which provider a seed came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seeded {
    /// Made for this boot.
    None,
    /// Local; MRENCLAVE of the provider.
    Local(Vec<u8>),
    /// TPM.
    Tpm,
}

/// All keys of a seed, with the app root certificate over the app key: `CN=App Root Cert`, a CA of path length `ca_level`, with evidence.
///
/// # Errors
/// [`SeedError`].
pub fn app_keys(
    seed: &Secret<32>,
    provider: Seeded,
    ca_level: u8,
    evidence_of: impl FnOnce([u8; 64]) -> Result<Vec<u8>, String>,
) -> Result<AppKeys, SeedError> {
    let (app, point) = seed.expose(|seed| pk8(&kdf(seed, &[b"app-key"]))).ok_or(SeedError::Scalar { label: "app" })?;
    let disk = seed.expose(|seed| derived_hash(seed, &[b"app-disk-key"])).ok_or(SeedError::Scalar { label: "disk" })?;
    let k256 = seed.expose(|seed| kdf(seed, &[b"app-k256-key"]));
    let public = spki(&point);
    let evidence = evidence_of(binding::ratls_certificate(&public)).map_err(|reason| SeedError::Evidence { reason })?;
    let ca_cert = root_certificate(&app, APP_ROOT, ca_level, &evidence)?;
    let key = pem(&app);
    Ok(AppKeys {
        disk_crypt_key: disk,
        env_crypt_key: SecretBytes::take(Vec::new()),
        k256_key: k256.expose(|key| SecretBytes::from_fn(32, |out| out.copy_from_slice(key))),
        k256_signature: Vec::new(),
        gateway_app_id: String::new(),
        ca_cert,
        key_provider: match provider {
            Seeded::None => ProviderKeys::None { key },
            Seeded::Local(mr) => ProviderKeys::Local { key, mr },
            Seeded::Tpm => ProviderKeys::Tpm { key, pubkey: public },
        },
    })
}

/// A self-signed CA certificate over the PKCS#8 key `der`, PEM.
///
/// # Errors
/// [`SeedError::Certificate`].
pub fn root_certificate(der: &SecretBytes, name: &str, ca_level: u8, evidence: &[u8]) -> Result<String, SeedError> {
    let wrong = |error: rcgen::Error| SeedError::Certificate { reason: error.to_string() };
    // the library's own copy of the key is wiped by the library
    let key = der.expose(|der| KeyPair::try_from(der)).map_err(wrong)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(ca_level));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.custom_extensions = vec![CustomExtension::from_oid_content(EVIDENCE_OID, wrap(evidence))];
    Ok(params.self_signed(&key).map_err(wrong)?.pem())
}

/// The key as PEM.
#[must_use]
pub fn pem(der: &SecretBytes) -> SecretBytes {
    use base64::Engine as _;
    let engine = base64::engine::general_purpose::STANDARD;
    der.expose(|der| {
        // four digits for three bytes
        let mut text = Zeroizing::new(vec![0; der.len().div_ceil(3).saturating_mul(4)]);
        let length = engine.encode_slice(der, &mut text).unwrap_or_default();
        let mut out = Vec::with_capacity(text.len().saturating_add(text.len() / 64).saturating_add(80));
        out.extend_from_slice(b"-----BEGIN PRIVATE KEY-----\n");
        for line in text.get(..length).unwrap_or_default().chunks(64) {
            out.extend_from_slice(line);
            out.push(b'\n');
        }
        out.extend_from_slice(b"-----END PRIVATE KEY-----\n");
        SecretBytes::take(out)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derivation_is_the_references() {
        let root = hex::decode("f57527cea4ab7ffb49af99b158cdc0e3ec06398f528349ea236b7d2afe19cec1").unwrap();
        // upstream's regression vector, then the reference's own
        let hash = |parts: &[&[u8]]| derived_hash(&root, parts).unwrap().expose(|bytes| hex::encode(bytes));
        assert_eq!(hash(&[b"context one", b"context two"]), "663afd58820be8ad645f9c035e93199d114ab16f738db62393bc1d7d623e8813");
        let (app, instance) = ([0x11; 20], [0x22; 20]);
        assert_eq!(hash(&[&app, &instance, b"app-disk-crypt-key"]), "a59c814e2c6d9353af59ce4fba7215e5ec3b62a2495b4dca48ea6f9804061f51");
        assert_eq!(hash(&[&app, &[], b"app-disk-crypt-key"]), "14de7a7fd8bddf8e641a55ca97f043cac4344d175419f743940840f3a348f049");
        let env = derived_hash(&root, &[&app, b"env-encrypt-key"]).unwrap();
        assert_eq!(env.expose(|bytes| hex::encode(bytes)), "a7470db8cfdd0fe24134b461d60766afa7c078abe6dce9f2c8a5c44034ca400e");
        let ca = kdf(&root, &[&app, b"app-ca"]);
        assert_eq!(ca.expose(|key| hex::encode(key)), "5b779e0a9fe80b2e5866d94958daa1a4e29a183228b3f37acd7eae153e18a75f");
        let k256 = kdf(&[0x33; 32], &[&app, b"app-key"]);
        assert_eq!(k256.expose(|key| hex::encode(key)), "6a77df55522c222fcb593ca9bb0d96132429d99b5c078cd152f1c0367516d6fb");
        let scalar = Secret::from_fn(|out: &mut [u8; 32]| out.copy_from_slice(&root));
        let (der, point) = pk8(&scalar).unwrap();
        assert_eq!(der.len(), PK8_BYTES);
        let prefix = "308187020100301306072a8648ce3d020106082a8648ce3d030107046d306b0201010420";
        assert!(der.expose(|der| hex::encode(der)).starts_with(prefix));
        assert_eq!(
            hex::encode(spki(&point)),
            "3059301306072a8648ce3d020106082a8648ce3d0301070342000491f50522407ce29dce3ed7d31a15d80c1c42f13a23552d2b33a0ce09ee11e47bce95936f\
             3e7f80d195f879e28e1b144ef37ac9ab8e36a690cbf930b775897b27"
        );
        assert_eq!(
            hex::encode(binding::ratls_certificate(&spki(&point))),
            "d224180bddf1a335755b07626fdc80ce18090be1ff37e7d6e1b53e780e27da0d8fafe99fc41e90333fcb51949ae5a1fc95b7820e142e611256ff4a8dc8997506"
        );
    }

    #[test]
    fn a_seed_gives_the_same_keys_each_time_and_a_root_with_evidence() {
        let seed = Secret::from_fn(|out: &mut [u8; 32]| out.fill(5));
        let keys = |provider| app_keys(&seed, provider, 1, |report_data| Ok(report_data.to_vec())).unwrap();
        let (one, two) = (keys(Seeded::None), keys(Seeded::Tpm));
        assert!(one.disk_crypt_key == two.disk_crypt_key && one.k256_key == two.k256_key);
        assert!(one.env_crypt_key.is_empty() && one.k256_signature.is_empty());
        let ProviderKeys::Tpm { key, pubkey } = &two.key_provider else { panic!("another provider") };
        key.expose(|pem| assert!(pem.starts_with(b"-----BEGIN PRIVATE KEY-----\nMIGHAgEA")));
        let der = base64_of(&one.ca_cert);
        assert!(der.windows(13).any(|window| window == b"App Root Cert"));
        assert!(der.windows(91).any(|window| window == pubkey.as_slice()), "the certificate is of the app key");
        let report_data = binding::ratls_certificate(pubkey);
        assert!(der.windows(66).any(|window| window == [&[4, 64], &report_data[..]].concat()), "evidence, bound to the key");
        let reused = key.expose(|pem| KeyPair::from_pem(std::str::from_utf8(pem).unwrap())).unwrap();
        assert_eq!(rcgen::PublicKeyData::subject_public_key_info(&reused), *pubkey);
    }

    fn base64_of(pem: &str) -> Vec<u8> {
        use base64::Engine as _;
        let text: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
        base64::engine::general_purpose::STANDARD.decode(text).unwrap()
    }
}
