//! What attest answers when it refuses: [`AttestError`], one variant per reason, each of one [`Class`].
//! Owns: the reasons and their words. Never: decides what to refuse, holds secrets (evidence is public).
//! Source: the refusal class table of the vectors' README.

use dstack_protocol::collateral::Want;

use crate::{Class, snp::Product};

/// Why evidence is refused. All variants are the fault of whoever sent the evidence, except where the doc says it is ours
/// (collateral, clock, roots). Times are milliseconds since 1970.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum AttestError {
    /// The bytes end before a field they promise. Peer's fault: refuse.
    #[error("{part} truncated: need {need_bytes} bytes, have {have_bytes}")]
    Truncated {
        /// What was read.
        part: &'static str,
        /// Bytes needed.
        need_bytes: usize,
        /// Bytes there.
        have_bytes: usize,
    },
    /// The bytes are not of the format. Peer's fault: refuse.
    #[error("{part} malformed: {why}")]
    Malformed {
        /// What was read.
        part: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A length field reaches beyond its buffer or our limit. Peer's fault: refuse.
    #[error("{part}: length {length_bytes} does not fit, limit {limit_bytes}")]
    Length {
        /// Whose length.
        part: &'static str,
        /// The claimed length.
        length_bytes: usize,
        /// The most it could be.
        limit_bytes: usize,
    },
    /// Bytes other than zero padding follow the end. Peer's fault: refuse.
    #[error("{part}: {count_bytes} bytes left over after the end")]
    TrailingBytes {
        /// After what.
        part: &'static str,
        /// How many.
        count_bytes: usize,
    },
    /// A field is outside its stated type, size or value. Peer's fault: refuse.
    #[error("field {field}: {why}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Evidence of another kind of TEE than asked for. Send evidence of a TD or an enclave.
    #[error("evidence of TEE type {got:#x}, not one that is served here")]
    WrongTee {
        /// The type found.
        got: u64,
    },
    /// A version or kind we do not read.
    #[error("{part}: version or kind {got} is not supported")]
    UnsupportedVersion {
        /// Of what.
        part: &'static str,
        /// The version found.
        got: u64,
    },
    /// Not a quote or document at all.
    #[error("not a quote: {why}")]
    NotAQuote {
        /// What was found in its place.
        why: &'static str,
    },
    /// The signature over the evidence body does not verify.
    #[error("signature over the evidence body does not verify")]
    BodySignature,
    /// The signature over the quoting enclave's report does not verify.
    #[error("signature over the quoting enclave's report does not verify")]
    QeReportSignature,
    /// The quoting enclave's report binds another attestation key.
    #[error("the quoting enclave's report does not bind the attestation key")]
    QeReportBinding,
    /// A signature algorithm that is not allowed.
    #[error("{part}: signature algorithm {got} is not allowed")]
    Algorithm {
        /// Whose algorithm.
        part: &'static str,
        /// Its identifier.
        got: String,
    },
    /// Reserved bytes beside a signature are set.
    #[error("reserved bytes of {part} are set")]
    ReservedBytes {
        /// Which bytes.
        part: &'static str,
    },
    /// The path ends at no root we trust. Either the evidence is forged or our list of roots lacks one.
    #[error("{chain}: ends at no trusted root")]
    UntrustedRoot {
        /// Which chain.
        chain: &'static str,
    },
    /// Nobody presented or pinned a certificate of an issuer. Ours to fix where the vendor has a new intermediate: refresh the collateral.
    #[error("{chain}: no certificate of the issuer {issuer}{}", told(from))]
    IssuerUnknown {
        /// Which chain.
        chain: &'static str,
        /// The issuer's name.
        issuer: String,
        /// Where the certificate that it issued says it is.
        from: Option<String>,
    },
    /// A signature in a certificate path or on a revocation list does not verify.
    #[error("{chain}: a signature of the certificate path does not verify")]
    ChainSignature {
        /// Which chain.
        chain: &'static str,
    },
    /// A certificate path or certificate is not well formed.
    #[error("{chain}: {why}")]
    ChainInvalid {
        /// Which chain.
        chain: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A certificate that issues others is not a CA.
    #[error("{chain}: an issuer is not a CA")]
    NotCa {
        /// Which chain.
        chain: &'static str,
    },
    /// A path longer than allowed.
    #[error("{chain}: path of {count} certificates is too long")]
    PathLength {
        /// Which chain.
        chain: &'static str,
        /// Certificates on the path.
        count: usize,
    },
    /// A revocation list is not that of the issuer. Ours to fix: refresh the collateral.
    #[error("{crl}: not the revocation list of the issuer it is used for")]
    CrlMismatch {
        /// Which list.
        crl: &'static str,
    },
    /// An issuer publishes a revocation list and the collateral has none. Ours to fix: refresh the collateral.
    #[error("{chain}: no revocation list of {issuer}{}", told(from))]
    CrlMissing {
        /// Which chain.
        chain: &'static str,
        /// The issuer's name.
        issuer: String,
        /// Where the certificate in question says the list is.
        from: Option<String>,
    },
    /// A certificate was revoked by its issuer.
    #[error("{chain}: certificate with serial {serial} is revoked")]
    Revoked {
        /// Which chain.
        chain: &'static str,
        /// Serial number, hex.
        serial: String,
    },
    /// A certificate is past its last day.
    #[error("{part}: certificate expired at {expired_at_ms}, now {now_ms}")]
    CertExpired {
        /// Which certificate or chain.
        part: &'static str,
        /// Its last moment.
        expired_at_ms: u64,
        /// The time of judgement.
        now_ms: u64,
    },
    /// A certificate or collateral is not valid yet: a clock is wrong, or the evidence is from the future.
    #[error("{part}: valid from {valid_from_ms}, now {now_ms}")]
    NotYetValid {
        /// Which part.
        part: &'static str,
        /// Its first moment.
        valid_from_ms: u64,
        /// The time of judgement.
        now_ms: u64,
    },
    /// A document is past its time. Peer's fault: ask for a fresh one.
    #[error("{part}: expired at {expired_at_ms}, now {now_ms}")]
    DocumentExpired {
        /// Which part.
        part: &'static str,
        /// Its last moment.
        expired_at_ms: u64,
        /// The time of judgement.
        now_ms: u64,
    },
    /// Collateral is past its time. Ours to fix by a refresh.
    #[error("{part}: expired at {expired_at_ms}, now {now_ms}")]
    CollateralExpired {
        /// Which part.
        part: &'static str,
        /// Its last moment.
        expired_at_ms: u64,
        /// The time of judgement.
        now_ms: u64,
    },
    /// TCB info or QE identity was altered. Ours to fix: refresh the collateral.
    #[error("signature over {part} does not verify")]
    CollateralSignature {
        /// Which part.
        part: &'static str,
    },
    /// Collateral of another platform or TEE. Ours to fix: refresh the collateral.
    #[error("{part} does not fit the quote: {why}")]
    CollateralMismatch {
        /// Which part.
        part: &'static str,
        /// How it differs.
        why: &'static str,
    },
    /// The bundle holds no collateral for this platform. Ours to fix: fetch it.
    #[error("no collateral for fmspc {fmspc}")]
    CollateralMissing {
        /// The platform's FMSPC, hex.
        fmspc: String,
    },
    /// Neither the evidence nor the bundle holds the certificate of the key that signed it. Ours to fix: fetch it.
    #[error("no certificate for chip {chip_id} at reported tcb {reported_tcb}")]
    VekMissing {
        /// The chip, hex.
        chip_id: String,
        /// Its reported TCB, hex as in the report.
        reported_tcb: String,
    },
    /// No level of the collateral fits the platform.
    #[error("no tcb level of {part} fits the platform")]
    NoTcbLevel {
        /// Which part.
        part: &'static str,
    },
    /// The guest runs in debug mode: its memory is open to the host. Never accepted.
    #[error("the guest runs in debug mode")]
    Debug,
    /// The TCB status is not allowed. The platform's operator has to update it.
    #[error("tcb status {status} is not allowed")]
    TcbStatus {
        /// The status found.
        status: String,
    },
    /// TD attributes outside what is allowed.
    #[error("td attributes: {why}")]
    TdAttributes {
        /// What is wrong with them.
        why: &'static str,
    },
    /// The guest's launch policy or its platform's settings are outside what is allowed. The host's operator has to change them.
    #[error("guest policy: {why}")]
    GuestPolicy {
        /// What is wrong with it.
        why: &'static str,
    },
    /// A service TD is bound to the guest.
    #[error("a service td is bound to the guest")]
    ServiceTd,
    /// A measurement is not an allowed one.
    #[error("measurement {register} is not an allowed one")]
    Measurement {
        /// Which measurement.
        register: &'static str,
    },
    /// The report data is not of this request, or the copy in the evidence differs from the signed one.
    #[error("report data is not the expected one")]
    ReportData,
    /// The nonce is not of this request.
    #[error("nonce is not the expected one")]
    Nonce,
    /// The user data is not of this request.
    #[error("user data is not the expected one")]
    UserData,
    /// Genuine, but of another chip than the one its certificate names.
    #[error("chip id: {why}")]
    ChipId {
        /// How they differ.
        why: &'static str,
    },
    /// Genuine, but the firmware versions contradict each other or the certificate.
    #[error("firmware versions: {why}")]
    FirmwareVersion {
        /// What contradicts what.
        why: &'static str,
    },
    /// The document beside the evidence is not the one that its launch was bound to.
    #[error("{document} is not the one that {field} binds")]
    Document {
        /// Which document.
        document: &'static str,
        /// The signed field.
        field: &'static str,
    },
    /// The TPM half is not bound to the quote.
    #[error("tpm quote is not bound to the td quote")]
    TpmQuote,
    /// The PCR selection is not the wanted one.
    #[error("pcr selection: {why}")]
    PcrSelection {
        /// What is wrong with it.
        why: &'static str,
    },
    /// The claimed PCRs do not fit the signed digest.
    #[error("claimed pcrs do not fit the signed digest")]
    PcrDigest,
    /// The event log does not lead to the signed register.
    #[error("event log does not lead to register {register}")]
    ReplayMismatch {
        /// Index of the first register that differs.
        register: u32,
    },
    /// An event's digest is not that of its content.
    #[error("event {index}: digest is not that of its content")]
    EventDigest {
        /// Position in the log.
        index: usize,
    },
    /// An event names a register that does not exist.
    #[error("event {index}: no register {register}")]
    EventRegister {
        /// Position in the log.
        index: usize,
        /// The register named.
        register: u32,
    },
    /// The platform is out of date and the grace of the policy is over. Update its firmware and attest anew, or lengthen the grace.
    #[error(
        "tcb status {status} is out of date since {outdated_since_ms}, the grace of {grace_ms} ms ended at {ended_at_ms}; tcb date \
         {tcb_date_ms}, advisories: {advisories}"
    )]
    TcbGraceOver {
        /// Its name.
        status: String,
        /// `tcbDate` of the level reached.
        tcb_date_ms: u64,
        /// `tcbDate` of the next better level.
        outdated_since_ms: u64,
        /// The grace.
        grace_ms: u64,
        /// Its last moment.
        ended_at_ms: u64,
        /// Advisories that apply.
        advisories: String,
    },
    /// An advisory applies to the platform that the policy refuses. Update its firmware and attest anew.
    #[error("advisory {id} applies to the platform (tcb status {status}), and the policy refuses it")]
    TcbAdvisory {
        /// The advisory.
        id: String,
        /// The status beside it.
        status: String,
    },
    /// The collateral is of an earlier TCB recovery than the policy asks for. Ours to fix: refresh the collateral.
    #[error("collateral is of tcb evaluation {got}, the policy asks for {least} or later")]
    TcbEvaluation {
        /// Number of the collateral.
        got: u32,
        /// Least number allowed.
        least: u32,
    },
    /// Our own steps all passed and the second verifier still refused. A bug in one of the two: refuse and report.
    #[error("second verifier refused: {detail}")]
    SecondVerifier {
        /// Its words, for people.
        detail: String,
    },
}

fn told(from: &Option<String>) -> String {
    from.as_ref().map(|url| format!(", published at {url}")).unwrap_or_default()
}

impl AttestError {
    /// What fetching might give to make such evidence pass; nothing of it is proven.
    #[must_use]
    pub fn wants(&self) -> Option<Want> {
        match self {
            Self::CollateralMissing { fmspc } => Some(Want::Tdx(bytes_of(fmspc)?)),
            Self::VekMissing { chip_id, reported_tcb } => Some(Want::Chip { id: bytes_of(chip_id)?, tcb: bytes_of(reported_tcb)? }),
            Self::IssuerUnknown { from: Some(url), .. } | Self::CrlMissing { from: Some(url), .. } if !url.contains("kdsintf.amd.com") => {
                Some(Want::Link(url.clone()))
            }
            Self::IssuerUnknown { issuer, .. } | Self::CrlMissing { issuer, .. } => {
                let vlek = issuer.contains("SEV-VLEK-");
                let product = Product::ALL.into_iter().find(|product| {
                    [format!("ARK-{}", product.name()), format!("SEV-{}", product.name()), format!("SEV-VLEK-{}", product.name())]
                        .iter()
                        .any(|name| issuer.contains(name))
                });
                product.map(|product| Want::Product { name: product.name().to_owned(), vlek })
            }
            _ => None,
        }
    }
}

fn bytes_of<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut out = [0; N];
    hex::decode_to_slice(text, &mut out).ok().map(|()| out)
}

impl AttestError {
    /// The refusal class of the vectors' table.
    #[must_use]
    pub const fn class(&self) -> Class {
        match self {
            Self::Truncated { .. } => Class::ParseTruncated,
            Self::Malformed { .. } => Class::ParseMalformed,
            Self::Length { .. } => Class::ParseLength,
            Self::TrailingBytes { .. } => Class::ParseTrailingBytes,
            Self::Field { .. } => Class::ParseField,
            Self::WrongTee { .. } => Class::TypeWrongTee,
            Self::UnsupportedVersion { .. } => Class::TypeUnsupportedVersion,
            Self::NotAQuote { .. } => Class::TypeNotAQuote,
            Self::BodySignature => Class::SigBody,
            Self::QeReportSignature => Class::SigQeReport,
            Self::QeReportBinding => Class::SigQeHash,
            Self::Algorithm { .. } => Class::SigAlgorithm,
            Self::ReservedBytes { .. } => Class::SigReserved,
            Self::UntrustedRoot { .. } | Self::IssuerUnknown { .. } => Class::ChainUntrustedRoot,
            Self::ChainSignature { .. } => Class::ChainSignature,
            Self::ChainInvalid { .. } | Self::SecondVerifier { .. } => Class::ChainInvalid,
            Self::NotCa { .. } => Class::ChainNotCa,
            Self::PathLength { .. } => Class::ChainPathLength,
            Self::CrlMismatch { .. } => Class::ChainCrlMismatch,
            Self::Revoked { .. } => Class::ChainRevoked,
            Self::CertExpired { .. } => Class::TimeCertExpired,
            Self::NotYetValid { .. } => Class::TimeNotYetValid,
            Self::DocumentExpired { .. } | Self::CollateralExpired { .. } => Class::TimeCollateralExpired,
            Self::CollateralSignature { .. } => Class::CollateralSignature,
            Self::CollateralMismatch { .. } | Self::CollateralMissing { .. } | Self::CrlMissing { .. } | Self::VekMissing { .. } => {
                Class::CollateralMismatch
            }
            Self::NoTcbLevel { .. } => Class::CollateralNoTcbLevel,
            Self::Debug => Class::PolicyDebug,
            Self::TcbStatus { .. } | Self::TcbGraceOver { .. } | Self::TcbAdvisory { .. } | Self::TcbEvaluation { .. } => {
                Class::PolicyTcbStatus
            }
            Self::TdAttributes { .. } | Self::GuestPolicy { .. } => Class::PolicyTdAttributes,
            Self::ServiceTd => Class::PolicyServiceTd,
            Self::Measurement { .. } => Class::PolicyMeasurement,
            Self::ReportData => Class::BindingReportData,
            Self::Nonce => Class::BindingNonce,
            Self::UserData | Self::Document { .. } => Class::BindingUserData,
            Self::ChipId { .. } => Class::BindingChipId,
            Self::FirmwareVersion { .. } => Class::BindingTcb,
            Self::TpmQuote => Class::BindingTpmQuote,
            Self::PcrSelection { .. } => Class::PcrSelection,
            Self::PcrDigest => Class::PcrDigestMismatch,
            Self::ReplayMismatch { .. } => Class::EventlogReplayMismatch,
            Self::EventDigest { .. } => Class::EventlogEventDigest,
            Self::EventRegister { .. } => Class::EventlogBadIndex,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replay_mismatch_has_its_class() {
        assert_eq!(AttestError::ReplayMismatch { register: 3 }.class().as_str(), "eventlog.replay_mismatch");
    }
}
