//! Batch proof that several elements have the same discrete logarithm: `B = k·G` and `D_j = k·C_j` for all `j`.
//!
//! Owns: GenerateProof and VerifyProof of RFC 9497 §2.2.1 with `A = G`, hedged nonces, the encoding `c ‖ s`.
//! Source: threshold.md §1.2.

use curve25519_dalek::ristretto::RistrettoPoint;
use curve25519_dalek::scalar::Scalar;
use dstack_protocol::codec::sha512;
use zeroize::{Zeroize as _, Zeroizing};

use crate::group::{CONTEXT, Group as _, Ristretto255, SecretScalar, hash_to_scalar_parts};

/// A proof, `c(32) ‖ s(32)`: public.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proof {
    c: Scalar,
    s: Scalar,
}

impl Proof {
    /// Reads challenge and response; `None` unless both are canonical.
    #[must_use]
    pub fn decode(c: &[u8; 32], s: &[u8; 32]) -> Option<Self> {
        Some(Self { c: Ristretto255::decode_scalar(c)?, s: Ristretto255::decode_scalar(s)? })
    }

    /// Challenge, 32 bytes.
    #[must_use]
    pub fn c(&self) -> [u8; 32] {
        self.c.to_bytes()
    }

    /// Response, 32 bytes.
    #[must_use]
    pub fn s(&self) -> [u8; 32] {
        self.s.to_bytes()
    }
}

/// What is proven: `b = k·G` and `d_j = k·c_j` for one `k`. With the encodings, which callers have or need anyway: each costs an inversion.
/// `c` and `d` have equal length, at most 65535; a longer one is cut to the other's length.
#[derive(Clone, Copy)]
pub(crate) struct Statement<'a> {
    pub(crate) b: &'a RistrettoPoint,
    pub(crate) c: &'a [RistrettoPoint],
    pub(crate) d: &'a [RistrettoPoint],
    pub(crate) b_bytes: &'a [u8; 32],
    pub(crate) c_bytes: &'a [[u8; 32]],
    pub(crate) d_bytes: &'a [[u8; 32]],
}

/// Encodings of `points`.
pub(crate) fn encoded(points: &[RistrettoPoint]) -> Vec<[u8; 32]> {
    points.iter().map(enc).collect()
}

/// Proves `b = k·G` and `d_j = k·c_j`. `rng`: 64 fresh bytes from the operating system. The nonce also depends on the key and
/// the statement, so that a broken generator repeats a nonce only for the same statement.
pub(crate) fn prove(
    k: &SecretScalar<Ristretto255>,
    b: &RistrettoPoint,
    c: &[RistrettoPoint],
    d: &[RistrettoPoint],
    rng: &[u8; 64],
) -> Proof {
    let (b_bytes, c_bytes, d_bytes) = (enc(b), encoded(c), Zeroizing::new(encoded(d)));
    prove_statement(k, Statement { b, c, d, b_bytes: &b_bytes, c_bytes: &c_bytes, d_bytes: &d_bytes }, rng)
}

/// [`prove`] where the encodings are at hand.
pub(crate) fn prove_statement(k: &SecretScalar<Ristretto255>, statement: Statement<'_>, rng: &[u8; 64]) -> Proof {
    prove_with(k, statement, |m, z| {
        // threshold.md §1.2: r = H2S("DKMS-V1-NONCE" ‖ rng(64) ‖ k(32) ‖ enc(B) ‖ enc(M) ‖ enc(Z))
        let b = statement.b_bytes;
        k.to_secret().expose(|key| SecretScalar::new(hash_to_scalar_parts(&[b"DKMS-V1-NONCE", rng, key, b, m, z])))
    })
}

/// [`prove`] with the nonce as a function of the encoded composites `M` and `Z`.
fn prove_with(
    k: &SecretScalar<Ristretto255>,
    statement: Statement<'_>,
    nonce: impl FnOnce(&[u8; 32], &[u8; 32]) -> SecretScalar<Ristretto255>,
) -> Proof {
    let weights = weights(statement);
    let m = Ristretto255::sum_of_products_public(&weights, statement.c);
    let z = k.expose(|k| Ristretto255::mul(&m, k));
    let (m_bytes, mut z_bytes) = (enc(&m), enc(&z));
    let r = nonce(&m_bytes, &z_bytes);
    let (t2, t3) = (r.public(), r.expose(|r| Ristretto255::mul(&m, r)));
    let challenge = challenge(statement.b_bytes, &m_bytes, &z_bytes, &t2, &t3);
    z_bytes.zeroize();
    let s = r.expose(|r| k.expose(|k| r - challenge * k));
    Proof { c: challenge, s }
}

/// Whether `proof` shows `b = k·G` and `d_j = k·c_j` for one `k`. All arguments are public.
#[must_use]
pub(crate) fn verify(b: &RistrettoPoint, c: &[RistrettoPoint], d: &[RistrettoPoint], proof: &Proof) -> bool {
    let (b_bytes, c_bytes, d_bytes) = (enc(b), encoded(c), encoded(d));
    verify_statement(Statement { b, c, d, b_bytes: &b_bytes, c_bytes: &c_bytes, d_bytes: &d_bytes }, proof)
}

/// [`verify`] where the encodings are at hand.
#[must_use]
pub(crate) fn verify_statement(statement: Statement<'_>, proof: &Proof) -> bool {
    let Statement { b, c, d, b_bytes, .. } = statement;
    if c.len() != d.len() || c.is_empty() || c.len() > usize::from(u16::MAX) {
        return false;
    }
    let weights = weights(statement);
    let m = Ristretto255::sum_of_products_public(&weights, c);
    let z = Ristretto255::sum_of_products_public(&weights, d);
    // t2 = s·G + c·B, t3 = s·M + c·Z
    let t2 = RistrettoPoint::vartime_double_scalar_mul_basepoint(&proof.c, b, &proof.s);
    let t3 = Ristretto255::sum_of_products_public(&[proof.s, proof.c], &[m, z]);
    challenge(b_bytes, &enc(&m), &enc(&z), &t2, &t3) == proof.c
}

/// The weights `d_i` of ComputeComposites.
fn weights(statement: Statement<'_>) -> Vec<Scalar> {
    let seed_tag = [b"Seed-".as_slice(), CONTEXT].concat();
    let seed = sha512(&[&ELEMENT_LEN, statement.b_bytes, &len2(seed_tag.len()), &seed_tag]);
    (0u16..=u16::MAX)
        .zip(statement.c_bytes.iter().zip(statement.d_bytes))
        .map(|(i, (c, d))| {
            hash_to_scalar_parts(&[&len2(seed.len()), &seed, &i.to_be_bytes(), &ELEMENT_LEN, c, &ELEMENT_LEN, d, b"Composite"])
        })
        .collect()
}

fn challenge(b: &[u8; 32], m: &[u8; 32], z: &[u8; 32], t2: &RistrettoPoint, t3: &RistrettoPoint) -> Scalar {
    hash_to_scalar_parts(&[&ELEMENT_LEN, b, &ELEMENT_LEN, m, &ELEMENT_LEN, z, &ELEMENT_LEN, &enc(t2), &ELEMENT_LEN, &enc(t3), b"Challenge"])
}

const ELEMENT_LEN: [u8; 2] = 32u16.to_be_bytes();

fn len2(len: usize) -> [u8; 2] {
    u16::try_from(len).expect("seed and tag are short").to_be_bytes()
}

fn enc(point: &RistrettoPoint) -> [u8; 32] {
    Ristretto255::encode(point)
}

/// A proof with a nonce of the caller's choice, for known answers.
#[cfg(test)]
pub(crate) fn prove_with_nonce(
    k: &SecretScalar<Ristretto255>,
    b: &RistrettoPoint,
    c: &[RistrettoPoint],
    d: &[RistrettoPoint],
    nonce: SecretScalar<Ristretto255>,
) -> Proof {
    let (b_bytes, c_bytes, d_bytes) = (enc(b), encoded(c), encoded(d));
    prove_with(k, Statement { b, c, d, b_bytes: &b_bytes, c_bytes: &c_bytes, d_bytes: &d_bytes }, |_, _| nonce)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::scalar;

    struct Case {
        k: SecretScalar<Ristretto255>,
        b: RistrettoPoint,
        c: Vec<RistrettoPoint>,
        d: Vec<RistrettoPoint>,
    }

    fn case(len: u64) -> Case {
        let k = scalar(b"k", 0);
        let c: Vec<_> = (0..len).map(|j| scalar::<Ristretto255>(b"c", j).public()).collect();
        let d = c.iter().map(|c| k.expose(|k| c * k)).collect();
        Case { b: k.public(), k, c, d }
    }

    #[test]
    fn a_true_statement_verifies() {
        for len in [1, 2, 16] {
            let x = case(len);
            let proof = prove(&x.k, &x.b, &x.c, &x.d, &[7; 64]);
            assert!(verify(&x.b, &x.c, &x.d, &proof));
            assert_eq!(Proof::decode(&proof.c(), &proof.s()), Some(proof));
        }
    }

    #[test]
    fn any_flipped_bit_is_rejected() {
        let x = case(2);
        let proof = prove(&x.k, &x.b, &x.c, &x.d, &[7; 64]);
        let flipped = |bytes: [u8; 32], bit: usize| {
            let mut out = bytes;
            out[bit / 8] ^= 1 << (bit % 8);
            out
        };
        for bit in 0..256 {
            let c = Proof::decode(&flipped(proof.c(), bit), &proof.s());
            let s = Proof::decode(&proof.c(), &flipped(proof.s(), bit));
            assert!(c.is_none_or(|p| !verify(&x.b, &x.c, &x.d, &p)), "c bit {bit}");
            assert!(s.is_none_or(|p| !verify(&x.b, &x.c, &x.d, &p)), "s bit {bit}");
            let b = Ristretto255::decode(&flipped(enc(&x.b), bit));
            assert!(b.is_none_or(|b| !verify(&b, &x.c, &x.d, &proof)), "B bit {bit}");
            if let Some(d0) = Ristretto255::decode(&flipped(enc(&x.d[0]), bit)) {
                assert!(!verify(&x.b, &x.c, &[d0, x.d[1]], &proof), "D bit {bit}");
            }
        }
    }

    #[test]
    fn swapped_missing_and_extra_elements_are_rejected() {
        let x = case(2);
        let proof = prove(&x.k, &x.b, &x.c, &x.d, &[7; 64]);
        assert!(!verify(&x.b, &x.c, &[x.d[1], x.d[0]], &proof));
        assert!(!verify(&x.b, &x.c[..1], &x.d[..1], &proof));
        assert!(!verify(&x.b, &x.c, &x.d[..1], &proof));
        assert!(!verify(&x.b, &[], &[], &proof));
        let y = case(3);
        assert!(!verify(&y.b, &y.c, &y.d, &proof));
    }

    #[test]
    fn the_nonce_depends_on_randomness_key_and_statement() {
        let x = case(2);
        let one = prove(&x.k, &x.b, &x.c, &x.d, &[7; 64]);
        assert_eq!(prove(&x.k, &x.b, &x.c, &x.d, &[7; 64]), one, "deterministic in its arguments");
        assert_ne!(prove(&x.k, &x.b, &x.c, &x.d, &[8; 64]), one);
        // Same randomness, other statement: r = s + c·k must differ.
        let other = prove(&x.k, &x.b, &x.c[..1], &x.d[..1], &[7; 64]);
        let nonce = |p: &Proof| x.k.expose(|k| p.s + p.c * k);
        assert_ne!(nonce(&one), nonce(&other));
    }
}
