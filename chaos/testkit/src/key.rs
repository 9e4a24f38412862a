//! Signing keys of the software PKIs: P-256 (TDX) and P-384 (Nitro). Owns: making them, signing, the public encoding.
//! Never: leaves this crate. The scalars sit in the curve crates' key types, which wipe themselves.

use dstack_secret::Secret;
use hkdf::Hkdf;
use p256::ecdsa::signature::Signer as _;
use p256::pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _};
use rcgen::{PublicKeyData, SignatureAlgorithm, SigningKey};
use sha2::Sha512;

use crate::error::TestkitError;

/// A curve with its certificate signature algorithm; the two that platform PKIs use.
pub(crate) trait Key: SigningKey + Sized {
    /// Makes a key of 64 uniform bytes and a label; the same bytes and label give the same key.
    fn derive(secret: &Secret<32>, info: &[&[u8]]) -> Self;
    /// PKCS#8 DER, for a file readable by its owner only.
    fn to_pkcs8(&self) -> Result<dstack_secret::SecretBytes, String>;
    /// Reads what `to_pkcs8` wrote.
    fn from_pkcs8(der: &[u8]) -> Result<Self, String>;
    /// `r ‖ s` over `message`, hashed with the curve's hash.
    fn sign_raw(&self, message: &[u8]) -> Vec<u8>;
}

/// ECDSA P-256 with SHA-256.
pub(crate) struct P256Key {
    signing: p256::ecdsa::SigningKey,
    point: Vec<u8>,
}

/// ECDSA P-384 with SHA-384.
pub(crate) struct P384Key {
    signing: p384::ecdsa::SigningKey,
    point: Vec<u8>,
}

impl P256Key {
    fn new(signing: p256::ecdsa::SigningKey) -> Self {
        let point = signing.verifying_key().to_sec1_point(false).as_bytes().to_vec();
        Self { signing, point }
    }

    /// `x ‖ y`, as quotes carry an attestation key.
    pub(crate) fn xy(&self) -> &[u8] {
        self.point.get(1..).unwrap_or_default()
    }
}

impl P384Key {
    fn new(signing: p384::ecdsa::SigningKey) -> Self {
        let point = signing.verifying_key().to_sec1_point(false).as_bytes().to_vec();
        Self { signing, point }
    }
}

impl Key for P256Key {
    fn derive(secret: &Secret<32>, info: &[&[u8]]) -> Self {
        derive_scalar::<32, _>(secret, info, |bytes| p256::ecdsa::SigningKey::from_slice(bytes).ok().map(Self::new))
    }

    fn to_pkcs8(&self) -> Result<dstack_secret::SecretBytes, String> {
        let der = self.signing.to_pkcs8_der().map_err(|error| error.to_string())?;
        Ok(dstack_secret::SecretBytes::take(der.as_bytes().to_vec()))
    }

    fn from_pkcs8(der: &[u8]) -> Result<Self, String> {
        p256::ecdsa::SigningKey::from_pkcs8_der(der).map(Self::new).map_err(|error| error.to_string())
    }

    fn sign_raw(&self, message: &[u8]) -> Vec<u8> {
        let signature: p256::ecdsa::Signature = self.signing.sign(message);
        signature.to_bytes().to_vec()
    }
}

impl Key for P384Key {
    fn derive(secret: &Secret<32>, info: &[&[u8]]) -> Self {
        derive_scalar::<48, _>(secret, info, |bytes| p384::ecdsa::SigningKey::from_slice(bytes).ok().map(Self::new))
    }

    fn to_pkcs8(&self) -> Result<dstack_secret::SecretBytes, String> {
        let der = self.signing.to_pkcs8_der().map_err(|error| error.to_string())?;
        Ok(dstack_secret::SecretBytes::take(der.as_bytes().to_vec()))
    }

    fn from_pkcs8(der: &[u8]) -> Result<Self, String> {
        p384::ecdsa::SigningKey::from_pkcs8_der(der).map(Self::new).map_err(|error| error.to_string())
    }

    fn sign_raw(&self, message: &[u8]) -> Vec<u8> {
        let signature: p384::ecdsa::Signature = self.signing.sign(message);
        signature.to_bytes().to_vec()
    }
}

impl PublicKeyData for P256Key {
    fn der_bytes(&self) -> &[u8] {
        &self.point
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

impl SigningKey for P256Key {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let signature: p256::ecdsa::Signature = self.signing.sign(message);
        Ok(signature.to_der().as_bytes().to_vec())
    }
}

impl PublicKeyData for P384Key {
    fn der_bytes(&self) -> &[u8] {
        &self.point
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P384_SHA384
    }
}

impl SigningKey for P384Key {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let signature: p384::ecdsa::Signature = self.signing.sign(message);
        Ok(signature.to_der().as_bytes().to_vec())
    }
}

/// 32 fresh random bytes.
///
/// # Errors
/// [`TestkitError::Randomness`] when the system gives none.
pub(crate) fn fresh_secret() -> Result<Secret<32>, TestkitError> {
    Secret::try_from_fn(|bytes| getrandom::fill(bytes).map_err(|error| TestkitError::Randomness(error.to_string())))
}

/// `N` public bytes that depend on the secret and the label, for identifiers such as a PPID.
pub(crate) fn derive_public<const N: usize>(secret: &Secret<32>, info: &[&[u8]]) -> [u8; N] {
    let mut out = [0; N];
    expand(secret, info, 0, &mut out);
    out
}

/// 32 secret bytes that depend on the secret and the label.
pub(crate) fn derive_secret(secret: &Secret<32>, info: &[&[u8]]) -> Secret<32> {
    Secret::from_fn(|out| expand(secret, info, 0, out))
}

/// Tries counters until the bytes are a scalar of the curve; the first one is, but for one case in 2^32 and fewer.
fn derive_scalar<const N: usize, T>(secret: &Secret<32>, info: &[&[u8]], make: impl Fn(&[u8; N]) -> Option<T>) -> T {
    let mut counter = 0u32;
    loop {
        let candidate = Secret::<N>::from_fn(|out| expand(secret, info, counter, out));
        if let Some(key) = candidate.expose(&make) {
            return key;
        }
        counter = counter.wrapping_add(1);
    }
}

/// HKDF-SHA-512; each part of the label carries its length, so that no two labels meet.
fn expand(secret: &Secret<32>, info: &[&[u8]], counter: u32, out: &mut [u8]) {
    let mut label = counter.to_be_bytes().to_vec();
    for part in info {
        label.extend((part.len() as u64).to_be_bytes());
        label.extend_from_slice(part);
    }
    secret.expose(|ikm| {
        Hkdf::<Sha512>::new(Some(b"dstack software TEE 1"), ikm)
            .expand(&label, out)
            .expect("outputs here are far below the 16,320 bytes that HKDF-SHA-512 gives")
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derived_values_depend_on_every_part_of_the_label() {
        let secret = Secret::from_fn(|bytes| bytes.fill(7));
        let ab_c: [u8; 16] = derive_public(&secret, &[b"ab", b"c"]);
        assert_eq!(ab_c, derive_public(&secret, &[b"ab", b"c"]));
        assert_ne!(ab_c, derive_public(&secret, &[b"a", b"bc"]));
        assert_ne!(ab_c, derive_public(&Secret::from_fn(|bytes| bytes.fill(8)), &[b"ab", b"c"]));
    }

    #[test]
    fn keys_survive_their_file_form() {
        let secret = Secret::from_fn(|bytes| bytes.fill(7));
        let small = P256Key::derive(&secret, &[b"x"]);
        let again = small.to_pkcs8().unwrap().expose(P256Key::from_pkcs8).unwrap();
        assert_eq!(small.der_bytes(), again.der_bytes());
        assert_eq!(small.sign_raw(b"m").len(), 64);
        let large = P384Key::derive(&secret, &[b"x"]);
        let again = large.to_pkcs8().unwrap().expose(P384Key::from_pkcs8).unwrap();
        assert_eq!(large.der_bytes(), again.der_bytes());
        assert_eq!(large.sign_raw(b"m").len(), 96);
        assert!(P256Key::from_pkcs8(b"no key").is_err());
    }
}
