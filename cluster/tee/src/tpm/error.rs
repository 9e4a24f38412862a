//! What a TPM answers when it cannot. Owns: [`TpmError`]. Never: carries a secret.

/// Why the TPM did not do what it was asked. None of it is a remote peer's fault.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TpmError {
    /// The config's text for the TPM is not understood. Operator's to fix.
    #[error("unknown TPM {tcti:?}: \"device:/dev/tpmrm0\" and \"swtpm:host=ADDRESS,port=PORT\" are known")]
    BadTcti {
        /// The text.
        tcti: String,
    },
    /// No TPM answers there. Operator's to fix: device node, permissions, driver.
    #[error("no TPM at {tcti}: {cause}; is the device there, and may this user open it?")]
    Unreachable {
        /// Where.
        tcti: String,
        /// What the TSS says.
        cause: String,
    },
    /// A command failed. By cause: retry, or the TPM's own fault.
    #[error("the TPM failed to {what}: {cause}")]
    Command {
        /// What it was to do.
        what: &'static str,
        /// What the TSS says.
        cause: String,
    },
    /// The cloud wrote no attestation key's template. Operator's to fix: a Confidential VM of Google Cloud has one.
    #[error("the TPM holds no attestation key template (NV 0x01c10003 or 0x01c10001): is this a machine of Google Cloud?")]
    NoTemplate,
    /// The cloud wrote no certificate of its attestation key. Operator's to fix: without it no verifier believes the TPM.
    #[error("the TPM holds no certificate of its attestation key (NV {index:#010x}): no verifier would believe its quotes")]
    NoCertificate {
        /// The index.
        index: u32,
    },
    /// The certificate is no DER certificate, or one of another key. The cloud's fault: do not use this TPM.
    #[error("NV {index:#010x} {why}: no verifier would believe the TPM's quotes")]
    BadCertificate {
        /// The index.
        index: u32,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Something extends the PCRs all the time. Retry.
    #[error("the PCRs changed between reading and quoting, {tries} times in a row")]
    Unstable {
        /// How often it was tried.
        tries: u32,
    },
    /// The PCRs are not what the secret was sealed to. Another boot or another program: refuse.
    #[error("the PCRs are not those that the secret was sealed to")]
    OtherPcrs,
    /// The sealed bytes are none of this TPM, or damaged.
    #[error("the sealed bytes are not of this TPM: {why}")]
    BadSealed {
        /// What is wrong with them.
        why: &'static str,
    },
}

impl TpmError {
    /// Names the failed command.
    pub(super) fn of(what: &'static str) -> impl FnOnce(tss_esapi::Error) -> Self {
        move |cause| Self::Command { what, cause: cause.to_string() }
    }
}
