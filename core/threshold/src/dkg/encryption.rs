//! Sub-shares on their way: encrypted to each recipient under a fresh key, openable one at a time.
//!
//! Source: threshold.md §3 step 2. The zero nonce is safe because the ephemeral scalar, and with it the key, is fresh for each pair.

use std::fmt;

use chacha20poly1305::aead::AeadInOut as _;
use chacha20poly1305::{ChaCha20Poly1305, KeyInit as _};
use curve25519_dalek::ristretto::RistrettoPoint;
use dstack_protocol::NodeIndex;
use dstack_secret::Secret;
use hkdf::Hkdf;
use sha2::{Sha256, Sha512};
use zeroize::Zeroize as _;

use crate::group::{Group, Ristretto255, SecretScalar};
use crate::shamir::Commitment;

/// What a recipient finds wrong with a sub-share. The dealer's fault.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubshareFault {
    /// The ciphertext does not open under the shared key.
    #[error("ciphertext does not open")]
    DoesNotOpen,
    /// The plaintext is no canonical scalar.
    #[error("sub-share is not a canonical scalar")]
    NotCanonical,
    /// The scalar is not the committed polynomial's value.
    #[error("sub-share does not match the commitment")]
    NotCommitted,
}

/// `dk_j`: decrypts the sub-shares of one attempt and root. Fresh for each; wiped with the participant that holds it.
pub struct EncryptionKey {
    pub(super) secret: SecretScalar<Ristretto255>,
    public: RistrettoPoint,
}

impl EncryptionKey {
    /// A key of 64 fresh bytes from the operating system.
    #[must_use]
    pub fn new(seed: Secret<64>) -> Self {
        let mut stream = Stream::new(seed, b"ek");
        let secret = stream.scalar::<Ristretto255>();
        Self { public: secret.public(), secret }
    }

    /// `ek_j = dk_j·G`, as in the Join.
    #[must_use]
    pub fn public(&self) -> [u8; 32] {
        Ristretto255::encode(&self.public)
    }

    pub(super) fn element(&self) -> &RistrettoPoint {
        &self.public
    }

    /// `K = dk_j·E_ij`.
    pub(super) fn shared(&self, ephemeral: &RistrettoPoint) -> SharedPoint {
        SharedPoint(self.secret.expose(|dk| Ristretto255::mul(ephemeral, dk)))
    }
}

impl fmt::Debug for EncryptionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EncryptionKey(redacted)")
    }
}

/// `K`: secret until a complaint opens it; wiped on drop.
pub(super) struct SharedPoint(pub(super) RistrettoPoint);

impl Drop for SharedPoint {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Which sub-share: names of run, dealer and recipient, and both public keys.
pub(super) struct Envelope<'a> {
    pub(super) inst: &'a [u8; 32],
    pub(super) dealer: NodeIndex,
    pub(super) recipient: NodeIndex,
    pub(super) ephemeral: &'a RistrettoPoint,
    pub(super) key: &'a RistrettoPoint,
}

impl Envelope<'_> {
    /// `inst ‖ i(2) ‖ j(2)`.
    fn aad(&self) -> Vec<u8> {
        [self.inst.as_slice(), &self.dealer.0.to_be_bytes(), &self.recipient.0.to_be_bytes()].concat()
    }

    fn cipher(&self, shared: &SharedPoint) -> ChaCha20Poly1305 {
        let mut ikm = Ristretto255::encode(&shared.0);
        let hkdf = Hkdf::<Sha256>::new(Some(b"DKMS-V1-DEAL"), &ikm);
        ikm.zeroize();
        let key = Secret::<32>::from_fn(|key| {
            let info = [&self.aad(), &Ristretto255::encode(self.ephemeral)[..], &Ristretto255::encode(self.key)];
            hkdf.expand_multi_info(&info, key).expect("32 bytes are within the limit");
        });
        key.expose(|key| ChaCha20Poly1305::new(key.into()))
    }

    /// Encrypts a sub-share: 32 bytes of ciphertext and the tag.
    pub(super) fn seal<G: Group>(&self, shared: &SharedPoint, subshare: &SecretScalar<G>) -> [u8; 48] {
        let mut buffer = subshare.to_secret();
        let tag = buffer.expose_mut(|buffer| {
            self.cipher(shared)
                .encrypt_inout_detached(&[0; 12].into(), &self.aad(), buffer.as_mut_slice().into())
                .expect("32 bytes are within the limit")
        });
        let mut ct = [0; 48];
        buffer.expose(|bytes| ct.iter_mut().zip(bytes.iter().chain(&tag)).for_each(|(to, from)| *to = *from));
        ct
    }

    /// Decrypts a sub-share and checks it against the dealer's commitment: `f_i(j)·B == Σ_k j^k·C_ik`.
    pub(super) fn open<G: Group>(
        &self,
        shared: &SharedPoint,
        ct: &[u8; 48],
        commitment: &Commitment<G>,
    ) -> Result<SecretScalar<G>, SubshareFault> {
        let (ciphertext, tag) = ct.split_at(32);
        let tag: [u8; 16] = tag.try_into().map_err(|_| SubshareFault::DoesNotOpen)?;
        let opened = Secret::<32>::try_from_fn(|buffer| {
            buffer.copy_from_slice(ciphertext);
            self.cipher(shared)
                .decrypt_inout_detached(&[0; 12].into(), &self.aad(), buffer.as_mut_slice().into(), &tag.into())
                .map_err(|_| SubshareFault::DoesNotOpen)
        })?;
        let subshare = SecretScalar::<G>::from_secret(&opened).ok_or(SubshareFault::NotCanonical)?;
        if commitment.matches(self.recipient, &subshare) { Ok(subshare) } else { Err(SubshareFault::NotCommitted) }
    }
}

/// All randomness of one participant, stretched from its 64-byte seed: HKDF-SHA512 with a counter.
pub(super) struct Stream {
    seed: Secret<64>,
    salt: Vec<u8>,
    counter: u64,
}

impl Stream {
    pub(super) fn new(seed: Secret<64>, context: &[u8]) -> Self {
        Self { seed, salt: [b"DKMS-V1-SEED".as_slice(), context].concat(), counter: 0 }
    }

    /// The next 64 uniform bytes.
    pub(super) fn bytes(&mut self) -> Secret<64> {
        self.counter += 1;
        let hkdf = self.seed.expose(|seed| Hkdf::<Sha512>::new(Some(&self.salt), seed));
        Secret::from_fn(|out| {
            hkdf.expand(&self.counter.to_be_bytes(), out).expect("64 bytes are within the limit");
        })
    }

    /// The next uniform scalar other than zero.
    pub(super) fn scalar<G: Group>(&mut self) -> SecretScalar<G> {
        loop {
            let scalar = SecretScalar::<G>::from_uniform(&self.bytes());
            if scalar.expose(|s| *s != G::scalar_from_u64(0)) {
                return scalar;
            }
        }
    }
}
