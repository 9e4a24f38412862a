//! Outputs that proofs led to once, told again without proofs.
//!
//! Owns: a check value for each such output, bounded; combination of partials that nobody proved, taken only if it gives what was proven
//! before. Never: keeps an output or anything it could be computed from (a check value is a hash of 64 secret bytes); calls an output
//! known that [`Combiner`](crate::combine::Combiner) did not give.
//! Source: threshold.md §1.3; ADR 0027. `PK_prf` and an input have one output, so equality with it says all that the proofs say.

use std::collections::HashMap;

use curve25519_dalek::ristretto::RistrettoPoint;
use dstack_protocol::codec::sha256;
use dstack_protocol::release::{PartialPlain, RelReq};
use dstack_protocol::{Generation, NodeIndex};
use zeroize::Zeroize as _;

use crate::combine::{PrfOutput, finalize};
use crate::group::{Group as _, Ristretto255};
use crate::prf::Evaluation;
use crate::shamir::lagrange_at_zero;

/// Outputs remembered at most, 64 bytes each.
pub const OUTPUTS_MAX: usize = 65_536;

type Name = [u8; 32];
type Check = [u8; 32];

/// See the module text. What was asked for in neither of the last two generations of the table is forgotten.
#[derive(Debug, Default)]
pub struct KnownOutputs {
    young: HashMap<Name, Check>,
    old: HashMap<Name, Check>,
}

/// The outputs that a request leads to, by their check values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    inputs: Vec<Vec<u8>>,
    checks: Vec<Check>,
}

/// One holder's elements without a proof.
pub struct Unproven {
    index: NodeIndex,
    elements: Vec<RistrettoPoint>,
}

impl Drop for Unproven {
    fn drop(&mut self) {
        self.elements.zeroize();
    }
}

impl KnownOutputs {
    /// What `request` leads to; `None` unless every one of its outputs is known.
    pub fn expected(&mut self, request: &RelReq) -> Option<Expected> {
        let inputs = inputs(request);
        let checks = inputs.iter().map(|input| self.find(&name(request.generation, input))).collect::<Option<_>>()?;
        Some(Expected { inputs, checks })
    }

    /// Remembers what proofs led to. `outputs`: those of the request's wishes, in their order.
    pub fn learn(&mut self, request: &RelReq, outputs: &[PrfOutput]) {
        for (input, output) in inputs(request).iter().zip(outputs) {
            self.keep(name(request.generation, input), check(output));
        }
    }

    fn find(&mut self, name: &Name) -> Option<Check> {
        if let Some(check) = self.young.get(name) {
            return Some(*check);
        }
        let check = self.old.remove(name)?;
        self.keep(*name, check);
        Some(check)
    }

    fn keep(&mut self, name: Name, check: Check) {
        if self.young.len() >= OUTPUTS_MAX / 2 {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(name, check);
    }
}

impl Expected {
    /// Combines the partials of exactly `t` holders; `None` where they do not lead to what is known, whoever's fault that is.
    #[must_use]
    pub fn combine(&self, partials: &[Unproven]) -> Option<Vec<PrfOutput>> {
        let indices: Vec<NodeIndex> = partials.iter().map(|partial| partial.index).collect();
        let weights = lagrange_at_zero::<Ristretto255>(&indices).ok()?;
        let outputs = self.inputs.iter().zip(&self.checks).enumerate().map(|(place, (input, known))| {
            let mut elements = partials.iter().map(|one| one.elements.get(place).copied()).collect::<Option<Vec<RistrettoPoint>>>()?;
            let mut y = Ristretto255::sum_of_products_public(&weights, &elements);
            elements.zeroize();
            let output = finalize(input, &y);
            y.zeroize();
            output.filter(|output| check(output) == *known)
        });
        outputs.collect()
    }
}

impl Unproven {
    /// The elements of an opened answer; `None` where one is not canonical.
    #[must_use]
    pub fn of(plain: &PartialPlain) -> Option<Self> {
        // Room for all from the start: growing would leave copies of the elements in freed memory.
        let mut this = Self { index: plain.index, elements: Vec::with_capacity(plain.elements.len()) };
        for bytes in plain.elements.iter() {
            this.elements.push(Ristretto255::decode(bytes)?);
        }
        Some(this)
    }

    /// This process's own.
    #[must_use]
    pub fn own(evaluation: Evaluation) -> Self {
        let (index, elements) = evaluation.into_elements();
        Self { index, elements }
    }
}

fn inputs(request: &RelReq) -> Vec<Vec<u8>> {
    request.wishes.iter().map(|wish| wish.prf_input(&request.cluster_id, &request.app_id)).collect()
}

fn name(generation: Generation, input: &[u8]) -> Name {
    sha256(&[b"DKMS-V1-KNOWN-INPUT", &generation.0.to_be_bytes(), input])
}

fn check(output: &PrfOutput) -> Check {
    output.expose(|z| sha256(&[b"DKMS-V1-KNOWN-OUTPUT", z]))
}

#[cfg(test)]
mod tests {
    use dstack_protocol::release::{KeyClass, Mode, Wish};
    use dstack_protocol::{AppId, ClusterId, Epoch};

    use super::*;
    use crate::combine::Combiner;
    use crate::group::SecretScalar;
    use crate::prf::{Batch, PrfShare, evaluate, evaluate_unproven};
    use crate::testing::scalar;

    fn request(path: &str) -> RelReq {
        RelReq {
            cluster_id: ClusterId([1; 32]),
            generation: Generation(0),
            beacon_pos: 0,
            beacon: [0; 32],
            mode: Mode::Legacy,
            evidence_hash: [0; 32],
            epk: [0; 32],
            nonce: [0; 32],
            app_id: AppId([2; 20]),
            wishes: vec![Wish::new(KeyClass::Env, Vec::new()).unwrap(), Wish::new(KeyClass::Custom, path.as_bytes().to_vec()).unwrap()],
        }
    }

    /// Share `index` of the line `secret + slope · x`.
    fn share(index: u16, slope: u64) -> PrfShare {
        let value = |name: &[u8], number: u64| scalar::<Ristretto255>(name, number).expose(|scalar| *scalar);
        let at = value(b"secret", 1) + value(b"slope", slope) * Ristretto255::scalar_from_u64(u64::from(index));
        let share = SecretScalar::<Ristretto255>::new(at);
        let vk = Ristretto255::encode(&share.public());
        PrfShare::new(NodeIndex(index), Generation(0), Epoch(1), share.to_secret(), &vk).unwrap()
    }

    fn proven(request: &RelReq) -> Vec<PrfOutput> {
        let public = Ristretto255::encode(&scalar::<Ristretto255>(b"secret", 1).public());
        let batch = Batch::of_request(request).unwrap();
        let mut combiner = Combiner::new(batch.clone(), Generation(0), &public).unwrap();
        let mut group = None;
        for index in [1, 3] {
            group = Some(combiner.add(&evaluate(&share(index, 1), &batch, &[7; 64]).into_plain(1, 2, [0; 32])).unwrap());
        }
        combiner.combine(&group.unwrap(), 2, None).unwrap().outputs
    }

    fn partials(request: &RelReq, holders: &[(u16, u64)]) -> Vec<Unproven> {
        let batch = Batch::of_request(request).unwrap();
        holders.iter().map(|(index, slope)| Unproven::own(evaluate_unproven(&share(*index, *slope), &batch))).collect()
    }

    #[test]
    fn known_outputs_are_told_again_by_any_holders_and_no_others() {
        let mut known = KnownOutputs::default();
        let request = request("a");
        assert_eq!(known.expected(&request), None);
        let outputs = proven(&request);
        known.learn(&request, &outputs);
        let expected = known.expected(&request).unwrap();
        let plain = |outputs: &[PrfOutput]| outputs.iter().map(|output| output.expose(|z| z.to_vec())).collect::<Vec<_>>();
        for holders in [[(1, 1), (3, 1)], [(1, 1), (2, 1)], [(2, 1), (3, 1)]] {
            assert_eq!(plain(&expected.combine(&partials(&request, &holders)).unwrap()), plain(&outputs), "{holders:?}");
        }
        // Of another polynomial, too few, twice the same, of other inputs.
        for holders in [vec![(1, 1), (3, 2)], vec![(1, 1)], vec![(1, 1), (1, 1)], vec![]] {
            assert!(expected.combine(&partials(&request, &holders)).is_none(), "{holders:?}");
        }
        let other = super::tests::request("b");
        assert!(expected.combine(&partials(&other, &[(1, 1), (3, 1)])).is_none());
        assert_eq!(known.expected(&other), None, "one of its two outputs is new");
        assert_eq!(known.expected(&RelReq { generation: Generation(1), ..request }), None, "of another generation");
    }

    #[test]
    fn an_opened_answer_gives_the_same_elements() {
        let (mut known, request) = (KnownOutputs::default(), request("a"));
        known.learn(&request, &proven(&request));
        let batch = Batch::of_request(&request).unwrap();
        let opened = |index| Unproven::of(&evaluate(&share(index, 1), &batch, &[7; 64]).into_plain(1, 2, [0; 32])).unwrap();
        assert!(known.expected(&request).unwrap().combine(&[opened(2), opened(3)]).is_some());
        let mut spoilt = evaluate(&share(1, 1), &batch, &[7; 64]).into_plain(1, 2, [0; 32]);
        spoilt.elements[1] = [0xff; 32];
        assert!(Unproven::of(&spoilt).is_none());
    }

    #[test]
    fn the_table_is_bounded_and_what_is_used_stays() {
        let mut known = KnownOutputs::default();
        let name = |number: usize| sha256(&[&number.to_be_bytes()]);
        for number in 0..3 * OUTPUTS_MAX {
            known.keep(name(number), [1; 32]);
            if number % 1000 == 0 {
                assert!(known.find(&name(0)).is_some(), "{number}");
            }
            assert!(known.young.len() + known.old.len() <= OUTPUTS_MAX);
        }
        assert_eq!(known.find(&name(1)), None);
    }
}
