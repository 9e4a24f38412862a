//! [`Head`]: what a commit says about the whole store. Layout (version 1, big-endian):
//! `version(1) ‖ sequence(8) ‖ 5 × fingerprint(32) ‖ purged ‖ last`, a position being `0` or `1 ‖ index(8) ‖ term(8)`.

use crate::engine::Tree;
use crate::error::StoreError;
use crate::log_store::LogPosition;

use super::record::{VERSION, hex};

/// The ends of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogBounds {
    /// The newest entry that was purged.
    pub purged: Option<LogPosition>,
    /// The newest entry, purged ones included.
    pub last: Option<LogPosition>,
}

/// Pseudo-random value of one record, or the sum (exclusive or) of those of a set: order does not matter, and without the key
/// nobody can find another set with the same sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Fingerprint(pub(super) [u8; 32]);

impl Fingerprint {
    fn add(&mut self, other: &Fingerprint) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine ^= theirs;
        }
    }
}

/// The record that every commit replaces.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Head {
    pub(super) sequence: u64,
    pub(super) bounds: LogBounds,
    trees: [Fingerprint; TREES],
}

impl Head {
    /// Takes `old` out of the tree's set and puts `new` in.
    pub(super) fn replace(&mut self, tree: Tree, old: Option<&Fingerprint>, new: Option<&Fingerprint>) {
        if let Some(sum) = self.trees.get_mut(tree.slot()) {
            for change in [old, new].into_iter().flatten() {
                sum.add(change);
            }
        }
    }

    pub(super) fn fingerprint(&self, tree: Tree) -> Fingerprint {
        self.trees.get(tree.slot()).copied().unwrap_or_default()
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION];
        bytes.extend_from_slice(&self.sequence.to_be_bytes());
        for sum in &self.trees {
            bytes.extend_from_slice(&sum.0);
        }
        for position in [self.bounds.purged, self.bounds.last] {
            encode_position(position, &mut bytes);
        }
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, StoreError> {
        let mut rest = bytes;
        let decoded = Self::decode_from(&mut rest).filter(|_| rest.is_empty());
        match bytes.first() {
            Some(&version) if version != VERSION => Err(StoreError::Version { found: version, supported: VERSION }),
            _ => decoded.ok_or_else(|| StoreError::Tampered {
                tree: Tree::Meta,
                key: hex(super::KEY_HEAD),
                detail: "layout of the head record",
            }),
        }
    }

    fn decode_from(rest: &mut &[u8]) -> Option<Self> {
        let _version = take::<1>(rest)?;
        let sequence = u64::from_be_bytes(*take(rest)?);
        let mut trees = [Fingerprint::default(); TREES];
        for sum in &mut trees {
            *sum = Fingerprint(*take(rest)?);
        }
        let bounds = LogBounds { purged: decode_position(rest)?, last: decode_position(rest)? };
        Some(Self { sequence, bounds, trees })
    }
}

pub(super) fn encode_position(position: Option<LogPosition>, bytes: &mut Vec<u8>) {
    match position {
        None => bytes.push(0),
        Some(LogPosition { index, term }) => {
            bytes.push(1);
            bytes.extend_from_slice(&index.to_be_bytes());
            bytes.extend_from_slice(&term.to_be_bytes());
        }
    }
}

pub(super) fn decode_position(rest: &mut &[u8]) -> Option<Option<LogPosition>> {
    match take::<1>(rest)? {
        [0] => Some(None),
        [1] => {
            let index = u64::from_be_bytes(*take(rest)?);
            let term = u64::from_be_bytes(*take(rest)?);
            Some(Some(LogPosition { index, term }))
        }
        _ => None,
    }
}

pub(super) fn take<'a, const N: usize>(rest: &mut &'a [u8]) -> Option<&'a [u8; N]> {
    let (taken, after) = rest.split_first_chunk::<N>()?;
    *rest = after;
    Some(taken)
}

/// Trees with a fingerprint: all but [`Tree::Meta`], which holds the head itself.
const TREES: usize = 5;

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> Head {
        let mut head =
            Head { sequence: 7, bounds: LogBounds { purged: None, last: Some(LogPosition { index: 9, term: 2 }) }, ..Head::default() };
        head.replace(Tree::Log, None, Some(&Fingerprint([5; 32])));
        head
    }

    #[test]
    fn version_1_has_a_stable_layout() {
        let bytes = head().encode();
        assert_eq!(bytes.len(), 1 + 8 + 5 * 32 + 1 + 17);
        assert_eq!(hex(&bytes[..9]), "010000000000000007");
        assert_eq!(hex(&bytes[41..73]), "05".repeat(32));
        assert_eq!(hex(&bytes[169..]), "000100000000000000090000000000000002");
        assert_eq!(Head::decode(&bytes).unwrap(), head());
    }

    #[test]
    fn every_shorter_or_longer_form_is_refused() {
        let bytes = head().encode();
        for cut in 0..bytes.len() {
            assert!(Head::decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(Head::decode(&longer).is_err());
        let mut newer = bytes;
        newer[0] = 2;
        assert_eq!(Head::decode(&newer), Err(StoreError::Version { found: 2, supported: 1 }));
    }

    #[test]
    fn a_set_is_the_same_in_any_order_and_forgets_what_left() {
        let (a, b) = (Fingerprint([1; 32]), Fingerprint([2; 32]));
        let mut one = Head::default();
        one.replace(Tree::Log, None, Some(&a));
        one.replace(Tree::Log, None, Some(&b));
        one.replace(Tree::Log, Some(&a), None);
        let mut other = Head::default();
        other.replace(Tree::Log, None, Some(&b));
        assert_eq!(one, other);
    }
}
