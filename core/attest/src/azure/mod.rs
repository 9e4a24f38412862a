//! Verifies evidence of Azure's confidential VMs on TDX: a TD quote whose report data binds the virtual TPM's key, and that TPM's quote.
//! Owns: the bindings between the parts. Never: fetches a part, reads the clock, decides which PCRs are good.
//! Source: Microsoft, "Guest attestation for confidential VMs: design and reference"; TPM 2.0 Library, part 2; ADR 0008.
//!
//! In such a VM Microsoft's paravisor owns the TD: it is what MRTD measures, RTMRs stay zero, and the guest above it is measured into
//! the virtual TPM. So the PCRs are what tells one guest from another, and they are worth what the paravisor is. dstack has no encoding
//! for this platform; the parts are given one by one, and no [`crate::VerifiedIdentity`] is made of them: nothing here names an app.

mod checks;
mod hcl;

use dstack_protocol::UnixMillis;
use sha2::{Digest, Sha256};

use crate::{
    AttestError, Check, TdxCollateral, Trace, Vendor, VerifyContext,
    tdx::{self, VerifiedTd},
    tpm::{self, Bank, PcrSet, PcrValues, Signature},
    x509::{self, Key, KeyKind, Purpose, Revocation, Rules, SignatureAlgorithm, Untrusted},
};
use x509_parser::der_parser::{Oid, oid};

/// Every check beside those of the TD quote, in the order in which they are made.
pub static CHECKS: &[&Check] = &[
    &checks::HCL_REPORT,
    &checks::TD_QUOTE,
    &checks::RUNTIME_DATA,
    &checks::KEY,
    &checks::AK_CERTIFICATE,
    &checks::TPM_QUOTE,
    &checks::PCRS,
];

/// tcg-kp-AIKCertificate: a certificate for an attestation key.
static ATTESTATION_KEY: Oid<'static> = oid!(2.23.133.8.3);
const CHAIN: &str = "azure attestation key chain";
/// PCRs that have to be signed: all of them.
const ALL_PCRS: PcrSet = PcrSet::new(Bank::Sha256, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]);

/// The parts of a VM's evidence, as its paravisor, its TPM and the host's metadata service give them.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    /// TD quote.
    pub quote: &'a [u8],
    /// Content of the TPM's index 0x01400001.
    pub hcl_report: &'a [u8],
    /// TPMS_ATTEST.
    pub tpm_message: &'a [u8],
    /// RSASSA-PKCS1-v1_5 with SHA-256 over it, as it is.
    pub tpm_signature: &'a [u8],
    /// All PCRs of the SHA-256 bank.
    pub pcrs: &'a PcrValues,
    /// Certificate of the attestation key, DER; without one the key is believed for the paravisor's sake alone.
    pub ak_certificate: Option<&'a [u8]>,
    /// Certificates of its issuers, DER.
    pub ak_intermediates: &'a [Vec<u8>],
}

/// A VM whose parts fit. Made by [`verify`] only.
#[derive(Debug, Clone)]
pub struct VerifiedVm {
    td: VerifiedTd,
    pcrs: PcrValues,
    nonce: Vec<u8>,
    vm_configuration: Option<serde_json::Value>,
    certified: bool,
    earliest_expiry: UnixMillis,
}

impl VerifiedVm {
    /// The TD that the paravisor runs in.
    #[must_use]
    pub const fn td(&self) -> &VerifiedTd {
        &self.td
    }

    /// The PCRs that the TPM signed.
    #[must_use]
    pub const fn pcrs(&self) -> &PcrValues {
        &self.pcrs
    }

    /// What the TPM's caller had signed: compare it, or evidence of yesterday passes today.
    #[must_use]
    pub fn nonce(&self) -> &[u8] {
        &self.nonce
    }

    /// What the host says of the machine, bound by the quote: `secure-boot`, `console-enabled`, `vmUniqueId` and others.
    #[must_use]
    pub const fn vm_configuration(&self) -> Option<&serde_json::Value> {
        self.vm_configuration.as_ref()
    }

    /// Whether Microsoft certified the attestation key, besides the quote's binding of it.
    #[must_use]
    pub const fn is_certified(&self) -> bool {
        self.certified
    }

    /// Canonical measurement: MRTD ‖ RTMR0 ‖ RTMR1 ‖ RTMR2 ‖ RTMR3 (48 bytes each) ‖ PCR0 … PCR23 (32 bytes each), 1008 bytes.
    #[must_use]
    pub fn measurement(&self) -> Vec<u8> {
        let body = self.td.body();
        let mut measurement = body.mr_td.to_vec();
        measurement.extend(body.rtmr.iter().flatten());
        measurement.extend(ALL_PCRS.indices().filter_map(|index| self.pcrs.get(Bank::Sha256, index)).flatten());
        measurement
    }

    /// The first moment at which a part of this is over.
    #[must_use]
    pub const fn earliest_expiry(&self) -> UnixMillis {
        self.earliest_expiry
    }

    /// Refuses evidence that was made for another request.
    /// # Errors
    /// [`AttestError::Nonce`].
    pub fn require_nonce(&self, expected: &[u8]) -> Result<(), AttestError> {
        match self.nonce == expected {
            true => Ok(()),
            false => Err(AttestError::Nonce),
        }
    }
}

/// What a paravisor's report says, before any of it is verified.
#[derive(Debug, Clone, PartialEq)]
pub struct ClaimedReport {
    /// The attestation key: RSAPublicKey, DER.
    pub key: Vec<u8>,
    /// What the host says of the machine.
    pub vm_configuration: Option<serde_json::Value>,
}

/// Reads a paravisor's report without verifying it.
/// # Errors
/// Parse and type classes only.
pub fn claimed_report(hcl_report: &[u8]) -> Result<ClaimedReport, AttestError> {
    let hcl::Bound { key, vm_configuration } = hcl::bound(hcl::runtime_data(hcl_report)?)?;
    Ok(ClaimedReport { key, vm_configuration })
}

/// Verifies the parts under the collateral of the TD's platform. The TCB status and the nonce are for the caller to judge.
/// # Errors
/// One [`AttestError`] per reason; those of [`tdx::verify_quote`] for the quote.
pub fn verify(
    parts: &Parts<'_>,
    collateral: &TdxCollateral,
    context: &VerifyContext<'_>,
    trace: &Trace,
) -> Result<VerifiedVm, AttestError> {
    trace.enter(&checks::HCL_REPORT);
    let runtime_data = hcl::runtime_data(parts.hcl_report)?;
    trace.enter(&checks::TD_QUOTE);
    let td = tdx::verify_quote_traced(parts.quote, collateral, context.now.0, context.roots, trace)?;
    trace.enter(&checks::RUNTIME_DATA);
    let mut report_data = [0; 64];
    let (digest, _) = report_data.split_at_mut(32);
    digest.copy_from_slice(&Sha256::digest(runtime_data));
    if td.body().report_data != report_data {
        return Err(AttestError::ReportData);
    }
    trace.enter(&checks::KEY);
    let bound = hcl::bound(runtime_data)?;
    trace.enter(&checks::AK_CERTIFICATE);
    let certified_until = parts.ak_certificate.map(|der| certified(der, &bound.key, parts, context)).transpose()?;
    trace.enter(&checks::TPM_QUOTE);
    let quote = tpm::verify_quote(parts.tpm_message, &Signature::Rsassa(parts.tpm_signature), Key::rsa(&bound.key))?;
    trace.enter(&checks::PCRS);
    quote.require_selection(ALL_PCRS)?;
    quote.require_values(parts.pcrs)?;
    let td_until = UnixMillis(td.earliest_expiry_ms());
    Ok(VerifiedVm {
        nonce: quote.extra_data.to_vec(),
        td,
        pcrs: parts.pcrs.clone(),
        vm_configuration: bound.vm_configuration,
        certified: certified_until.is_some(),
        earliest_expiry: certified_until.map_or(td_until, |until| until.min(td_until)),
    })
}

/// Walks the path of the attestation key's certificate; answers when it ends.
fn certified(der: &[u8], key: &[u8], parts: &Parts<'_>, context: &VerifyContext<'_>) -> Result<UnixMillis, AttestError> {
    let rules = Rules {
        chain: CHAIN,
        vendor: Vendor::Microsoft,
        keys: &[KeyKind::Rsa],
        signatures: &[SignatureAlgorithm::RsaPkcs1Sha256, SignatureAlgorithm::RsaPkcs1Sha384, SignatureAlgorithm::RsaPkcs1Sha512],
        purpose: Some(Purpose::Other(&ATTESTATION_KEY)),
        alternative_names: false,
        // ADR 0008: its issuers' lists are obeyed where the bundle has them; the quote's collateral is what has to be there.
        revocation: Revocation::WhereGiven,
        intermediates_max: 3,
    };
    let pool = context.collateral.x509();
    let untrusted = Untrusted { presented: parts.ak_intermediates, pinned: &pool.certificates, crls: &pool.crls };
    let path = x509::build(der, &untrusted, context.roots, context.now, &rules)?;
    if path.key()?.bytes() != key {
        return Err(AttestError::TpmQuote);
    }
    Ok(path.earliest_expiry())
}

#[cfg(test)]
mod tests;
