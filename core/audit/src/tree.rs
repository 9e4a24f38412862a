//! Hashing of the Merkle tree. Owns: the two domain-separated hashes and the root of the empty tree.
//! Never: keeps state. Source: threshold.md §2.6 `leaf`, `node`, `log_root(0)`; RFC 6962 §2.1.

use sha2::{Digest, Sha256};

/// A SHA-256 value: a leaf, an inner node or a root.
pub type Hash = [u8; 32];

/// Prefix of a leaf, so that no record can be mistaken for a pair of nodes.
const LEAF_PREFIX: u8 = 0x00;
/// Prefix of an inner node.
const NODE_PREFIX: u8 = 0x01;

/// `leaf = SHA-256(0x00 ‖ record)`.
#[must_use]
pub fn leaf_hash(record: &[u8]) -> Hash {
    let mut sha = Sha256::new();
    sha.update([LEAF_PREFIX]);
    sha.update(record);
    sha.finalize().into()
}

/// `node = SHA-256(0x01 ‖ left ‖ right)`.
#[must_use]
pub fn node_hash(left: &Hash, right: &Hash) -> Hash {
    let mut sha = Sha256::new();
    sha.update([NODE_PREFIX]);
    sha.update(left);
    sha.update(right);
    sha.finalize().into()
}

/// `log_root(0) = SHA-256("")`: the root of a log that holds nothing.
#[must_use]
pub fn empty_root() -> Hash {
    Sha256::digest([]).into()
}
