//! Partials of several holders to PRF outputs, bad ones dropped and named.
//!
//! Owns: the six steps of threshold.md §1.3. Trusts `PK_prf` of the generation and nothing else: not the holders' keys, the epoch
//! or the threshold. Never: judges a receipt; the caller checks the group's `(pos, size, log_root)` against it (§2.7) before it
//! asks for the combination.

use std::collections::BTreeMap;

use curve25519_dalek::ristretto::RistrettoPoint;
use dstack_protocol::codec::Writer;
use dstack_protocol::limits::NODES_MAX;
use dstack_protocol::release::PartialPlain;
use dstack_protocol::{Epoch, Generation, NodeIndex};
use dstack_secret::Secret;
use sha2::{Digest as _, Sha512};
use zeroize::Zeroize as _;

use crate::dleq::{self, Proof, Statement};
use crate::group::{Group as _, Ristretto255};
use crate::prf::Batch;
use crate::shamir::lagrange_at_zero;

/// Sets of holders tried before the search ends; all sets of 5 out of 13.
pub const SETS_TRIED_MAX: usize = 1287;

/// One holder's answer is bad. That holder (or a relay that forged it) is at fault: drop it, ask another, report it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("partial of holder {index}: {fault}")]
pub struct PartialError {
    /// Who the answer says it is from.
    pub index: NodeIndex,
    /// What is wrong with it.
    pub fault: PartialFault,
}

/// What is wrong with a partial.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PartialFault {
    /// Index 0 or one that belongs to operators.
    #[error("not a node index")]
    Index,
    /// A second answer of one holder, or more answers than a cluster has nodes.
    #[error("answered already")]
    Again,
    /// It answers for another generation of the root.
    #[error("generation {got}, asked for {want}")]
    Generation {
        /// Generation asked for.
        want: Generation,
        /// Generation answered.
        got: Generation,
    },
    /// Not one element an input.
    #[error("{got} elements for {want} inputs")]
    Count {
        /// Inputs asked for.
        want: usize,
        /// Elements answered.
        got: usize,
    },
    /// An element or scalar is not canonical, or is the identity.
    #[error("element or scalar is not canonical")]
    Encoding,
    /// The proof does not verify.
    #[error("proof fails")]
    Proof,
}

/// Why there is no combination yet, or none at all.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CombineError {
    /// `PK_prf` is no element. The pin is at fault.
    #[error("the pinned public key is no group element")]
    PublicKey,
    /// A threshold below 2 is none.
    #[error("threshold {0} is below 2")]
    Threshold(u16),
    /// Ask more holders.
    #[error("{have} usable partials of this group, {need} needed")]
    TooFew {
        /// Usable partials of the group.
        have: usize,
        /// The threshold.
        need: usize,
        /// Dropped because their key is not the certified one.
        culprits: Vec<NodeIndex>,
    },
    /// No set of `t` holders adds up to `PK_prf`: some of them lie, or `t` is wrong. Ask more holders, or get the certified keys.
    #[error("none of {} sets of holders leads to the public key", .failed_sets.len())]
    NoSet {
        /// The sets that were tried, each reported whole.
        failed_sets: Vec<Vec<NodeIndex>>,
        /// Dropped because their key is not the certified one.
        culprits: Vec<NodeIndex>,
    },
    /// An output would be the identity: cannot happen with an honest majority of inputs hashed to the group.
    #[error("an output is the identity")]
    Identity,
}

impl CombineError {
    /// Holders that are proven wrong.
    #[must_use]
    pub fn culprits(&self) -> &[NodeIndex] {
        match self {
            Self::TooFew { culprits, .. } | Self::NoSet { culprits, .. } => culprits,
            Self::PublicKey | Self::Threshold(_) | Self::Identity => &[],
        }
    }
}

/// What the answers of one group agree on; only answers of one group are combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct AnswerGroup {
    /// Epoch of the shares.
    pub epoch: Epoch,
    /// Leaf number of the intent.
    pub pos: u64,
    /// Log size at the end of the intent's entry.
    pub size: u64,
    /// Log root at that size.
    pub log_root: [u8; 32],
}

/// A PRF output `Z` of 64 secret bytes; [`derive`](crate::keys::derive) makes a key of it.
pub struct PrfOutput {
    pub(crate) z: Secret<64>,
}

impl PrfOutput {
    /// Lends the 64 bytes.
    pub fn expose<T>(&self, use_it: impl FnOnce(&[u8; 64]) -> T) -> T {
        self.z.expose(use_it)
    }
}

/// A successful combination.
pub struct Combined {
    /// One output an input, in the batch's order.
    pub outputs: Vec<PrfOutput>,
    /// The holders whose partials were used.
    pub used: Vec<NodeIndex>,
    /// Sets that did not add up, each reported whole: at least one member of each lies.
    pub failed_sets: Vec<Vec<NodeIndex>>,
    /// Holders dropped because their key is not the certified one.
    pub culprits: Vec<NodeIndex>,
}

struct Accepted {
    group: AnswerGroup,
    vk: RistrettoPoint,
    vk_encoded: [u8; 32],
    elements: Vec<RistrettoPoint>,
}

impl Drop for Accepted {
    fn drop(&mut self) {
        self.elements.zeroize();
    }
}

/// Collects verified partials of one batch and combines them.
pub struct Combiner {
    batch: Batch,
    generation: Generation,
    public_key: RistrettoPoint,
    accepted: BTreeMap<NodeIndex, Accepted>,
}

impl Combiner {
    /// A combiner for `batch`. `pk_prf`: the pinned public key of `generation`, the only thing that is trusted.
    ///
    /// # Errors
    /// [`CombineError::PublicKey`].
    pub fn new(batch: Batch, generation: Generation, pk_prf: &[u8; 32]) -> Result<Self, CombineError> {
        let public_key = Ristretto255::decode(pk_prf).ok_or(CombineError::PublicKey)?;
        Ok(Self { batch, generation, public_key, accepted: BTreeMap::new() })
    }

    /// Steps 1 and 3: takes an opened answer if it is well formed and its proof verifies. Answers the group that it belongs to.
    ///
    /// # Errors
    /// [`PartialError`] names the holder; nothing is kept of a refused answer.
    pub fn add(&mut self, plain: &PartialPlain) -> Result<AnswerGroup, PartialError> {
        let fail = |fault| PartialError { index: plain.index, fault };
        if plain.index.0 == 0 || plain.index.0 >= 0x8000 {
            return Err(fail(PartialFault::Index));
        }
        if self.accepted.contains_key(&plain.index) || self.accepted.len() >= NODES_MAX {
            return Err(fail(PartialFault::Again));
        }
        if plain.generation != self.generation {
            let fault = PartialFault::Generation { want: self.generation, got: plain.generation };
            return Err(fail(fault));
        }
        if plain.elements.len() != self.batch.len() {
            let fault = PartialFault::Count { want: self.batch.len(), got: plain.elements.len() };
            return Err(fail(fault));
        }
        // Step 1: `decode` refuses non-canonical elements and the identity.
        let vk = Ristretto255::decode(&plain.vk).ok_or(fail(PartialFault::Encoding))?;
        let group = AnswerGroup { epoch: plain.epoch, pos: plain.pos, size: plain.size, log_root: plain.log_root };
        // Room for all from the start: growing would leave copies of the elements in freed memory.
        let mut accepted = Accepted { group, vk, vk_encoded: plain.vk, elements: Vec::with_capacity(plain.elements.len()) };
        for bytes in plain.elements.iter() {
            accepted.elements.push(Ristretto255::decode(bytes).ok_or(fail(PartialFault::Encoding))?);
        }
        let proof = Proof::decode(&plain.c, &plain.s).ok_or(fail(PartialFault::Encoding))?;
        // Step 3: each response alone.
        let statement = Statement {
            b: &accepted.vk,
            c: self.batch.points(),
            d: &accepted.elements,
            b_bytes: &plain.vk,
            c_bytes: self.batch.encoded(),
            d_bytes: &plain.elements,
        };
        if !dleq::verify_statement(statement, &proof) {
            return Err(fail(PartialFault::Proof));
        }
        self.accepted.insert(plain.index, accepted);
        Ok(group)
    }

    /// Forgets a holder's answer, so that it can be asked again. Anyone can make an answer with a valid proof in another's name; only
    /// the sum tells.
    pub fn remove(&mut self, index: NodeIndex) {
        self.accepted.remove(&index);
    }

    /// Step 2: the groups that answers fall into, with their holders.
    #[must_use]
    pub fn groups(&self) -> BTreeMap<AnswerGroup, Vec<NodeIndex>> {
        let mut groups: BTreeMap<AnswerGroup, Vec<NodeIndex>> = BTreeMap::new();
        for (index, accepted) in &self.accepted {
            groups.entry(accepted.group).or_default().push(*index);
        }
        groups
    }

    /// Steps 4 to 6 over the answers of `group`, which the caller has checked against the receipt.
    ///
    /// `threshold`: a hint; a wrong one only makes the search fail. `certified`: the verification keys of that epoch from the log, if at
    /// hand; they name liars at once and make the first set succeed.
    ///
    /// # Errors
    /// [`CombineError::TooFew`] (ask more), [`CombineError::NoSet`] (somebody lies).
    pub fn combine(
        &self,
        group: &AnswerGroup,
        threshold: u16,
        certified: Option<&BTreeMap<NodeIndex, [u8; 32]>>,
    ) -> Result<Combined, CombineError> {
        if threshold < 2 {
            return Err(CombineError::Threshold(threshold));
        }
        let need = usize::from(threshold);
        let mut culprits = Vec::new();
        let mut members: Vec<(NodeIndex, &Accepted)> = Vec::new();
        for (index, accepted) in self.accepted.iter().filter(|(_, a)| a.group == *group) {
            let honest = certified.is_none_or(|keys| keys.get(index) == Some(&accepted.vk_encoded));
            if honest {
                members.push((*index, accepted));
            } else {
                culprits.push(*index);
            }
        }
        if members.len() < need {
            return Err(CombineError::TooFew { have: members.len(), need, culprits });
        }

        let mut failed_sets = Vec::new();
        let mut sets = Subsets::new(members.len(), need);
        while let Some(places) = sets.next() {
            if failed_sets.len() >= SETS_TRIED_MAX {
                break;
            }
            let set: Vec<(NodeIndex, &Accepted)> = places.iter().filter_map(|place| members.get(*place)).copied().collect();
            let used: Vec<NodeIndex> = set.iter().map(|(index, _)| *index).collect();
            let weights = lagrange_at_zero::<Ristretto255>(&used).expect("indices are distinct and not 0");
            let keys: Vec<RistrettoPoint> = set.iter().map(|(_, a)| a.vk).collect();
            // Step 4: Σ λ_i·VK_i == PK_prf. With step 3 this implies Y_j = s·P_j.
            if Ristretto255::sum_of_products_public(&weights, &keys) != self.public_key {
                failed_sets.push(used);
                continue;
            }
            let outputs = self
                .batch
                .inputs()
                .iter()
                .enumerate()
                .map(|(j, input)| {
                    let mut partials: Vec<RistrettoPoint> = set.iter().filter_map(|(_, a)| a.elements.get(j)).copied().collect();
                    let mut y = Ristretto255::sum_of_products_public(&weights, &partials);
                    partials.zeroize();
                    let output = finalize(input, &y);
                    y.zeroize();
                    output
                })
                .collect::<Option<Vec<_>>>()
                .ok_or(CombineError::Identity)?;
            return Ok(Combined { outputs, used, failed_sets, culprits });
        }
        Err(CombineError::NoSet { failed_sets, culprits })
    }
}

/// Step 6: `Z = SHA-512(lp(x) ‖ lp(enc(Y)) ‖ "Finalize")`; `None` for the identity (step 5).
pub(crate) fn finalize(input: &[u8], y: &RistrettoPoint) -> Option<PrfOutput> {
    if *y == Ristretto255::identity() {
        return None;
    }
    let mut encoded = Ristretto255::encode(y);
    let mut head = Writer::default();
    head.lp(input).u16(32);
    let z = Secret::from_fn(|z| {
        let mut hash = Sha512::new();
        hash.update(head.into_bytes());
        hash.update(encoded);
        hash.update(b"Finalize");
        hash.finalize_into(z.into());
    });
    encoded.zeroize();
    Some(PrfOutput { z })
}

/// Subsets of `0..n` with `k` elements in lexicographic order.
struct Subsets {
    n: usize,
    places: Vec<usize>,
    started: bool,
}

impl Subsets {
    fn new(n: usize, k: usize) -> Self {
        Self { n, places: (0..k).collect(), started: false }
    }

    fn next(&mut self) -> Option<&[usize]> {
        if !self.started {
            self.started = true;
            return (self.places.len() <= self.n).then_some(self.places.as_slice());
        }
        // The last place that can still move; those after it follow it.
        let k = self.places.len();
        let slack = self.n.checked_sub(k)?;
        let (moved, value) =
            self.places.iter().enumerate().rev().find(|(at, value)| **value < slack + at).map(|(at, value)| (at, *value))?;
        for (offset, place) in self.places.iter_mut().skip(moved).enumerate() {
            *place = value + 1 + offset;
        }
        Some(&self.places)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subsets_are_complete_and_distinct() {
        for (n, k, count) in [(3, 2, 3), (5, 3, 10), (9, 5, 126), (4, 4, 1), (3, 4, 0)] {
            let mut subsets = Subsets::new(n, k);
            let mut seen = std::collections::BTreeSet::new();
            while let Some(set) = subsets.next() {
                assert!(set.windows(2).all(|w| w[0] < w[1]) && set.iter().all(|p| *p < n));
                assert!(seen.insert(set.to_vec()));
            }
            assert_eq!(seen.len(), count, "{k} of {n}");
        }
    }

    #[test]
    fn the_identity_has_no_output() {
        assert!(finalize(b"x", &Ristretto255::identity()).is_none());
    }
}
