//! Keys of API v1: named by domain and algorithm, every input length-prefixed. Owns: derivation and claim.
//! Never: a key that v0 would give.
//! Source: guest API reference §7.

use dstack_secret::{Locked, Secret};
use hkdf::Hkdf;
use sha2::Sha256;
use sha3::{Digest as _, Keccak256};

use crate::app_key::{Algorithm, AppKeyError, TEXT_BYTES_MAX, public_key, sign_by_app_key};

/// A derived key with its public half and the first element of its chain.
#[derive(Debug)]
pub struct DerivedKey {
    /// The 32 bytes.
    pub key: Secret<32>,
    /// 33 bytes (SEC1 compressed) or 32.
    pub public_key: Vec<u8>,
    /// `r ‖ s ‖ v` by the app key over the claim.
    pub signature: [u8; 65],
}

/// By v1's names: no alias, no default.
///
/// # Errors
/// [`AppKeyError::Algorithm`].
pub fn algorithm(name: &str) -> Result<Algorithm, AppKeyError> {
    match name {
        "secp256k1" => Ok(Algorithm::Secp256k1),
        "ed25519" => Ok(Algorithm::Ed25519),
        _ => Err(AppKeyError::Algorithm),
    }
}

/// `HKDF-SHA256(salt "dstack-guest-v1", IKM = app key, info = LP("dstack-guest-v1-key") ‖ LP(algorithm) ‖ LP(domain), 32)`.
///
/// # Errors
/// [`AppKeyError`].
pub fn derive(app_key: &Locked<32>, domain: &str, name: &str) -> Result<DerivedKey, AppKeyError> {
    let algorithm = algorithm(name)?;
    if domain.len() > TEXT_BYTES_MAX {
        return Err(AppKeyError::TooLong { field: "domain", have_bytes: domain.len() });
    }
    let info = prefixed(&[b"dstack-guest-v1-key", name.as_bytes(), domain.as_bytes()]);
    let hkdf = app_key.expose(|ikm| Hkdf::<Sha256>::new(Some(b"dstack-guest-v1"), ikm));
    let key = Secret::from_fn(|key: &mut [u8; 32]| hkdf.expand(&info, key).expect("32 bytes, far below 255 hash outputs"));
    let public_key = public_key(&key, algorithm)?;
    let claim = prefixed(&[b"dstack-guest-v1-key-claim", name.as_bytes(), domain.as_bytes(), &public_key]);
    let signature = sign_by_app_key(app_key, &Keccak256::digest(claim).into())?;
    Ok(DerivedKey { key, public_key, signature })
}

/// `LP(x) = u32 big-endian length ‖ x`, of each part.
fn prefixed(parts: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::new();
    for part in parts {
        out.extend_from_slice(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
        out.extend_from_slice(part);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guest API reference §14.
    #[test]
    fn the_references_vectors() {
        let key = Locked::new(
            Secret::take_slice(&mut hex::decode("1a2b3c4d5e6f7a8b9c0d1e2f3a4b5c6d7e8f9a0b1c2d3e4f5a6b7c8d9e0f1a2b").unwrap()).unwrap(),
        );
        let of = |domain: &str, name: &str| derive(&key, domain, name).unwrap();
        let hexed = |key: &DerivedKey| key.key.expose(|bytes| hex::encode(bytes));
        let derived = of("storage-encryption", "secp256k1");
        assert_eq!(hexed(&derived), "5510330f86902ddae38c6d89c93a8408019332c17a429e1abd01c4a28d1544a6");
        assert_eq!(hex::encode(&derived.public_key), "03d962450a41748021c8b02787ac36ce642ff0ae25f4c55019eb527e1112cfd764");
        assert_eq!(
            hex::encode(derived.signature),
            "5b6193729ce7976ec67863f21692d4b98c69832698aae8e001a7d33a6f818b6e46ca950725b6e90e8ca9bcf394abd03ce264bf9b7eec1e91693247f9dd53c26901"
        );
        let derived = of("storage-encryption", "ed25519");
        assert_eq!(hexed(&derived), "3c4c3ece12fa99ccb93fc0090877f80e70545fdd971e2ac93d3398c4684538d3");
        assert_eq!(hex::encode(&derived.public_key), "2380c4a33a60b60613fa43866421e5b96eb8dcde211317200fd0d41e7e491288");
        assert_eq!(hexed(&of("", "secp256k1")), "59f60584ce6fd2a3a31997256db9d77322463fc8a6b1520110401bcb1ee92387");
        assert_eq!(hexed(&of("", "ed25519")), "b023493030669cf22e9cafa6a464d4cf3ae4edfe5474ec796710f21ea011946d");
        for name in ["", "k256", "Secp256k1", "secp256k1_prehashed"] {
            assert_eq!(derive(&key, "", name).unwrap_err(), AppKeyError::Algorithm, "{name}");
        }
        assert!(matches!(derive(&key, &"x".repeat(TEXT_BYTES_MAX + 1), "ed25519"), Err(AppKeyError::TooLong { field: "domain", .. })));
    }
}
