//! What a refusal means, for people. Owns: the words "expected", "got" and "what to do" of each [`AttestError`], and one sentence for
//! each [`Class`]. Never: decides; the texts may change, classes may not.
//! Source: the refusal class table of the vectors' README, in our words.

use x509_parser::time::ASN1Time;

use crate::{AttestError, Class};

/// A refusal taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// What would have passed.
    pub expected: String,
    /// What came.
    pub got: String,
    /// What to do.
    pub fix: &'static str,
}

impl AttestError {
    /// What was expected, what came, and what to do.
    #[must_use]
    pub fn explain(&self) -> Explanation {
        let (expected, got) = self.sides();
        Explanation { expected, got, fix: self.class().fix() }
    }

    fn sides(&self) -> (String, String) {
        match self {
            Self::Truncated { part, need_bytes, have_bytes } => {
                (format!("{need_bytes} more bytes of {part}"), format!("{have_bytes} bytes"))
            }
            Self::Malformed { part, why } => (format!("a well formed {part}"), (*why).to_owned()),
            Self::Length { part, length_bytes, limit_bytes } => {
                (format!("at most {limit_bytes} bytes of {part}"), format!("{length_bytes} bytes"))
            }
            Self::TrailingBytes { part, count_bytes } => (format!("nothing but zero padding after {part}"), format!("{count_bytes} bytes")),
            Self::Field { field, why } => (format!("{field} of its stated type and size"), (*why).to_owned()),
            Self::WrongTee { got } => ("a TD (type 0x81)".to_owned(), format!("TEE type {got:#x}")),
            Self::UnsupportedVersion { part, got } => (format!("a version of {part} that is read here"), got.to_string()),
            Self::BodySignature => ("a signature by the attested key over the evidence".to_owned(), "one that does not verify".to_owned()),
            Self::Algorithm { part, got } => (format!("an allowed signature algorithm of {part}"), got.clone()),
            Self::UntrustedRoot { chain } => (format!("a trusted root at the end of the {chain}"), "another one".to_owned()),
            Self::PathLength { chain, count } => {
                (format!("a {chain} no longer than its certificates allow"), format!("{count} certificates"))
            }
            Self::Revoked { chain, serial } => (format!("no revoked certificate in the {chain}"), format!("serial {serial}, revoked")),
            Self::CertExpired { part, expired_at_ms, now_ms }
            | Self::DocumentExpired { part, expired_at_ms, now_ms }
            | Self::CollateralExpired { part, expired_at_ms, now_ms } => {
                (format!("{part} in force at {}", time(*now_ms)), format!("it ended at {}", time(*expired_at_ms)))
            }
            Self::NotYetValid { part, valid_from_ms, now_ms } => {
                (format!("{part} in force at {}", time(*now_ms)), format!("it begins at {}", time(*valid_from_ms)))
            }
            Self::CollateralMissing { fmspc } => (format!("collateral of fmspc {fmspc}"), "none in the bundle".to_owned()),
            Self::Debug => ("a guest whose memory is closed to the host".to_owned(), "debug mode".to_owned()),
            Self::TcbStatus { status } => ("a tcb status that the policy allows".to_owned(), status.clone()),
            Self::TcbGraceOver { status, outdated_since_ms, grace_ms, ended_at_ms, advisories, .. } => (
                format!("a tcb that is out of date for {} days at most", grace_ms / 86_400_000),
                format!("{status} since {}, the grace ended at {}; advisories: {advisories}", time(*outdated_since_ms), time(*ended_at_ms)),
            ),
            Self::TcbAdvisory { id, status } => {
                ("a platform without advisories that the policy refuses".to_owned(), format!("{id}, {status}"))
            }
            Self::TcbEvaluation { got, least } => (format!("collateral of tcb evaluation {least} or later"), format!("evaluation {got}")),
            Self::Measurement { register } => (format!("an allowed value of {register}"), "another value".to_owned()),
            Self::ReplayMismatch { register } => {
                (format!("events that lead to the signed register {register}"), "events that lead elsewhere".to_owned())
            }
            Self::EventDigest { index } => (format!("event {index} with the digest of its content"), "another digest".to_owned()),
            Self::EventRegister { index, register } => (format!("event {index} of a register that exists"), register.to_string()),
            other => (other.class().meaning().to_owned(), other.to_string()),
        }
    }
}

impl Class {
    /// The class of that stable text.
    #[must_use]
    pub fn named(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|class| class.as_str() == text)
    }

    /// What holds when no refusal of this class is made.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::ParseTruncated => "the encoding is whole",
            Self::ParseMalformed => "the bytes are of the format",
            Self::ParseLength => "every length stays inside its buffer and its cap",
            Self::ParseTrailingBytes => "nothing but padding follows the end",
            Self::ParseField => "every field has its stated type and size",
            Self::TypeWrongTee => "the evidence is of a kind of TEE that is served",
            Self::TypeUnsupportedVersion => "the version is one that is read here",
            Self::TypeNotAQuote => "the bytes are a quote or document at all",
            Self::SigBody => "the signature over the evidence verifies",
            Self::SigQeReport => "the signature over the quoting enclave's report verifies",
            Self::SigQeHash => "the quoting enclave's report binds the attestation key",
            Self::SigAlgorithm => "only allowed signature algorithms are used",
            Self::SigReserved => "reserved bytes beside signatures are zero",
            Self::ChainUntrustedRoot => "the certificate path ends at a trusted root",
            Self::ChainSignature => "every certificate and revocation list is signed by its issuer",
            Self::ChainInvalid => "the certificate path is well formed",
            Self::ChainNotCa => "every issuer is a CA",
            Self::ChainPathLength => "the path is no longer than its CAs allow",
            Self::ChainCrlMismatch => "each revocation list is of the issuer it is used for",
            Self::ChainRevoked => "no certificate on the path is revoked",
            Self::TimeCertExpired => "no certificate is past its last moment",
            Self::TimeNotYetValid => "nothing is from the future",
            Self::TimeCollateralExpired => "collateral and documents are fresh enough",
            Self::CollateralSignature => "collateral is signed by its publisher",
            Self::CollateralMismatch => "collateral is there and of this platform",
            Self::CollateralNoTcbLevel => "a TCB level of the collateral fits the platform",
            Self::PolicyDebug => "the guest is not in debug mode",
            Self::PolicyTcbStatus => "the TCB status is allowed",
            Self::PolicyTdAttributes => "the guest's attributes are allowed ones",
            Self::PolicyServiceTd => "no service TD is bound to the guest",
            Self::PolicyMeasurement => "measurements are allowed ones",
            Self::BindingReportData => "the report data is of this request",
            Self::BindingNonce => "the nonce is of this request",
            Self::BindingUserData => "the user data is of this request",
            Self::BindingChipId => "report and certificate are of one chip",
            Self::BindingTcb => "report and certificate are of one TCB",
            Self::BindingTpmQuote => "the TPM's quote is bound to the other half of the evidence",
            Self::PcrSelection => "exactly the wanted PCRs are quoted",
            Self::PcrDigestMismatch => "the PCR values given are those that were signed",
            Self::EventlogReplayMismatch => "the event log leads to the signed registers",
            Self::EventlogEventDigest => "every event has the digest of its content",
            Self::EventlogBadIndex => "every event is of a register that exists",
        }
    }

    /// What to do about a refusal of this class.
    #[must_use]
    pub const fn fix(self) -> &'static str {
        match self {
            Self::ParseTruncated | Self::ParseMalformed | Self::ParseLength | Self::ParseTrailingBytes | Self::ParseField => {
                "give the evidence whole and unchanged, as the platform made it"
            }
            Self::TypeWrongTee | Self::TypeUnsupportedVersion | Self::TypeNotAQuote => {
                "give evidence of a platform and version of docs/attestation.md"
            }
            Self::SigBody | Self::SigQeReport | Self::SigQeHash | Self::SigAlgorithm | Self::SigReserved => {
                "do not trust it: it was changed, or never was genuine"
            }
            Self::ChainUntrustedRoot => "vendors' roots are built in; of a test root give its certificate by name",
            Self::ChainSignature | Self::ChainInvalid | Self::ChainNotCa | Self::ChainPathLength => {
                "do not trust it; if the collateral is old, refresh it and try again"
            }
            Self::ChainCrlMismatch | Self::CollateralSignature | Self::CollateralMismatch | Self::CollateralNoTcbLevel => {
                "refresh the platform's collateral"
            }
            Self::ChainRevoked => "the vendor withdrew this platform's certificate: take the machine out of service",
            Self::TimeCertExpired | Self::TimeNotYetValid | Self::TimeCollateralExpired => {
                "make fresh evidence, refresh the collateral, or compare the clocks"
            }
            Self::PolicyDebug => "start the guest without debug mode",
            Self::PolicyTcbStatus => "update the platform's firmware, or accept the status in the policy if you mean it",
            Self::PolicyTdAttributes | Self::PolicyServiceTd => "start the guest with allowed attributes",
            Self::PolicyMeasurement => "run the measured code that the policy names, or have the policy changed",
            Self::BindingReportData | Self::BindingNonce | Self::BindingUserData => "make evidence for this request; it may be a replay",
            Self::BindingChipId | Self::BindingTcb => "give the certificate of this chip at this TCB",
            Self::BindingTpmQuote => "make both halves of the evidence together",
            Self::PcrSelection | Self::PcrDigestMismatch => "quote the PCRs that the reference lists and send their values",
            Self::EventlogReplayMismatch | Self::EventlogEventDigest | Self::EventlogBadIndex => {
                "send the whole log in the order it was measured"
            }
        }
    }
}

/// `2025-07-01T00:00:00Z`, or the number where no calendar reaches.
fn time(ms: u64) -> String {
    let seconds = i64::try_from(ms / 1000).ok().and_then(|seconds| ASN1Time::from_timestamp(seconds).ok());
    let Some(at) = seconds.map(|seconds| seconds.to_datetime()) else { return format!("{ms} ms") };
    let (month, day) = (u8::from(at.month()), at.day());
    format!("{:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", at.year(), at.hour(), at.minute(), at.second())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_has_its_name_and_words() {
        for class in Class::ALL {
            assert_eq!(Class::named(class.as_str()), Some(class));
            assert!(!class.meaning().is_empty() && !class.fix().is_empty());
        }
        assert_eq!(Class::named("sig"), None);
    }

    #[test]
    fn both_sides_of_a_refusal_are_told() {
        let error = AttestError::CertExpired { part: "leaf", expired_at_ms: 1_751_328_000_000, now_ms: 1_751_328_060_000 };
        let Explanation { expected, got, .. } = error.explain();
        assert_eq!((expected.as_str(), got.as_str()), ("leaf in force at 2025-07-01T00:01:00Z", "it ended at 2025-07-01T00:00:00Z"));
        let other = AttestError::TpmQuote.explain();
        assert!(!other.expected.is_empty() && other.got.contains("not bound"));
    }
}
