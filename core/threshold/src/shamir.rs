//! Shamir sharing over a group's scalars, with commitments to the polynomial.
//!
//! Owns: deal, eval, commit, Lagrange coefficients at 0, evaluation of commitments. Never: rebuilds a shared secret; the sum of
//! weighted shares is taken over group elements only. Source: threshold.md §0 (`λ_i(Q)`), §3 steps 2, 3 and 5, §8.

use dstack_protocol::NodeIndex;
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::group::{Group, SecretScalar};

/// Evaluation points that cannot be interpolated over. The fault of who chose the set.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ShamirError {
    /// Index 0 is the secret's own place.
    #[error("index 0 is not an evaluation point")]
    IndexZero,
    /// Two shares of one index.
    #[error("index {0} occurs twice in a set")]
    DuplicateIndex(NodeIndex),
    /// No index at all.
    #[error("empty set of indices")]
    Empty,
}

/// A secret polynomial over the scalars; its value at 0 is what is shared.
pub(crate) struct Polynomial<G: Group> {
    /// Lowest first; allocated once, so that no copy is left behind.
    coefficients: Vec<G::Scalar>,
}

impl<G: Group> Polynomial<G> {
    /// Draws a polynomial of degree `threshold − 1` with coefficients from `next`.
    pub(crate) fn deal(threshold: u16, mut next: impl FnMut() -> SecretScalar<G>) -> Self {
        let mut coefficients = Vec::with_capacity(usize::from(threshold));
        for _ in 0..threshold {
            next().expose(|scalar| coefficients.push(*scalar));
        }
        Self { coefficients }
    }

    /// The share of `index`: the polynomial's value there.
    pub(crate) fn eval(&self, index: NodeIndex) -> SecretScalar<G> {
        let at = G::scalar_from_u64(u64::from(index.0));
        let mut value = G::scalar_from_u64(0);
        for coefficient in self.coefficients.iter().rev() {
            value = value * at + *coefficient;
        }
        SecretScalar::new(value)
    }

    /// `a_k · B` for each coefficient.
    pub(crate) fn commit(&self) -> Commitment<G> {
        Commitment { points: self.coefficients.iter().map(G::mul_base).collect() }
    }

    /// Lends the constant term.
    pub(crate) fn with_constant<T>(&self, use_it: impl FnOnce(&G::Scalar) -> T) -> Option<T> {
        self.coefficients.first().map(use_it)
    }
}

impl<G: Group> Drop for Polynomial<G> {
    fn drop(&mut self) {
        self.coefficients.zeroize();
    }
}

impl<G: Group> ZeroizeOnDrop for Polynomial<G> {}

/// Public commitment to a polynomial (Feldman): one element a coefficient, lowest first.
#[derive(Debug, Clone, PartialEq)]
pub struct Commitment<G: Group> {
    pub(crate) points: Vec<G::Element>,
}

impl<G: Group> Commitment<G> {
    /// The element that commits to the constant term.
    #[must_use]
    pub fn constant(&self) -> G::Element {
        self.points.first().copied().unwrap_or_else(G::identity)
    }

    /// `Σ_k index^k · C_k`: what the share of `index` must be a multiple of `B` by.
    #[must_use]
    pub fn eval(&self, index: NodeIndex) -> G::Element {
        let at = G::scalar_from_u64(u64::from(index.0));
        let powers: Vec<G::Scalar> =
            std::iter::successors(Some(G::scalar_from_u64(1)), |power| Some(*power * at)).take(self.points.len()).collect();
        G::sum_of_products_public(&powers, &self.points)
    }

    /// Whether `share` is the committed polynomial's value at `index`.
    #[must_use]
    pub fn matches(&self, index: NodeIndex, share: &SecretScalar<G>) -> bool {
        share.public() == self.eval(index)
    }

    /// Sum of commitments of equal degree, which commits to the sum of the polynomials; missing points count as identity.
    #[must_use]
    pub fn sum<'a>(all: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut points: Vec<G::Element> = Vec::new();
        for commitment in all {
            points.resize(points.len().max(commitment.points.len()), G::identity());
            for (sum, point) in points.iter_mut().zip(&commitment.points) {
                *sum = *sum + *point;
            }
        }
        Self { points }
    }
}

/// `λ_i(Q)` for each `i` of `set`, in its order: the weights that interpolate at 0 (threshold.md §0).
///
/// # Errors
/// [`ShamirError`] for an empty set, index 0, or an index that occurs twice.
pub fn lagrange_at_zero<G: Group>(set: &[NodeIndex]) -> Result<Vec<G::Scalar>, ShamirError> {
    if set.is_empty() {
        return Err(ShamirError::Empty);
    }
    set.iter()
        .enumerate()
        .map(|(place, i)| {
            if i.0 == 0 {
                return Err(ShamirError::IndexZero);
            }
            let at = G::scalar_from_u64(u64::from(i.0));
            let mut above = G::scalar_from_u64(1);
            let mut below = G::scalar_from_u64(1);
            for (_, j) in set.iter().enumerate().filter(|(other, _)| *other != place) {
                let j = G::scalar_from_u64(u64::from(j.0));
                above = above * j;
                below = below * (j - at);
            }
            // The product below is zero only if some other j equals i.
            let inverse = G::invert_public(&below).ok_or(ShamirError::DuplicateIndex(*i))?;
            Ok(above * inverse)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use shamir_secret_sharing::ShamirSecretSharing;
    use shamir_secret_sharing::num_bigint::{BigInt, Sign};

    use super::*;
    use crate::group::{Edwards25519, NistP256, Ristretto255, Secp256k1};
    use crate::testing::{scalar, subsets};

    const SCHEMES: [(u16, u16); 4] = [(2, 3), (3, 5), (4, 7), (5, 9)];

    /// Only tests rebuild a secret.
    fn rebuild<G: Group>(shares: &[(NodeIndex, SecretScalar<G>)]) -> G::Scalar {
        let set: Vec<NodeIndex> = shares.iter().map(|(i, _)| *i).collect();
        let weights = lagrange_at_zero::<G>(&set).unwrap();
        shares.iter().zip(weights).fold(G::scalar_from_u64(0), |sum, ((_, share), weight)| sum + share.expose(|s| *s * weight))
    }

    fn every_subset_agrees<G: Group>() {
        for (t, n) in SCHEMES {
            let mut counter = 0;
            let polynomial = Polynomial::<G>::deal(t, || {
                counter += 1;
                scalar(b"coefficient", counter)
            });
            let commitment = polynomial.commit();
            assert_eq!(commitment.points.len(), usize::from(t));
            let secret = polynomial.with_constant(|c| *c).unwrap();
            for set in subsets(n, t) {
                let shares: Vec<_> = set.iter().map(|i| (*i, polynomial.eval(*i))).collect();
                assert!(rebuild(&shares) == secret, "{t}/{n} {set:?}");
                assert!(shares.iter().all(|(i, s)| commitment.matches(*i, s)));
                assert!(!commitment.matches(NodeIndex(shares[0].0.0 + 1), &shares[0].1));
            }
        }
    }

    #[test]
    fn every_subset_of_t_shares_gives_the_secret_in_every_group() {
        every_subset_agrees::<Ristretto255>();
        every_subset_agrees::<Edwards25519>();
        every_subset_agrees::<Secp256k1>();
        every_subset_agrees::<NistP256>();
    }

    #[test]
    fn fewer_than_t_shares_are_consistent_with_every_secret() {
        // For any claimed secret there is exactly one polynomial of degree t − 1 through it and t − 1 shares.
        let (t, shares_of) = (3u16, [NodeIndex(2), NodeIndex(5)]);
        let mut counter = 0;
        let polynomial = Polynomial::<Ristretto255>::deal(t, || {
            counter += 1;
            scalar(b"secrecy", counter)
        });
        for claim in 0..20 {
            let claimed = scalar::<Ristretto255>(b"claim", claim);
            // The share at 7 that makes {2, 5, 7} interpolate to the claim: (claim − λ₂s₂ − λ₅s₅) / λ₇.
            let set = [shares_of[0], shares_of[1], NodeIndex(7)];
            let weights = lagrange_at_zero::<Ristretto255>(&set).unwrap();
            let known = polynomial.eval(set[0]).expose(|s| s * weights[0]) + polynomial.eval(set[1]).expose(|s| s * weights[1]);
            let third = claimed.expose(|c| (c - known) * weights[2].invert());
            let shares = vec![(set[0], polynomial.eval(set[0])), (set[1], polynomial.eval(set[1])), (set[2], SecretScalar::new(third))];
            assert!(claimed.expose(|c| rebuild(&shares) == *c));
        }
    }

    #[test]
    fn agrees_with_an_independent_implementation() {
        let order = BigInt::parse_bytes(b"1000000000000000000000000000000014def9dea2f79cd65812631a5cf5d3ed", 16).unwrap();
        for (t, n) in SCHEMES {
            let oracle = ShamirSecretSharing { threshold: usize::from(t), share_amount: usize::from(n), prime: order.clone() };
            let mut counter = 0;
            let polynomial = Polynomial::<Ristretto255>::deal(t, || {
                counter += 1;
                scalar(b"oracle", counter)
            });
            let number = |s: &SecretScalar<Ristretto255>| s.expose(|s| BigInt::from_bytes_le(Sign::Plus, s.as_bytes()));
            let secret = polynomial.with_constant(|c| BigInt::from_bytes_le(Sign::Plus, c.as_bytes())).unwrap();
            // Our shares, their interpolation.
            let ours: Vec<(usize, BigInt)> = (2..=t + 1).map(|i| (usize::from(i), number(&polynomial.eval(NodeIndex(i))))).collect();
            assert_eq!(oracle.recover(&ours), secret);
            // Their shares, our interpolation.
            let theirs: Vec<(NodeIndex, SecretScalar<Ristretto255>)> = oracle
                .split(secret.clone())
                .into_iter()
                .take(usize::from(t))
                .map(|(i, value)| {
                    let mut bytes = value.to_bytes_le().1;
                    bytes.resize(32, 0);
                    let bytes: [u8; 32] = bytes.try_into().unwrap();
                    let share = Ristretto255::decode_scalar(&bytes).unwrap();
                    (NodeIndex(u16::try_from(i).unwrap()), SecretScalar::new(share))
                })
                .collect();
            assert_eq!(BigInt::from_bytes_le(Sign::Plus, rebuild(&theirs).as_bytes()), secret);
        }
    }

    #[test]
    fn bad_sets_are_refused() {
        let set = |list: &[u16]| lagrange_at_zero::<Ristretto255>(&list.iter().map(|i| NodeIndex(*i)).collect::<Vec<_>>());
        assert_eq!(set(&[]).unwrap_err(), ShamirError::Empty);
        assert_eq!(set(&[0, 1]).unwrap_err(), ShamirError::IndexZero);
        assert_eq!(set(&[1, 2, 1]).unwrap_err(), ShamirError::DuplicateIndex(NodeIndex(1)));
        assert!(set(&[1]).is_ok());
    }

    #[test]
    fn commitments_add_up() {
        let mut counter = 0;
        let mut deal = || {
            Polynomial::<Secp256k1>::deal(3, || {
                counter += 1;
                scalar(b"sum", counter)
            })
        };
        let (f, g) = (deal(), deal());
        let sum = Commitment::sum([&f.commit(), &g.commit()]);
        let mut share = f.eval(NodeIndex(4));
        share.accumulate(&g.eval(NodeIndex(4)));
        assert!(sum.matches(NodeIndex(4), &share));
    }
}
