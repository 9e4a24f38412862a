//! The checks of Azure TDX evidence by name, beside those of its TD quote. Owns: their table. Never: makes one.
//! Source: Microsoft, "Guest attestation for confidential VMs: design and reference" (HCL report); TPM 2.0 Library, part 2; ADR 0008.

use crate::{Check, Class};

pub(super) static HCL_REPORT: Check = Check {
    id: "azure.hcl-report",
    what: "the HCL report is whole, of a TD, and carries runtime data hashed with SHA-256",
    source: "Microsoft, guest attestation for confidential VMs, HCL report",
    classes: &[
        Class::ParseMalformed,
        Class::ParseTruncated,
        Class::ParseLength,
        Class::ParseField,
        Class::ParseTrailingBytes,
        Class::TypeUnsupportedVersion,
        Class::TypeWrongTee,
    ],
    test: "refuses_hcl_reports_of_another_shape",
};
pub(super) static TD_QUOTE: Check = Check {
    id: "azure.td-quote",
    what: "the TD quote passes every check of TDX, under the collateral of its platform",
    source: "the checks of TDX",
    classes: &[Class::SigBody, Class::ParseMalformed, Class::ParseTruncated, Class::CollateralMismatch],
    test: "no_byte_of_a_part_can_change_unnoticed",
};
pub(super) static RUNTIME_DATA: Check = Check {
    id: "azure.runtime-data",
    what: "the quote's report data is SHA-256 of the runtime data, then zeros",
    source: "Microsoft, guest attestation for confidential VMs, HCL report",
    classes: &[Class::BindingReportData],
    test: "no_byte_of_a_part_can_change_unnoticed",
};
pub(super) static KEY: Check = Check {
    id: "azure.attestation-key",
    what: "the runtime data names one RSA key HCLAkPub for signing",
    source: "Microsoft, guest attestation for confidential VMs, HCL report",
    classes: &[Class::ParseMalformed, Class::ParseField],
    test: "refuses_runtime_data_without_one_attestation_key",
};
pub(super) static AK_CERTIFICATE: Check = Check {
    id: "azure.ak-certificate",
    what: "a certificate of that key ends at Microsoft's root for virtual TPMs",
    source: "RFC 5280, section 6.1; Microsoft, guest attestation for confidential VMs; ADR 0008",
    classes: &[
        Class::ChainSignature,
        Class::ChainUntrustedRoot,
        Class::ChainInvalid,
        Class::BindingTpmQuote,
        Class::TimeCertExpired,
        Class::TimeNotYetValid,
        Class::ChainRevoked,
        Class::ChainNotCa,
        Class::ChainPathLength,
        Class::ChainCrlMismatch,
        Class::TimeCollateralExpired,
        Class::SigAlgorithm,
        Class::ParseMalformed,
        Class::ParseLength,
    ],
    test: "the_certificate_is_of_the_key_that_the_quote_binds",
};
pub(super) static TPM_QUOTE: Check = Check {
    id: "azure.tpm-quote",
    what: "that key signed the TPM's quote",
    source: "TPM 2.0 Library, part 2, sections 10.12 and 11.3",
    classes: &[
        Class::SigBody,
        Class::ParseMalformed,
        Class::ParseTruncated,
        Class::ParseLength,
        Class::ParseField,
        Class::ParseTrailingBytes,
        Class::TypeNotAQuote,
        Class::PcrSelection,
    ],
    test: "no_byte_of_a_part_can_change_unnoticed",
};
pub(super) static PCRS: Check = Check {
    id: "azure.pcrs",
    what: "the PCRs given are SHA-256, all 24, and those that the TPM signed",
    source: "TPM 2.0 Library, part 2, section 10.12.1",
    classes: &[Class::PcrDigestMismatch, Class::PcrSelection, Class::ParseField],
    test: "no_byte_of_a_part_can_change_unnoticed",
};
