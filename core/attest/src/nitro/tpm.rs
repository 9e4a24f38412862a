//! NitroTPM: the document that the TPM of an EC2 instance makes. Owns: what it proves beyond an enclave's document.
//! Never: asks for enclave PCRs; the two kinds of documents name their PCRs differently and neither passes for the other.
//! Source: dstack attestation reference, sections 5.4, 6 and 7.

use dstack_protocol::UnixMillis;
use sha2::{Digest, Sha256};

use super::{VerifiedDocument, document::Maker, verify_document};
use crate::{
    AttestError, Trace, TrustRoots,
    eventlog::{self, ProvenEvents},
    image::{self, ImageClaim},
    wire::RuntimeEvent,
};

/// PCRs of what was started: boot loader and kernel image, Secure Boot, command line.
pub(super) const BOOT_PCRS: [u8; 3] = [4, 7, 12];
/// The PCR that runtime events extend.
const RUNTIME_PCR: u8 = 14;

/// Verifies a NitroTPM's document at `now` under `roots`. The caller compares `user_data` or `nonce`.
/// # Errors
/// As [`super::verify`].
pub fn verify(document: &[u8], roots: &TrustRoots, now: UnixMillis) -> Result<VerifiedDocument, AttestError> {
    verify_traced(document, roots, now, &Trace::new())
}

/// As [`verify`], and notes in `trace` every check that was begun.
/// # Errors
/// As [`verify`].
pub fn verify_traced(document: &[u8], roots: &TrustRoots, now: UnixMillis, trace: &Trace) -> Result<VerifiedDocument, AttestError> {
    verify_document(document, Maker::NitroTpm, roots, now, trace)
}

/// Proves `events`: the document's PCR14 is what they lead to.
/// # Errors
/// [`AttestError::ReplayMismatch`], [`AttestError::EventDigest`] for a name that could be read two ways.
pub fn prove_events(document: &VerifiedDocument, events: &[RuntimeEvent]) -> Result<ProvenEvents, AttestError> {
    eventlog::prove_into(events, document.pcrs().required(RUNTIME_PCR)?, RUNTIME_PCR.into())
}

/// The OS image of VmConfig, where one is claimed: its measurement document has to name the boot PCRs.
/// # Errors
/// [`AttestError::Measurement`], parse classes.
pub fn os_image(document: &VerifiedDocument, config: &str) -> Result<Option<[u8; 32]>, AttestError> {
    let claim = ImageClaim::parse(config)?;
    let Some(hash) = claim.os_image_hash else { return Ok(None) };
    let unproven = AttestError::Measurement { register: "os image: claimed without its measurement document" };
    let boot = image::aws_boot(claim.aws.ok_or(unproven)?.prove(&hash, "measurement.aws.cbor")?)?;
    match boot == <[u8; 32]>::from(Sha256::digest(document.image())) {
        true => Ok(Some(hash)),
        false => Err(AttestError::Measurement { register: "os image: not the one pcr 4, 7 and 12 measure" }),
    }
}
