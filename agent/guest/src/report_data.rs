//! How a caller's bytes become the 64 of a quote. Owns: padding, the hashes of `TdxQuote`, the text that names an app key.
//! Source: guest API reference §3.3, §4, §5, §9.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256, Sha384, Sha512};
use sha3::{Keccak256, Keccak384, Keccak512, Sha3_256, Sha3_384, Sha3_512};

use crate::app_key::Algorithm;

/// Why there is no report data. The caller's fault.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReportDataError {
    /// More than 64 bytes.
    #[error("Report data is too long")]
    TooLong,
    /// Raw report data of another length.
    #[error("invalid report data length: expected 64 bytes, got {have_bytes}")]
    NotWhole {
        /// Its length.
        have_bytes: usize,
    },
    /// No such hash.
    #[error(
        "invalid hash algorithm: expected sha256, sha384, sha512, sha3-256, sha3-384, sha3-512, keccak256, keccak384, keccak512 or raw"
    )]
    Hash,
}

/// Zeros to the right.
///
/// # Errors
/// [`ReportDataError::TooLong`].
pub fn padded(bytes: &[u8]) -> Result<[u8; 64], ReportDataError> {
    let mut report_data = [0; 64];
    report_data.get_mut(..bytes.len()).ok_or(ReportDataError::TooLong)?.copy_from_slice(bytes);
    Ok(report_data)
}

/// Exactly 64 bytes.
///
/// # Errors
/// [`ReportDataError::NotWhole`].
pub fn whole(bytes: &[u8]) -> Result<[u8; 64], ReportDataError> {
    bytes.try_into().map_err(|_| ReportDataError::NotWhole { have_bytes: bytes.len() })
}

/// Report data of `TdxQuote`, with hash and tag as applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tagged {
    /// The 64 bytes.
    pub report_data: [u8; 64],
    /// Its name.
    pub hash_algorithm: &'static str,
    /// The tag; empty for raw.
    pub prefix: String,
}

/// `hash(tag ‖ ":" ‖ data)`, left-aligned.
///
/// # Errors
/// [`ReportDataError`].
pub fn tagged(data: &[u8], hash_algorithm: &str, prefix: &str) -> Result<Tagged, ReportDataError> {
    let tag = if prefix.is_empty() { "app-data" } else { prefix };
    let message = [tag.as_bytes(), b":", data].concat();
    let (hash_algorithm, digest) = match hash_algorithm {
        "sha256" => ("sha256", Sha256::digest(&message).to_vec()),
        "sha384" => ("sha384", Sha384::digest(&message).to_vec()),
        "" | "sha512" => ("sha512", Sha512::digest(&message).to_vec()),
        "sha3-256" => ("sha3-256", Sha3_256::digest(&message).to_vec()),
        "sha3-384" => ("sha3-384", Sha3_384::digest(&message).to_vec()),
        "sha3-512" => ("sha3-512", Sha3_512::digest(&message).to_vec()),
        "keccak256" => ("keccak256", Keccak256::digest(&message).to_vec()),
        "keccak384" => ("keccak384", Keccak384::digest(&message).to_vec()),
        "keccak512" => ("keccak512", Keccak512::digest(&message).to_vec()),
        "raw" => return Ok(Tagged { report_data: whole(data)?, hash_algorithm: "raw", prefix: String::new() }),
        _ => return Err(ReportDataError::Hash),
    };
    Ok(Tagged { report_data: padded(&digest)?, hash_algorithm, prefix: tag.to_owned() })
}

/// The text that binds an app's signing key: ASCII, zeros to the right.
///
/// # Errors
/// [`ReportDataError::TooLong`] for what is no public key of the curve.
pub fn of_app_key(algorithm: Algorithm, public_key: &[u8]) -> Result<[u8; 64], ReportDataError> {
    let tag = match algorithm {
        Algorithm::Secp256k1 => "dip1::secp256k1c-pk:",
        Algorithm::Ed25519 => "dip1::ed25519-pk:",
    };
    padded(format!("{tag}{}", URL_SAFE_NO_PAD.encode(public_key)).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_and_hashes() {
        let plain = tagged(b"x", "", "").unwrap();
        assert_eq!((plain.hash_algorithm, plain.prefix.as_str()), ("sha512", "app-data"));
        assert_eq!(plain.report_data.as_slice(), Sha512::digest(b"app-data:x").as_slice());
        let short = tagged(b"x", "sha3-256", "tag").unwrap();
        assert_eq!(&short.report_data[..32], Sha3_256::digest(b"tag:x").as_slice());
        assert_eq!(&short.report_data[32..], [0; 32]);
        for name in ["sha256", "sha384", "sha512", "sha3-256", "sha3-384", "sha3-512", "keccak256", "keccak384", "keccak512"] {
            let length = if name.ends_with("256") {
                32
            } else if name.ends_with("384") {
                48
            } else {
                64
            };
            let tagged = tagged(b"x", name, "").unwrap();
            assert_eq!(tagged.hash_algorithm, name);
            assert!(tagged.report_data[length - 1] != 0 || tagged.report_data[length - 2] != 0);
            assert!(tagged.report_data[length..].iter().all(|byte| *byte == 0), "{name}");
        }
        let raw = tagged(&[7; 64], "raw", "ignored").unwrap();
        assert_eq!(raw, Tagged { report_data: [7; 64], hash_algorithm: "raw", prefix: String::new() });
        assert_eq!(tagged(&[7; 63], "raw", ""), Err(ReportDataError::NotWhole { have_bytes: 63 }));
        assert_eq!(tagged(b"", "md5", ""), Err(ReportDataError::Hash));
        assert_eq!(padded(&[1; 65]).unwrap_err().to_string(), "Report data is too long");
    }

    /// Guest API reference §14.
    #[test]
    fn the_texts_of_app_keys() {
        let public = hex::decode("03ab7f25d56455d300a1c1f77f57f6d16193e89cdd9edc5c5e2994b446b1f3373d").unwrap();
        let text = of_app_key(Algorithm::Secp256k1, &public).unwrap();
        assert_eq!(&text, b"dip1::secp256k1c-pk:A6t_JdVkVdMAocH3f1f20WGT6JzdntxcXimUtEax8zc9");
        let key = dstack_secret::Locked::new(
            dstack_secret::Secret::take_slice(
                &mut hex::decode("1a2b3c4d5e6f7a8b9c0d1e2f3a4b5c6d7e8f9a0b1c2d3e4f5a6b7c8d9e0f1a2b").unwrap(),
            )
            .unwrap(),
        );
        let derived = crate::app_key::derive(&key, "vms", "", Algorithm::Ed25519).unwrap();
        let text = of_app_key(Algorithm::Ed25519, &derived.public_key).unwrap();
        assert_eq!(&text[..60], b"dip1::ed25519-pk:5Pbre1Amf1hrp2V2bbfKlIfxpQb2pJAmrgmhxgVoG9s");
        assert_eq!(&text[60..], [0; 4]);
    }
}
