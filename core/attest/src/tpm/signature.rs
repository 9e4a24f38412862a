//! Signatures of a TPM's attestation key. Owns: TPMT_SIGNATURE and the two plain forms evidence carries instead.
//! Never: takes a hash other than SHA-256 or a scheme other than RSASSA and ECDSA on P-256.
//! Source: TPM 2.0 Library, part 2, section 11.3 (TPMT_SIGNATURE); dstack attestation reference, section 5.2 rule 3.

use crate::{
    AttestError,
    reader::Reader,
    x509::{Key, SignatureAlgorithm},
};

const PART: &str = "tpm signature";
const RSASSA: u16 = 0x0014;
const ECDSA: u16 = 0x0018;
const SHA256: u16 = 0x000b;
/// Largest RSA signature: 8192 bits.
const RSA_BYTES_MAX: usize = 1024;

/// A signature over a TPMS_ATTEST, with SHA-256.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signature<'a> {
    /// RSASSA-PKCS1-v1_5, as it is.
    Rsassa(&'a [u8]),
    /// ECDSA on P-256, `r ‖ s`.
    Ecdsa([u8; 64]),
    /// ECDSA on P-256, in DER: the form a library gives that has read the TPM's.
    EcdsaDer(&'a [u8]),
}

impl<'a> Signature<'a> {
    /// Parses a whole TPMT_SIGNATURE.
    /// # Errors
    /// Parse classes, [`AttestError::Algorithm`] for any other scheme or hash.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, AttestError> {
        let mut reader = Reader::new(bytes, PART);
        let (scheme, hash) = (reader.u16_be()?, reader.u16_be()?);
        if !matches!(scheme, RSASSA | ECDSA) || hash != SHA256 {
            return Err(AttestError::Algorithm { part: PART, got: format!("{scheme:#06x} with hash {hash:#06x}") });
        }
        let signature = match scheme {
            RSASSA => {
                let signature = reader.sized_be()?;
                if signature.len() > RSA_BYTES_MAX {
                    return Err(AttestError::Length { part: PART, length_bytes: signature.len(), limit_bytes: RSA_BYTES_MAX });
                }
                Self::Rsassa(signature)
            }
            _ => {
                let (r, s) = (scalar(&mut reader)?, scalar(&mut reader)?);
                let mut both = [0; 64];
                let (first, second) = both.split_at_mut(32);
                first.copy_from_slice(&r);
                second.copy_from_slice(&s);
                Self::Ecdsa(both)
            }
        };
        match reader.remaining() {
            0 => Ok(signature),
            count_bytes => Err(AttestError::TrailingBytes { part: PART, count_bytes }),
        }
    }

    /// Whether it is `key`'s over `message`; a key of another kind made no such signature.
    pub(super) fn verifies(&self, message: &[u8], key: Key<'_>) -> bool {
        match self {
            Self::Rsassa(signature) => key.verifies(SignatureAlgorithm::RsaPkcs1Sha256, message, signature),
            Self::Ecdsa(signature) => key.verifies(SignatureAlgorithm::EcdsaP256Sha256Fixed, message, signature),
            Self::EcdsaDer(signature) => key.verifies(SignatureAlgorithm::EcdsaP256Sha256, message, signature),
        }
    }
}

/// An integer of at most 32 bytes, filled up to them: a TPM may leave leading zeros away.
fn scalar(reader: &mut Reader<'_>) -> Result<[u8; 32], AttestError> {
    let bytes = reader.sized_be()?;
    let mut scalar = [0; 32];
    let wrong = AttestError::Field { field: "ecdsa signature", why: "a number of more than 32 bytes" };
    let at = 32_usize.checked_sub(bytes.len()).ok_or(wrong.clone())?;
    scalar.get_mut(at..).ok_or(wrong)?.copy_from_slice(bytes);
    Ok(scalar)
}
