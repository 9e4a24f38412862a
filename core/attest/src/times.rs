//! Which parts of each platform's evidence have dates. Owns: the rows that tests, the table of `docs/attestation.md` and `xtask check` are
//! held against. Never: judges; [`crate::window`] is the one rule, and the named tests show that each platform applies it.

use crate::Class;

/// A part with dates, on one platform.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatedPart {
    /// As in the names of checks.
    pub platform: &'static str,
    /// What has the dates.
    pub part: &'static str,
    /// The refusal before its first moment.
    pub early: Class,
    /// The refusal after its last moment.
    pub late: Class,
    /// The test that judges evidence at, before and after both moments.
    pub test: &'static str,
}

/// Every platform's dated parts.
pub static DATED_PARTS: &[DatedPart] = &[
    DatedPart {
        platform: "tdx",
        part: "certificate",
        early: Class::TimeNotYetValid,
        late: Class::TimeCertExpired,
        test: "dates_of_tdx_evidence",
    },
    DatedPart {
        platform: "tdx",
        part: "revocation list",
        early: Class::TimeNotYetValid,
        late: Class::TimeCollateralExpired,
        test: "dates_of_tdx_evidence",
    },
    DatedPart {
        platform: "tdx",
        part: "TCB info, QE identity",
        early: Class::TimeNotYetValid,
        late: Class::TimeCollateralExpired,
        test: "dates_of_tdx_evidence",
    },
    DatedPart {
        platform: "gcp",
        part: "certificate of the attestation key",
        early: Class::TimeNotYetValid,
        late: Class::TimeCertExpired,
        test: "dates_of_google_evidence",
    },
    DatedPart {
        platform: "gcp",
        part: "revocation list of its issuer",
        early: Class::TimeNotYetValid,
        late: Class::TimeCollateralExpired,
        test: "dates_of_google_evidence",
    },
    DatedPart {
        platform: "gcp",
        part: "collateral of the TD",
        early: Class::TimeNotYetValid,
        late: Class::TimeCollateralExpired,
        test: "dates_of_google_evidence",
    },
    DatedPart {
        platform: "azure",
        part: "certificate of the attestation key",
        early: Class::TimeNotYetValid,
        late: Class::TimeCertExpired,
        test: "dates_of_azure_evidence",
    },
    DatedPart {
        platform: "azure",
        part: "revocation list of its issuer",
        early: Class::TimeNotYetValid,
        late: Class::TimeCollateralExpired,
        test: "dates_of_azure_evidence",
    },
    DatedPart {
        platform: "azure",
        part: "collateral of the TD",
        early: Class::TimeNotYetValid,
        late: Class::TimeCollateralExpired,
        test: "dates_of_azure_evidence",
    },
    DatedPart {
        platform: "nitro",
        part: "certificate",
        early: Class::TimeNotYetValid,
        late: Class::TimeCertExpired,
        test: "dates_of_enclave_documents",
    },
    DatedPart {
        platform: "nitro",
        part: "document",
        early: Class::TimeNotYetValid,
        late: Class::TimeCollateralExpired,
        test: "dates_of_enclave_documents",
    },
    DatedPart {
        platform: "nitro-tpm",
        part: "certificate",
        early: Class::TimeNotYetValid,
        late: Class::TimeCertExpired,
        test: "dates_of_tpm_documents",
    },
    DatedPart {
        platform: "nitro-tpm",
        part: "document",
        early: Class::TimeNotYetValid,
        late: Class::TimeCollateralExpired,
        test: "dates_of_tpm_documents",
    },
    DatedPart {
        platform: "snp",
        part: "certificate",
        early: Class::TimeNotYetValid,
        late: Class::TimeCertExpired,
        test: "dates_of_snp_evidence",
    },
    DatedPart {
        platform: "snp",
        part: "revocation list",
        early: Class::TimeNotYetValid,
        late: Class::TimeCollateralExpired,
        test: "dates_of_snp_evidence",
    },
];
