//! Partial evaluation of the threshold PRF at one holder.
//!
//! Owns: the map from authorised wishes to group elements, the holder's share, the partial with its proof.
//! Never: evaluates an element that came from outside; a [`Batch`] can be made of wishes only, so the share is no oracle for
//! points of an attacker's choice. Source: threshold.md §1.1, §1.2.

use std::fmt;

use curve25519_dalek::ristretto::RistrettoPoint;
use dstack_protocol::limits::WISHES_MAX;
use dstack_protocol::release::{PartialPlain, RelReq, Wish};
use dstack_protocol::{AppId, ClusterId, Epoch, Generation, NodeIndex};
use dstack_secret::{LockWarning, Locked, Secret};
use zeroize::{Zeroize as _, Zeroizing};

use crate::dleq::{self, Proof};
use crate::group::{Group as _, Ristretto255, SecretScalar, hash_to_group};
use crate::share::ShareId;

/// Why a batch or a share cannot be made.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PrfError {
    /// A batch has 1 to 16 inputs. Caller's fault.
    #[error("a batch has 1 to {WISHES_MAX} inputs, not {0}")]
    BatchSize(usize),
    /// The bytes are no share: not canonical, zero, or not the expected verification key. The file or the ceremony that gave them is
    /// at fault.
    #[error("not the share of holder {0}")]
    NotAShare(NodeIndex),
}

/// The inputs of one evaluation, in the order of the request, with their group elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    inputs: Vec<Vec<u8>>,
    points: Vec<RistrettoPoint>,
}

impl Batch {
    /// Hashes authorised wishes of one app to the group (`P_j = H2G(x_j)`).
    ///
    /// # Errors
    /// [`PrfError::BatchSize`] unless there are 1 to 16 wishes.
    pub fn new(cluster_id: &ClusterId, app_id: &AppId, wishes: &[Wish]) -> Result<Self, PrfError> {
        if wishes.is_empty() || wishes.len() > WISHES_MAX {
            return Err(PrfError::BatchSize(wishes.len()));
        }
        let inputs: Vec<Vec<u8>> = wishes.iter().map(|wish| wish.prf_input(cluster_id, app_id)).collect();
        let points = inputs.iter().map(|x| hash_to_group(x)).collect();
        Ok(Self { inputs, points })
    }

    /// The batch of a release request.
    ///
    /// # Errors
    /// As [`Batch::new`].
    pub fn of_request(request: &RelReq) -> Result<Self, PrfError> {
        Self::new(&request.cluster_id, &request.app_id, &request.wishes)
    }

    /// Number of inputs.
    #[must_use]
    pub fn len(&self) -> usize {
        self.points.len()
    }

    /// Never true: a batch has at least one input.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.points.is_empty()
    }

    /// The inputs `x_j`.
    pub(crate) fn inputs(&self) -> &[Vec<u8>] {
        &self.inputs
    }

    /// The elements `P_j`.
    pub(crate) fn points(&self) -> &[RistrettoPoint] {
        &self.points
    }
}

/// A holder's share of root `prf`, in locked memory.
pub struct PrfShare {
    index: NodeIndex,
    generation: Generation,
    epoch: Epoch,
    vk: RistrettoPoint,
    scalar: Locked<32>,
}

impl PrfShare {
    /// Takes over a share. `expected_vk`: the holder's verification key as the log states it.
    ///
    /// # Errors
    /// [`PrfError::NotAShare`] when the bytes are not the scalar behind that key, or the index is 0.
    pub fn new(index: NodeIndex, generation: Generation, epoch: Epoch, share: Secret<32>, expected_vk: &[u8]) -> Result<Self, PrfError> {
        let scalar = SecretScalar::<Ristretto255>::from_secret(&share).ok_or(PrfError::NotAShare(index))?;
        let vk = scalar.public();
        // `decode` refuses the identity, so a zero share fails here too.
        if index.0 == 0 || Ristretto255::decode(expected_vk) != Some(vk) {
            return Err(PrfError::NotAShare(index));
        }
        Ok(Self { index, generation, epoch, vk, scalar: Locked::new(share) })
    }

    /// Which share it is.
    #[must_use]
    pub fn share_id(&self) -> ShareId {
        ShareId { index: self.index, generation: self.generation, epoch: self.epoch }
    }

    /// Evaluation point of the share.
    #[must_use]
    pub fn index(&self) -> NodeIndex {
        self.index
    }

    /// Generation of the root.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Epoch of the share.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// `VK_i = s_i · G`.
    #[must_use]
    pub fn vk(&self) -> [u8; 32] {
        Ristretto255::encode(&self.vk)
    }

    /// The share's bytes, for sealing (threshold.md §6).
    #[must_use]
    pub fn scalar(&self) -> &Locked<32> {
        &self.scalar
    }

    /// Memory protections that the system refused.
    #[must_use]
    pub fn lock_warnings(&self) -> &[LockWarning] {
        self.scalar.warnings()
    }
}

impl fmt::Debug for PrfShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrfShare")
            .field("index", &self.index)
            .field("generation", &self.generation)
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

/// What one holder contributes to a batch: `Y_ij = s_i · P_j` and one proof for all.
pub struct PartialEvaluation {
    index: NodeIndex,
    generation: Generation,
    epoch: Epoch,
    vk: RistrettoPoint,
    elements: Vec<RistrettoPoint>,
    proof: Proof,
}

impl Drop for PartialEvaluation {
    fn drop(&mut self) {
        self.elements.zeroize();
    }
}

impl PartialEvaluation {
    /// The answer to the intent at `pos`, whose entry ended at `size` with `log_root` (threshold.md §2.3).
    #[must_use]
    pub fn into_plain(self, pos: u64, size: u64, log_root: [u8; 32]) -> PartialPlain {
        PartialPlain {
            index: self.index,
            generation: self.generation,
            epoch: self.epoch,
            pos,
            size,
            log_root,
            vk: Ristretto255::encode(&self.vk),
            elements: Zeroizing::new(self.elements.iter().map(Ristretto255::encode).collect()),
            c: self.proof.c(),
            s: self.proof.s(),
        }
    }
}

/// Evaluates a batch under one share, with a batch proof. `rng`: 64 fresh bytes from the operating system, used once.
///
/// Constant time in the share. Asking again for the same batch gives the same elements and a fresh proof.
#[must_use]
pub fn evaluate(share: &PrfShare, batch: &Batch, rng: &[u8; 64]) -> PartialEvaluation {
    let scalar = SecretScalar::<Ristretto255>::from_locked(&share.scalar).expect("checked when the share was made");
    let elements: Vec<RistrettoPoint> = scalar.expose(|s| batch.points.iter().map(|point| Ristretto255::mul(point, s)).collect());
    let proof = dleq::prove(&scalar, &share.vk, &batch.points, &elements, rng);
    PartialEvaluation { index: share.index, generation: share.generation, epoch: share.epoch, vk: share.vk, elements, proof }
}

#[cfg(test)]
mod tests {
    use dstack_protocol::release::KeyClass;

    use super::*;
    use crate::testing::scalar;

    #[test]
    fn batches_are_bounded() {
        let wish = |n: usize| Wish::new(KeyClass::Custom, format!("path/{n}").into_bytes()).unwrap();
        let make = |n: usize| Batch::new(&ClusterId([1; 32]), &AppId([2; 20]), &(0..n).map(wish).collect::<Vec<_>>());
        assert_eq!(make(0), Err(PrfError::BatchSize(0)));
        assert_eq!(make(17), Err(PrfError::BatchSize(17)));
        assert_eq!(make(16).unwrap().len(), 16);
    }

    #[test]
    fn a_share_must_match_its_verification_key() {
        let new =
            |index: u16, bytes: Secret<32>, vk: &[u8]| PrfShare::new(NodeIndex(index), Generation(0), Epoch(1), bytes, vk).map(|s| s.vk());
        let share = || scalar::<Ristretto255>(b"share", 1);
        let vk = Ristretto255::encode(&share().public());
        let other = Ristretto255::encode(&scalar::<Ristretto255>(b"share", 2).public());
        let refused = Err(PrfError::NotAShare(NodeIndex(3)));
        assert_eq!(new(3, share().to_secret(), &vk), Ok(vk));
        assert_eq!(new(3, share().to_secret(), &other), refused);
        assert_eq!(new(3, share().to_secret(), &vk[1..]), refused);
        assert_eq!(new(3, Secret::from_fn(|b| b.fill(0xff)), &vk), refused);
        assert_eq!(new(3, Secret::from_fn(|_| {}), &[0; 32]), refused, "a zero share");
        assert_eq!(new(0, share().to_secret(), &vk), Err(PrfError::NotAShare(NodeIndex(0))));
    }

    #[test]
    fn debug_of_a_share_shows_its_name_only() {
        let secret = scalar::<Ristretto255>(b"share", 1);
        let vk = Ristretto255::encode(&secret.public());
        let share = PrfShare::new(NodeIndex(3), Generation(0), Epoch(1), secret.to_secret(), &vk).unwrap();
        assert_eq!(format!("{share:?}"), "PrfShare { index: NodeIndex(3), generation: Generation(0), epoch: Epoch(1), .. }");
    }
}
