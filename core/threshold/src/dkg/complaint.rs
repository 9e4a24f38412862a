//! A recipient's complaint opens one sub-share; everyone judges it alike.
//!
//! Never: opens `dk_j`, which would publish the sub-shares of honest dealers. Source: threshold.md §3 steps 3 and 4.

use dstack_protocol::NodeIndex;
use dstack_protocol::ceremony::ComplainBody;
use dstack_secret::Secret;

use crate::dkg::deal::CheckedDeal;
use crate::dkg::encryption::{EncryptionKey, Envelope, SharedPoint, SubshareFault};
use crate::dkg::instance::Instance;
use crate::dleq::{self, Proof};
use crate::group::{Group, Ristretto255};

/// Who is guilty after a complaint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The opened sub-share is wrong.
    Dealer {
        /// The guilty dealer.
        dealer: NodeIndex,
        /// What is wrong with the sub-share.
        fault: SubshareFault,
    },
    /// The proof is false, or the sub-share is right.
    Complainer {
        /// The guilty complainer.
        complainer: NodeIndex,
        /// Whether the proof verified: if so, the sub-share is right.
        proof_verified: bool,
    },
}

/// Opens the sub-share of `dealer` for everyone, with proof. `rng`: 64 fresh bytes.
pub(super) fn complain(
    dealer: NodeIndex,
    key: &EncryptionKey,
    ephemeral: &curve25519_dalek::ristretto::RistrettoPoint,
    rng: &Secret<64>,
) -> ComplainBody {
    let shared = key.shared(ephemeral);
    let proof = rng.expose(|rng| dleq::prove(&key.secret, key.element(), &[*ephemeral], &[shared.0], rng));
    ComplainBody { dealer, shared: Ristretto255::encode(&shared.0), c: proof.c(), s: proof.s() }
}

/// Judges the complaint of `complainer` against a dealer whose Deal is in the log.
///
/// `deal`: the Deal of `complaint.dealer`. Answers `None` if `complainer` is no member of the run.
#[must_use]
pub fn judge<G: Group>(instance: &Instance<G>, complainer: NodeIndex, complaint: &ComplainBody, deal: &CheckedDeal<G>) -> Option<Verdict> {
    let key = instance.key(complainer)?;
    let share = deal.shares.get(&complainer)?;
    let guilty = |proof_verified| Some(Verdict::Complainer { complainer, proof_verified });
    // A false proof convicts its author.
    let (Some(shared), Some(proof)) = (Ristretto255::decode(&complaint.shared), Proof::decode(&complaint.c, &complaint.s)) else {
        return guilty(false);
    };
    if !dleq::verify(key, &[share.ephemeral], &[shared], &proof) {
        return guilty(false);
    }
    let inst = instance.inst();
    let envelope = Envelope { inst: &inst, dealer: complaint.dealer, recipient: complainer, ephemeral: &share.ephemeral, key };
    match envelope.open(&SharedPoint(shared), &share.ct, &deal.commitment) {
        Ok(_) => guilty(true),
        Err(fault) => Some(Verdict::Dealer { dealer: complaint.dealer, fault }),
    }
}
