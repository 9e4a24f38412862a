//! The checks of the vTPM half of Google Cloud evidence, in their order; those of the TD half are `tdx`'s.

use crate::{Check, Class};

pub(super) static FORM: Check = Check {
    id: "gcp.form",
    what: "the TPM half is Google's: a TPMS_ATTEST of a quote and a TPMT_SIGNATURE, whole",
    source: "dstack attestation reference, section 5.2",
    classes: &[Class::ParseTruncated, Class::ParseMalformed, Class::ParseField, Class::ParseTrailingBytes, Class::TypeNotAQuote],
    test: "a_half_of_another_form_is_refused",
};

pub(super) static AK_CHAIN: Check = Check {
    id: "gcp.ak-chain",
    what: "the attestation key's certificate leads to a root of Google over pinned intermediates; nobody on the path is revoked",
    source: "dstack attestation reference, section 5.2 rule 4; RFC 5280 section 6",
    classes: &[
        Class::ChainUntrustedRoot,
        Class::ChainSignature,
        Class::ChainInvalid,
        Class::ChainNotCa,
        Class::ChainRevoked,
        Class::TimeCertExpired,
        Class::TimeNotYetValid,
        Class::TimeCollateralExpired,
        Class::CollateralMismatch,
    ],
    test: "an_attestation_key_under_no_root_is_refused",
};

pub(super) static SIGNATURE: Check = Check {
    id: "gcp.tpm-signature",
    what: "the attestation key signed the TPM quote with SHA-256, RSASSA or ECDSA P-256",
    source: "dstack attestation reference, section 5.2 rule 3",
    classes: &[Class::SigBody, Class::SigAlgorithm],
    test: "vector:gcp-tpm-tdx-host/sig",
};

pub(super) static BINDING: Check = Check {
    id: "gcp.bound-quote",
    what: "the TPM quote's extra data is SHA-256 of the TD quote as given",
    source: "dstack attestation reference, section 5.2 rule 5",
    classes: &[Class::BindingTpmQuote],
    test: "vector:gcp-bound/other-quote-hash",
};

pub(super) static SELECTION: Check = Check {
    id: "gcp.pcr-selection",
    what: "exactly PCR 0, 2 and 14 of the SHA-256 bank are signed and given",
    source: "dstack attestation reference, section 5.2 rule 2",
    classes: &[Class::PcrSelection, Class::ParseField],
    test: "vector:gcp-bound/pcr-selection-wider",
};

pub(super) static PCR_DIGEST: Check = Check {
    id: "gcp.pcr-values",
    what: "the given PCR values have the signed digest",
    source: "dstack attestation reference, section 5.2 rule 2",
    classes: &[Class::PcrDigestMismatch, Class::PcrSelection],
    test: "vector:gcp-bound/pcr14-changed",
};

pub(super) static BOOT_LOG: Check = Check {
    id: "gcp.boot-log",
    what: "the boot events given for a quoted PCR lead to its value",
    source: "dstack attestation reference, section 5.2 rule 2",
    classes: &[Class::EventlogReplayMismatch, Class::EventlogEventDigest, Class::EventlogBadIndex],
    test: "boot_events_that_lead_elsewhere_are_refused",
};

pub(super) static RUNTIME_LOG: Check = Check {
    id: "gcp.runtime-log",
    what: "the one list of runtime events that leads to RTMR3 leads to PCR14 as well",
    source: "dstack attestation reference, section 5.2 rule 6",
    classes: &[Class::EventlogReplayMismatch],
    test: "runtime_events_that_miss_pcr_14_are_refused",
};

pub(super) static FIRMWARE: Check = Check {
    id: "gcp.firmware",
    what: "PCR0 is a firmware that the verifier lists",
    source: "dstack attestation reference, section 6 and checklist 4",
    classes: &[Class::PolicyMeasurement],
    test: "an_unlisted_firmware_is_refused",
};

pub(super) static IMAGE: Check = Check {
    id: "gcp.os-image",
    what: "the claimed OS image is the one whose kernel the third event of PCR2 measures",
    source: "dstack attestation reference, sections 6 and 8",
    classes: &[Class::PolicyMeasurement, Class::ParseField, Class::ParseMalformed, Class::TypeUnsupportedVersion],
    test: "an_image_that_was_not_loaded_is_refused",
};

/// All checks of the vTPM half, in order.
pub static CHECKS: &[&Check] =
    &[&FORM, &AK_CHAIN, &SIGNATURE, &BINDING, &SELECTION, &PCR_DIGEST, &BOOT_LOG, &RUNTIME_LOG, &FIRMWARE, &IMAGE];
