//! Holders of a root whose shares were dealt here, in the open: for benchmarks of the arithmetic. Owns: shares, a request, answers.
//! Never: near a production binary; a real root comes from key generation, and no process ever knows its polynomial.

use curve25519_dalek::ristretto::RistrettoPoint;
use curve25519_dalek::scalar::Scalar;
use dstack_protocol::release::{KeyClass, Mode, Out, PartialPlain, RelReq, Wish};
use dstack_protocol::{AppId, ClusterId, Epoch, Generation, NodeIndex};
use dstack_secret::Secret;
use dstack_threshold::answer::{AnswerContext, RecipientKey, open_partial, seal_partial};
use dstack_threshold::combine::{AnswerGroup, Combined, Combiner};
use dstack_threshold::prf::{Batch, PrfShare, evaluate};

/// `n` holders, any `threshold` of which serve.
pub struct Holders {
    /// The shares, indices from 1.
    pub shares: Vec<PrfShare>,
    /// The root's public key.
    pub public_key: [u8; 32],
    threshold: u16,
    recipient: RecipientKey,
}

impl Holders {
    /// Deals a root.
    #[must_use]
    pub fn deal(threshold: u16, n: u16) -> Self {
        let coefficients: Vec<Scalar> = (0..threshold).map(|at| Scalar::from(0x9e37_79b9_7f4a_7c15u64 + u64::from(at))).collect();
        let value = |at: u64| coefficients.iter().rev().fold(Scalar::ZERO, |sum, next| sum * Scalar::from(at) + next);
        let share = |index: u16| {
            let scalar = value(u64::from(index));
            let vk = RistrettoPoint::mul_base(&scalar).compress().to_bytes();
            PrfShare::new(NodeIndex(index), Generation(0), Epoch(1), Secret::take(&mut scalar.to_bytes()), &vk).unwrap()
        };
        Self {
            shares: (1..=n).map(share).collect(),
            public_key: RistrettoPoint::mul_base(&value(0)).compress().to_bytes(),
            threshold,
            recipient: RecipientKey::new(Secret::from_fn(|seed| seed.fill(8))),
        }
    }

    /// A request for `keys` keys of one app.
    #[must_use]
    pub fn request(&self, keys: usize) -> RelReq {
        let custom = (1u8..).map(|n| Wish::new(KeyClass::Custom, format!("path/{n}").into_bytes()));
        let disk = std::iter::once(Wish::new(KeyClass::Disk, vec![7; 20]));
        let named = [KeyClass::Env, KeyClass::K256].into_iter().map(|class| Wish::new(class, Vec::new()));
        RelReq {
            cluster_id: ClusterId([1; 32]),
            generation: Generation(0),
            beacon_pos: 9,
            beacon: [2; 32],
            mode: Mode::Client,
            evidence_hash: [3; 32],
            epk: self.recipient.public(),
            nonce: [4; 32],
            app_id: AppId([5; 20]),
            wishes: disk.chain(named).chain(custom).take(keys).map(Result::unwrap).collect(),
        }
    }

    /// What holder `at` (from 0) contributes.
    #[must_use]
    pub fn partial(&self, at: usize, request: &RelReq) -> PartialPlain {
        let batch = Batch::of_request(request).unwrap();
        evaluate(&self.shares[at], &batch, &[6; 64]).into_plain(40, 41, [7; 32])
    }

    /// The partials of the first `threshold` holders.
    #[must_use]
    pub fn partials(&self, request: &RelReq) -> Vec<PartialPlain> {
        (0..usize::from(self.threshold)).map(|at| self.partial(at, request)).collect()
    }

    /// Seals a partial to the request.
    #[must_use]
    pub fn seal(&self, plain: PartialPlain, request: &RelReq, req_hash: &[u8; 32]) -> Out {
        let context = AnswerContext { cluster_id: &request.cluster_id, generation: request.generation, req_hash };
        seal_partial(plain, &context, &request.epk, Secret::from_fn(|seed| seed.fill(9))).unwrap()
    }

    /// Opens an answer.
    #[must_use]
    pub fn open(&self, out: &Out, request: &RelReq, req_hash: &[u8; 32]) -> PartialPlain {
        let context = AnswerContext { cluster_id: &request.cluster_id, generation: request.generation, req_hash };
        open_partial(out, &context, &self.recipient).unwrap()
    }

    /// Verifies the partials and combines them, as the agent does.
    #[must_use]
    pub fn combine(&self, request: &RelReq, partials: &[PartialPlain]) -> Combined {
        let batch = Batch::of_request(request).unwrap();
        let mut combiner = Combiner::new(batch, Generation(0), &self.public_key).unwrap();
        let groups: Vec<AnswerGroup> = partials.iter().map(|plain| combiner.add(plain).unwrap()).collect();
        combiner.combine(&groups[0], self.threshold, None).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_measured_gives_the_same_key_from_any_holders() {
        let holders = Holders::deal(2, 3);
        let request = holders.request(4);
        assert_eq!(request.wishes.len(), 4);
        let req_hash = request.req_hash();
        let key = |set: [usize; 2]| {
            let partials =
                set.map(|at| holders.open(&holders.seal(holders.partial(at, &request), &request, &req_hash), &request, &req_hash));
            let combined = holders.combine(&request, &partials);
            combined.outputs.iter().map(|output| output.expose(|z| *z)).collect::<Vec<_>>()
        };
        assert_eq!(key([0, 1]), key([2, 1]));
        assert_eq!(holders.combine(&request, &holders.partials(&request)).used.len(), 2);
    }
}
