//! Signatures of root `id`: recoverable ECDSA over secp256k1 and a Keccak-256 digest, `r(32) ‖ s(32) ‖ recid(1)`, low-s.
//!
//! Owns: verification and recovery. Never: signs. Source: threshold.md §5.1; KMS API reference §6.

use k256::ecdsa::signature::hazmat::PrehashVerifier as _;
use k256::ecdsa::{RecoveryId, Signature, VerifyingKey};

use crate::CertificateError;

const BAD: CertificateError = CertificateError::BadSignature { what: "identity" };

/// Compressed public key of whoever signed `digest`.
///
/// # Errors
/// [`CertificateError::BadSignature`]: not 65 bytes, a high `s`, a recovery id above 3, or no such point.
pub fn recover(digest: &[u8; 32], signature: &[u8]) -> Result<[u8; 33], CertificateError> {
    let (rs, recid) = signature.split_last_chunk::<1>().ok_or(BAD)?;
    let rs = low_s(rs)?;
    let recid = RecoveryId::from_byte(recid[0]).ok_or(BAD)?;
    let key = VerifyingKey::recover_from_prehash(digest, &rs, recid).map_err(|_| BAD)?;
    key.to_sec1_point(true).as_bytes().try_into().map_err(|_| BAD)
}

/// Verifies `digest` under a compressed public key; the recovery id must lead to it too.
///
/// # Errors
/// [`CertificateError::BadKey`], [`CertificateError::BadSignature`].
pub fn verify(public_key: &[u8], digest: &[u8; 32], signature: &[u8]) -> Result<(), CertificateError> {
    let (rs, _) = signature.split_last_chunk::<1>().ok_or(BAD)?;
    verify_plain(public_key, digest, rs)?;
    if recover(digest, signature)?.as_slice() == public_key { Ok(()) } else { Err(BAD) }
}

/// Verifies a signature without recovery id: an app's claim to its key.
///
/// # Errors
/// [`CertificateError::BadKey`], [`CertificateError::BadSignature`].
pub fn verify_plain(public_key: &[u8], digest: &[u8; 32], rs: &[u8]) -> Result<(), CertificateError> {
    let bad_key = CertificateError::BadKey { what: "identity", algorithm: "secp256k1" };
    if public_key.len() != 33 {
        return Err(bad_key);
    }
    let key = VerifyingKey::from_sec1_bytes(public_key).map_err(|_| bad_key)?;
    key.verify_prehash(digest, &low_s(rs)?).map_err(|_| BAD)
}

/// Whether these are the bytes of a compressed point of secp256k1.
#[must_use]
pub fn is_point(public_key: &[u8; 33]) -> bool {
    VerifyingKey::from_sec1_bytes(public_key).is_ok()
}

fn low_s(rs: &[u8]) -> Result<Signature, CertificateError> {
    let signature = Signature::from_slice(rs).map_err(|_| BAD)?;
    if signature.normalize_s() == signature { Ok(signature) } else { Err(BAD) }
}
