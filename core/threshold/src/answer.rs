//! Partials sealed to a client's one-time key: relays see ciphertext.
//!
//! Owns: HPKE sealing and opening with the exact info and associated data. The sender is authenticated by its proof, not by HPKE.
//! Source: threshold.md §2.3; RFC 9180 base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305.

use std::convert::Infallible;

use dstack_protocol::release::{Out, PartialPlain, hpke_aad, hpke_info};
use dstack_protocol::{ClusterId, DecodeError, Generation, NodeIndex, Wire as _};
use dstack_secret::{Secret, SecretBytes};
use hpke::aead::ChaCha20Poly1305;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::rand_core::{TryCryptoRng, TryRng};
use hpke::{Deserializable as _, Kem, OpModeR, OpModeS, Serializable as _};
use sha2::{Digest as _, Sha512};

/// Why an answer cannot be sealed or opened.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// The client's key is of low order. The client's fault: refuse the request.
    #[error("one-time key of the request is of low order")]
    RecipientKey,
    /// The ciphertext is not for this request, or was altered. Holder or relay is at fault: ask another way.
    #[error("answer of holder {0} does not open")]
    DoesNotOpen(NodeIndex),
    /// The opened bytes are no partial. The holder's fault.
    #[error("answer of holder {index}: {source}")]
    NotAPartial {
        /// Who answered.
        index: NodeIndex,
        /// What is wrong.
        source: DecodeError,
    },
    /// Index or epoch inside differ from those outside. The holder's fault.
    #[error("answer of holder {0} names another holder or epoch inside")]
    Header(NodeIndex),
}

/// A client's one-time X25519 key; new for each request.
pub struct RecipientKey {
    private: <X25519HkdfSha256 as Kem>::PrivateKey,
    public: [u8; 32],
}

impl RecipientKey {
    /// The key whose private half is `seed`, 32 fresh bytes from the operating system.
    #[must_use]
    pub fn new(seed: Secret<32>) -> Self {
        let private =
            seed.expose(|bytes| <X25519HkdfSha256 as Kem>::PrivateKey::from_bytes(bytes)).expect("any 32 bytes are an X25519 key");
        let public = X25519HkdfSha256::sk_to_pk(&private).to_bytes().into();
        Self { private, public }
    }

    /// `epk` of the request.
    #[must_use]
    pub fn public(&self) -> [u8; 32] {
        self.public
    }
}

/// What an answer belongs to.
#[derive(Debug, Clone, Copy)]
pub struct AnswerContext<'a> {
    /// Cluster asked.
    pub cluster_id: &'a ClusterId,
    /// Generation asked for.
    pub generation: Generation,
    /// Hash of the request.
    pub req_hash: &'a [u8; 32],
}

/// Seals a partial to the request's `epk` and wipes it. `rng`: 32 fresh bytes from the operating system, used once.
///
/// # Errors
/// [`AnswerError::RecipientKey`].
pub fn seal_partial(plain: PartialPlain, context: &AnswerContext<'_>, epk: &[u8; 32], rng: Secret<32>) -> Result<Out, AnswerError> {
    let recipient = <X25519HkdfSha256 as Kem>::PublicKey::from_bytes(epk).map_err(|_| AnswerError::RecipientKey)?;
    let info = hpke_info(context.cluster_id, context.generation, context.req_hash);
    let aad = hpke_aad(plain.index, plain.epoch);
    let plaintext = SecretBytes::take(plain.encode());
    let (kem, ct) = plaintext
        .expose(|plaintext| {
            hpke::single_shot_seal_with_rng::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
                &OpModeS::Base,
                &recipient,
                &info,
                plaintext,
                &aad,
                &mut Ephemeral { seed: rng, block: 0 },
            )
        })
        .map_err(|_| AnswerError::RecipientKey)?;
    Ok(Out { index: plain.index, epoch: plain.epoch, kem: kem.to_bytes().into(), ct })
}

/// Opens an answer to the request that `context` names.
///
/// # Errors
/// [`AnswerError`] names the holder.
pub fn open_partial(out: &Out, context: &AnswerContext<'_>, key: &RecipientKey) -> Result<PartialPlain, AnswerError> {
    let fail = || AnswerError::DoesNotOpen(out.index);
    let kem = <X25519HkdfSha256 as Kem>::EncappedKey::from_bytes(&out.kem).map_err(|_| fail())?;
    let info = hpke_info(context.cluster_id, context.generation, context.req_hash);
    let aad = hpke_aad(out.index, out.epoch);
    let plaintext =
        hpke::single_shot_open::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(&OpModeR::Base, &key.private, &kem, &info, &out.ct, &aad)
            .map_err(|_| fail())?;
    let plaintext = SecretBytes::take(plaintext);
    let plain = plaintext.expose(PartialPlain::decode).map_err(|source| AnswerError::NotAPartial { index: out.index, source })?;
    if plain.index != out.index || plain.epoch != out.epoch {
        return Err(AnswerError::Header(out.index));
    }
    Ok(plain)
}

/// The caller's 32 bytes as the generator that the HPKE library asks for: `SHA-512("DKMS-V1-EPHEMERAL" ‖ seed ‖ block)`.
struct Ephemeral {
    seed: Secret<32>,
    block: u64,
}

impl TryRng for Ephemeral {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        let mut bytes = [0; 4];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let mut bytes = [0; 8];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, out: &mut [u8]) -> Result<(), Infallible> {
        for chunk in out.chunks_mut(64) {
            let block = Secret::<64>::from_fn(|block| {
                let mut hash = Sha512::new();
                hash.update(b"DKMS-V1-EPHEMERAL");
                self.seed.expose(|seed| hash.update(seed));
                hash.update(self.block.to_be_bytes());
                hash.finalize_into(block.into());
            });
            self.block = self.block.wrapping_add(1);
            block.expose(|block| chunk.iter_mut().zip(block).for_each(|(to, from)| *to = *from));
        }
        Ok(())
    }
}

impl TryCryptoRng for Ephemeral {}

#[cfg(test)]
mod tests {
    use dstack_protocol::Epoch;

    use super::*;

    fn plain() -> PartialPlain {
        PartialPlain {
            index: NodeIndex(2),
            generation: Generation(0),
            epoch: Epoch(7),
            pos: 10,
            size: 11,
            log_root: [1; 32],
            vk: [2; 32],
            elements: vec![[3; 32], [4; 32]].into(),
            c: [5; 32],
            s: [6; 32],
        }
    }

    fn seed(byte: u8) -> Secret<32> {
        Secret::from_fn(|b| b.fill(byte))
    }

    const CLUSTER: ClusterId = ClusterId([8; 32]);
    const CONTEXT: AnswerContext<'static> = AnswerContext { cluster_id: &CLUSTER, generation: Generation(0), req_hash: &[9; 32] };

    #[test]
    fn rfc_9180_a_2_1_opens_under_this_suite() {
        let bytes = |text| hex::decode(text).unwrap();
        let private = bytes("8057991eef8f1f1af18f4a9491d16a1ce333f695d4db8e38da75975c4478e0fb");
        let kem = bytes("1afa08d3dec047a643885163f1180476fa7ddb54c6a8029ea33f95796bf2ac4a");
        let opened = hpke::single_shot_open::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
            &OpModeR::Base,
            &<X25519HkdfSha256 as Kem>::PrivateKey::from_bytes(&private).unwrap(),
            &<X25519HkdfSha256 as Kem>::EncappedKey::from_bytes(&kem).unwrap(),
            &bytes("4f6465206f6e2061204772656369616e2055726e"),
            &bytes("1c5250d8034ec2b784ba2cfd69dbdb8af406cfe3ff938e131f0def8c8b60b4db21993c62ce81883d2dd1b51a28"),
            &bytes("436f756e742d30"),
        );
        assert_eq!(opened.unwrap(), b"Beauty is truth, truth beauty");
    }

    #[test]
    fn opens_what_was_sealed() {
        let key = RecipientKey::new(seed(1));
        let out = seal_partial(plain(), &CONTEXT, &key.public(), seed(2)).unwrap();
        assert!(open_partial(&out, &CONTEXT, &key).unwrap() == plain());
        let again = seal_partial(plain(), &CONTEXT, &key.public(), seed(3)).unwrap();
        assert_ne!(out.kem, again.kem);
        assert_ne!(out.ct, again.ct);
    }

    #[test]
    fn any_other_context_key_or_header_does_not_open() {
        let key = RecipientKey::new(seed(1));
        let out = seal_partial(plain(), &CONTEXT, &key.public(), seed(2)).unwrap();
        let failed = |out: &Out, context: &AnswerContext<'_>, key: &RecipientKey| {
            open_partial(out, context, key).err() == Some(AnswerError::DoesNotOpen(out.index))
        };
        assert!(failed(&out, &AnswerContext { cluster_id: &ClusterId([0; 32]), ..CONTEXT }, &key));
        assert!(failed(&out, &AnswerContext { generation: Generation(1), ..CONTEXT }, &key));
        assert!(failed(&out, &AnswerContext { req_hash: &[0; 32], ..CONTEXT }, &key));
        assert!(failed(&out, &CONTEXT, &RecipientKey::new(seed(9))));
        assert!(failed(&Out { index: NodeIndex(3), ..out.clone() }, &CONTEXT, &key));
        assert!(failed(&Out { epoch: Epoch(8), ..out.clone() }, &CONTEXT, &key));
        assert!(failed(&Out { kem: [0; 32], ..out.clone() }, &CONTEXT, &key));
        assert!(failed(&Out { ct: vec![], ..out.clone() }, &CONTEXT, &key));
        for at in 0..out.ct.len() {
            let mut bad = out.clone();
            bad.ct[at] ^= 1;
            assert!(failed(&bad, &CONTEXT, &key), "byte {at}");
        }
    }

    #[test]
    fn a_low_order_key_is_refused() {
        let error = seal_partial(plain(), &CONTEXT, &[0; 32], seed(2)).unwrap_err();
        assert_eq!(error, AnswerError::RecipientKey);
        let mut order_four = [0; 32];
        order_four[0] = 1;
        let error = seal_partial(plain(), &CONTEXT, &order_four, seed(2)).unwrap_err();
        assert_eq!(error, AnswerError::RecipientKey);
    }

    #[test]
    fn a_holder_that_contradicts_its_header_is_named() {
        // Sealed under the header of holder 3, the plaintext says 2.
        let key = RecipientKey::new(seed(1));
        let recipient = <X25519HkdfSha256 as Kem>::PublicKey::from_bytes(&key.public()).unwrap();
        let seal = |plaintext: &[u8]| {
            let (kem, ct) = hpke::single_shot_seal_with_rng::<ChaCha20Poly1305, HkdfSha256, X25519HkdfSha256>(
                &OpModeS::Base,
                &recipient,
                &hpke_info(&CLUSTER, Generation(0), &[9; 32]),
                plaintext,
                &hpke_aad(NodeIndex(3), Epoch(7)),
                &mut Ephemeral { seed: seed(4), block: 0 },
            )
            .unwrap();
            Out { index: NodeIndex(3), epoch: Epoch(7), kem: kem.to_bytes().into(), ct }
        };
        let error = open_partial(&seal(&plain().encode()), &CONTEXT, &key).err();
        assert_eq!(error, Some(AnswerError::Header(NodeIndex(3))));
        let error = open_partial(&seal(b"nonsense"), &CONTEXT, &key).err();
        assert!(matches!(error, Some(AnswerError::NotAPartial { index: NodeIndex(3), .. })));
    }
}
