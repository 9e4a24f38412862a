//! The one entry: a versioned attestation in, a verified identity out. Owns: which platforms are served and the bindings between
//! the parts of an attestation. Never: fetches, reads the clock, or decides who gets a key.
//! Source: dstack attestation reference, sections 2 and 5.

use dstack_protocol::{Platform, UnixMillis, binding};

use crate::{
    AttestError, Check, Class, CollateralBundle, TcbPolicy, TcbStanding, Trace, TrustRoots, VerifiedIdentity,
    eventlog::{self, ProvenEvents},
    gcp, nitro, snp,
    tdx::{self, VerifiedTd},
    wire::{Attestation, PlatformEvidence, TdxEvidence},
};

/// The checks that are the same for every platform.
pub(crate) static CHECKS: &[&Check] = &[&DECODED];

static DECODED: Check = Check {
    id: "evidence.encoding",
    what: "the evidence is SCALE V0 or msgpack V1, whole, of a platform that is served",
    source: "dstack attestation reference, section 2",
    classes: &[Class::ParseMalformed],
    test: "any_bytes_are_refused",
};

/// What evidence is judged against.
#[derive(Debug, Clone, Copy)]
pub struct VerifyContext<'a> {
    /// The time of judgement.
    pub now: UnixMillis,
    /// Roots a chain may end at.
    pub roots: &'a TrustRoots,
    /// Collateral of the platforms that are served.
    pub collateral: &'a CollateralBundle,
    /// TCB statuses that are good enough.
    pub tcb: &'a TcbPolicy,
}

/// Verifies a versioned attestation (SCALE V0 or msgpack V1, the content of X.509 extension `.8`).
///
/// The report data is proven to be signed; that it is the caller's is for [`VerifiedIdentity::require_report_data`]. Of GCP TDX
/// evidence both halves are judged, and each has to hold.
/// # Errors
/// One [`AttestError`] per reason, see its variants for whose fault it is.
pub fn verify(evidence: &[u8], context: &VerifyContext<'_>) -> Result<VerifiedIdentity, AttestError> {
    verify_traced(evidence, context, &Trace::new())
}

/// As [`verify`], and notes in `trace` every check that was begun: the last one is the one that refused.
/// # Errors
/// As [`verify`].
pub fn verify_traced(evidence: &[u8], context: &VerifyContext<'_>, trace: &Trace) -> Result<VerifiedIdentity, AttestError> {
    verify_decoded(&Attestation::decode(evidence)?, evidence, context, trace)
}

/// Verifies the legacy pair of X.509 extensions `.1` (quote) and `.2` (event log, JSON), which 0.5.x guests present on TDX.
/// # Errors
/// As [`verify`].
pub fn verify_legacy(quote: &[u8], event_log_json: &[u8], context: &VerifyContext<'_>) -> Result<VerifiedIdentity, AttestError> {
    verify_legacy_traced(quote, event_log_json, context, &Trace::new())
}

/// As [`verify_legacy`], and notes in `trace` every check that was begun.
/// # Errors
/// As [`verify`].
pub fn verify_legacy_traced(
    quote: &[u8],
    event_log_json: &[u8],
    context: &VerifyContext<'_>,
    trace: &Trace,
) -> Result<VerifiedIdentity, AttestError> {
    let attestation = Attestation::from_legacy_pair(quote, event_log_json)?;
    verify_decoded(&attestation, &binding::legacy_evidence(quote, event_log_json), context, trace)
}

fn verify_decoded(
    attestation: &Attestation,
    evidence: &[u8],
    context: &VerifyContext<'_>,
    trace: &Trace,
) -> Result<VerifiedIdentity, AttestError> {
    trace.enter(&DECODED);
    judged(attestation, evidence, context, trace).map(|identity| identity.judged_with(*context.collateral.id()))
}

fn judged(attestation: &Attestation, evidence: &[u8], context: &VerifyContext<'_>, trace: &Trace) -> Result<VerifiedIdentity, AttestError> {
    match &attestation.platform {
        PlatformEvidence::Tdx(td) => {
            let (verified, events, standing) = verify_td(td, attestation, context, trace)?;
            trace.enter(&tdx::IDENTITY);
            VerifiedIdentity::of_td(Platform::Tdx, &verified, standing, &events, evidence)
        }
        PlatformEvidence::GcpTdx(td, tpm) => {
            let (verified, events, standing) = verify_td(td, attestation, context, trace)?;
            let vtpm = gcp::verify(&td.quote, tpm, &attestation.runtime_events, &attestation.config, context, trace)?;
            trace.enter(&tdx::IDENTITY);
            VerifiedIdentity::of_gcp(&verified, standing, &vtpm, &events, evidence)
        }
        PlatformEvidence::NitroEnclave { nsm_quote } => verify_enclave(nsm_quote, attestation, evidence, context, trace),
        PlatformEvidence::NitroTpm { attestation_doc } => verify_nitro_tpm(attestation_doc, attestation, evidence, context, trace),
        PlatformEvidence::SevSnp { report, cert_chain, mr_config } => {
            let guest = snp::verify_guest(report, cert_chain, mr_config, attestation, context, trace)?;
            Ok(VerifiedIdentity::of_snp(&guest, evidence))
        }
    }
}

fn verify_td(
    td: &TdxEvidence,
    attestation: &Attestation,
    context: &VerifyContext<'_>,
    trace: &Trace,
) -> Result<(VerifiedTd, ProvenEvents, TcbStanding), AttestError> {
    let verified = tdx::verify_bundled(&td.quote, context.collateral, context.now.0, context.roots, trace)?;
    let body = verified.body();
    // Section 5.1 step 4: the copy is the signed one.
    trace.enter(&tdx::REPORT_DATA);
    if body.report_data != attestation.report_data {
        return Err(AttestError::ReportData);
    }
    // Section 5.1 step 3: all runtime events lead to RTMR3. A log that is proven to hold the same events has shown it already.
    trace.enter(&tdx::RUNTIME_EVENTS);
    let [_, _, _, rtmr3] = &body.rtmr;
    let speaks = td.event_log.iter().any(|event| event.imr == eventlog::RUNTIME_REGISTER);
    let logged = speaks.then(|| eventlog::prove_log(&td.event_log, &body.rtmr));
    let events = match logged {
        Some(Ok(logged)) if logged.all() == attestation.runtime_events => {
            trace.enter(&tdx::EVENT_LOG);
            logged
        }
        logged => {
            let events = eventlog::prove(&attestation.runtime_events, rtmr3)?;
            // What the log says has to be what is replayed, or two readers see two guests; a log without runtime events says nothing.
            trace.enter(&tdx::EVENT_LOG);
            if logged.transpose()?.is_some_and(|logged| logged != events) {
                return Err(AttestError::ReplayMismatch { register: eventlog::RUNTIME_REGISTER });
            }
            events
        }
    };
    trace.enter(&tdx::TCB_POLICY);
    let standing = context.tcb.judge(&verified.tcb().facts(), context.now)?;
    Ok((verified, events, standing))
}

fn verify_enclave(
    document: &[u8],
    attestation: &Attestation,
    evidence: &[u8],
    context: &VerifyContext<'_>,
    trace: &Trace,
) -> Result<VerifiedIdentity, AttestError> {
    let verified = nitro::verify_traced(document, context.roots, context.now, trace)?;
    // Section 5.3 step 6: `user_data` is present and equal to the copy.
    trace.enter(&nitro::checks::REPORT_DATA);
    if *verified.report_data()? != attestation.report_data {
        return Err(AttestError::ReportData);
    }
    VerifiedIdentity::of_enclave(&verified, &attestation.runtime_events, evidence)
}

fn verify_nitro_tpm(
    document: &[u8],
    attestation: &Attestation,
    evidence: &[u8],
    context: &VerifyContext<'_>,
    trace: &Trace,
) -> Result<VerifiedIdentity, AttestError> {
    let verified = nitro::tpm::verify_traced(document, context.roots, context.now, trace)?;
    trace.enter(&nitro::checks::TPM_REPORT_DATA);
    if *verified.report_data()? != attestation.report_data {
        return Err(AttestError::ReportData);
    }
    trace.enter(&nitro::checks::TPM_EVENTS);
    let events = nitro::tpm::prove_events(&verified, &attestation.runtime_events)?;
    trace.enter(&nitro::checks::TPM_IMAGE);
    let os_image_hash = nitro::tpm::os_image(&verified, &attestation.config)?;
    VerifiedIdentity::of_nitro_tpm(&verified, &events, os_image_hash, evidence)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::TdxEvent;

    fn refused(evidence: &[u8]) -> AttestError {
        let (roots, collateral, tcb) = (TrustRoots::production(), CollateralBundle::empty(), TcbPolicy::default());
        verify(evidence, &VerifyContext { now: UnixMillis(1_751_328_000_000), roots: &roots, collateral: &collateral, tcb: &tcb })
            .unwrap_err()
    }

    fn attestation(platform: PlatformEvidence) -> Vec<u8> {
        Attestation { platform, report_data: [0; 64], runtime_events: Vec::new(), config: String::new(), report_data_payload: None }
            .encode()
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused(mut bytes in proptest::collection::vec(any::<u8>(), 1..600), wrapper in 0u8..5) {
            let _ = refused(&bytes);
            bytes.truncate(300);
            let evidence = match wrapper {
                0 if bytes.len() % 2 == 0 => PlatformEvidence::NitroTpm { attestation_doc: bytes },
                0 => PlatformEvidence::NitroEnclave { nsm_quote: bytes },
                1 => PlatformEvidence::Tdx(TdxEvidence { quote: bytes, event_log: vec![TdxEvent::default()] }),
                2 => PlatformEvidence::SevSnp { report: bytes, cert_chain: Vec::new(), mr_config: String::new() },
                _ => PlatformEvidence::Tdx(TdxEvidence { quote: bytes, event_log: Vec::new() }),
            };
            let _ = refused(&attestation(evidence));
        }
    }
}
