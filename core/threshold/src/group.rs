//! Prime-order groups behind one small trait, so that sharing and key generation are written once.
//!
//! Owns: scalar and element encodings, strict decoding, the rule which operation may take variable time.
//! Never: hands out a secret scalar; [`SecretScalar`] lends it. Source: threshold.md §0, §3 step 2 (`H_s`).

mod edwards;
mod ristretto;
mod weierstrass;

use std::fmt;
use std::ops::{Add, Mul, Sub};

use dstack_secret::{Locked, Secret};
use zeroize::{Zeroize, ZeroizeOnDrop};

pub use edwards::Edwards25519;
pub use ristretto::Ristretto255;
pub(crate) use ristretto::{CONTEXT, hash_to_group, hash_to_scalar_parts};
pub use weierstrass::{NistP256, Secp256k1};
pub(crate) use weierstrass::{p256_scalar_from_48, secp256k1_scalar_from_48};

/// A group of prime order with fixed encodings (threshold.md §0).
///
/// Functions whose name ends in `_public` may take time that depends on their scalars; everything else is constant time.
pub trait Group: Copy + PartialEq + fmt::Debug + Send + Sync + 'static {
    /// Integers modulo the group's order.
    type Scalar: Copy
        + PartialEq
        + Zeroize
        + Add<Output = Self::Scalar>
        + Sub<Output = Self::Scalar>
        + Mul<Output = Self::Scalar>
        + Send
        + Sync
        + 'static;
    /// Group elements.
    type Element: Copy + PartialEq + fmt::Debug + Add<Output = Self::Element> + Sub<Output = Self::Element> + Send + Sync + 'static;
    /// An element's canonical encoding.
    type Encoding: AsRef<[u8]> + Copy + Ord + fmt::Debug + Send + Sync + 'static;

    /// Name of the group.
    const NAME: &'static str;
    /// Bytes of an encoded element.
    const ELEMENT_BYTES: usize;

    /// The scalar of a small number.
    fn scalar_from_u64(number: u64) -> Self::Scalar;
    /// Reads 32 bytes; `None` unless canonical.
    fn decode_scalar(bytes: &[u8; 32]) -> Option<Self::Scalar>;
    /// Canonical encoding of a scalar.
    fn encode_scalar(scalar: &Self::Scalar) -> [u8; 32];
    /// Reduces 64 uniform bytes to a scalar of negligible bias.
    fn scalar_from_uniform(bytes: &[u8; 64]) -> Self::Scalar;
    /// Inverse of a public scalar; `None` for zero.
    fn invert_public(scalar: &Self::Scalar) -> Option<Self::Scalar>;
    /// `H_s` of threshold.md §3 step 2, over the concatenation of `parts`.
    fn hash_to_scalar(parts: &[&[u8]]) -> Self::Scalar;
    /// The neutral element.
    fn identity() -> Self::Element;
    /// `scalar · B`, `B` the group's generator.
    fn mul_base(scalar: &Self::Scalar) -> Self::Element;
    /// `scalar · element`.
    fn mul(element: &Self::Element, scalar: &Self::Scalar) -> Self::Element;
    /// `Σ scalar_k · element_k`; the shorter list ends the sum.
    fn sum_of_products_public(scalars: &[Self::Scalar], elements: &[Self::Element]) -> Self::Element;
    /// Canonical encoding of an element.
    fn encode(element: &Self::Element) -> Self::Encoding;
    /// Reads an element; `None` for a wrong length, a non-canonical encoding, an element outside the prime-order group, or the
    /// identity.
    fn decode(bytes: &[u8]) -> Option<Self::Element>;
}

/// A secret scalar: on the heap, wiped on drop, never printed or copied.
pub struct SecretScalar<G: Group> {
    value: Box<G::Scalar>,
}

impl<G: Group> SecretScalar<G> {
    /// Takes over a scalar. The caller's copy is on its stack; keep it short-lived.
    pub(crate) fn new(mut value: G::Scalar) -> Self {
        let scalar = Self { value: Box::new(value) };
        value.zeroize();
        scalar
    }

    /// Reads a canonical scalar out of secret bytes; `None` unless canonical.
    #[must_use]
    pub fn from_secret(bytes: &Secret<32>) -> Option<Self> {
        bytes.expose(|b| G::decode_scalar(b).map(Self::new))
    }

    /// As [`SecretScalar::from_secret`] for locked memory.
    #[must_use]
    pub fn from_locked(bytes: &Locked<32>) -> Option<Self> {
        bytes.expose(|b| G::decode_scalar(b).map(Self::new))
    }

    /// A uniform scalar from 64 uniform secret bytes.
    #[must_use]
    pub fn from_uniform(bytes: &Secret<64>) -> Self {
        bytes.expose(|b| Self::new(G::scalar_from_uniform(b)))
    }

    /// Canonical encoding as secret bytes.
    #[must_use]
    pub fn to_secret(&self) -> Secret<32> {
        let mut bytes = G::encode_scalar(&self.value);
        Secret::take(&mut bytes)
    }

    /// `self · B`.
    #[must_use]
    pub fn public(&self) -> G::Element {
        G::mul_base(&self.value)
    }

    /// Lends the scalar to `use_it`.
    pub(crate) fn expose<T>(&self, use_it: impl FnOnce(&G::Scalar) -> T) -> T {
        use_it(&self.value)
    }

    /// Adds another secret in place.
    pub(crate) fn accumulate(&mut self, other: &Self) {
        *self.value = *self.value + *other.value;
    }
}

impl<G: Group> Drop for SecretScalar<G> {
    fn drop(&mut self) {
        self.value.zeroize();
    }
}

impl<G: Group> ZeroizeOnDrop for SecretScalar<G> {}

impl<G: Group> fmt::Debug for SecretScalar<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretScalar<{}>(redacted)", G::NAME)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn laws<G: Group>() {
        let three = G::scalar_from_u64(3);
        let five = G::scalar_from_u64(5);
        let b = G::mul_base(&G::scalar_from_u64(1));
        assert_eq!(G::mul(&b, &three) + G::mul(&b, &five), G::mul_base(&(three + five)));
        assert_eq!(G::mul_base(&five) - G::mul_base(&three), G::mul_base(&(five - three)));
        assert_eq!(G::sum_of_products_public(&[three, five], &[G::mul_base(&five), b]), G::mul_base(&G::scalar_from_u64(20)));
        assert!(G::invert_public(&three).unwrap() * three == G::scalar_from_u64(1));
        assert!(G::invert_public(&G::scalar_from_u64(0)).is_none());

        let encoded = G::encode(&G::mul_base(&five));
        assert_eq!(encoded.as_ref().len(), G::ELEMENT_BYTES);
        assert_eq!(G::decode(encoded.as_ref()), Some(G::mul_base(&five)));
        assert_eq!(G::decode(&encoded.as_ref()[1..]), None);
        assert_eq!(G::decode(G::encode(&G::identity()).as_ref()), None, "the identity is refused");
        assert_eq!(G::decode(&vec![0xff; G::ELEMENT_BYTES]), None);

        let scalar = G::encode_scalar(&five);
        assert!(G::decode_scalar(&scalar).unwrap() == five);
        assert!(G::decode_scalar(&[0xff; 32]).is_none(), "a scalar above the order is refused");
        assert!(G::hash_to_scalar(&[b"a", b"b"]) == G::hash_to_scalar(&[b"ab"]));
        assert!(G::hash_to_scalar(&[b"a"]) != G::hash_to_scalar(&[b"b"]));
        assert!(G::scalar_from_uniform(&[0; 64]) == G::scalar_from_u64(0));
    }

    #[test]
    fn all_groups_follow_the_laws() {
        laws::<Ristretto255>();
        laws::<Edwards25519>();
        laws::<Secp256k1>();
        laws::<NistP256>();
    }

    #[test]
    fn edwards_refuses_points_of_small_order_and_non_canonical_ones() {
        // y = −1: order 2. Then y = 1 + p, the identity written twice as large.
        let mut order_two = [0xff; 32];
        order_two[0] = 0xec;
        order_two[31] = 0x7f;
        assert!(Edwards25519::decode(&order_two).is_none());
        let mut not_canonical = [0xff; 32];
        not_canonical[0] = 0xee;
        not_canonical[31] = 0x7f;
        assert!(Edwards25519::decode(&not_canonical).is_none());
    }

    #[test]
    fn secret_scalar_prints_nothing_and_round_trips() {
        let secret = Secret::<32>::from_fn(|b| b[0] = 9);
        let scalar = SecretScalar::<Ristretto255>::from_secret(&secret).unwrap();
        assert_eq!(format!("{scalar:?}"), "SecretScalar<ristretto255>(redacted)");
        assert_eq!(scalar.to_secret(), secret);
        assert_eq!(scalar.public(), Ristretto255::mul_base(&Ristretto255::scalar_from_u64(9)));
    }
}
