//! What can go wrong between a wish and a key. Owns: [`ClientError`], and [`NodeFault`] for what one node did.
//! Never: carries a secret.

use std::fmt;

use dstack_audit::AuditError;
use dstack_protocol::{ClusterId, DecodeError, NodeIndex, Refusal, RefusalCode};
use dstack_ratls::{PeerError, RatlsError};
use dstack_threshold::answer::AnswerError;
use dstack_threshold::combine::{CombineError, PartialFault};
use dstack_threshold::keys::KeyError;

use crate::kcv::KcvError;

/// Why a release gave no keys.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The cluster refuses. The refusal says which rule, what was expected, what came, and what to do.
    #[error("{node} refused: {}: expected {}; got {}; to do: {}", .refusal.code.text(), .refusal.expected, .refusal.got, .refusal.code.fix())]
    Refused {
        /// The node that said so first.
        node: String,
        /// Its words.
        refusal: Box<Refusal>,
    },
    /// No node served the request. Each fault says whose it is; retry later.
    #[error("no node served the request: {}", list_faults(.faults))]
    NoNode {
        /// One for each try, in order.
        faults: Vec<(String, NodeFault)>,
    },
    /// There is no node to ask. The configuration is at fault.
    #[error("the list of nodes is empty")]
    NoNodes,
    /// Too many partials are bad: no set of holders leads to the pinned key. Wrong pin, or too many holders lie.
    #[error("no set of holders leads to the pinned key ({source}); bad partials: {}", list_bad(.bad))]
    Partials {
        /// Partials refused, with their holders.
        bad: Vec<BadPartial>,
        /// What the last combination said.
        source: CombineError,
    },
    /// A request has 1 to 16 wishes without duplicates. Caller's fault.
    #[error("not a request: {0}")]
    Wishes(DecodeError),
    /// A derived key is unusable.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The key is not the one used before, or the file of check values is unusable.
    #[error(transparent)]
    Kcv(#[from] KcvError),
    /// The device gave no evidence, or the session's key or certificate cannot be made. Ours to fix.
    #[error("no session: {0}")]
    Session(RatlsError),
    /// The operating system gives no randomness. Ours to fix.
    #[error("no randomness: {reason}")]
    Randomness {
        /// Its words.
        reason: String,
    },
    /// The app key is no scalar of secp256k1. The keys file or the cluster is at fault.
    #[error("the app's key is no key of secp256k1")]
    AppKey,
    /// `ca_pub` of the pin is no public key. Whoever wrote the compose file is at fault.
    #[error("ca_pub of the pin is no public key")]
    CaPub,
}

impl ClientError {
    /// Stable short name.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Refused { refusal, .. } => refusal.code.text(),
            Self::NoNode { .. } | Self::NoNodes => "client.no_node",
            Self::Partials { .. } => "client.partials",
            Self::Wishes(_) => "client.wishes",
            Self::Key(_) => "client.key",
            Self::Kcv(_) => "client.kcv",
            Self::Session(_) => "client.session",
            Self::Randomness { .. } => "client.randomness",
            Self::AppKey => "client.app_key",
            Self::CaPub => "client.ca_pub",
        }
    }

    /// The cluster's refusal, where there is one.
    #[must_use]
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused { refusal, .. } => Some(refusal),
            _ => None,
        }
    }

    /// Whether the same wish may be granted later without anybody changing a configuration.
    #[must_use]
    pub fn retryable(&self) -> bool {
        match self {
            Self::Refused { refusal, .. } => refusal.code.retryable(),
            Self::NoNode { .. } => true,
            Self::NoNodes
            | Self::Partials { .. }
            | Self::Wishes(_)
            | Self::Key(_)
            | Self::Kcv(_)
            | Self::Session(_)
            | Self::Randomness { .. }
            | Self::AppKey
            | Self::CaPub => false,
        }
    }

    /// Holders whose partials were bad.
    #[must_use]
    pub fn culprits(&self) -> Vec<NodeIndex> {
        match self {
            Self::Partials { bad, .. } => bad.iter().map(|one| one.index).collect(),
            _ => Vec::new(),
        }
    }
}

/// What one node did wrong, or said.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeFault {
    /// Its name does not resolve. The configuration or the resolver is at fault.
    #[error("name does not resolve: {reason}")]
    Resolve {
        /// The system's words.
        reason: String,
    },
    /// It cannot be reached, or its evidence is not trusted.
    #[error(transparent)]
    Connection(#[from] PeerError),
    /// The proxy on the way gives no tunnel to it. The proxy or its allow-list is at fault.
    #[error("proxy {route}: {reason}")]
    Proxy {
        /// The way to it.
        route: String,
        /// What went wrong.
        reason: String,
    },
    /// It refuses.
    #[error("{}: expected {}; got {}", .0.code.text(), .0.expected, .0.got)]
    Refused(Box<Refusal>),
    /// Its answer does not decode.
    #[error("answer does not decode: {0}")]
    Undecodable(DecodeError),
    /// It answers with a status that says nothing.
    #[error("status {status} without a refusal")]
    Status {
        /// HTTP status.
        status: u16,
    },
    /// It belongs to another cluster than the pinned one.
    #[error("node of cluster {got}, pinned is {pinned}")]
    WrongCluster {
        /// Ours.
        pinned: ClusterId,
        /// Its.
        got: ClusterId,
    },
    /// Its receipt does not hold, or the holders contradict it.
    #[error("receipt refused: {0}")]
    Receipt(AuditError),
    /// Its signature over the app's key is none of the pinned identity.
    #[error("signature over the app's key is not by the pinned identity (id_pub)")]
    Signature,
    /// Its root certificate is none of the pinned key, or not self-signed.
    #[error("root CA certificate is not the pinned one's (ca_pub): {reason}")]
    RootCa {
        /// What is wrong.
        reason: &'static str,
    },
}

impl NodeFault {
    /// Stable short name, from a closed set.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Resolve { .. } => "resolve",
            Self::Connection(error) => error.code(),
            Self::Proxy { .. } => "proxy",
            Self::Refused(_) => "refused",
            Self::Undecodable(_) => "undecodable",
            Self::Status { .. } => "status",
            Self::WrongCluster { .. } => "wrong_cluster",
            Self::Receipt(_) => "receipt",
            Self::Signature => "signature",
            Self::RootCa { .. } => "root_ca",
        }
    }

    pub(crate) fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }

    /// Whether another node would most likely say the same. One node alone is not believed: it may lie or lag.
    pub(crate) fn is_final(&self) -> bool {
        match self {
            Self::Refused(refusal) => !refusal.code.retryable() && refusal.code != RefusalCode::Fork,
            Self::WrongCluster { .. } => true,
            _ => false,
        }
    }

    /// Whether the node is to be asked later than others.
    pub(crate) fn is_unhealthy(&self) -> bool {
        !self.is_final()
    }
}

/// A partial that was dropped. The holder is at fault, or the node that relayed it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("holder {index}: {fault}")]
pub struct BadPartial {
    /// The holder it names.
    pub index: NodeIndex,
    /// What is wrong.
    pub fault: BadPartialFault,
}

/// What is wrong with a partial.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadPartialFault {
    /// It does not open, or what opens is no partial.
    #[error(transparent)]
    Sealed(AnswerError),
    /// It is no partial of this request, or its proof fails.
    #[error("{0}")]
    Evaluation(PartialFault),
    /// Its verification key does not fit those of the others: with it the sum misses `PK_prf`.
    #[error("its key does not lead to the pinned key")]
    OffThePolynomial,
}

fn list_faults(faults: &[(String, NodeFault)]) -> impl fmt::Display {
    let texts: Vec<String> = faults.iter().map(|(node, fault)| format!("{node}: {fault}")).collect();
    texts.join("; ")
}

fn list_bad(all: &[BadPartial]) -> impl fmt::Display {
    let texts: Vec<String> = all.iter().map(ToString::to_string).collect();
    if texts.is_empty() { "none".to_owned() } else { texts.join("; ") }
}
