//! Verifies SGX quotes of version 3: which enclave said this, on which platform. Owns: the root that the chain must end at, reading the
//! verdict. Never: judges MRENCLAVE or TCB status (the caller's policy does), fetches collateral.
//! Source: Intel SGX ECDSA Quote Library API, appendix A. The signatures, lists, TCB levels and the debug bit are judged by `dcap-qvl`
//! alone: the one user of such quotes is the local key provider of dstack, whose own implementation judges by the same library.

use dcap_qvl::verify::QuoteVerifier;
use dstack_protocol::TcbStatus;

use super::second::{collateral_of, status_of};
use super::{PCK_CHAIN, chain, parse_all, tcb::ours};
use crate::{AttestError, TdxCollateral, TrustRoots, pem, reader::Reader};

/// Largest quote looked at.
const QUOTE_BYTES_MAX: usize = 64 * 1024;
const PART: &str = "sgx quote";
const BODY_BYTES: usize = 384;
/// Signature, attestation key, QE report, its signature.
const BEFORE_AUTHENTICATION_BYTES: usize = 64 + 64 + 384 + 64;
const CERTIFICATION_TYPE_PCK_CHAIN: u16 = 5;

/// An enclave whose quote was verified. Only [`verify_enclave`] makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedEnclave {
    mr_enclave: [u8; 32],
    mr_signer: [u8; 32],
    report_data: [u8; 64],
    status: TcbStatus,
    advisory_ids: Vec<String>,
    software_root: bool,
}

impl VerifiedEnclave {
    /// Measurement of the enclave.
    #[must_use]
    pub const fn mr_enclave(&self) -> &[u8; 32] {
        &self.mr_enclave
    }

    /// Measurement of its signer's key.
    #[must_use]
    pub const fn mr_signer(&self) -> &[u8; 32] {
        &self.mr_signer
    }

    /// What it bound to the quote.
    #[must_use]
    pub const fn report_data(&self) -> &[u8; 64] {
        &self.report_data
    }

    /// TCB status; whether it is good enough is the caller's policy.
    #[must_use]
    pub const fn status(&self) -> TcbStatus {
        self.status
    }

    /// Advisories behind the status.
    #[must_use]
    pub fn advisory_ids(&self) -> &[String] {
        &self.advisory_ids
    }

    /// Whether the chain ends at a software root.
    #[must_use]
    pub const fn software_root(&self) -> bool {
        self.software_root
    }
}

/// Verifies an SGX quote with the SGX collateral of its platform (TCB info `SGX`, QE identity `QE`).
///
/// # Errors
/// Parse and chain classes; [`AttestError::SecondVerifier`] with the library's words; [`AttestError::TcbStatus`] where it is revoked.
pub fn verify_enclave(bytes: &[u8], collateral: &TdxCollateral, now_ms: u64, roots: &TrustRoots) -> Result<VerifiedEnclave, AttestError> {
    let ders = pem::certificates(pck_chain(bytes)?, PCK_CHAIN)?;
    let root = chain::root_of(&parse_all(&ders, PCK_CHAIN)?, roots, PCK_CHAIN)?;
    let refused = |detail: String| AttestError::SecondVerifier { detail };
    let verdict = QuoteVerifier::new(root.der().to_vec())
        .verify(bytes, &collateral_of(collateral), now_ms / 1000)
        .map_err(|error| refused(format!("{error:#}")))?;
    let report = verdict.report.as_sgx().ok_or_else(|| refused("it is no quote of an enclave".to_owned()))?;
    let status = status_of(&verdict.status).map(ours).ok_or_else(|| refused(format!("unknown status {:?}", verdict.status)))?;
    if status == TcbStatus::Revoked {
        return Err(AttestError::TcbStatus { status: status.name().to_owned() });
    }
    Ok(VerifiedEnclave {
        mr_enclave: report.mr_enclave,
        mr_signer: report.mr_signer,
        report_data: report.report_data,
        status,
        advisory_ids: verdict.advisory_ids,
        software_root: root.is_software(),
    })
}

/// The PEM chain of a quote of version 3; every length of the way there, and nothing after it.
fn pck_chain(bytes: &[u8]) -> Result<&[u8], AttestError> {
    if bytes.len() > QUOTE_BYTES_MAX {
        return Err(AttestError::Length { part: PART, length_bytes: bytes.len(), limit_bytes: QUOTE_BYTES_MAX });
    }
    let malformed = |why| AttestError::Malformed { part: PART, why };
    let mut reader = Reader::new(bytes, PART);
    let version = reader.u16()?;
    if version != 3 {
        return Err(AttestError::UnsupportedVersion { part: PART, got: u64::from(version) });
    }
    reader.u16()?;
    if reader.u32()? != 0 {
        return Err(malformed("of another TEE than SGX"));
    }
    reader.take(40)?;
    reader.take(BODY_BYTES)?;
    let size = reader.u32()?;
    if usize::try_from(size) != Ok(reader.remaining()) {
        return Err(malformed("its signature is of another length than it says"));
    }
    reader.take(BEFORE_AUTHENTICATION_BYTES)?;
    let authentication = reader.u16()?;
    reader.take(usize::from(authentication))?;
    if reader.u16()? != CERTIFICATION_TYPE_PCK_CHAIN {
        return Err(malformed("without a chain of certificates"));
    }
    let size = reader.u32()?;
    let chain = reader.take(usize::try_from(size).unwrap_or(usize::MAX))?;
    if reader.remaining() == 0 { Ok(chain) } else { Err(malformed("bytes after its end")) }
}
