//! Why a certificate or a signature is not what it should be.

/// What is wrong. Messages hold public values only.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// The bytes are no certificate, or one that breaks a rule of X.509. Peer's fault.
    #[error("not a certificate: {0}")]
    NotACertificate(String),
    /// A public key is not a point of its curve, or of another algorithm. Peer's fault.
    #[error("{what}: not a public key of {algorithm}")]
    BadKey {
        /// Whose key.
        what: &'static str,
        /// What it should be of.
        algorithm: &'static str,
    },
    /// A signature does not verify. Peer's fault.
    #[error("{what}: the signature does not verify")]
    BadSignature {
        /// What is signed.
        what: &'static str,
    },
    /// A field is not what the kind of certificate prescribes. Peer's fault.
    #[error("{field}: expected {expected}, got {got}")]
    Field {
        /// The field.
        field: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A chain does not lead from its leaf to its root. Peer's fault.
    #[error("certificate {depth} of the chain: {reason}")]
    Path {
        /// 0 is the leaf.
        depth: usize,
        /// What breaks it.
        reason: String,
    },
    /// A leaf is asked for with a name that belongs to a node. Peer's fault.
    #[error("the name {0} is a node's: leave it out of the request")]
    ReservedHost(String),
    /// The object is not signed by this root. Our fault.
    #[error("a {object} is not signed by root {root}")]
    WrongRoot {
        /// What was to be signed.
        object: &'static str,
        /// By which root.
        root: &'static str,
    },
    /// Our own encoder refused. Our fault.
    #[error("building a certificate: {0}")]
    Build(String),
}

impl CertificateError {
    pub(crate) fn field(field: &'static str, expected: impl Into<String>, got: impl Into<String>) -> Self {
        Self::Field { field, expected: expected.into(), got: got.into() }
    }
}
