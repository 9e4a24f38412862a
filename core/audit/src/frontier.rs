//! The right edge of the tree: all that appending needs. Owns: at most 64 peaks and the size.
//! Never: remembers leaves; `RecentNodes` holds what one batch made, so that its receipts need no store.
//! Source: threshold.md §2.6 (the frontier is part of the replicated state and of snapshots).

use std::collections::BTreeMap;

use dstack_protocol::codec::{DecodeError, Reader, Wire, Writer};

use crate::error::AuditError;
use crate::nodes::Nodes;
use crate::tree::{Hash, empty_root, node_hash};

/// Size and peaks (roots of the complete subtrees, largest first) of a log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Frontier {
    size: u64,
    peaks: Vec<Hash>,
}

impl Frontier {
    /// The frontier of the empty log.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes back what [`Frontier::size`] and [`Frontier::peaks`] gave.
    ///
    /// # Errors
    /// [`AuditError::FrontierShape`] if the number of peaks does not fit the size.
    pub fn from_parts(size: u64, peaks: Vec<Hash>) -> Result<Self, AuditError> {
        let need = size.count_ones() as usize;
        if peaks.len() != need {
            return Err(AuditError::FrontierShape { size, need, have: peaks.len() });
        }
        Ok(Self { size, peaks })
    }

    /// Number of leaves.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Roots of the complete subtrees, largest (leftmost) first: one for each set bit of the size.
    #[must_use]
    pub fn peaks(&self) -> &[Hash] {
        &self.peaks
    }

    /// Root of the whole log: the peaks folded from the right.
    #[must_use]
    pub fn root(&self) -> Hash {
        let mut from_right = self.peaks.iter().rev();
        match from_right.next() {
            None => empty_root(),
            Some(last) => from_right.fold(*last, |right, left| node_hash(left, &right)),
        }
    }

    /// Appends one leaf; returns its position.
    ///
    /// # Errors
    /// [`AuditError::LogFull`] at 2⁶⁴−1 leaves.
    pub fn append(&mut self, leaf: Hash) -> Result<u64, AuditError> {
        self.append_with(leaf, |_, _, _| {})
    }

    /// Appends one leaf and shows `completed` every node that it completes, the leaf itself first: `(level, index, hash)`.
    /// A store that keeps all of these can prove anything ([`Nodes`]).
    ///
    /// # Errors
    /// [`AuditError::LogFull`] at 2⁶⁴−1 leaves.
    pub fn append_with(&mut self, leaf: Hash, mut completed: impl FnMut(u8, u64, Hash)) -> Result<u64, AuditError> {
        let pos = self.size;
        let size = pos.checked_add(1).ok_or(AuditError::LogFull { size: pos })?;
        let mut hash = leaf;
        completed(0, pos, hash);
        // Each trailing one of the old size is a subtree of equal height to the left, which the new one completes.
        for level in 0..pos.trailing_ones() {
            let left = self.peaks.pop().expect("one peak for each set bit of the size, kept by every constructor");
            hash = node_hash(&left, &hash);
            completed(level as u8 + 1, pos >> (level + 1), hash);
        }
        self.peaks.push(hash);
        self.size = size;
        assert_eq!(self.peaks.len(), size.count_ones() as usize, "peaks fit the size");
        Ok(pos)
    }

    /// Appends a batch; what it returns proves any leaf of the batch at the new size without a store.
    ///
    /// # Errors
    /// [`AuditError::LogFull`]; then nothing was appended.
    pub fn append_batch(&mut self, leaves: &[Hash]) -> Result<RecentNodes, AuditError> {
        if (leaves.len() as u64) > u64::MAX - self.size {
            return Err(AuditError::LogFull { size: self.size });
        }
        let mut nodes = BTreeMap::new();
        for (level, index, hash) in self.placed_peaks() {
            nodes.insert((level, index), hash);
        }
        let first = self.size;
        for leaf in leaves {
            self.append_with(*leaf, |level, index, hash| {
                nodes.insert((level, index), hash);
            })?;
        }
        Ok(RecentNodes { first, size: self.size, nodes })
    }

    /// The peaks with their places in the tree.
    fn placed_peaks(&self) -> impl Iterator<Item = (u8, u64, Hash)> {
        let mut start = 0_u64;
        let mut rest = self.size;
        self.peaks.iter().map(move |peak| {
            let level = 63 - rest.leading_zeros();
            let placed = (level as u8, start >> level, *peak);
            start += 1 << level;
            rest -= 1 << level;
            placed
        })
    }
}

/// `size(8) ‖ { peak(32) }*`, as many peaks as the size has set bits: one encoding for each frontier.
impl Wire for Frontier {
    const BYTES_MAX: usize = 8 + 64 * 32;
    fn write(&self, w: &mut Writer) {
        w.u64(self.size);
        for peak in &self.peaks {
            w.raw(peak);
        }
    }
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let size = r.u64("size")?;
        let peaks = r.list("peaks", size.count_ones() as usize, 32, |r| r.array("peak"))?;
        Ok(Self { size, peaks })
    }
}

/// The old peaks and all nodes that one batch completed: enough to prove each leaf of the batch at the size after it.
///
/// Why that is enough: a sibling on the path of a new leaf either ends before the batch, then its parent was incomplete and it was a
/// peak; or it was completed by the batch; or it is an incomplete right edge, folded from such nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecentNodes {
    first: u64,
    size: u64,
    nodes: BTreeMap<(u8, u64), Hash>,
}

impl RecentNodes {
    /// Position of the batch's first leaf.
    #[must_use]
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Size of the log after the batch.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl Nodes for RecentNodes {
    fn node(&self, level: u8, index: u64) -> Result<Hash, AuditError> {
        self.nodes.get(&(level, index)).copied().ok_or(AuditError::MissingNode { level, index })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_a_frontier_with_a_missing_peak() {
        let refused = Frontier::from_parts(3, vec![[1; 32]]);
        assert_eq!(refused, Err(AuditError::FrontierShape { size: 3, need: 2, have: 1 }));
    }

    #[test]
    fn refuses_to_grow_beyond_the_last_number() {
        let mut full = Frontier::from_parts(u64::MAX, vec![[0; 32]; 64]).unwrap();
        let before = full.clone();
        assert_eq!(full.append([1; 32]), Err(AuditError::LogFull { size: u64::MAX }));
        assert_eq!(full.append_batch(&[[1; 32]]), Err(AuditError::LogFull { size: u64::MAX }));
        assert_eq!(full, before);
    }

    #[test]
    fn appends_up_to_the_last_number() {
        let mut nearly = Frontier::from_parts(u64::MAX - 1, vec![[0; 32]; 63]).unwrap();
        assert_eq!(nearly.append([1; 32]), Ok(u64::MAX - 1));
        assert_eq!(nearly.peaks().len(), 64);
    }
}
