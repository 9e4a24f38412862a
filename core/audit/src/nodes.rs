//! Where the complete subtrees of the log are read from. Owns: the trait and two plain sources.
//! Never: reads a file; a store on disk implements [`Nodes`] or lends its leaf hashes to [`LeafNodes`].

use crate::error::AuditError;
use crate::frontier::Frontier;
use crate::tree::{Hash, node_hash};

/// Source of complete subtrees: node `(level, index)` covers leaves `index·2^level .. (index+1)·2^level`.
pub trait Nodes {
    /// The hash of one complete subtree.
    ///
    /// # Errors
    /// [`AuditError::MissingNode`] if the source does not hold it.
    fn node(&self, level: u8, index: u64) -> Result<Hash, AuditError>;
}

/// All nodes in memory: 64 bytes a leaf. For tests, offline verification and logs of some million leaves.
#[derive(Debug, Clone, Default)]
pub struct MemoryTree {
    frontier: Frontier,
    levels: Vec<Vec<Hash>>,
}

impl MemoryTree {
    /// The empty tree.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a leaf; returns its position.
    ///
    /// # Errors
    /// [`AuditError::LogFull`] at 2⁶⁴−1 leaves.
    pub fn append(&mut self, leaf: Hash) -> Result<u64, AuditError> {
        let levels = &mut self.levels;
        self.frontier.append_with(leaf, |level, _, hash| {
            // Nodes of a level are completed from left to right, so pushing keeps their order.
            let level = usize::from(level);
            if levels.len() == level {
                levels.push(Vec::new());
            }
            if let Some(row) = levels.get_mut(level) {
                row.push(hash);
            }
        })
    }

    /// Size, root and peaks.
    #[must_use]
    pub fn frontier(&self) -> &Frontier {
        &self.frontier
    }

    /// Number of leaves.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.frontier.size()
    }

    /// Root of all leaves.
    #[must_use]
    pub fn root(&self) -> Hash {
        self.frontier.root()
    }
}

impl Nodes for MemoryTree {
    fn node(&self, level: u8, index: u64) -> Result<Hash, AuditError> {
        let at = usize::try_from(index).ok();
        let row = self.levels.get(usize::from(level));
        row.zip(at).and_then(|(row, at)| row.get(at)).copied().ok_or(AuditError::MissingNode { level, index })
    }
}

/// Derives every node from stored leaf hashes: no memory, but a proof reads each leaf once. For rare proofs of old entries.
pub struct LeafNodes<F> {
    leaf: F,
}

impl<F: Fn(u64) -> Option<Hash>> LeafNodes<F> {
    /// `leaf` gives the stored hash of a position.
    #[must_use]
    pub fn new(leaf: F) -> Self {
        Self { leaf }
    }
}

impl<F: Fn(u64) -> Option<Hash>> Nodes for LeafNodes<F> {
    fn node(&self, level: u8, index: u64) -> Result<Hash, AuditError> {
        let missing = AuditError::MissingNode { level, index };
        let count = 1_u64.checked_shl(level.into()).ok_or_else(|| missing.clone())?;
        let first = index.checked_mul(count).ok_or_else(|| missing.clone())?;
        let end = first.checked_add(count).ok_or_else(|| missing.clone())?;
        // A small stack of finished subtrees; equal heights merge at once.
        let mut stack: Vec<(u8, Hash)> = Vec::with_capacity(usize::from(level) + 1);
        for pos in first..end {
            let mut right = (0_u8, (self.leaf)(pos).ok_or(AuditError::MissingNode { level: 0, index: pos })?);
            while let Some((_, left)) = stack.pop_if(|top| top.0 == right.0) {
                right = (right.0 + 1, node_hash(&left, &right.1));
            }
            stack.push(right);
        }
        stack.pop().map(|(_, hash)| hash).ok_or(missing)
    }
}
