//! Deterministic scalars and subsets for unit tests.

use dstack_protocol::NodeIndex;
use dstack_protocol::codec::sha512;

use crate::group::{Group, SecretScalar};

/// A scalar that depends on `label` and `number` only.
pub(crate) fn scalar<G: Group>(label: &[u8], number: u64) -> SecretScalar<G> {
    SecretScalar::new(G::scalar_from_uniform(&sha512(&[label, &number.to_be_bytes()])))
}

/// Every subset of `1..=n` with `t` elements, ascending.
pub(crate) fn subsets(n: u16, t: u16) -> Vec<Vec<NodeIndex>> {
    (0u32..1 << n)
        .filter(|mask| mask.count_ones() == u32::from(t))
        .map(|mask| (1..=n).filter(|i| mask >> (i - 1) & 1 == 1).map(NodeIndex).collect())
        .collect()
}
