//! The closed vocabulary of refusals: [`Class`], one name per kind of reason. Owns: the refusal classes of the attestation vectors.
//! Never: says more than the kind; that is [`crate::AttestError`].
//! Source: the refusal class table of the vectors' README.

/// Why evidence was refused, in the closed vocabulary the vectors use; the text is part of the audit record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// The encoding ends too early.
    ParseTruncated,
    /// The bytes are not of the format.
    ParseMalformed,
    /// A length reaches beyond its buffer.
    ParseLength,
    /// Bytes are left over after the end.
    ParseTrailingBytes,
    /// A field is outside its stated type or size.
    ParseField,
    /// Good bytes of another kind of TEE.
    TypeWrongTee,
    /// Good bytes of a version not asked for.
    TypeUnsupportedVersion,
    /// Not a quote at all.
    TypeNotAQuote,
    /// The signature over the evidence body does not verify.
    SigBody,
    /// The signature over the quoting enclave's report does not verify.
    SigQeReport,
    /// The quoting enclave's report does not bind the attestation key.
    SigQeHash,
    /// A signature algorithm that is not allowed.
    SigAlgorithm,
    /// Reserved bytes beside a signature are set.
    SigReserved,
    /// The certificate path ends at no root we trust.
    ChainUntrustedRoot,
    /// A signature in the certificate path does not verify.
    ChainSignature,
    /// The certificate path is not well formed.
    ChainInvalid,
    /// A certificate that issues others is not a CA.
    ChainNotCa,
    /// The certificate path is longer than a CA on it allows.
    ChainPathLength,
    /// A revocation list is not the one of the issuer it is used for.
    ChainCrlMismatch,
    /// A certificate was revoked.
    ChainRevoked,
    /// A certificate is past its last day.
    TimeCertExpired,
    /// A certificate or collateral is not valid yet.
    TimeNotYetValid,
    /// Collateral is past its next update.
    TimeCollateralExpired,
    /// TCB info or QE identity was altered.
    CollateralSignature,
    /// Collateral is of another platform or TEE, or is missing.
    CollateralMismatch,
    /// No level of the collateral fits the platform.
    CollateralNoTcbLevel,
    /// The guest runs in debug mode.
    PolicyDebug,
    /// The TCB status is not on the list of allowed ones.
    PolicyTcbStatus,
    /// TD attributes outside what is allowed.
    PolicyTdAttributes,
    /// A service TD is bound to the guest.
    PolicyServiceTd,
    /// A measurement is not an allowed one.
    PolicyMeasurement,
    /// Genuine, but the report data is not of this request.
    BindingReportData,
    /// Genuine, but the nonce is not of this request.
    BindingNonce,
    /// Genuine, but the user data is not of this request.
    BindingUserData,
    /// Genuine, but of another chip than its certificate.
    BindingChipId,
    /// Genuine, but of another TCB than its certificate.
    BindingTcb,
    /// The TPM half is not bound to the quote.
    BindingTpmQuote,
    /// The PCR selection is not the wanted one.
    PcrSelection,
    /// The claimed PCRs do not fit the signed digest.
    PcrDigestMismatch,
    /// An event log that does not lead to the signed registers.
    EventlogReplayMismatch,
    /// An event's digest is not that of its content.
    EventlogEventDigest,
    /// An event names a register that does not exist.
    EventlogBadIndex,
}

impl Class {
    /// Every class, in the order of the table.
    pub const ALL: [Self; 42] = [
        Self::ParseTruncated,
        Self::ParseMalformed,
        Self::ParseLength,
        Self::ParseTrailingBytes,
        Self::ParseField,
        Self::TypeWrongTee,
        Self::TypeUnsupportedVersion,
        Self::TypeNotAQuote,
        Self::SigBody,
        Self::SigQeReport,
        Self::SigQeHash,
        Self::SigAlgorithm,
        Self::SigReserved,
        Self::ChainUntrustedRoot,
        Self::ChainSignature,
        Self::ChainInvalid,
        Self::ChainNotCa,
        Self::ChainPathLength,
        Self::ChainCrlMismatch,
        Self::ChainRevoked,
        Self::TimeCertExpired,
        Self::TimeNotYetValid,
        Self::TimeCollateralExpired,
        Self::CollateralSignature,
        Self::CollateralMismatch,
        Self::CollateralNoTcbLevel,
        Self::PolicyDebug,
        Self::PolicyTcbStatus,
        Self::PolicyTdAttributes,
        Self::PolicyServiceTd,
        Self::PolicyMeasurement,
        Self::BindingReportData,
        Self::BindingNonce,
        Self::BindingUserData,
        Self::BindingChipId,
        Self::BindingTcb,
        Self::BindingTpmQuote,
        Self::PcrSelection,
        Self::PcrDigestMismatch,
        Self::EventlogReplayMismatch,
        Self::EventlogEventDigest,
        Self::EventlogBadIndex,
    ];

    /// The stable text of the class.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ParseTruncated => "parse.truncated",
            Self::ParseMalformed => "parse.malformed",
            Self::ParseLength => "parse.length",
            Self::ParseTrailingBytes => "parse.trailing_bytes",
            Self::ParseField => "parse.field",
            Self::TypeWrongTee => "type.wrong_tee",
            Self::TypeUnsupportedVersion => "type.unsupported_version",
            Self::TypeNotAQuote => "type.not_a_quote",
            Self::SigBody => "sig.body",
            Self::SigQeReport => "sig.qe_report",
            Self::SigQeHash => "sig.qe_hash",
            Self::SigAlgorithm => "sig.algorithm",
            Self::SigReserved => "sig.reserved",
            Self::ChainUntrustedRoot => "chain.untrusted_root",
            Self::ChainSignature => "chain.signature",
            Self::ChainInvalid => "chain.invalid",
            Self::ChainNotCa => "chain.not_ca",
            Self::ChainPathLength => "chain.path_length",
            Self::ChainCrlMismatch => "chain.crl_mismatch",
            Self::ChainRevoked => "chain.revoked",
            Self::TimeCertExpired => "time.cert_expired",
            Self::TimeNotYetValid => "time.not_yet_valid",
            Self::TimeCollateralExpired => "time.collateral_expired",
            Self::CollateralSignature => "collateral.signature",
            Self::CollateralMismatch => "collateral.mismatch",
            Self::CollateralNoTcbLevel => "collateral.no_tcb_level",
            Self::PolicyDebug => "policy.debug",
            Self::PolicyTcbStatus => "policy.tcb_status",
            Self::PolicyTdAttributes => "policy.td_attributes",
            Self::PolicyServiceTd => "policy.service_td",
            Self::PolicyMeasurement => "policy.measurement",
            Self::BindingReportData => "binding.report_data",
            Self::BindingNonce => "binding.nonce",
            Self::BindingUserData => "binding.user_data",
            Self::BindingChipId => "binding.chip_id",
            Self::BindingTcb => "binding.tcb",
            Self::BindingTpmQuote => "binding.tpm_quote",
            Self::PcrSelection => "pcr.selection",
            Self::PcrDigestMismatch => "pcr.digest_mismatch",
            Self::EventlogReplayMismatch => "eventlog.replay_mismatch",
            Self::EventlogEventDigest => "eventlog.event_digest",
            Self::EventlogBadIndex => "eventlog.bad_index",
        }
    }
}

impl std::fmt::Display for Class {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn class_texts_are_distinct() {
        let mut texts: Vec<_> = Class::ALL.iter().map(|c| c.as_str()).collect();
        texts.sort_unstable();
        texts.dedup();
        assert_eq!(texts.len(), Class::ALL.len());
    }
}
