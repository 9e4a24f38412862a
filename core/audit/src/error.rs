//! What can be wrong with a proof, a receipt, a head or a whole log. Owns: one enum; each variant says whose fault it is.
//! Never: carries key material or free text from a peer.

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
}
