//! The checks of both kinds of Nitro documents, in their order.

use crate::{Check, Class};

/// What both kinds are checked for, each under its own name.
pub(super) struct Steps {
    pub(super) form: &'static Check,
    pub(super) fields: &'static Check,
    pub(super) chain: &'static Check,
    pub(super) signature: &'static Check,
    pub(super) age: &'static Check,
    pub(super) pcrs: &'static Check,
}

static NSM_FORM: Check = Check {
    id: "nitro.form",
    what: "a COSE_Sign1 message of at most 32 KiB, ES384 in its protected header, nothing after its end",
    source: "dstack attestation reference, section 5.3 rule 1; RFC 9052 section 4.2",
    classes: &[Class::ParseMalformed, Class::ParseTrailingBytes, Class::ParseLength, Class::SigAlgorithm],
    test: "vector:nitro-dstack-a/alg-es256",
};

static NSM_FIELDS: Check = Check {
    id: "nitro.fields",
    what: "every field of the document has its type and size, none stands twice, the digest is SHA384, the PCRs are under `pcrs`",
    source: "dstack attestation reference, section 5.3 rule 2",
    classes: &[Class::ParseField, Class::ParseMalformed, Class::ParseTrailingBytes],
    test: "unknown_members_are_passed_over_and_double_ones_refused",
};

static NSM_CHAIN: Check = Check {
    id: "nitro.chain",
    what: "the bundle begins with a trusted root of AWS; every certificate below is signed by the one above, on P-384, inside its dates and usages",
    source: "dstack attestation reference, section 5.3 rule 4; RFC 5280 section 6.1",
    classes: &[
        Class::ChainUntrustedRoot,
        Class::ChainSignature,
        Class::ChainInvalid,
        Class::ChainNotCa,
        Class::ChainPathLength,
        Class::SigAlgorithm,
        Class::TimeCertExpired,
        Class::TimeNotYetValid,
        Class::ParseMalformed,
    ],
    test: "certificates_must_be_of_their_kind",
};

static NSM_SIGNATURE: Check = Check {
    id: "nitro.signature",
    what: "the leaf's key signed the message",
    source: "dstack attestation reference, section 5.3 rule 5",
    classes: &[Class::SigBody],
    test: "vector:nitro-dstack-a/sig-r",
};

static NSM_AGE: Check = Check {
    id: "nitro.age",
    what: "the document is at most an hour old and at most five minutes ahead",
    source: "dstack attestation reference, section 5.3 rule 3",
    classes: &[Class::TimeCollateralExpired, Class::TimeNotYetValid],
    test: "age_is_judged_after_the_signature",
};

static NSM_PCRS: Check = Check {
    id: "nitro.pcrs",
    what: "PCR0, PCR1 and PCR2 are there",
    source: "dstack attestation reference, section 5.3 rule 7",
    classes: &[Class::ParseField],
    test: "a_document_without_its_image_is_refused",
};

pub(super) static ENCLAVE: Steps =
    Steps { form: &NSM_FORM, fields: &NSM_FIELDS, chain: &NSM_CHAIN, signature: &NSM_SIGNATURE, age: &NSM_AGE, pcrs: &NSM_PCRS };

pub(super) static NOT_DEBUG: Check = Check {
    id: "nitro.not-debug",
    what: "none of PCR0, PCR1 and PCR2 is zero, as all are in debug mode",
    source: "dstack attestation reference, section 6 and checklist 3",
    classes: &[Class::PolicyDebug],
    test: "one_zero_pcr_of_the_image_is_debug",
};

pub(crate) static REPORT_DATA: Check = Check {
    id: "nitro.report-data",
    what: "`user_data` is there and is the report data beside the document",
    source: "dstack attestation reference, section 5.3 rule 6",
    classes: &[Class::BindingReportData, Class::BindingUserData],
    test: "evidence_around_a_document_becomes_an_identity",
};

static TPM_FORM: Check = Check {
    id: "nitro-tpm.form",
    what: "a COSE_Sign1 message of at most 32 KiB, ES384 in its protected header, nothing after its end",
    source: "dstack attestation reference, sections 5.3 and 5.4, rule 1; RFC 9052 section 4.2",
    classes: &[Class::ParseMalformed, Class::ParseTrailingBytes, Class::ParseLength, Class::SigAlgorithm],
    test: "vector:nitro-tpm-ec2/alg-es256",
};

static TPM_FIELDS: Check = Check {
    id: "nitro-tpm.fields",
    what: "every field of the document has its type and size, none stands twice, the digest is SHA384, the PCRs are under `nitrotpm_pcrs`",
    source: "dstack attestation reference, sections 5.3 and 5.4, rule 2",
    classes: &[Class::ParseField, Class::ParseMalformed, Class::ParseTrailingBytes],
    test: "an_enclaves_document_is_none_of_a_tpm",
};

static TPM_CHAIN: Check = Check {
    id: "nitro-tpm.chain",
    what: "the bundle begins with a trusted root of AWS; every certificate below is signed by the one above, on P-384, inside its dates and usages",
    source: "dstack attestation reference, sections 5.3 and 5.4, rule 4; RFC 5280 section 6.1",
    classes: &[
        Class::ChainUntrustedRoot,
        Class::ChainSignature,
        Class::ChainInvalid,
        Class::ChainNotCa,
        Class::ChainPathLength,
        Class::SigAlgorithm,
        Class::TimeCertExpired,
        Class::TimeNotYetValid,
        Class::ParseMalformed,
    ],
    test: "vector:nitro-tpm-ec2/forged-chain",
};

static TPM_SIGNATURE: Check = Check {
    id: "nitro-tpm.signature",
    what: "the leaf's key signed the message",
    source: "dstack attestation reference, sections 5.3 and 5.4, rule 5",
    classes: &[Class::SigBody],
    test: "vector:nitro-tpm-ec2/sig-r",
};

static TPM_AGE: Check = Check {
    id: "nitro-tpm.age",
    what: "the document is at most an hour old and at most five minutes ahead",
    source: "dstack attestation reference, sections 5.3 and 5.4, rule 3",
    classes: &[Class::TimeCollateralExpired, Class::TimeNotYetValid],
    test: "a_tpm_document_ages_as_an_enclaves_does",
};

static TPM_PCRS: Check = Check {
    id: "nitro-tpm.pcrs",
    what: "PCR4, PCR7 and PCR12 are there",
    source: "dstack attestation reference, sections 5.3 and 5.4, rule 7",
    classes: &[Class::ParseField],
    test: "a_tpm_document_without_boot_pcrs_is_refused",
};

pub(super) static TPM: Steps =
    Steps { form: &TPM_FORM, fields: &TPM_FIELDS, chain: &TPM_CHAIN, signature: &TPM_SIGNATURE, age: &TPM_AGE, pcrs: &TPM_PCRS };

pub(crate) static TPM_REPORT_DATA: Check = Check {
    id: "nitro-tpm.report-data",
    what: "`user_data` is there and is the report data beside the document",
    source: "dstack attestation reference, section 5.4",
    classes: &[Class::BindingReportData, Class::BindingUserData],
    test: "tpm_evidence_is_bound_to_its_report_data",
};

pub(crate) static TPM_EVENTS: Check = Check {
    id: "nitro-tpm.runtime-log",
    what: "all runtime events lead to PCR14",
    source: "dstack attestation reference, section 5.4",
    classes: &[Class::EventlogReplayMismatch, Class::EventlogEventDigest],
    test: "tpm_events_that_miss_pcr_14_are_refused",
};

pub(crate) static TPM_IMAGE: Check = Check {
    id: "nitro-tpm.os-image",
    what: "a claimed OS image has a measurement document that names SHA-256 of PCR4, PCR7 and PCR12",
    source: "dstack attestation reference, sections 6 and 8",
    classes: &[Class::PolicyMeasurement, Class::ParseField, Class::ParseMalformed],
    test: "a_tpm_image_that_was_not_booted_is_refused",
};

/// All checks of an enclave's evidence, in order.
pub static CHECKS: &[&Check] = &[&NSM_FORM, &NSM_FIELDS, &NSM_CHAIN, &NSM_SIGNATURE, &NSM_AGE, &NSM_PCRS, &NOT_DEBUG, &REPORT_DATA];

/// All checks of a NitroTPM's evidence, in order.
pub static TPM_CHECKS: &[&Check] =
    &[&TPM_FORM, &TPM_FIELDS, &TPM_CHAIN, &TPM_SIGNATURE, &TPM_AGE, &TPM_PCRS, &TPM_REPORT_DATA, &TPM_EVENTS, &TPM_IMAGE];
