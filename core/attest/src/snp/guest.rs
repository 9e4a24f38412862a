//! dstack's rules on top of AMD's. Owns: the bindings between a report and what lies beside it. Never: judges a signature itself.
//! Source: dstack attestation reference, section 5.5 (order of checks), 6, 7, 9.

use super::{SignedReport, SigningKey, VerifiedReport, checks, config::MrConfig, endorsement::Presented, judge, launch, signing_key};
use crate::{AttestError, TcbFacts, TcbStanding, Trace, VerifyContext, wire::Attestation};

/// A guest whose report and documents were verified. Made by [`verify_guest`] only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Guest {
    pub(crate) verified: VerifiedReport,
    pub(crate) config: MrConfig,
    /// Proven by recomputing the launch; `None` without a document that names an image.
    pub(crate) os_image_hash: Option<[u8; 32]>,
    pub(crate) tcb: TcbFacts,
    pub(crate) standing: TcbStanding,
}

/// Verifies SEV-SNP evidence: `report`, `cert_chain` and `mr_config` as they travel in `attestation`.
///
/// Runtime events are bound by nothing on this platform (section 4); the document says who the guest is, and they are not looked at.
/// # Errors
/// As [`super::verify`], and for each binding that does not hold.
pub(crate) fn verify_guest(
    report: &[u8],
    cert_chain: &[Vec<u8>],
    mr_config: &str,
    attestation: &Attestation,
    context: &VerifyContext<'_>,
    trace: &Trace,
) -> Result<Guest, AttestError> {
    let signed = SignedReport::parse_traced(report, trace)?;
    let key = signing_key(&signed.report, context, trace)?;
    trace.enter(&checks::ENDORSEMENT);
    let presented = Presented::find(cert_chain, &signed.report, key, context.collateral.x509(), context.roots)?;
    let verified = judge(signed, key, &presented.as_endorsement(), context, trace)?;
    let report = verified.report();
    // A lower level is a guest inside the guest: what asked may be what the measured firmware keeps out.
    trace.enter(&checks::VMPL);
    if report.vmpl != 0 {
        return Err(AttestError::GuestPolicy { why: "the report was asked for at a lower privilege level than 0" });
    }
    trace.enter(&checks::REPORT_DATA);
    if report.report_data != attestation.report_data {
        return Err(AttestError::ReportData);
    }
    trace.enter(&checks::HOST_DATA);
    let config = MrConfig::read(mr_config, &report.host_data)?;
    trace.enter(&checks::LAUNCH);
    let os_image_hash = launch::os_image_hash(&attestation.config, &report.measurement)?;
    trace.enter(&checks::TCB_STATUS);
    let tcb = TcbFacts { status: verified.tcb_status(), vlek: key == SigningKey::Vlek, ..TcbFacts::none() };
    let standing = context.tcb.judge(&tcb, context.now)?;
    Ok(Guest { verified, config, os_image_hash, tcb, standing })
}
