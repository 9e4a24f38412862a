//! The checks of TDX evidence, in the order in which they are made. Owns: their names, sources and negative tests.

use crate::{Check, Class};

pub(super) static QUOTE: Check = Check {
    id: "tdx.quote",
    what: "the bytes are one quote of a TD, version 4 or 5, every length fitting, ECDSA P-256, a PCK chain inside",
    source: "Intel TDX DCAP Quoting Library API, appendix A.3, A.4",
    classes: &[
        Class::ParseMalformed,
        Class::ParseTruncated,
        Class::ParseLength,
        Class::TypeUnsupportedVersion,
        Class::TypeWrongTee,
        Class::SigAlgorithm,
    ],
    test: "vector:tdx-v4-phala/truncated-05of16",
};
pub(super) static PCK_CHAIN_TEXT: Check = Check {
    id: "tdx.pck-chain-text",
    what: "the chain in the quote is PEM of at most four certificates, each DER that ends where its bytes end",
    source: "RFC 7468, RFC 5280 4.1",
    classes: &[Class::ParseMalformed, Class::ParseTrailingBytes, Class::ParseLength, Class::ChainPathLength, Class::ChainInvalid],
    test: "refuses_text_between_certificates",
};
pub(super) static COLLATERAL: Check = Check {
    id: "tdx.collateral",
    what: "the bundle holds collateral of the platform that the PCK certificate names",
    source: "Intel PCS API v4",
    classes: &[Class::CollateralMismatch, Class::ChainInvalid, Class::ParseMalformed],
    test: "a_platform_without_collateral_is_refused",
};
pub(super) static PCK_ROOT: Check = Check {
    id: "tdx.pck-root",
    what: "the chain ends at a trusted root, known by its key",
    source: "Intel SGX PCK Certificate and CRL specification, 1.2",
    classes: &[Class::ChainUntrustedRoot, Class::ChainInvalid],
    test: "vector:tdx-v4-phala/other-trust-root",
};
pub(super) static PCK_PATH: Check = Check {
    id: "tdx.pck-path",
    what: "each certificate is signed by the next, P-256 with SHA-256, inside its dates; issuers are CAs of enough depth; every \
           critical extension is understood",
    source: "RFC 5280 6.1",
    classes: &[
        Class::ChainSignature,
        Class::ChainUntrustedRoot,
        Class::ChainInvalid,
        Class::ChainNotCa,
        Class::ChainPathLength,
        Class::SigAlgorithm,
        Class::TimeCertExpired,
        Class::TimeNotYetValid,
    ],
    test: "vector:tdx-v4-phala/pck-sig",
};
pub(super) static ROOT_CRL: Check = Check {
    id: "tdx.root-crl",
    what: "the root's revocation list is signed by the root and in force",
    source: "RFC 5280 6.3",
    classes: &[
        Class::ChainSignature,
        Class::ChainCrlMismatch,
        Class::ChainInvalid,
        Class::ParseMalformed,
        Class::TimeCollateralExpired,
        Class::TimeNotYetValid,
    ],
    test: "vector:tdx-v4-phala/coll-root-crl-sig",
};
pub(super) static PCK_CRL: Check = Check {
    id: "tdx.pck-crl",
    what: "the PCK CA's revocation list is signed by the CA of the quote's chain and in force",
    source: "RFC 5280 6.3",
    classes: &[
        Class::ChainSignature,
        Class::ChainCrlMismatch,
        Class::ChainInvalid,
        Class::ParseMalformed,
        Class::TimeCollateralExpired,
        Class::TimeNotYetValid,
    ],
    test: "vector:tdx-v4-phala/coll-pck-crl-sig",
};
pub(super) static REVOCATION: Check = Check {
    id: "tdx.revocation",
    what: "neither root, PCK CA nor PCK certificate is revoked",
    source: "RFC 5280 6.3",
    classes: &[Class::ChainRevoked],
    test: "a_list_refuses_whom_it_names",
};
pub(super) static TCB_INFO: Check = Check {
    id: "tdx.tcb-info",
    what: "the TCB info is signed by a certificate of the same root, not revoked, and inside its dates",
    source: "Intel PCS API v4, Get TDX TCB info",
    classes: &[
        Class::CollateralSignature,
        Class::ChainUntrustedRoot,
        Class::ChainSignature,
        Class::ChainInvalid,
        Class::ChainNotCa,
        Class::ChainPathLength,
        Class::ChainRevoked,
        Class::SigAlgorithm,
        Class::ParseMalformed,
        Class::ParseLength,
        Class::ParseTrailingBytes,
        Class::ParseField,
        Class::TimeCertExpired,
        Class::TimeCollateralExpired,
        Class::TimeNotYetValid,
    ],
    test: "vector:tdx-v4-phala/coll-tcb-sig",
};
pub(super) static QE_IDENTITY: Check = Check {
    id: "tdx.qe-identity",
    what: "the QE identity is signed by a certificate of the same root, not revoked, and inside its dates",
    source: "Intel PCS API v4, Get TD QE identity",
    classes: &[
        Class::CollateralSignature,
        Class::ChainUntrustedRoot,
        Class::ChainSignature,
        Class::ChainInvalid,
        Class::ChainNotCa,
        Class::ChainPathLength,
        Class::ChainRevoked,
        Class::SigAlgorithm,
        Class::ParseMalformed,
        Class::ParseLength,
        Class::ParseTrailingBytes,
        Class::ParseField,
        Class::TimeCertExpired,
        Class::TimeCollateralExpired,
        Class::TimeNotYetValid,
    ],
    test: "vector:tdx-v4-phala/coll-qe-sig",
};
pub(super) static QE_REPORT_SIGNATURE: Check = Check {
    id: "tdx.qe-report-signature",
    what: "the PCK key signs the quoting enclave's report",
    source: "Intel TDX DCAP Quoting Library API, appendix A.4",
    classes: &[Class::SigQeReport, Class::SigAlgorithm],
    test: "vector:tdx-v4-phala/qe-report-sig",
};
pub(super) static ATTESTATION_KEY: Check = Check {
    id: "tdx.attestation-key",
    what: "the report binds the attestation key and its authentication data, and nothing else",
    source: "Intel TDX DCAP Quoting Library API, appendix A.4",
    classes: &[Class::SigQeHash],
    test: "vector:tdx-v4-phala/attest-key",
};
pub(super) static BODY_SIGNATURE: Check = Check {
    id: "tdx.body-signature",
    what: "the attestation key signs header and body",
    source: "Intel TDX DCAP Quoting Library API, appendix A.3",
    classes: &[Class::SigBody],
    test: "vector:tdx-v4-phala/sig-r",
};
pub(super) static PLATFORM: Check = Check {
    id: "tdx.platform",
    what: "the TCB info is of TDX and of the FMSPC and PCE id in the PCK certificate",
    source: "Intel PCS API v4, Get TDX TCB info",
    classes: &[Class::CollateralMismatch, Class::ChainInvalid, Class::ParseMalformed, Class::ParseField],
    test: "vector:tdx-v4-phala/coll-other-fmspc",
};
pub(super) static QUOTING_ENCLAVE: Check = Check {
    id: "tdx.quoting-enclave",
    what: "the enclave is the TD quoting enclave of the QE identity: signer, product, misc select and attributes under their masks; no debug",
    source: "Intel PCS API v4, Get TD QE identity",
    classes: &[Class::CollateralMismatch, Class::PolicyDebug],
    test: "an_enclave_that_is_not_the_one_described_is_refused",
};
pub(super) static TCB_LEVEL: Check = Check {
    id: "tdx.tcb-level",
    what: "a level of the collateral fits the platform, the TDX module and the quoting enclave",
    source: "Intel PCS API v4, TCB level selection",
    classes: &[Class::CollateralNoTcbLevel, Class::ParseMalformed, Class::ParseField],
    test: "the_highest_level_that_is_met_counts",
};
pub(super) static TD_ATTRIBUTES: Check = Check {
    id: "tdx.td-attributes",
    what: "no debug, no migration, no profiling or reserved bit, SEPT_VE_DISABLE on; no service TD is bound",
    source: "Intel TDX Module ABI specification, ATTRIBUTES",
    classes: &[Class::PolicyDebug, Class::PolicyServiceTd, Class::PolicyTdAttributes],
    test: "each_bit_has_its_refusal",
};
pub(super) static TDX_MODULE: Check = Check {
    id: "tdx.module",
    what: "the TDX module is signed by Intel and its attributes are those of its identity",
    source: "Intel PCS API v4, tdxModule and tdxModuleIdentities",
    classes: &[Class::PolicyMeasurement, Class::CollateralNoTcbLevel, Class::ParseMalformed],
    test: "a_module_that_is_not_intels_is_refused",
};
pub(super) static REVOKED_TCB: Check = Check {
    id: "tdx.revoked-tcb",
    what: "the TCB level is not revoked, whatever a policy allows",
    source: "Intel PCS API v4, tcbStatus",
    classes: &[Class::PolicyTcbStatus],
    test: "revoked_is_refused_even_when_named",
};
pub(super) static PADDING: Check = Check {
    id: "tdx.padding",
    what: "nothing but zero bytes follows the quote",
    source: "the vectors' README",
    classes: &[Class::ParseTrailingBytes],
    test: "vector:tdx-v4-phala/trailing-garbage",
};
pub(crate) static REPORT_DATA: Check = Check {
    id: "tdx.report-data",
    what: "the report data beside the quote is the signed one",
    source: "dstack attestation reference, 5.1 step 4",
    classes: &[Class::BindingReportData],
    test: "the_parts_of_an_attestation_are_bound_to_each_other",
};
pub(crate) static RUNTIME_EVENTS: Check = Check {
    id: "tdx.runtime-events",
    what: "all runtime events lead to RTMR3, and no name before system-ready can be read two ways",
    source: "dstack attestation reference, 4 and 5.1 step 3",
    classes: &[Class::EventlogReplayMismatch, Class::EventlogEventDigest],
    test: "the_parts_of_an_attestation_are_bound_to_each_other",
};
pub(crate) static EVENT_LOG: Check = Check {
    id: "tdx.event-log",
    what: "each event of the log has its own digest, each register the log speaks of is the signed one, and it holds the same runtime events",
    source: "dstack attestation reference, 2.5 and 4",
    classes: &[Class::EventlogReplayMismatch, Class::EventlogEventDigest, Class::EventlogBadIndex, Class::ParseMalformed],
    test: "the_parts_of_an_attestation_are_bound_to_each_other",
};
pub(crate) static TCB_POLICY: Check = Check {
    id: "tdx.tcb-policy",
    what: "the status is allowed or out of date within the grace, no advisory is refused, the evaluation number is high enough",
    source: "docs/attestation.md, TCB policy",
    classes: &[Class::PolicyTcbStatus],
    test: "each_rule_refuses_on_its_own",
};
pub(crate) static IDENTITY: Check = Check {
    id: "tdx.identity",
    what: "the events that name the guest have their sizes",
    source: "dstack attestation reference, 7",
    classes: &[Class::ParseField],
    test: "events_that_name_a_guest_have_their_sizes",
};

/// All checks of TDX evidence, in their order.
pub static CHECKS: &[&Check] = &[
    &QUOTE,
    &PCK_CHAIN_TEXT,
    &COLLATERAL,
    &PCK_ROOT,
    &PCK_PATH,
    &ROOT_CRL,
    &PCK_CRL,
    &REVOCATION,
    &TCB_INFO,
    &QE_IDENTITY,
    &QE_REPORT_SIGNATURE,
    &ATTESTATION_KEY,
    &BODY_SIGNATURE,
    &PLATFORM,
    &QUOTING_ENCLAVE,
    &TCB_LEVEL,
    &TD_ATTRIBUTES,
    &TDX_MODULE,
    &REVOKED_TCB,
    &PADDING,
    &REPORT_DATA,
    &RUNTIME_EVENTS,
    &EVENT_LOG,
    &TCB_POLICY,
    &IDENTITY,
];
