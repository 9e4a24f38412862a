//! The checks of SEV-SNP evidence by name. Owns: their table. Never: makes one.
//! Source: AMD SEV-SNP firmware ABI (56860) and KDS specification (57230); dstack attestation reference, sections 5.5 to 9.

use crate::{Check, Class};

pub(super) static LAYOUT: Check = Check {
    id: "snp.layout",
    what: "the report has 1184 bytes",
    source: "AMD SEV-SNP firmware ABI (56860), ATTESTATION_REPORT",
    classes: &[Class::ParseTruncated],
    test: "refuses_other_versions_lengths_and_algorithms",
};
pub(super) static VERSION: Check = Check {
    id: "snp.version",
    what: "its version is 2, 3 or 5",
    source: "AMD SEV-SNP firmware ABI (56860), ATTESTATION_REPORT",
    classes: &[Class::TypeUnsupportedVersion],
    test: "vector:snp-milan-azure-style/version-99",
};
pub(super) static LENGTH: Check = Check {
    id: "snp.trailing-bytes",
    what: "nothing follows the report",
    source: "AMD SEV-SNP firmware ABI (56860), ATTESTATION_REPORT",
    classes: &[Class::ParseTrailingBytes],
    test: "vector:snp-milan-azure-style/trailing",
};
pub(super) static ALGORITHM: Check = Check {
    id: "snp.signature-algorithm",
    what: "it is signed by ECDSA P-384 with SHA-384",
    source: "AMD SEV-SNP firmware ABI (56860), signature formats",
    classes: &[Class::SigAlgorithm],
    test: "vector:snp-milan-azure-style/sig-algo",
};
pub(super) static SIGNATURE_RESERVED: Check = Check {
    id: "snp.signature-reserved",
    what: "the bytes after the signature are zero",
    source: "AMD SEV-SNP firmware ABI (56860), signature formats",
    classes: &[Class::SigReserved],
    test: "vector:snp-milan-azure-style/sig-reserved",
};
pub(super) static SIGNING_KEY: Check = Check {
    id: "snp.signing-key",
    what: "the report names a VCEK as its key, or a VLEK where the policy takes one, and the chip's key is not masked",
    source: "dstack attestation reference, section 5.5; ADR 0008",
    classes: &[Class::PolicyTdAttributes, Class::BindingChipId, Class::ParseField],
    test: "a_vlek_is_taken_only_where_the_policy_says_so",
};
pub(super) static ENDORSEMENT: Check = Check {
    id: "snp.endorsement",
    what: "evidence or bundle holds the certificate of that key",
    source: "dstack attestation reference, section 5.5 (forms of cert_chain)",
    classes: &[Class::CollateralMismatch, Class::ParseMalformed, Class::ParseLength, Class::ParseTruncated, Class::ChainUntrustedRoot],
    test: "a_report_without_its_certificate_is_refused_by_the_name_of_its_chip",
};
pub(super) static CHAIN: Check = Check {
    id: "snp.chain",
    what: "root, ASK or ASVK, and VEK: names, RSA-PSS with SHA-384, CA flags, dates, and nobody is on the root's revocation list",
    source: "AMD KDS specification (57230); RFC 5280, section 6.1; ADR 0008",
    classes: &[
        Class::ChainSignature,
        Class::ChainInvalid,
        Class::ChainUntrustedRoot,
        Class::ChainNotCa,
        Class::ChainPathLength,
        Class::ChainRevoked,
        Class::ChainCrlMismatch,
        Class::TimeCertExpired,
        Class::TimeNotYetValid,
        Class::TimeCollateralExpired,
        Class::CollateralMismatch,
        Class::ParseMalformed,
    ],
    test: "vector:snp-milan-azure-style/vek-sig",
};
pub(super) static PRODUCT: Check = Check {
    id: "snp.product",
    what: "root, issuer and VEK are of one product and of the kind of key that the report names",
    source: "AMD KDS specification (57230), certificates",
    classes: &[Class::ChainInvalid, Class::ParseMalformed],
    test: "a_vlek_certificate_does_not_stand_for_a_vcek",
};
pub(super) static SIGNATURE: Check = Check {
    id: "snp.signature",
    what: "the VEK signed the report",
    source: "AMD SEV-SNP firmware ABI (56860), signature formats",
    classes: &[Class::SigBody],
    test: "vector:snp-milan-azure-style/measurement",
};
pub(super) static CHIP: Check = Check {
    id: "snp.chip",
    what: "the report's processor is of the root's product, its chip is the VCEK's",
    source: "AMD KDS specification (57230), certificates",
    classes: &[Class::BindingChipId],
    test: "refuses_a_report_of_another_chip_or_product",
};
pub(super) static REPORTED_TCB: Check = Check {
    id: "snp.reported-tcb",
    what: "the reported firmware versions are the VEK's; reported and committed ones are not above the running ones",
    source: "AMD SEV-SNP firmware ABI (56860), TCB_VERSION; KDS specification (57230)",
    classes: &[Class::BindingTcb, Class::ParseField],
    test: "refuses_firmware_versions_that_contradict_the_certificate",
};
pub(super) static RESERVED: Check = Check {
    id: "snp.reserved",
    what: "no reserved bit of report, policy and key flags is set; the privilege level is a guest's",
    source: "AMD SEV-SNP firmware ABI (56860), ATTESTATION_REPORT",
    classes: &[Class::ParseField],
    test: "refuses_reserved_bits_of_a_signed_report",
};
pub(super) static DEBUG: Check = Check {
    id: "snp.debug",
    what: "the guest's policy forbids debugging",
    source: "dstack attestation reference, section 5.5",
    classes: &[Class::PolicyDebug],
    test: "refuses_a_guest_that_may_be_debugged",
};
pub(super) static MIGRATION: Check = Check {
    id: "snp.migration",
    what: "no migration agent is or may be bound to the guest",
    source: "dstack attestation reference, section 5.5",
    classes: &[Class::PolicyTdAttributes],
    test: "refuses_a_migration_agent",
};
pub(super) static PLATFORM: Check = Check {
    id: "snp.platform",
    what: "SMT, RAPL, ciphertext hiding and firmware are as the guest's policy demands",
    source: "dstack attestation reference, section 5.5",
    classes: &[Class::PolicyTdAttributes],
    test: "refuses_a_platform_that_contradicts_the_policy",
};
pub(super) static VMPL: Check = Check {
    id: "snp.vmpl",
    what: "the report was asked for at privilege level 0",
    source: "dstack attestation reference, section 5.5",
    classes: &[Class::PolicyTdAttributes],
    test: "refuses_a_report_of_a_lower_privilege_level",
};
pub(super) static REPORT_DATA: Check = Check {
    id: "snp.report-data",
    what: "the copy of the report data is the signed one",
    source: "dstack attestation reference, section 3",
    classes: &[Class::BindingReportData],
    test: "refuses_report_data_that_was_not_signed",
};
pub(super) static HOST_DATA: Check = Check {
    id: "snp.host-data",
    what: "HOST_DATA binds the mr-config document, which is of version 3",
    source: "dstack attestation reference, sections 5.5 and 9",
    classes: &[Class::BindingUserData, Class::ParseMalformed, Class::ParseField, Class::ParseLength, Class::TypeUnsupportedVersion],
    test: "refuses_a_document_that_host_data_does_not_bind",
};
pub(super) static LAUNCH: Check = Check {
    id: "snp.launch",
    what: "a measurement document, if there is one, recomputes to the report's measurement; no image hash is believed without",
    source: "dstack attestation reference, sections 6 and 8",
    classes: &[Class::PolicyMeasurement, Class::ParseMalformed, Class::ParseField, Class::ParseLength, Class::TypeUnsupportedVersion],
    test: "refuses_a_launch_that_is_not_the_measured_one",
};
pub(super) static TCB_STATUS: Check = Check {
    id: "snp.tcb-status",
    what: "running, reported, committed and launch firmware are one, or the policy takes OutOfDate",
    source: "dstack KMS reference, section 9.2",
    classes: &[Class::PolicyTcbStatus],
    test: "firmware_that_is_not_committed_is_out_of_date",
};
