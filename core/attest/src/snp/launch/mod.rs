//! Ties the OS image to the launch measurement. Owns: the measurement documents beside a report and their proof by recomputing.
//! Never: believes an image hash that no recomputed measurement stands behind; fetches an image.
//! Source: dstack attestation reference, section 6 (SEV-SNP row) and 8 (VmConfig, `sev_snp_measurement`, `measurement.snp.cbor`).
//!
//! Two forms are read. The later one carries `sha256sum.txt` of the image, whose digest is the image's hash, and the measured values in
//! CBOR that this file lists. The earlier one carries the values alone: it explains the measurement, but names no image.

mod digest;
mod document;
mod vmsa;

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::AttestError;

/// Largest document beside a report.
const CONFIG_BYTES_MAX: usize = 256 * 1024;

#[derive(Deserialize)]
struct VmConfig {
    os_image_hash: Option<String>,
    sev_snp_measurement: Option<String>,
}

/// The hash of the OS image that `measurement` is of, as far as `config` (VmConfig text) proves one.
/// # Errors
/// [`AttestError::Measurement`] where the documents lead to another measurement or image; `parse.*` where they are none.
pub(super) fn os_image_hash(config: &str, measurement: &[u8; 48]) -> Result<Option<[u8; 32]>, AttestError> {
    if config.is_empty() {
        return Ok(None);
    }
    if config.len() > CONFIG_BYTES_MAX {
        return Err(AttestError::Length { part: "vm config", length_bytes: config.len(), limit_bytes: CONFIG_BYTES_MAX });
    }
    let config: VmConfig =
        serde_json::from_str(config).map_err(|_| AttestError::Malformed { part: "vm config", why: "not a json object" })?;
    let Some(text) = config.sev_snp_measurement else { return Ok(None) };
    let document = document::Document::parse(&text)?;
    // Section 6: the launch measurement is recomputed; nothing else makes an image hash more than a claim.
    if document.launch.digest()? != *measurement {
        return Err(AttestError::Measurement { register: "snp launch digest" });
    }
    let Some(manifest) = document.manifest else { return Ok(None) };
    let hash: [u8; 32] = Sha256::digest(manifest).into();
    if config.os_image_hash.is_some_and(|claimed| claimed != hex::encode(hash)) {
        return Err(AttestError::Measurement { register: "os image hash" });
    }
    Ok(Some(hash))
}

#[cfg(test)]
mod tests;
