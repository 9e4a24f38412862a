//! When two histories cannot both be true. Owns: the evidence of a fork and who signed both sides.
//! Never: decides what to do; the node stops (`FORK`), the auditor reports.
//! Source: threshold.md §2.6 "A node never un-applies"; architecture.md §2.

use dstack_protocol::NodeIndex;
use dstack_protocol::log::{Head, HeadCert};

use crate::signers::CertifiedHead;

/// Two sides that contradict each other, kept as evidence.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fork {
    /// Two valid certificates of one size differ.
    Certificates {
        /// The one seen first.
        first: Box<HeadCert>,
        /// The other.
        second: Box<HeadCert>,
        /// Who signed both, ascending. With `f = 0` and no liars at all this cannot be empty: two majorities meet.
        signed_both: Vec<NodeIndex>,
    },
    /// A valid certificate differs from the log that this node applied.
    OwnLog {
        /// The head that this log has at that size.
        own: Head,
        /// The certificate.
        certificate: Box<HeadCert>,
        /// Who signed the certificate and is known to have signed our head too, ascending.
        signed_both: Vec<NodeIndex>,
    },
    /// The leader sends an entry that contradicts an applied one.
    Leader {
        /// Raft log index of the entry.
        log_index: u64,
        /// SHA-256 of the applied entry.
        applied: [u8; 32],
        /// SHA-256 of the entry that the leader sent.
        sent: [u8; 32],
        /// Who sent it.
        leader: NodeIndex,
    },
}

impl Fork {
    /// Compares two certified heads; `None` unless they have one size and differ.
    #[must_use]
    pub fn between(first: &CertifiedHead, second: &CertifiedHead) -> Option<Self> {
        let contradicts = first.head().size == second.head().size && first.head() != second.head();
        contradicts.then(|| Self::Certificates {
            first: Box::new(first.certificate().clone()),
            second: Box::new(second.certificate().clone()),
            signed_both: both(first.signers(), second.signers()),
        })
    }

    /// Compares a certified head with the head that our own log has at that size; `own_signers` are those whose signature on ours is at
    /// hand. `None` if they agree or the sizes differ.
    #[must_use]
    pub fn with_own_log(own: &Head, own_signers: &[NodeIndex], certified: &CertifiedHead) -> Option<Self> {
        let contradicts = own.size == certified.head().size && own != certified.head();
        contradicts.then(|| Self::OwnLog {
            own: *own,
            certificate: Box::new(certified.certificate().clone()),
            signed_both: both(certified.signers(), own_signers.iter().copied()),
        })
    }

    /// Nodes that this evidence proves to have lied, ascending. For certificates: they signed two heads of one size.
    #[must_use]
    pub fn culprits(&self) -> &[NodeIndex] {
        match self {
            Self::Certificates { signed_both, .. } | Self::OwnLog { signed_both, .. } => signed_both,
            Self::Leader { leader, .. } => std::slice::from_ref(leader),
        }
    }
}

impl std::fmt::Display for Fork {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<String> = self.culprits().iter().map(ToString::to_string).collect();
        let names = if names.is_empty() { "nobody".to_owned() } else { names.join(", ") };
        match self {
            Self::Certificates { first, .. } => {
                write!(f, "fork at size {}: two certified heads differ, signed by both sides: {names}", first.head.size)
            }
            Self::OwnLog { own, .. } => {
                write!(f, "fork at size {}: a certified head differs from the applied log, signed by both sides: {names}", own.size)
            }
            Self::Leader { log_index, .. } => {
                write!(f, "fork at log index {log_index}: the leader contradicts an applied entry, sent by: {names}")
            }
        }
    }
}

/// Members of both lists, ascending.
fn both(one: impl Iterator<Item = NodeIndex>, other: impl Iterator<Item = NodeIndex>) -> Vec<NodeIndex> {
    let other: std::collections::BTreeSet<NodeIndex> = other.collect();
    let mut shared: Vec<NodeIndex> = one.filter(|index| other.contains(index)).collect();
    shared.sort_unstable();
    shared
}
