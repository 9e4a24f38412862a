//! Public keys of certificates, and P-256 keys made of a scalar (an app's CA, the temp CA).
//!
//! Owns: encodings, verification. Never: makes a key of randomness, prints a private one.

use dstack_protocol::genesis::CaAlgorithm;
use dstack_secret::Secret;
use p256::ecdsa::signature::{Signer as _, Verifier as _};
use p256::pkcs8::DecodePublicKey as _;

use crate::CertificateError;

/// A public key that stands in one of our certificates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublicKey {
    /// Ed25519: a root.
    Ed25519([u8; 32]),
    /// P-256, uncompressed SEC1: everything else.
    P256([u8; 65]),
}

impl PublicKey {
    /// A P-256 key from SEC1, compressed or not.
    ///
    /// # Errors
    /// [`CertificateError::BadKey`] when it is no point.
    pub fn p256(what: &'static str, sec1: &[u8]) -> Result<Self, CertificateError> {
        let bad = CertificateError::BadKey { what, algorithm: "P-256" };
        let key = p256::PublicKey::from_sec1_bytes(sec1).map_err(|_| bad.clone())?;
        <[u8; 65]>::try_from(p256::ecdsa::VerifyingKey::from(key).to_sec1_point(false).as_bytes()).map(Self::P256).map_err(|_| bad)
    }

    /// The public key of root `ca` as the state holds it.
    ///
    /// # Errors
    /// [`CertificateError::BadKey`].
    pub fn root(algorithm: CaAlgorithm, bytes: &[u8]) -> Result<Self, CertificateError> {
        match algorithm {
            CaAlgorithm::Ed25519 => {
                let bad = CertificateError::BadKey { what: "root ca", algorithm: "Ed25519" };
                let bytes: [u8; 32] = bytes.try_into().map_err(|_| bad.clone())?;
                let key = ed25519_dalek::VerifyingKey::from_bytes(&bytes).map_err(|_| bad.clone())?;
                if key.is_weak() { Err(bad) } else { Ok(Self::Ed25519(bytes)) }
            }
            CaAlgorithm::P256 => Self::p256("root ca", bytes),
        }
    }

    /// A P-256 key from a SubjectPublicKeyInfo.
    ///
    /// # Errors
    /// [`CertificateError::BadKey`].
    pub fn p256_from_spki(what: &'static str, spki: &[u8]) -> Result<Self, CertificateError> {
        let key = p256::PublicKey::from_public_key_der(spki).map_err(|_| CertificateError::BadKey { what, algorithm: "P-256" })?;
        Self::p256(what, &key.to_sec1_bytes())
    }

    /// SubjectPublicKeyInfo, DER.
    #[must_use]
    pub fn spki(&self) -> Vec<u8> {
        rcgen::PublicKeyData::subject_public_key_info(self)
    }

    /// The compressed point of a P-256 key.
    #[must_use]
    pub fn p256_compressed(&self) -> Option<[u8; 33]> {
        let Self::P256(point) = self else { return None };
        let key = p256::ecdsa::VerifyingKey::from_sec1_bytes(point).ok()?;
        key.to_sec1_point(true).as_bytes().try_into().ok()
    }

    /// Verifies a signature as it stands in a certificate: 64 bytes of Ed25519 (strict), ASN.1 of ECDSA with SHA-256.
    ///
    /// # Errors
    /// [`CertificateError::BadSignature`].
    pub fn verify(&self, what: &'static str, message: &[u8], signature: &[u8]) -> Result<(), CertificateError> {
        let right = match self {
            Self::Ed25519(key) => ed25519_dalek::VerifyingKey::from_bytes(key).is_ok_and(|key| {
                let signature = <&[u8; 64]>::try_from(signature).map(ed25519_dalek::Signature::from_bytes);
                !key.is_weak() && signature.is_ok_and(|signature| key.verify_strict(message, &signature).is_ok())
            }),
            Self::P256(key) => p256::ecdsa::VerifyingKey::from_sec1_bytes(key).is_ok_and(|key| {
                let signature = p256::ecdsa::Signature::from_der(signature);
                signature.is_ok_and(|signature| key.verify(message, &signature).is_ok())
            }),
        };
        if right { Ok(()) } else { Err(CertificateError::BadSignature { what }) }
    }
}

impl rcgen::PublicKeyData for PublicKey {
    fn der_bytes(&self) -> &[u8] {
        match self {
            Self::Ed25519(key) => key,
            Self::P256(key) => key,
        }
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        match self {
            Self::Ed25519(_) => &rcgen::PKCS_ED25519,
            Self::P256(_) => &rcgen::PKCS_ECDSA_P256_SHA256,
        }
    }
}

/// A P-256 key made of its scalar; signs deterministically (RFC 6979). Wiped on drop, never printed.
pub struct P256Key {
    key: p256::ecdsa::SigningKey,
    public: PublicKey,
    point: [u8; 65],
}

impl P256Key {
    /// From 32 bytes, big-endian: the derived key of class 0x05.
    ///
    /// # Errors
    /// [`CertificateError::BadKey`] when the scalar is 0 or not below the order.
    pub fn from_scalar(scalar: &Secret<32>) -> Result<Self, CertificateError> {
        scalar.expose(Self::from_bytes)
    }

    pub(crate) fn from_bytes(bytes: &[u8; 32]) -> Result<Self, CertificateError> {
        let bad = CertificateError::BadKey { what: "scalar", algorithm: "P-256" };
        let key = p256::ecdsa::SigningKey::from_slice(bytes).map_err(|_| bad.clone())?;
        let point = <[u8; 65]>::try_from(key.verifying_key().to_sec1_point(false).as_bytes()).map_err(|_| bad)?;
        Ok(Self { key, public: PublicKey::P256(point), point })
    }

    /// Its public half.
    #[must_use]
    pub fn public(&self) -> &PublicKey {
        &self.public
    }
}

impl std::fmt::Debug for P256Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("P256Key(<redacted>)")
    }
}

impl rcgen::PublicKeyData for P256Key {
    fn der_bytes(&self) -> &[u8] {
        &self.point
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

impl rcgen::SigningKey for P256Key {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let signature: p256::ecdsa::Signature = self.key.try_sign(message).map_err(|_| rcgen::Error::RemoteKeyError)?;
        Ok(signature.to_der().as_bytes().to_vec())
    }
}
