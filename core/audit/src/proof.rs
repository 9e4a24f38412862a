//! Inclusion and consistency proofs. Owns: making them from [`Nodes`], judging them from nothing but their bytes.
//! Never: trusts a length or a position; a verifier reads at most the hashes it was given.
//! Source: RFC 6962 §2.1.1 and §2.1.2 (making); RFC 9162 §2.1.3.2 and §2.1.4.2 (judging).

use crate::error::AuditError;
use crate::nodes::Nodes;
use crate::tree::{Hash, empty_root, node_hash};

/// Longest proof of any tree whose size fits 64 bits.
pub const PROOF_HASHES_MAX: usize = 64;

/// Root of the first `size` leaves.
///
/// # Errors
/// [`AuditError::MissingNode`] if the source lacks one of its peaks.
pub fn root_at(nodes: &impl Nodes, size: u64) -> Result<Hash, AuditError> {
    if size == 0 {
        return Ok(empty_root());
    }
    range_root(nodes, 0, size)
}

/// Path of leaf `pos` in the tree of the first `size` leaves, lowest sibling first.
///
/// # Errors
/// [`AuditError::OutOfTree`] unless `pos < size`; [`AuditError::MissingNode`] of the source.
pub fn inclusion_proof(nodes: &impl Nodes, pos: u64, size: u64) -> Result<Vec<Hash>, AuditError> {
    if pos >= size {
        return Err(AuditError::OutOfTree { pos, size });
    }
    let (mut start, mut end) = (0_u64, size);
    let mut path = Vec::new();
    while end - start > 1 {
        let middle = start + split(end - start);
        if pos < middle {
            path.push(range_root(nodes, middle, end)?);
            end = middle;
        } else {
            path.push(range_root(nodes, start, middle)?);
            start = middle;
        }
    }
    path.reverse();
    Ok(path)
}

/// Proof that the tree of `old` leaves is a prefix of that of `new` leaves. Empty for equal sizes and for `old = 0`.
///
/// # Errors
/// [`AuditError::OutOfTree`] if `old > new`; [`AuditError::MissingNode`] of the source.
pub fn consistency_proof(nodes: &impl Nodes, old: u64, new: u64) -> Result<Vec<Hash>, AuditError> {
    if old > new {
        return Err(AuditError::OutOfTree { pos: old, size: new });
    }
    if old == 0 || old == new {
        return Ok(Vec::new());
    }
    let (mut start, mut end) = (0_u64, new);
    // The verifier knows the old root: while the left edge is the tree's own, that subtree need not be sent.
    let mut known = true;
    let mut path = Vec::new();
    while old != end {
        let middle = start + split(end - start);
        if old <= middle {
            path.push(range_root(nodes, middle, end)?);
            end = middle;
        } else {
            path.push(range_root(nodes, start, middle)?);
            start = middle;
            known = false;
        }
    }
    if !known {
        path.push(range_root(nodes, start, end)?);
    }
    path.reverse();
    Ok(path)
}

/// Judges an inclusion proof: leaf `leaf` stands at `pos` in the tree of `size` leaves with root `root`.
///
/// # Errors
/// [`AuditError::OutOfTree`], [`AuditError::ProofLength`] or [`AuditError::RootMismatch`].
pub fn verify_inclusion(leaf: &Hash, pos: u64, size: u64, proof: &[Hash], root: &Hash) -> Result<(), AuditError> {
    if pos >= size {
        return Err(AuditError::OutOfTree { pos, size });
    }
    let length = |too_long| AuditError::ProofLength { pos, size, have: proof.len(), too_long };
    let (mut node, mut last) = (pos, size - 1);
    let mut hash = *leaf;
    for sibling in proof {
        if last == 0 {
            return Err(length(true));
        }
        if node & 1 == 1 || node == last {
            hash = node_hash(sibling, &hash);
            climb(&mut node, &mut last);
        } else {
            hash = node_hash(&hash, sibling);
        }
        node >>= 1;
        last >>= 1;
    }
    if last != 0 {
        return Err(length(false));
    }
    if hash != *root {
        return Err(AuditError::RootMismatch { pos, size });
    }
    Ok(())
}

/// Judges a consistency proof: the log of `old` leaves with `old_root` is a prefix of that of `new` leaves with `new_root`.
///
/// # Errors
/// [`AuditError::OutOfTree`], [`AuditError::ProofLength`] or [`AuditError::RootMismatch`].
pub fn verify_consistency(old: u64, new: u64, proof: &[Hash], old_root: &Hash, new_root: &Hash) -> Result<(), AuditError> {
    if old > new {
        return Err(AuditError::OutOfTree { pos: old, size: new });
    }
    let length = |too_long| AuditError::ProofLength { pos: old, size: new, have: proof.len(), too_long };
    let mismatch = || AuditError::RootMismatch { pos: old, size: new };
    if old == 0 || old == new {
        if !proof.is_empty() {
            return Err(length(true));
        }
        let same = if old == 0 { *old_root == empty_root() } else { old_root == new_root };
        return if same { Ok(()) } else { Err(mismatch()) };
    }

    // A power of two is one complete subtree: its root starts the path and is not sent.
    let mut rest = proof.iter();
    let first = if old.is_power_of_two() { old_root } else { rest.next().ok_or_else(|| length(false))? };
    let (mut node, mut last) = (old - 1, new - 1);
    let complete = node.trailing_ones();
    node >>= complete;
    last >>= complete;
    let (mut to_old, mut to_new) = (*first, *first);
    for sibling in rest {
        if last == 0 {
            return Err(length(true));
        }
        if node & 1 == 1 || node == last {
            to_old = node_hash(sibling, &to_old);
            to_new = node_hash(sibling, &to_new);
            climb(&mut node, &mut last);
        } else {
            to_new = node_hash(&to_new, sibling);
        }
        node >>= 1;
        last >>= 1;
    }
    if last != 0 {
        return Err(length(false));
    }
    if to_old != *old_root || to_new != *new_root {
        return Err(mismatch());
    }
    Ok(())
}

/// Skips the levels at which an only child is its own parent.
fn climb(node: &mut u64, last: &mut u64) {
    while *node != 0 && *node & 1 == 0 {
        *node >>= 1;
        *last >>= 1;
    }
}

/// RFC 6962 §2.1: the largest power of two smaller than `count`; `count > 1`.
fn split(count: u64) -> u64 {
    1 << (63 - (count - 1).leading_zeros())
}

/// Root of leaves `start..end` of a range that RFC 6962 splits off: `start` is a multiple of every subtree used.
fn range_root(nodes: &impl Nodes, start: u64, end: u64) -> Result<Hash, AuditError> {
    let mut lefts = Vec::new();
    let mut start = start;
    loop {
        let count = end - start;
        if count.is_power_of_two() {
            let level = count.trailing_zeros();
            let last = nodes.node(level as u8, start >> level)?;
            return Ok(lefts.iter().rev().fold(last, |right, left| node_hash(left, &right)));
        }
        let left = split(count);
        let level = left.trailing_zeros();
        lefts.push(nodes.node(level as u8, start >> level)?);
        start += left;
    }
}
