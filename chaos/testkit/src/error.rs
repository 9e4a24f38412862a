//! What can go wrong while producing evidence or serving it. Every variant says whose fault it is.

use std::path::PathBuf;

/// Failure of a software TEE. Nothing here is ever caused by a verifier.
#[non_exhaustive]
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TestkitError {
    /// A certificate or CRL could not be written, for instance because its validity is empty. Caller's fault: fix the parameters.
    #[error("certificate {subject:?} cannot be written: {reason}")]
    Certificate {
        /// Subject of the certificate, or issuer of the CRL.
        subject: String,
        /// What the encoder said.
        reason: String,
    },
    /// A file of the root directory is missing or unreadable. Operator's fault: run `init`, check the permissions.
    #[error("{path}: {reason}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// A file of the root directory has another content than `init` writes. Operator's fault: make a new directory.
    #[error("{path} is not what `init` writes: {reason}", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The system gave no random bytes. The machine's fault: retry.
    #[error("no randomness: {0}")]
    Randomness(String),
    /// The asking process could not be measured: it ended, or its executable cannot be read. Without root the client has to stay
    /// inspectable (`Hardening::inspectable`) and to belong to the same user.
    #[error("process {pid} cannot be measured: {reason}")]
    Unmeasurable {
        /// Process id from the socket's peer credentials; 0 for a process of another pid namespace.
        pid: i32,
        /// What is missing.
        reason: String,
    },
    /// A machine specification of the command line is malformed. Caller's fault.
    #[error("machine {spec:?}: {reason}")]
    MachineSpec {
        /// The text given.
        spec: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl TestkitError {
    pub(crate) fn file(path: impl Into<PathBuf>, error: impl ToString) -> Self {
        Self::File { path: path.into(), reason: error.to_string() }
    }

    pub(crate) fn damaged(path: impl Into<PathBuf>, reason: impl ToString) -> Self {
        Self::Damaged { path: path.into(), reason: reason.to_string() }
    }
}
