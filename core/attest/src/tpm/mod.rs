//! Quotes of TPM 2.0: what is signed, by which key, over which PCRs. Owns: the wire forms and the checks every vTPM platform shares.
//! Never: decides which PCRs are wanted or which key is trusted; that is the platform's (`gcp`, Azure).
//! Source: TPM 2.0 Library, part 2, sections 10.12 (TPMS_ATTEST), 10.6 (PCR selections), 11.3 (signatures).

mod pcr;
mod quote;
mod signature;

pub use pcr::{Bank, PCRS_MAX, PcrSet, PcrValues};
pub use quote::{QUOTE_BYTES_MAX, Quote};
pub use signature::Signature;

use crate::{AttestError, x509::Key};

/// Parses `message` (TPMS_ATTEST) and verifies `signature` over it by `key`.
/// # Errors
/// Parse classes and [`AttestError::NotAQuote`] for the message, [`AttestError::BodySignature`].
pub fn verify_quote<'a>(message: &'a [u8], signature: &Signature<'_>, key: Key<'_>) -> Result<Quote<'a>, AttestError> {
    let quote = Quote::parse(message)?;
    match signature.verifies(message, key) {
        true => Ok(quote),
        false => Err(AttestError::BodySignature),
    }
}

#[cfg(test)]
mod tests;
