//! The P-256 key of a certificate. Owns: generation, signatures. Never: exports the private key; it lives and dies in
//! the cryptographic library's memory, which wipes it when the key is dropped.

use std::sync::Arc;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use rcgen::PublicKeyData;
use rustls::sign::{Signer, SigningKey};
use rustls::{SignatureAlgorithm, SignatureScheme};

use crate::error::RatlsError;

/// A fresh P-256 key pair without a way to copy or print its private half.
pub struct CertificateKey {
    pair: Arc<EcdsaKeyPair>,
}

impl CertificateKey {
    /// Makes one from the library's own random source.
    ///
    /// # Errors
    /// [`RatlsError::Key`], when that source fails.
    pub fn generate() -> Result<Self, RatlsError> {
        let pair =
            EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).map_err(|_unspecified| RatlsError::Key { operation: "generate" })?;
        Ok(Self { pair: Arc::new(pair) })
    }

    /// SubjectPublicKeyInfo, DER.
    pub fn spki(&self) -> Vec<u8> {
        self.subject_public_key_info()
    }

    /// ECDSA with SHA-256 over `message`, as `r(32) ‖ s(32)`: the signature of a release request, whose digest is the
    /// request's hash (threshold.md §2.2).
    ///
    /// # Errors
    /// [`RatlsError::Key`], when the library fails to sign.
    pub fn sign_fixed(&self, message: &[u8]) -> Result<[u8; 64], RatlsError> {
        let der = sign_der(&self.pair, message)?;
        fixed_from_der(&der).ok_or(RatlsError::Key { operation: "sign with" })
    }

    pub(crate) fn for_tls(&self) -> Arc<dyn SigningKey> {
        Arc::new(TlsKey { pair: Arc::clone(&self.pair) })
    }
}

impl std::fmt::Debug for CertificateKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CertificateKey(<redacted>)")
    }
}

impl PublicKeyData for CertificateKey {
    fn der_bytes(&self) -> &[u8] {
        self.pair.public_key().as_ref()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

impl rcgen::SigningKey for CertificateKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        sign_der(&self.pair, message).map_err(|_key| rcgen::Error::RemoteKeyError)
    }
}

/// The same key as rustls wants it.
struct TlsKey {
    pair: Arc<EcdsaKeyPair>,
}

impl std::fmt::Debug for TlsKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsKey(<redacted>)")
    }
}

impl SigningKey for TlsKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        offered.contains(&SCHEME).then(|| Box::new(Self { pair: Arc::clone(&self.pair) }) as Box<dyn Signer>)
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ECDSA
    }
}

impl Signer for TlsKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        sign_der(&self.pair, message).map_err(|error| rustls::Error::General(error.to_string()))
    }

    fn scheme(&self) -> SignatureScheme {
        SCHEME
    }
}

/// The only signature scheme of certificates and handshakes.
pub(crate) const SCHEME: SignatureScheme = SignatureScheme::ECDSA_NISTP256_SHA256;

fn sign_der(pair: &EcdsaKeyPair, message: &[u8]) -> Result<Vec<u8>, RatlsError> {
    let signature = pair.sign(&SystemRandom::new(), message).map_err(|_unspecified| RatlsError::Key { operation: "sign with" })?;
    Ok(signature.as_ref().to_vec())
}

/// `SEQUENCE { INTEGER r, INTEGER s }` to two 32-byte numbers. P-256 signatures have lengths below 128, hence one
/// length byte each.
fn fixed_from_der(der: &[u8]) -> Option<[u8; 64]> {
    let (body, rest) = tlv(der, 0x30)?;
    let (r, after_r) = tlv(body, 0x02)?;
    let (s, after_s) = tlv(after_r, 0x02)?;
    if !rest.is_empty() || !after_s.is_empty() {
        return None;
    }
    let mut fixed = [0u8; 64];
    let (high, low) = fixed.split_at_mut(32);
    right_align(r, high)?;
    right_align(s, low)?;
    Some(fixed)
}

fn tlv(input: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let [first, length, rest @ ..] = input else { return None };
    let length = usize::from(*length);
    (*first == tag && length < 0x80).then(|| rest.split_at_checked(length)).flatten()
}

fn right_align(integer: &[u8], target: &mut [u8]) -> Option<()> {
    let digits = integer.strip_prefix(&[0]).unwrap_or(integer);
    let start = target.len().checked_sub(digits.len())?;
    target.get_mut(start..)?.copy_from_slice(digits);
    Some(())
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};

    use super::*;

    #[test]
    fn fixed_signatures_verify_for_all_lengths_of_r_and_s() {
        let key = CertificateKey::generate().unwrap();
        let public = UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, key.pair.public_key().as_ref().to_vec());
        // 600 signatures: both numbers have a leading zero byte often enough to meet the short forms.
        for i in 0u32..600 {
            let message = i.to_be_bytes();
            public.verify(&message, &key.sign_fixed(&message).unwrap()).unwrap();
        }
    }

    #[test]
    fn spki_is_the_librarys_own() {
        let key = CertificateKey::generate().unwrap();
        let expected: PublicKeyX509Der<'_> = key.pair.public_key().as_der().unwrap();
        assert_eq!(key.spki(), expected.as_ref());
    }

    #[test]
    fn malformed_der_is_refused() {
        for der in [&[][..], &[0x30], &[0x30, 5, 2, 1, 1], &[0x30, 6, 2, 1, 1, 2, 1, 1, 0], &[0x31, 6, 2, 1, 1, 2, 1, 1]] {
            assert_eq!(fixed_from_der(der), None);
        }
        let mut long = vec![0x30, 0x25, 0x02, 0x21];
        long.extend([1u8; 33]);
        long.extend([2, 0]);
        assert_eq!(fixed_from_der(&long), None);
    }
}
