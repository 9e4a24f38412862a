//! ristretto255 (RFC 9496) with the hashes of RFC 9497's suite `ristretto255-SHA512`, mode VOPRF.

use curve25519_dalek::ristretto::{CompressedRistretto, RistrettoPoint};
use curve25519_dalek::scalar::Scalar;
use curve25519_dalek::traits::{Identity as _, VartimeMultiscalarMul as _};
use zeroize::Zeroize as _;

use crate::group::Group;
use crate::xmd::{XmdSha512, expand};

/// `CTX` of threshold.md §0: suite and mode.
pub(crate) const CONTEXT: &[u8] = b"OPRFV1-\x01-ristretto255-SHA512";

/// The group of root `prf` and of every encryption key of a ceremony.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ristretto255;

/// `H2G`: HashToGroup of the suite.
pub(crate) fn hash_to_group(message: &[u8]) -> RistrettoPoint {
    RistrettoPoint::from_uniform_bytes(&expand::<XmdSha512, 64>(&[message], &[b"HashToGroup-", CONTEXT]))
}

/// `H2S`: HashToScalar of the suite, over the concatenation of `parts`.
pub(crate) fn hash_to_scalar_parts(parts: &[&[u8]]) -> Scalar {
    let mut wide = expand::<XmdSha512, 64>(parts, &[b"HashToScalar-", CONTEXT]);
    let scalar = Scalar::from_bytes_mod_order_wide(&wide);
    wide.zeroize();
    scalar
}

/// A scalar that is a small number, or the negative of one: Lagrange coefficients of few holders mostly are.
struct Factor {
    size: u16,
    is_negative: bool,
}

impl Factor {
    fn of(scalar: &Scalar) -> Option<Self> {
        let small = |scalar: &Scalar| match scalar.as_bytes() {
            [low, high, rest @ ..] if rest.iter().all(|byte| *byte == 0) => Some(u16::from_le_bytes([*low, *high])),
            _ => None,
        };
        let positive = small(scalar).map(|size| Self { size, is_negative: false });
        positive.or_else(|| small(&-scalar).map(|size| Self { size, is_negative: true }))
    }
}

/// Double and add over as many bits as the factors have. They are public; of the elements nothing shows in time.
fn small_sum(factors: &[Factor], elements: &[RistrettoPoint]) -> RistrettoPoint {
    let bits = factors.iter().map(|factor| u16::BITS - factor.size.leading_zeros()).max().unwrap_or(0);
    let mut sum = RistrettoPoint::identity();
    for bit in (0..bits).rev() {
        sum += sum;
        for (factor, element) in factors.iter().zip(elements).filter(|(factor, _)| factor.size >> bit & 1 == 1) {
            if factor.is_negative {
                sum -= element;
            } else {
                sum += element;
            }
        }
    }
    sum
}

impl Group for Ristretto255 {
    type Scalar = Scalar;
    type Element = RistrettoPoint;
    type Encoding = [u8; 32];

    const NAME: &'static str = "ristretto255";
    const ELEMENT_BYTES: usize = 32;

    fn scalar_from_u64(number: u64) -> Scalar {
        Scalar::from(number)
    }

    fn decode_scalar(bytes: &[u8; 32]) -> Option<Scalar> {
        Scalar::from_canonical_bytes(*bytes).into()
    }

    fn encode_scalar(scalar: &Scalar) -> [u8; 32] {
        scalar.to_bytes()
    }

    fn scalar_from_uniform(bytes: &[u8; 64]) -> Scalar {
        Scalar::from_bytes_mod_order_wide(bytes)
    }

    fn invert_public(scalar: &Scalar) -> Option<Scalar> {
        (*scalar != Scalar::ZERO).then(|| scalar.invert())
    }

    fn hash_to_scalar(parts: &[&[u8]]) -> Scalar {
        hash_to_scalar_parts(parts)
    }

    fn identity() -> RistrettoPoint {
        RistrettoPoint::identity()
    }

    fn mul_base(scalar: &Scalar) -> RistrettoPoint {
        RistrettoPoint::mul_base(scalar)
    }

    fn mul(element: &RistrettoPoint, scalar: &Scalar) -> RistrettoPoint {
        element * scalar
    }

    fn sum_of_products_public(scalars: &[Scalar], elements: &[RistrettoPoint]) -> RistrettoPoint {
        if let Some(factors) = scalars.iter().map(Factor::of).collect::<Option<Vec<_>>>() {
            return small_sum(&factors, elements);
        }
        let terms = scalars.len().min(elements.len());
        RistrettoPoint::vartime_multiscalar_mul(scalars.iter().take(terms), elements.iter().take(terms))
    }

    fn encode(element: &RistrettoPoint) -> [u8; 32] {
        element.compress().to_bytes()
    }

    fn decode(bytes: &[u8]) -> Option<RistrettoPoint> {
        let point = CompressedRistretto::from_slice(bytes).ok()?.decompress()?;
        (point != RistrettoPoint::identity()).then_some(point)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_factors_give_the_same_sum() {
        let elements: Vec<RistrettoPoint> = (1_u64..4).map(|n| RistrettoPoint::mul_base(&Scalar::from(n * 1_000_003))).collect();
        let number = |n: i64| if n < 0 { -Scalar::from(n.unsigned_abs()) } else { Scalar::from(n.unsigned_abs()) };
        for numbers in [[2, -1, 0], [3, -3, 1], [0, 0, 0], [65_535, -65_535, 7], [65_536, -1, 1], [10, -20, 15]] {
            let scalars = numbers.map(number);
            let wanted: RistrettoPoint = scalars.iter().zip(&elements).map(|(scalar, element)| element * scalar).sum();
            assert_eq!(Ristretto255::sum_of_products_public(&scalars, &elements), wanted, "{numbers:?}");
        }
        assert_eq!(Ristretto255::sum_of_products_public(&[number(2)], &elements), elements[0] + elements[0], "the shorter one counts");
        assert_eq!(Ristretto255::sum_of_products_public(&[], &elements), RistrettoPoint::identity());
    }

    /// RFC 9496 appendix A.3.
    #[test]
    fn one_way_map_of_rfc_9496() {
        for (input, want) in [
            (
                "5d1be09e3d0c82fc538112490e35701979d99e06ca3e2b5b54bffe8b4dc772c14d98b696a1bbfb5ca32c436cc61c16563790306c79eaca7705668b47dffe5bb6",
                "3066f82a1a747d45120d1740f14358531a8f04bbffe6a819f86dfe50f44a0a46",
            ),
            (
                "f116b34b8f17ceb56e8732a60d913dd10cce47a6d53bee9204be8b44f6678b270102a56902e2488c46120e9276cfe54638286b9e4b3cdb470b542d46c2068d38",
                "f26e5b6f7d362d2d2a94c5d0e7602cb4773c95a2e5c31a64f133189fa76ed61b",
            ),
            (
                "8422e1bbdaab52938b81fd602effb6f89110e1e57208ad12d9ad767e2e25510c27140775f9337088b982d83d7fcf0b2fa1edffe51952cbe7365e95c86eaf325c",
                "006ccd2a9e6867e6a2c5cea83d3302cc9de128dd2a9a57dd8ee7b9d7ffe02826",
            ),
        ] {
            let uniform: [u8; 64] = hex::decode(input).unwrap().try_into().unwrap();
            let point = RistrettoPoint::from_uniform_bytes(&uniform);
            assert_eq!(hex::encode(Ristretto255::encode(&point)), want);
        }
    }
}
