//! TPMS_ATTEST of a quote. Owns: its layout, and the comparison of claimed PCRs with what it signs.
//! Never: verifies a signature; the fields are claims until [`super::verify_quote`] has passed.
//! Source: TPM 2.0 Library, part 2, sections 10.12.8 (TPMS_ATTEST), 10.12.1 (TPMS_QUOTE_INFO), 10.11 (TPMS_CLOCK_INFO).

use super::pcr::{Bank, PcrSet, PcrValues};
use crate::{AttestError, reader::Reader};

/// Largest message taken; one of all 24 PCRs has 145 bytes.
pub const QUOTE_BYTES_MAX: usize = 4 * 1024;

const PART: &str = "tpm quote";
/// TPM_GENERATED_VALUE: no key of the TPM signs foreign bytes that begin so.
const MAGIC: u32 = 0xff54_4347;
/// TPM_ST_ATTEST_QUOTE.
const TYPE_QUOTE: u16 = 0x8018;
/// Most selections: a TPM has at most 16 banks.
const SELECTIONS_MAX: u32 = 16;

/// A parsed quote; the slices are parts of the message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quote<'a> {
    /// Name of the signing key, with its parents' hashed in.
    pub qualified_signer: &'a [u8],
    /// What the caller gave to be signed: the nonce, or the hash of what is bound.
    pub extra_data: &'a [u8],
    /// Milliseconds the TPM was powered.
    pub clock_ms: u64,
    /// Resets since the owner was cleared.
    pub reset_count: u32,
    /// Restarts since the last reset.
    pub restart_count: u32,
    /// Whether the clock is surely ahead of every value reported before.
    pub safe: bool,
    /// Vendor's firmware version.
    pub firmware_version: u64,
    /// PCRs that are signed, in the order of their digest.
    pub selections: Vec<PcrSet>,
    /// Digest over them.
    pub pcr_digest: &'a [u8],
}

impl<'a> Quote<'a> {
    /// Parses the whole of `message`.
    /// # Errors
    /// Parse classes, [`AttestError::NotAQuote`] for a message of another type, [`AttestError::PcrSelection`] for an unknown bank.
    pub fn parse(message: &'a [u8]) -> Result<Self, AttestError> {
        if message.len() > QUOTE_BYTES_MAX {
            return Err(AttestError::Length { part: PART, length_bytes: message.len(), limit_bytes: QUOTE_BYTES_MAX });
        }
        let mut reader = Reader::new(message, PART);
        if reader.u32_be()? != MAGIC {
            return Err(AttestError::Malformed { part: PART, why: "no tpm generated it" });
        }
        if reader.u16_be()? != TYPE_QUOTE {
            return Err(AttestError::NotAQuote { why: "a tpm attestation of another type" });
        }
        let quote = Self {
            qualified_signer: reader.sized_be()?,
            extra_data: reader.sized_be()?,
            clock_ms: reader.u64_be()?,
            reset_count: reader.u32_be()?,
            restart_count: reader.u32_be()?,
            safe: match reader.u8()? {
                0 => false,
                1 => true,
                _ => return Err(AttestError::Field { field: "safe", why: "neither yes nor no" }),
            },
            firmware_version: reader.u64_be()?,
            selections: selections(&mut reader)?,
            pcr_digest: reader.sized_be()?,
        };
        match reader.remaining() {
            0 => Ok(quote),
            count_bytes => Err(AttestError::TrailingBytes { part: PART, count_bytes }),
        }
    }

    /// Refuses a quote over any other PCRs than exactly `wanted`.
    /// # Errors
    /// [`AttestError::PcrSelection`].
    pub fn require_selection(&self, wanted: PcrSet) -> Result<(), AttestError> {
        match *self.selections == [wanted] {
            true => Ok(()),
            false => Err(AttestError::PcrSelection { why: "other pcrs are signed than are asked for" }),
        }
    }

    /// Proves `values`: exactly the signed PCRs, and those whose digest is signed. The quote has to be signed with SHA-256.
    /// # Errors
    /// [`AttestError::PcrSelection`], [`AttestError::PcrDigest`].
    pub fn require_values(&self, values: &PcrValues) -> Result<(), AttestError> {
        if !values.are_exactly(&self.selections) {
            return Err(AttestError::PcrSelection { why: "other pcrs are given than are signed" });
        }
        match values.digest(&self.selections).as_ref() == self.pcr_digest {
            true => Ok(()),
            false => Err(AttestError::PcrDigest),
        }
    }
}

/// TPML_PCR_SELECTION. A bank may stand once.
fn selections(reader: &mut Reader<'_>) -> Result<Vec<PcrSet>, AttestError> {
    let count = reader.u32_be()?;
    if count > SELECTIONS_MAX {
        let (length_bytes, limit_bytes) = (count as usize, SELECTIONS_MAX as usize);
        return Err(AttestError::Length { part: "pcr selections", length_bytes, limit_bytes });
    }
    let mut sets: Vec<PcrSet> = Vec::new();
    for _ in 0..count {
        let bank = Bank::of(reader.u16_be()?);
        let size = reader.u8()?;
        let mask = reader.take(usize::from(size))?;
        if mask.is_empty() || mask.len() > 4 {
            return Err(AttestError::Field { field: "pcr select", why: "not one to four bytes" });
        }
        let bits = mask.iter().rev().fold(0, |bits, byte| (bits << 8) | u32::from(*byte));
        let bank = bank.ok_or(AttestError::PcrSelection { why: "a bank of an unknown hash" })?;
        if sets.iter().any(|set| set.bank() == bank) {
            return Err(AttestError::PcrSelection { why: "a bank is selected twice" });
        }
        sets.push(PcrSet::of_bits(bank, bits));
    }
    Ok(sets)
}
