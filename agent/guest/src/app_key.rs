//! Keys that applications ask for by path. Owns: dstack's derivation from the app key, and the signature that ties them to it.
//! Never: hands out the app key itself.
//! Source: guest API reference §3.2. `purpose` is no input of the derivation and both curves share the 32 bytes: quirks of the
//! frozen API, kept bit-exact.

use dstack_secret::{Locked, Secret};
use hkdf::Hkdf;
use k256::ecdsa::SigningKey;
use sha2::Sha256;
use sha3::{Digest as _, Keccak256};

/// Longest path or purpose, bytes; a path is one HKDF info.
pub const TEXT_BYTES_MAX: usize = 64 * 1024;

/// Which curve the caller uses the 32 bytes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// secp256k1; the bytes are the scalar.
    Secp256k1,
    /// Ed25519; the bytes are the seed of RFC 8032.
    Ed25519,
}

/// Why there is no key. The caller's fault, but for the last.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AppKeyError {
    /// No such algorithm.
    #[error("Unsupported algorithm")]
    Algorithm,
    /// Path or purpose is too long.
    #[error("{field} has {have_bytes} bytes, at most {TEXT_BYTES_MAX} are taken")]
    TooLong {
        /// Which.
        field: &'static str,
        /// Its length.
        have_bytes: usize,
    },
    /// The bytes are no scalar of the curve; happens with probability 2⁻¹²⁸. Use another path.
    #[error("the key of this path is no scalar of its curve")]
    NotAScalar,
}

impl Algorithm {
    /// By dstack's names; empty is secp256k1.
    ///
    /// # Errors
    /// [`AppKeyError::Algorithm`].
    pub fn from_name(name: &str) -> Result<Self, AppKeyError> {
        match name {
            "" | "secp256k1" | "k256" => Ok(Self::Secp256k1),
            "ed25519" => Ok(Self::Ed25519),
            _ => Err(AppKeyError::Algorithm),
        }
    }
}

/// A derived key and the first element of its signature chain.
#[derive(Debug)]
pub struct DerivedKey {
    /// The 32 bytes.
    pub key: Secret<32>,
    /// 33 bytes (SEC1 compressed) or 32.
    pub public_key: Vec<u8>,
    /// `r ‖ s ‖ v` by the app key over `Keccak-256(purpose ‖ ":" ‖ hex(public key))`.
    pub signature: [u8; 65],
}

/// Derives the key of `path` from the app key: `HKDF-SHA256(salt "RATLS", IKM = app key, info = path, 32)`.
///
/// # Errors
/// [`AppKeyError`].
pub fn derive(app_key: &Locked<32>, path: &str, purpose: &str, algorithm: Algorithm) -> Result<DerivedKey, AppKeyError> {
    for (field, text) in [("path", path), ("purpose", purpose)] {
        if text.len() > TEXT_BYTES_MAX {
            return Err(AppKeyError::TooLong { field, have_bytes: text.len() });
        }
    }
    let key = app_key.expose(|ikm| kdf(ikm, path.as_bytes()));
    let public = public_key(&key, algorithm)?;
    let signature = sign_by_app_key(app_key, &claim_digest(purpose, &public))?;
    Ok(DerivedKey { key, public_key: public, signature })
}

/// `Keccak-256(purpose ‖ ":" ‖ hex(public key))`.
fn claim_digest(purpose: &str, public_key: &[u8]) -> [u8; 32] {
    Keccak256::new().chain_update(purpose).chain_update(b":").chain_update(hex::encode(public_key)).finalize().into()
}

/// `r ‖ s ‖ v`, low-s, RFC 6979, over a digest.
pub(crate) fn sign_by_app_key(app_key: &Locked<32>, digest: &[u8; 32]) -> Result<[u8; 65], AppKeyError> {
    let signer = app_key.expose(|bytes| SigningKey::from_slice(bytes)).map_err(|_| AppKeyError::NotAScalar)?;
    let (rs, v) = signer.sign_prehash_recoverable(digest);
    let mut signature = [0; 65];
    let (head, tail) = signature.split_at_mut(64);
    head.copy_from_slice(&rs.to_bytes());
    tail.fill(v.to_byte());
    Ok(signature)
}

/// dstack's derivation: `HKDF-SHA256(salt "RATLS", IKM, info = path, 32)`.
#[must_use]
pub fn kdf(ikm: &[u8; 32], path: &[u8]) -> Secret<32> {
    let hkdf = Hkdf::<Sha256>::new(Some(b"RATLS"), ikm);
    Secret::from_fn(|key: &mut [u8; 32]| hkdf.expand(path, key).expect("32 bytes, far below 255 hash outputs"))
}

/// 33 bytes (SEC1 compressed) or 32.
pub(crate) fn public_key(key: &Secret<32>, algorithm: Algorithm) -> Result<Vec<u8>, AppKeyError> {
    match algorithm {
        Algorithm::Secp256k1 => {
            let key = key.expose(|bytes| SigningKey::from_slice(bytes)).map_err(|_| AppKeyError::NotAScalar)?;
            Ok(key.verifying_key().to_sec1_point(true).as_bytes().to_vec())
        }
        Algorithm::Ed25519 => Ok(key.expose(ed25519_dalek::SigningKey::from_bytes).verifying_key().to_bytes().to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app_key(text: &str) -> Locked<32> {
        Locked::new(Secret::take_slice(&mut hex::decode(text).unwrap()).unwrap())
    }

    /// Guest API reference §14.
    #[test]
    fn the_references_vectors() {
        let key = app_key("6a77df55522c222fcb593ca9bb0d96132429d99b5c078cd152f1c0367516d6fb");
        let derived = derive(&key, "wallet/eth", "mainnet", Algorithm::Secp256k1).unwrap();
        assert_eq!(derived.key.expose(|b| hex::encode(b)), "5db1f81c635c85bc7d5f700fad451e588d8e792d75ca52b2bb93b6ce37358c88");
        let public = public_key(&derived.key, Algorithm::Secp256k1).unwrap();
        assert_eq!(hex::encode(&public), "032522c928c71e213d8830bb3599c219513d1da0a8c1624833a983a5ddac379b2d");
        let claim = claim_digest("mainnet", &public);
        assert_eq!(hex::encode(claim), "7125fd88d0e81964fe3b35c6d36671ae4e26158c623a203e9efaf0393218a680");

        let key = app_key("1a2b3c4d5e6f7a8b9c0d1e2f3a4b5c6d7e8f9a0b1c2d3e4f5a6b7c8d9e0f1a2b");
        let derived = derive(&key, "test", "signing", Algorithm::from_name("").unwrap()).unwrap();
        assert_eq!(derived.key.expose(|b| hex::encode(b)), "52786aa123b0971e283af97f32e25767483d099d66e6c40afeb3a49046b5379e");
        let chain = "c8a3dcf06c4e95bd78a5d7a1c8fcff171fc5848cfae804c6fc11bda4dc5d4062379995390843827444992c4c0e4bac70f0f878e01b9fc8b98cd7126fe5a3876b01";
        assert_eq!(hex::encode(derived.signature), chain);
        assert_eq!(hex::encode(&derived.public_key), "02ead9e0064aad1bb151c270c78ef82a4caf6d3fc92c311804e79751deb3476919");
        let claim = claim_digest("signing", &derived.public_key);
        assert_eq!(hex::encode(claim), "d3e444b4603fcb389c6c32ecb3e55126544fff5294389b5040fbab56232905b5");
        let derived = derive(&key, "vms", "signing", Algorithm::Secp256k1).unwrap();
        let public = public_key(&derived.key, Algorithm::Secp256k1).unwrap();
        assert_eq!(hex::encode(public), "03ab7f25d56455d300a1c1f77f57f6d16193e89cdd9edc5c5e2994b446b1f3373d");
    }

    #[test]
    fn both_curves_share_the_bytes_and_differ_in_the_signature() {
        let key = app_key("1a2b3c4d5e6f7a8b9c0d1e2f3a4b5c6d7e8f9a0b1c2d3e4f5a6b7c8d9e0f1a2b");
        let on = |algorithm| derive(&key, "p", "q", algorithm).unwrap();
        let (a, b) = (on(Algorithm::Secp256k1), on(Algorithm::Ed25519));
        assert_eq!(a.key, b.key);
        assert_ne!(a.signature, b.signature);
        // The app key signs in both cases, over the public key of the curve.
        let public = b.key.expose(ed25519_dalek::SigningKey::from_bytes).verifying_key().to_bytes();
        let digest = Keccak256::digest(format!("q:{}", hex::encode(public)));
        let recovered = k256::ecdsa::VerifyingKey::recover_from_prehash(
            &digest,
            &k256::ecdsa::Signature::from_slice(&b.signature[..64]).unwrap(),
            k256::ecdsa::RecoveryId::from_byte(b.signature[64]).unwrap(),
        );
        let own = key.expose(|bytes| SigningKey::from_slice(bytes)).unwrap();
        assert_eq!(recovered.unwrap(), *own.verifying_key());
    }

    #[test]
    fn refuses_what_is_no_algorithm_or_too_long() {
        assert_eq!(Algorithm::from_name("rsa"), Err(AppKeyError::Algorithm));
        assert_eq!(AppKeyError::Algorithm.to_string(), "Unsupported algorithm");
        let long = "x".repeat(TEXT_BYTES_MAX + 1);
        let refused = derive(&app_key(&"11".repeat(32)), &long, "", Algorithm::Ed25519).unwrap_err();
        assert_eq!(refused, AppKeyError::TooLong { field: "path", have_bytes: TEXT_BYTES_MAX + 1 });
    }
}
