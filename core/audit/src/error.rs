//! What can be wrong with a proof, a receipt, a head or a whole log. Owns: one enum; each variant says whose fault it is.
//! Never: carries key material or free text from a peer.

use dstack_protocol::{DecodeError, NodeIndex};

use crate::fork::Fork;

/// Why audit material was refused.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum AuditError {
    /// The log holds 2⁶⁴−1 leaves. Ours: stop, nothing can be recorded any more.
    #[error("log is full at {size} leaves")]
    LogFull {
        /// Leaves in the log.
        size: u64,
    },
    /// A stored frontier has another number of peaks than its size has set bits. Our disk or the sender of a snapshot: refuse it.
    #[error("frontier of {size} leaves needs {need} peaks, has {have}")]
    FrontierShape {
        /// Leaves the frontier claims.
        size: u64,
        /// Peaks that this size has.
        need: usize,
        /// Peaks that were given.
        have: usize,
    },
    /// A proof was asked for or given about a leaf or size outside the tree. Caller's fault.
    #[error("position {pos} is outside a tree of {size} leaves")]
    OutOfTree {
        /// Leaf number, or the smaller size of a consistency proof.
        pos: u64,
        /// Size of the tree.
        size: u64,
    },
    /// The node store does not hold a node that the proof needs. Ours: rebuild the store from the leaves.
    #[error("merkle node level {level} index {index} is not at hand")]
    MissingNode {
        /// Height above the leaves.
        level: u8,
        /// Number of the node at that height, from the left.
        index: u64,
    },
    /// The proof has the wrong number of hashes for its position and size. Sender's fault: refuse.
    #[error("proof for {pos} in {size} has {have} hashes, which is {}", if *.too_long { "too many" } else { "too few" })]
    ProofLength {
        /// Leaf number, or the smaller size.
        pos: u64,
        /// Size of the tree.
        size: u64,
        /// Hashes given.
        have: usize,
        /// Too many rather than too few.
        too_long: bool,
    },
    /// The proof leads to another root than the one stated. Sender's fault: refuse, and suspect a fork.
    #[error("proof for {pos} in {size} does not lead to the stated root")]
    RootMismatch {
        /// Leaf number, or the smaller size.
        pos: u64,
        /// Size of the tree.
        size: u64,
    },

    /// A signer's key is not a canonical Ed25519 key of large order. Whoever admitted it erred: refuse the list.
    #[error("key of signer {index} is not a canonical Ed25519 key")]
    SignerKey {
        /// The signer.
        index: NodeIndex,
    },
    /// An index (or index 0) or a key comes twice in a signer list. Whoever made the list erred: refuse it.
    #[error("signer {index} is in the list twice, or its key is, or it is 0")]
    SignerTwice {
        /// The signer.
        index: NodeIndex,
    },
    /// A signer list is empty. Whoever made it erred.
    #[error("members version {members_version} has no signers")]
    NoSigners {
        /// Version of the list.
        members_version: u64,
    },
    /// A signature names an index that is no signer of that version. Sender's fault: refuse.
    #[error("{index} is no signer of members version {members_version}")]
    UnknownSigner {
        /// The index named.
        index: NodeIndex,
        /// Version of the list.
        members_version: u64,
    },
    /// A signature does not verify. Sender's fault: refuse, and do not blame the signer, who may not have made it.
    #[error("signature of {index} does not verify")]
    BadSignature {
        /// The signer named.
        index: NodeIndex,
    },
    /// A head belongs to another list of signers. Sender's fault, or ours for taking the wrong list.
    #[error("head is of members version {have}, judged by {need}")]
    OtherMembers {
        /// Version of the list at hand.
        need: u64,
        /// Version in the head.
        have: u64,
    },
    /// A certificate names a signer list that was not in force at its size. It is forged, or the log lacks an admission.
    #[error("certificate of size {size} names members version {members_version}, which was not in force there")]
    UnknownMembers {
        /// Version named.
        members_version: u64,
        /// Size of the head.
        size: u64,
    },
    /// A head of another size was handed to a tally. Caller's fault.
    #[error("head of size {have} in a tally of size {need}")]
    OtherSize {
        /// Size of the tally.
        need: u64,
        /// Size of the head.
        have: u64,
    },
    /// A certificate has too few valid signatures. Sender's fault: refuse, ask another node.
    #[error("certificate has {have} valid signatures, needs {need}")]
    BelowQuorum {
        /// `q`.
        need: usize,
        /// Valid ones.
        have: usize,
        /// Whose signatures did not count.
        bad: Vec<NodeIndex>,
    },
    /// A receipt is for another intent than ours. The node that sent it lies or mixed up: use no key, ask another.
    #[error("receipt is for another intent")]
    OtherIntent,
    /// A record does not say what it must. The node that sent it lies: use no key.
    #[error("record at {pos}: {field} is not that of the intent")]
    NotTheRecord {
        /// Position of the record.
        pos: u64,
        /// Field that differs.
        field: &'static str,
    },
    /// No holder vouches for the receipt. Caller's fault: a receipt alone proves nothing.
    #[error("no holder vouches for the receipt")]
    NoVouchers,
    /// Holders vouch for another position, size or root than the receipt. One side lies: use no key.
    #[error("{} holders vouch for another log", holders.len())]
    HolderDisagrees {
        /// Holders that disagree with the receipt.
        holders: Vec<NodeIndex>,
    },
    /// A record or body in a log does not decode. The node whose log this is made or kept it wrong.
    #[error("record {pos}: {source}")]
    Undecodable {
        /// Position.
        pos: u64,
        /// Why.
        source: DecodeError,
    },
    /// A record breaks a rule of the log. The node whose log this is made or kept it wrong.
    #[error("record {pos}: {rule}")]
    LogRule {
        /// Position.
        pos: u64,
        /// The rule.
        rule: &'static str,
    },
    /// A certificate beside the log contradicts it. The log was altered, or the cluster forked: both sides are evidence.
    #[error("{0}")]
    Fork(Box<Fork>),
    /// A certificate covers more leaves than the log holds: its end is missing.
    #[error("log ends at {have} leaves, a certificate covers {need}")]
    LogTooShort {
        /// Size of the certified head.
        need: u64,
        /// Leaves in the log.
        have: u64,
    },
}

impl AuditError {
    /// Nodes that this error proves or suspects to be at fault, ascending; empty where nobody can be named.
    #[must_use]
    pub fn culprits(&self) -> &[NodeIndex] {
        match self {
            Self::HolderDisagrees { holders } => holders,
            Self::Fork(fork) => fork.culprits(),
            Self::SignerKey { index } | Self::SignerTwice { index } => std::slice::from_ref(index),
            Self::LogFull { .. }
            | Self::FrontierShape { .. }
            | Self::OutOfTree { .. }
            | Self::MissingNode { .. }
            | Self::ProofLength { .. }
            | Self::RootMismatch { .. }
            | Self::NoSigners { .. }
            | Self::UnknownSigner { .. }
            | Self::BadSignature { .. }
            | Self::OtherMembers { .. }
            | Self::OtherSize { .. }
            | Self::UnknownMembers { .. }
            | Self::BelowQuorum { .. }
            | Self::OtherIntent
            | Self::NotTheRecord { .. }
            | Self::NoVouchers
            | Self::Undecodable { .. }
            | Self::LogRule { .. }
            | Self::LogTooShort { .. } => &[],
        }
    }
}
