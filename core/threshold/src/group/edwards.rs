//! The prime-order subgroup of edwards25519 (RFC 8032), for root `ca`.

use curve25519_dalek::edwards::{CompressedEdwardsY, EdwardsPoint};
use curve25519_dalek::scalar::Scalar;
use curve25519_dalek::traits::{Identity as _, VartimeMultiscalarMul as _};
use sha2::{Digest as _, Sha512};

use crate::group::Group;

/// The group of root `ca` with `ca_alg` ed25519.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edwards25519;

impl Group for Edwards25519 {
    type Scalar = Scalar;
    type Element = EdwardsPoint;
    type Encoding = [u8; 32];

    const NAME: &'static str = "edwards25519";
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
        let mut hash = Sha512::new();
        for part in parts {
            hash.update(part);
        }
        Scalar::from_bytes_mod_order_wide(&hash.finalize().into())
    }

    fn identity() -> EdwardsPoint {
        EdwardsPoint::identity()
    }

    fn mul_base(scalar: &Scalar) -> EdwardsPoint {
        EdwardsPoint::mul_base(scalar)
    }

    fn mul(element: &EdwardsPoint, scalar: &Scalar) -> EdwardsPoint {
        element * scalar
    }

    fn sum_of_products_public(scalars: &[Scalar], elements: &[EdwardsPoint]) -> EdwardsPoint {
        let terms = scalars.len().min(elements.len());
        EdwardsPoint::vartime_multiscalar_mul(scalars.iter().take(terms), elements.iter().take(terms))
    }

    fn encode(element: &EdwardsPoint) -> [u8; 32] {
        element.compress().to_bytes()
    }

    fn decode(bytes: &[u8]) -> Option<EdwardsPoint> {
        let point = CompressedEdwardsY::from_slice(bytes).ok()?.decompress()?;
        // The library also decompresses y ≥ p and points outside the subgroup; both are refused here.
        let strict = point.compress().as_bytes().as_slice() == bytes && point.is_torsion_free() && point != EdwardsPoint::identity();
        strict.then_some(point)
    }
}
