//! secp256k1 and P-256, for roots `id` and `ca`: big-endian scalars, SEC1 compressed points.

use k256::elliptic_curve::PrimeField as _;
use k256::elliptic_curve::group::Group as _;
use k256::elliptic_curve::sec1::ToSec1Point as _;
use zeroize::Zeroize as _;

use crate::group::Group;
use crate::xmd::{XmdSha256, expand};

/// The group of root `id`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Secp256k1;

/// The group of root `ca` with `ca_alg` p256.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NistP256;

macro_rules! weierstrass {
    ($group:ident, $curve:ident, $from_48:ident, $name:literal, $tag:literal) => {
        /// `OS2IP(bytes) mod n` in constant time: two halves below 2¹⁹², the upper one times 2¹⁹².
        pub(crate) fn $from_48(bytes: &[u8; 48]) -> $curve::Scalar {
            let (high, low) = bytes.split_at(24);
            let half = |bytes: &[u8]| {
                let mut wide = $curve::FieldBytes::default();
                for (to, from) in wide.iter_mut().skip(8).zip(bytes) {
                    *to = *from;
                }
                let scalar =
                    Option::<$curve::Scalar>::from($curve::Scalar::from_repr(wide)).expect("a number below 2^192 is below the order");
                wide.as_mut_slice().zeroize();
                scalar
            };
            let two_to_96 = $curve::Scalar::from_u128(1 << 96);
            half(high) * two_to_96 * two_to_96 + half(low)
        }

        impl Group for $group {
            type Scalar = $curve::Scalar;
            type Element = $curve::ProjectivePoint;
            type Encoding = [u8; 33];

            const NAME: &'static str = $name;
            const ELEMENT_BYTES: usize = 33;

            fn scalar_from_u64(number: u64) -> Self::Scalar {
                $curve::Scalar::from(number)
            }

            fn decode_scalar(bytes: &[u8; 32]) -> Option<Self::Scalar> {
                $curve::Scalar::from_repr((*bytes).into()).into()
            }

            fn encode_scalar(scalar: &Self::Scalar) -> [u8; 32] {
                scalar.to_bytes().into()
            }

            fn scalar_from_uniform(bytes: &[u8; 64]) -> Self::Scalar {
                // 384 of the 512 bits leave a bias below 2^-128.
                let mut used = [0u8; 48];
                for (to, from) in used.iter_mut().zip(bytes) {
                    *to = *from;
                }
                let scalar = $from_48(&used);
                used.zeroize();
                scalar
            }

            fn invert_public(scalar: &Self::Scalar) -> Option<Self::Scalar> {
                scalar.invert().into()
            }

            fn hash_to_scalar(parts: &[&[u8]]) -> Self::Scalar {
                $from_48(&expand::<XmdSha256, 48>(parts, &[$tag]))
            }

            fn identity() -> Self::Element {
                $curve::ProjectivePoint::IDENTITY
            }

            fn mul_base(scalar: &Self::Scalar) -> Self::Element {
                $curve::ProjectivePoint::mul_by_generator(scalar)
            }

            fn mul(element: &Self::Element, scalar: &Self::Scalar) -> Self::Element {
                element * scalar
            }

            fn sum_of_products_public(scalars: &[Self::Scalar], elements: &[Self::Element]) -> Self::Element {
                scalars.iter().zip(elements).fold(Self::identity(), |sum, (s, e)| sum + e * s)
            }

            fn encode(element: &Self::Element) -> [u8; 33] {
                let mut out = [0u8; 33];
                // The identity is one zero byte in SEC1; it stays zeros here, which `decode` refuses.
                for (to, from) in out.iter_mut().zip(element.to_affine().to_sec1_point(true).as_bytes()) {
                    *to = *from;
                }
                out
            }

            fn decode(bytes: &[u8]) -> Option<Self::Element> {
                // 33 bytes: neither the uncompressed form nor the identity.
                let compressed: &[u8; 33] = bytes.try_into().ok()?;
                let key = $curve::PublicKey::from_sec1_bytes(compressed).ok()?;
                Some(key.to_projective())
            }
        }
    };
}

weierstrass!(Secp256k1, k256, secp256k1_scalar_from_48, "secp256k1", b"DKMS-V1-POP-secp256k1");
weierstrass!(NistP256, p256, p256_scalar_from_48, "p256", b"DKMS-V1-POP-P256");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reduction_of_48_bytes_agrees_with_long_division() {
        use shamir_secret_sharing::num_bigint::BigUint;
        let cases = [[0xff; 48], [0x80; 48], std::array::from_fn(|i| i as u8 * 5 + 1)];
        let order_k = "fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141";
        let order_p = "ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551";
        for bytes in cases {
            let number = BigUint::from_bytes_be(&bytes);
            let expect = |order: &str| {
                let n = BigUint::parse_bytes(order.as_bytes(), 16).unwrap();
                format!("{:0>64}", (&number % n).to_str_radix(16))
            };
            assert_eq!(hex::encode(Secp256k1::encode_scalar(&secp256k1_scalar_from_48(&bytes))), expect(order_k));
            assert_eq!(hex::encode(NistP256::encode_scalar(&p256_scalar_from_48(&bytes))), expect(order_p));
        }
    }
}
