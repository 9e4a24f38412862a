//! Verifies the vTPM half of Google Cloud evidence. Owns: the order of its checks and what they prove together.
//! Never: fetches an intermediate or a list, reads the clock, judges the TD quote (that is `tdx`).
//! Source: dstack attestation reference, sections 5.2 and 6; the vectors' README ("The `gcp-bound/*` vectors").
//!
//! The TPM's quote signs the hash of the TD quote, and both halves have to be reached by one list of runtime events: RTMR3 in the TD,
//! PCR14 in the TPM. Evidence whose TPM half does not hold is refused whole: it is not TDX evidence of another kind.

pub(crate) mod chain;
mod checks;

use dstack_protocol::UnixMillis;
use sha2::{Digest, Sha256};

pub use chain::{chain_of_pem, verify_ak};
pub use checks::CHECKS;

use crate::{
    AttestError, Trace, VerifyContext,
    eventlog::tpm::{replay_list, replay_runtime},
    image::{self, ImageClaim},
    tpm::{self, Bank, PcrSet, PcrValues, Quote, Signature},
    wire::{RuntimeEvent, TpmPlatform, TpmQuote},
    x509::{Revocation, Untrusted},
};

/// PCRs that are quoted: firmware, the loaded kernel image, runtime events.
pub const QUOTED: PcrSet = PcrSet::new(Bank::Sha256, &[FIRMWARE, KERNEL, RUNTIME]);
const FIRMWARE: u32 = 0;
const KERNEL: u32 = 2;
const RUNTIME: u32 = 14;
/// Which event of PCR2 measures the unified kernel image.
const KERNEL_EVENT: usize = 2;

/// What the vTPM half proves. Made by [`verify`] only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedVtpm {
    firmware: [u8; 32],
    kernel: [u8; 32],
    runtime: [u8; 32],
    os_image_hash: Option<[u8; 32]>,
    earliest_expiry: UnixMillis,
    software_root: bool,
}

impl VerifiedVtpm {
    /// PCR0: the firmware.
    #[must_use]
    pub const fn firmware(&self) -> &[u8; 32] {
        &self.firmware
    }

    /// PCR2: what the firmware loaded.
    #[must_use]
    pub const fn kernel(&self) -> &[u8; 32] {
        &self.kernel
    }

    /// PCR14: the runtime events.
    #[must_use]
    pub const fn runtime(&self) -> &[u8; 32] {
        &self.runtime
    }

    /// Hash of the OS image, tied to the third event of PCR2; `None` where the evidence carries no events of PCR2.
    #[must_use]
    pub const fn os_image_hash(&self) -> Option<[u8; 32]> {
        self.os_image_hash
    }

    /// When a certificate or list of the attestation key's path is to be renewed.
    #[must_use]
    pub const fn earliest_expiry(&self) -> UnixMillis {
        self.earliest_expiry
    }

    /// Whether the path ended at a software root.
    #[must_use]
    pub const fn software_root(&self) -> bool {
        self.software_root
    }
}

/// Verifies the vTPM half that came with `td_quote` (the bytes as given, padding included), `events` and the VmConfig `config`.
/// # Errors
/// One [`AttestError`] per reason, in the order of [`CHECKS`].
pub fn verify(
    td_quote: &[u8],
    evidence: &TpmQuote,
    events: &[RuntimeEvent],
    config: &str,
    context: &VerifyContext<'_>,
    trace: &Trace,
) -> Result<VerifiedVtpm, AttestError> {
    trace.enter(&checks::FORM);
    if evidence.platform != TpmPlatform::Gcp {
        return Err(AttestError::Field { field: "tpm platform", why: "not gcp" });
    }
    Quote::parse(&evidence.message)?;
    let signature = Signature::parse(&evidence.signature)?;

    trace.enter(&checks::AK_CHAIN);
    let pool = context.collateral.x509();
    let untrusted = Untrusted { presented: &[], pinned: &pool.certificates, crls: &pool.crls };
    let revocation = match context.tcb.accepts_missing_crl() {
        true => Revocation::WhereGiven,
        false => Revocation::WhereNamed,
    };
    let path = verify_ak(&evidence.ak_cert, &untrusted, context.roots, context.now, revocation)?;

    trace.enter(&checks::SIGNATURE);
    let quote = tpm::verify_quote(&evidence.message, &signature, path.key()?)?;

    trace.enter(&checks::BINDING);
    require_bound(&quote, td_quote)?;

    trace.enter(&checks::SELECTION);
    quote.require_selection(QUOTED)?;
    let mut values = PcrValues::default();
    for pcr in &evidence.pcr_values {
        let bank = Bank::named(&pcr.algorithm).ok_or(AttestError::PcrSelection { why: "a bank of an unknown hash" })?;
        values.add(bank, pcr.index, pcr.value.clone())?;
    }
    trace.enter(&checks::PCR_DIGEST);
    quote.require_values(&values)?;
    let value = |index| values.get(Bank::Sha256, index).and_then(|value| <[u8; 32]>::try_from(value).ok()).ok_or(AttestError::PcrDigest);
    let (firmware, kernel, runtime) = (value(FIRMWARE)?, value(KERNEL)?, value(RUNTIME)?);

    trace.enter(&checks::BOOT_LOG);
    for (index, signed) in [(FIRMWARE, &firmware), (KERNEL, &kernel), (RUNTIME, &runtime)] {
        if replay_list(&evidence.event_log, index, Bank::Sha256)?.is_some_and(|replayed| replayed != signed) {
            return Err(AttestError::ReplayMismatch { register: index });
        }
    }
    trace.enter(&checks::RUNTIME_LOG);
    if replay_runtime(events, Bank::Sha256) != runtime {
        return Err(AttestError::ReplayMismatch { register: RUNTIME });
    }

    trace.enter(&checks::FIRMWARE);
    if !context.tcb.google_firmware().contains(&firmware) {
        return Err(AttestError::Measurement { register: "pcr 0: a firmware that is not listed" });
    }
    trace.enter(&checks::IMAGE);
    Ok(VerifiedVtpm {
        firmware,
        kernel,
        runtime,
        os_image_hash: os_image(evidence, config)?,
        earliest_expiry: path.earliest_expiry(),
        software_root: path.root().is_software(),
    })
}

/// The TPM's quote was made for exactly these bytes of a TD quote.
/// # Errors
/// [`AttestError::TpmQuote`].
pub fn require_bound(quote: &Quote<'_>, td_quote: &[u8]) -> Result<(), AttestError> {
    match Sha256::digest(td_quote).as_slice() == quote.extra_data {
        true => Ok(()),
        false => Err(AttestError::TpmQuote),
    }
}

/// Both forms in the field: with a measurement document the claimed hash is the image's, and the document names the kernel; without,
/// the hash is the kernel's own (0.5.x), claimed or not.
fn os_image(evidence: &TpmQuote, config: &str) -> Result<Option<[u8; 32]>, AttestError> {
    let claim = ImageClaim::parse(config)?;
    let other = AttestError::Measurement { register: "os image: not the one the third event of pcr 2 measures" };
    let measured = evidence.event_log.iter().filter(|event| event.pcr_index == KERNEL).nth(KERNEL_EVENT);
    let Some(measured) = measured.and_then(|event| <[u8; 32]>::try_from(&event.digest[..]).ok()) else {
        return match claim.os_image_hash {
            Some(_) => Err(other),
            None => Ok(None),
        };
    };
    let hash = claim.os_image_hash.unwrap_or(measured);
    let kernel = match &claim.gcp {
        Some(document) => image::gcp_uki(document.prove(&hash, "measurement.gcp.cbor")?)?,
        None => hash,
    };
    match kernel == measured {
        true => Ok(Some(hash)),
        false => Err(other),
    }
}
