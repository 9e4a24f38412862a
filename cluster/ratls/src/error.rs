//! Errors of this crate. Each variant says whose fault it is; [`RatlsError::code`] and [`PeerError::code`] are stable.

use std::net::SocketAddr;
use std::time::Duration;

use crate::hello::HelloError;
use crate::judge::JudgeError;

/// Making certificates, opening listeners. Ours or the operator's to mend.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum RatlsError {
    /// The cryptographic library refused to make or use a key.
    #[error("cannot {operation} the certificate key")]
    Key {
        /// What was attempted.
        operation: &'static str,
    },
    /// The device gave no evidence.
    #[error("no evidence for the certificate: {reason}")]
    Evidence {
        /// The device's reason.
        reason: String,
    },
    /// Evidence so large that no peer would take the certificate.
    #[error("certificate would have {size_bytes} bytes, the limit is {limit_bytes}; strip the event log")]
    CertificateTooLarge {
        /// Its size.
        size_bytes: usize,
        /// [`crate::CERTIFICATE_BYTES_MAX`].
        limit_bytes: usize,
    },
    /// The certificate could not be encoded.
    #[error("cannot build certificate: {reason}")]
    Certificate {
        /// The encoder's reason.
        reason: String,
    },
    /// The TLS configuration was refused.
    #[error("cannot configure tls: {reason}")]
    Tls {
        /// The library's reason.
        reason: String,
    },
    /// The socket cannot be bound.
    #[error("cannot listen on {address}: {reason}")]
    Bind {
        /// As configured.
        address: String,
        /// The operating system's answer.
        reason: String,
    },
    /// Worker threads for verification could not be started.
    #[error("cannot start verification threads: {reason}")]
    Threads {
        /// The operating system's answer.
        reason: String,
    },
}

impl RatlsError {
    /// Stable short name.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Key { .. } => "ratls.key",
            Self::Evidence { .. } => "ratls.evidence",
            Self::CertificateTooLarge { .. } => "ratls.certificate_too_large",
            Self::Certificate { .. } => "ratls.certificate",
            Self::Tls { .. } => "ratls.tls",
            Self::Bind { .. } => "ratls.bind",
            Self::Threads { .. } => "ratls.threads",
        }
    }
}

/// A connection or a request to a peer failed.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum PeerError {
    /// Nothing answers there, or the connection broke. Try again later, or another node.
    #[error("{address} unreachable: {reason}")]
    Unreachable {
        /// The peer.
        address: SocketAddr,
        /// The operating system's or the connection's reason.
        reason: String,
    },
    /// It did not answer in time. Whether the request took effect is unknown.
    #[error("{address} did not finish {stage} within {waited:?}")]
    Timeout {
        /// The peer.
        address: SocketAddr,
        /// What took too long.
        stage: &'static str,
        /// How long it was given.
        waited: Duration,
    },
    /// We refuse the peer: its evidence or certificate does not hold. Peer's fault; do not retry blindly.
    #[error("{address} is not trusted: {error}")]
    Untrusted {
        /// The peer.
        address: SocketAddr,
        /// What did not hold.
        error: JudgeError,
    },
    /// The peer's HELLO does not hold: another cluster, another seat, a wrong signature.
    #[error("{address} said a wrong hello: {error}")]
    Hello {
        /// The peer.
        address: SocketAddr,
        /// What is wrong with it.
        error: HelloError,
    },
    /// The peer refuses us: our certificate, our HELLO, or it is overloaded. Its log says which.
    #[error("{address} refused the connection: {reason}")]
    RefusedByPeer {
        /// The peer.
        address: SocketAddr,
        /// TLS alert or the way it closed.
        reason: String,
    },
    /// The peer's answer is larger than asked for.
    #[error("answer of {address} exceeds {limit_bytes} bytes")]
    TooLarge {
        /// The peer.
        address: SocketAddr,
        /// The limit.
        limit_bytes: usize,
    },
    /// The peer speaks neither our TLS nor our HTTP, or our own request was malformed.
    #[error("protocol error with {address}: {reason}")]
    Protocol {
        /// The peer.
        address: SocketAddr,
        /// What did not fit.
        reason: String,
    },
}

impl PeerError {
    /// Stable short name.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "peer.unreachable",
            Self::Timeout { .. } => "peer.timeout",
            Self::Untrusted { .. } => "peer.untrusted",
            Self::Hello { .. } => "peer.hello",
            Self::RefusedByPeer { .. } => "peer.refused",
            Self::TooLarge { .. } => "peer.too_large",
            Self::Protocol { .. } => "peer.protocol",
        }
    }

    /// True where the request was surely not carried out.
    pub fn surely_not_done(&self) -> bool {
        matches!(self, Self::Untrusted { .. } | Self::Hello { .. })
    }
}
