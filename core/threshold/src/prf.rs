//! Partial evaluation of the threshold PRF at one holder.
//!
//! Owns: the map from authorised wishes to group elements, the holder's share, the partial with its proof.
//! Never: evaluates an element that came from outside; a [`Batch`] can be made of wishes only, so the share is no oracle for
//! points of an attacker's choice. Source: threshold.md §1.1, §1.2.

use std::collections::HashMap;
use std::fmt;

use curve25519_dalek::ristretto::RistrettoPoint;
use dstack_protocol::limits::WISHES_MAX;
use dstack_protocol::release::{PartialPlain, RelReq, Wish};
use dstack_protocol::{AppId, ClusterId, Epoch, Generation, NodeIndex};
use dstack_secret::{LockWarning, Locked, Secret};
use zeroize::{Zeroize as _, Zeroizing};

use crate::dleq::{self, Proof, Statement};
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
    encoded: Vec<[u8; 32]>,
}

/// Group elements of inputs hashed lately: two of three keys that guests of an app ask for have the same input in every instance. Public.
#[derive(Debug, Default)]
pub struct HashedInputs {
    young: HashMap<Vec<u8>, (RistrettoPoint, [u8; 32])>,
    old: HashMap<Vec<u8>, (RistrettoPoint, [u8; 32])>,
}

impl HashedInputs {
    fn point(&mut self, input: &[u8]) -> (RistrettoPoint, [u8; 32]) {
        if let Some(known) = self.young.get(input) {
            return *known;
        }
        let hashed = self.old.remove(input).unwrap_or_else(|| hashed(input));
        if self.young.len() >= HASHED_INPUTS_MAX / 2 {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(input.to_vec(), hashed);
        hashed
    }
}

/// Inputs kept by [`HashedInputs`] at most, up to 1.3 kB each.
pub const HASHED_INPUTS_MAX: usize = 4096;

fn hashed(input: &[u8]) -> (RistrettoPoint, [u8; 32]) {
    let point = hash_to_group(input);
    let encoded = Ristretto255::encode(&point);
    (point, encoded)
}

impl Batch {
    /// Hashes authorised wishes of one app to the group (`P_j = H2G(x_j)`).
    ///
    /// # Errors
    /// [`PrfError::BatchSize`] unless there are 1 to 16 wishes.
    pub fn new(cluster_id: &ClusterId, app_id: &AppId, wishes: &[Wish]) -> Result<Self, PrfError> {
        Self::hashed_by(hashed, cluster_id, app_id, wishes)
    }

    /// As [`Batch::new`], with what was hashed lately.
    ///
    /// # Errors
    /// As [`Batch::new`].
    pub fn remembered(inputs: &mut HashedInputs, cluster_id: &ClusterId, app_id: &AppId, wishes: &[Wish]) -> Result<Self, PrfError> {
        Self::hashed_by(|input| inputs.point(input), cluster_id, app_id, wishes)
    }

    fn hashed_by(
        hashed: impl FnMut(&[u8]) -> (RistrettoPoint, [u8; 32]),
        cluster_id: &ClusterId,
        app_id: &AppId,
        wishes: &[Wish],
    ) -> Result<Self, PrfError> {
        if wishes.is_empty() || wishes.len() > WISHES_MAX {
            return Err(PrfError::BatchSize(wishes.len()));
        }
        let inputs: Vec<Vec<u8>> = wishes.iter().map(|wish| wish.prf_input(cluster_id, app_id)).collect();
        let (points, encoded) = inputs.iter().map(Vec::as_slice).map(hashed).unzip();
        Ok(Self { inputs, points, encoded })
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

    /// Their encodings.
    pub(crate) fn encoded(&self) -> &[[u8; 32]] {
        &self.encoded
    }
}

/// A holder's share of root `prf`, in locked memory.
pub struct PrfShare {
    index: NodeIndex,
    generation: Generation,
    epoch: Epoch,
    vk: RistrettoPoint,
    vk_encoded: [u8; 32],
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
        Ok(Self { index, generation, epoch, vk, vk_encoded: Ristretto255::encode(&vk), scalar: Locked::new(share) })
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
        self.vk_encoded
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

/// What one holder contributes to a batch without a proof: `Y_ij = s_i · P_j`. For a combiner in the same process that knows what must
/// come out.
pub struct Evaluation {
    index: NodeIndex,
    elements: Vec<RistrettoPoint>,
}

impl Drop for Evaluation {
    fn drop(&mut self) {
        self.elements.zeroize();
    }
}

impl Evaluation {
    pub(crate) fn into_elements(mut self) -> (NodeIndex, Vec<RistrettoPoint>) {
        (self.index, std::mem::take(&mut self.elements))
    }
}

/// Evaluates a batch under one share, without a proof. Constant time in the share.
#[must_use]
pub fn evaluate_unproven(share: &PrfShare, batch: &Batch) -> Evaluation {
    let scalar = SecretScalar::<Ristretto255>::from_locked(&share.scalar).expect("checked when the share was made");
    Evaluation { index: share.index, elements: elements(&scalar, batch) }
}

fn elements(scalar: &SecretScalar<Ristretto255>, batch: &Batch) -> Vec<RistrettoPoint> {
    scalar.expose(|s| batch.points.iter().map(|point| Ristretto255::mul(point, s)).collect())
}

/// What one holder contributes to a batch: `Y_ij = s_i · P_j` and one proof for all.
pub struct PartialEvaluation {
    index: NodeIndex,
    generation: Generation,
    epoch: Epoch,
    vk: [u8; 32],
    elements: Zeroizing<Vec<[u8; 32]>>,
    proof: Proof,
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
            vk: self.vk,
            elements: self.elements,
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
    let mut elements = elements(&scalar, batch);
    let encoded = Zeroizing::new(dleq::encoded(&elements));
    let (vk, vk_encoded) = (&share.vk, &share.vk_encoded);
    let statement = Statement { b: vk, c: &batch.points, d: &elements, b_bytes: vk_encoded, c_bytes: &batch.encoded, d_bytes: &encoded };
    let proof = dleq::prove_statement(&scalar, statement, rng);
    elements.zeroize();
    PartialEvaluation { index: share.index, generation: share.generation, epoch: share.epoch, vk: *vk_encoded, elements: encoded, proof }
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
    fn remembered_inputs_give_the_same_batch() {
        let mut inputs = HashedInputs::default();
        let wish = |number: usize| Wish::new(KeyClass::Custom, format!("path/{number}").into_bytes()).unwrap();
        for number in 0..HASHED_INPUTS_MAX + 2 {
            let wishes = [wish(0), wish(number + 1)];
            let remembered = Batch::remembered(&mut inputs, &ClusterId([1; 32]), &AppId([2; 20]), &wishes).unwrap();
            if number % 64 == 0 {
                assert_eq!(remembered, Batch::new(&ClusterId([1; 32]), &AppId([2; 20]), &wishes).unwrap());
            }
            assert!(inputs.young.len() + inputs.old.len() <= HASHED_INPUTS_MAX);
        }
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
