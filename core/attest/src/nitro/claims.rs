//! What an NSM document claims, for tools that show it. Owns: that list. Never: verifies; no judgement may rest on it.

use super::cose::Sign1;
use super::document::{Document, Maker};
use super::{DOCUMENT_BYTES_MAX, PART, PcrMap};
use crate::AttestError;
use dstack_protocol::UnixMillis;

/// The members of a document of which nothing is verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// Name of the enclave.
    pub module_id: String,
    /// When the document was made.
    pub timestamp: UnixMillis,
    /// PCRs.
    pub pcrs: PcrMap,
    /// `user_data` of the request.
    pub user_data: Option<Vec<u8>>,
    /// `nonce` of the request.
    pub nonce: Option<Vec<u8>>,
    /// `public_key` of the request.
    pub public_key: Option<Vec<u8>>,
    /// Certificates of the bundle, without the leaf.
    pub certificates: usize,
}

/// Decodes a document without verifying it.
/// # Errors
/// Classes `parse.*` and `sig.algorithm`, as [`super::verify`].
pub fn claims(document: &[u8]) -> Result<Claims, AttestError> {
    if document.len() > DOCUMENT_BYTES_MAX {
        return Err(AttestError::Length { part: PART, length_bytes: document.len(), limit_bytes: DOCUMENT_BYTES_MAX });
    }
    let message = Sign1::decode(document)?;
    let document = Document::decode(message.payload, Maker::Nsm).or_else(|_| Document::decode(message.payload, Maker::NitroTpm))?;
    Ok(Claims {
        module_id: document.module_id.to_owned(),
        timestamp: UnixMillis(document.timestamp_ms),
        pcrs: document.pcrs,
        user_data: document.user_data.map(<[u8]>::to_vec),
        nonce: document.nonce.map(<[u8]>::to_vec),
        public_key: document.public_key.map(<[u8]>::to_vec),
        certificates: document.cabundle.len(),
    })
}
