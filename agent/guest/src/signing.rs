//! `Sign` and `Verify` of v0. Owns: their modes, the key they sign with.
//! Source: guest API reference §3.5. Frozen: a prehashed digest of another length than 32 is verified as the curve library reads it.

use dstack_secret::Locked;
use ed25519_dalek::Signer as _;
use k256::ecdsa::signature::Verifier as _;
use k256::ecdsa::signature::hazmat::{PrehashSigner as _, PrehashVerifier as _};
use k256::ecdsa::{Signature, SigningKey, VerifyingKey};

use crate::app_key::{Algorithm, AppKeyError, derive};

/// Path of the signing key.
pub const PATH: &str = "vms";
/// What the chain says the key is for.
const PURPOSE: &str = "signing";

/// How data becomes a signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Ed25519,
    Secp256k1,
    Prehashed,
}

/// Why there is no signature or no verdict. The caller's fault.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SigningError {
    /// No such mode, or no key.
    #[error(transparent)]
    Key(#[from] AppKeyError),
    /// A digest of another length.
    #[error("Pre-hashed signing requires a 32-byte digest, but received {have_bytes} bytes")]
    Digest {
        /// Its length.
        have_bytes: usize,
    },
    /// A signature or public key that is none.
    #[error("{field} is not {expected}")]
    Encoding {
        /// Which.
        field: &'static str,
        /// What it may be.
        expected: &'static str,
    },
}

/// A signature, and how its key hangs on the app key.
#[derive(Debug)]
pub struct Signed {
    /// 64 bytes.
    pub signature: [u8; 64],
    /// By the app key, over the public key.
    pub key_signature: [u8; 65],
    /// 33 or 32 bytes.
    pub public_key: Vec<u8>,
}

fn mode(name: &str) -> Result<Mode, AppKeyError> {
    match name {
        "ed25519" => Ok(Mode::Ed25519),
        "secp256k1" | "k256" => Ok(Mode::Secp256k1),
        "secp256k1_prehashed" => Ok(Mode::Prehashed),
        _ => Err(AppKeyError::Algorithm),
    }
}

/// Signs with the key of path `vms`.
///
/// # Errors
/// [`SigningError`].
pub fn sign(app_key: &Locked<32>, algorithm: &str, data: &[u8]) -> Result<Signed, SigningError> {
    let mode = mode(algorithm)?;
    let curve = if mode == Mode::Ed25519 { Algorithm::Ed25519 } else { Algorithm::Secp256k1 };
    if mode == Mode::Prehashed && data.len() != 32 {
        return Err(SigningError::Digest { have_bytes: data.len() });
    }
    let derived = derive(app_key, PATH, PURPOSE, curve)?;
    let signature = derived.key.expose(|bytes| match mode {
        Mode::Ed25519 => Ok(ed25519_dalek::SigningKey::from_bytes(bytes).sign(data).to_bytes()),
        Mode::Secp256k1 | Mode::Prehashed => {
            let key = SigningKey::from_slice(bytes).map_err(|_| AppKeyError::NotAScalar)?;
            let signature: Result<Signature, _> = match mode {
                Mode::Prehashed => key.sign_prehash(data),
                _ => k256::ecdsa::signature::Signer::try_sign(&key, data),
            };
            let signature = signature.map_err(|_| AppKeyError::NotAScalar)?.normalize_s();
            Ok(signature.to_bytes().into())
        }
    });
    Ok(Signed { signature: signature.map_err(SigningError::Key)?, key_signature: derived.signature, public_key: derived.public_key })
}

/// Judges a signature. A high `s` is a signature that does not hold.
///
/// # Errors
/// [`SigningError`] for what is no signature or no key.
pub fn verify(algorithm: &str, data: &[u8], signature: &[u8], public_key: &[u8]) -> Result<bool, SigningError> {
    let wrong = |field, expected| SigningError::Encoding { field, expected };
    match mode(algorithm)? {
        Mode::Ed25519 => {
            let key = public_key.try_into().ok().and_then(|bytes| ed25519_dalek::VerifyingKey::from_bytes(bytes).ok());
            let key = key.ok_or_else(|| wrong("public_key", "an Ed25519 public key of 32 bytes"))?;
            let signature =
                ed25519_dalek::Signature::from_slice(signature).map_err(|_| wrong("signature", "an Ed25519 signature of 64 bytes"))?;
            Ok(ed25519_dalek::Verifier::verify(&key, data, &signature).is_ok())
        }
        mode => {
            let key = VerifyingKey::from_sec1_bytes(public_key).map_err(|_| wrong("public_key", "a secp256k1 public key in SEC1 form"))?;
            let signature = Signature::from_slice(signature).map_err(|_| wrong("signature", "an ECDSA signature of 64 bytes (r, s)"))?;
            Ok(match mode {
                Mode::Prehashed => key.verify_prehash(data, &signature).is_ok(),
                _ => key.verify(data, &signature).is_ok(),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use dstack_secret::Secret;
    use sha2::{Digest as _, Sha256};

    use super::*;

    fn app_key() -> Locked<32> {
        Locked::new(
            Secret::take_slice(&mut hex::decode("1a2b3c4d5e6f7a8b9c0d1e2f3a4b5c6d7e8f9a0b1c2d3e4f5a6b7c8d9e0f1a2b").unwrap()).unwrap(),
        )
    }

    #[test]
    fn what_is_signed_verifies_and_nothing_else() {
        let digest = Sha256::digest(b"message");
        for (algorithm, data) in
            [("ed25519", b"message".as_slice()), ("secp256k1", b"message"), ("k256", b""), ("secp256k1_prehashed", &digest)]
        {
            let signed = sign(&app_key(), algorithm, data).unwrap();
            assert_eq!(verify(algorithm, data, &signed.signature, &signed.public_key), Ok(true), "{algorithm}");
            assert_eq!(verify(algorithm, b"another message of some length...", &signed.signature, &signed.public_key), Ok(false));
            let mut other = signed.signature;
            other[10] ^= 1;
            assert_eq!(verify(algorithm, data, &other, &signed.public_key), Ok(false));
        }
        // The two secp256k1 modes are one signature.
        let (whole, hashed) =
            (sign(&app_key(), "secp256k1", b"message").unwrap(), sign(&app_key(), "secp256k1_prehashed", &digest).unwrap());
        assert_eq!(whole.signature, hashed.signature);
        assert_eq!(hex::encode(&whole.public_key), "03ab7f25d56455d300a1c1f77f57f6d16193e89cdd9edc5c5e2994b446b1f3373d");
    }

    #[test]
    fn the_quirks_of_the_frozen_api() {
        let digest = Sha256::digest(b"m");
        let signed = sign(&app_key(), "secp256k1_prehashed", &digest).unwrap();
        let low = Signature::from_slice(&signed.signature).unwrap();
        let high = Signature::from_scalars(low.r(), -low.s()).unwrap();
        assert_eq!(verify("secp256k1_prehashed", &digest, &high.to_bytes(), &signed.public_key), Ok(false), "high s");
        // Longer digests are cut, shorter ones filled, very short ones hold for nothing.
        let longer = [digest.as_slice(), b"more"].concat();
        assert_eq!(verify("secp256k1_prehashed", &longer, &signed.signature, &signed.public_key), Ok(true));
        let mut padded = [0; 32];
        padded[16..].copy_from_slice(&digest[..16]);
        let short = sign(&app_key(), "secp256k1_prehashed", &padded).unwrap();
        assert_eq!(verify("secp256k1_prehashed", &digest[..16], &short.signature, &short.public_key), Ok(true));
        assert_eq!(verify("secp256k1_prehashed", &digest[..15], &short.signature, &short.public_key), Ok(false));
        let refused = sign(&app_key(), "secp256k1_prehashed", b"short").unwrap_err();
        assert_eq!(refused.to_string(), "Pre-hashed signing requires a 32-byte digest, but received 5 bytes");
        for algorithm in ["", "rsa", "Ed25519"] {
            assert_eq!(sign(&app_key(), algorithm, b"").unwrap_err().to_string(), "Unsupported algorithm");
            assert_eq!(verify(algorithm, b"", &[], &[]).unwrap_err().to_string(), "Unsupported algorithm");
        }
        for (algorithm, signature, key) in [
            ("ed25519", vec![0; 63], vec![0; 32]),
            ("ed25519", vec![0; 64], vec![0; 31]),
            ("secp256k1", signed.signature[..63].to_vec(), signed.public_key.clone()),
            ("secp256k1", signed.signature.to_vec(), vec![2; 32]),
            ("secp256k1", vec![0; 64], signed.public_key.clone()),
        ] {
            assert!(matches!(verify(algorithm, b"", &signature, &key), Err(SigningError::Encoding { .. })), "{algorithm}");
        }
    }
}
