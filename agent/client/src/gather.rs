//! Partials of one request, from one answer or several, to its keys. Owns: opening, dropping and naming bad ones, the rule that only
//! partials whose holders vouch for the receipt's head are combined. Never: talks to a node, keeps an opened partial.
//! Source: threshold.md §1.3, §2.7.

use std::collections::BTreeMap;

use dstack_audit::{AuditError, CommittedIntent, VouchedHead};
use dstack_protocol::NodeIndex;
use dstack_protocol::release::{Out, RelReq};
use dstack_threshold::answer::{AnswerContext, RecipientKey, open_partial};
use dstack_threshold::combine::{AnswerGroup, CombineError, Combined, Combiner};
use dstack_threshold::keys::{TypedKey, derive};
use dstack_threshold::prf::Batch;

use crate::error::{BadPartial, BadPartialFault, ClientError};
use crate::pin::Pin;

/// Sets of holders tried over all sizes before more partials are asked for.
const SETS_TRIED_MAX: usize = 1500;

/// See the module text.
pub(crate) struct Gather<'a> {
    request: &'a RelReq,
    req_hash: [u8; 32],
    recipient: RecipientKey,
    combiner: Combiner,
    bad: BTreeMap<NodeIndex, BadPartialFault>,
}

/// What an answer led to.
pub(crate) enum Gathered {
    /// The keys, in the order of the wishes, and the holders that made them.
    Keys(Vec<TypedKey>, Vec<NodeIndex>),
    /// Not yet: somebody lies. `pool`: holders with well-formed partials, of which some do not belong.
    Short { pool: Vec<NodeIndex>, source: CombineError },
    /// No holder vouches for the receipt: whoever made it is at fault.
    ReceiptContradicted(AuditError),
}

impl<'a> Gather<'a> {
    pub(crate) fn new(request: &'a RelReq, recipient: RecipientKey, pin: &Pin) -> Result<Self, ClientError> {
        let failed = |source| ClientError::Partials { bad: Vec::new(), source };
        // A request was encoded and decoded before: its wishes are 1 to 16.
        let batch = Batch::of_request(request).map_err(|_| failed(CombineError::TooFew { have: 0, need: 0, culprits: Vec::new() }))?;
        let combiner = Combiner::new(batch, pin.generation, &pin.pk_prf).map_err(failed)?;
        Ok(Self { request, req_hash: request.req_hash(), recipient, combiner, bad: BTreeMap::new() })
    }

    /// Partials dropped so far.
    pub(crate) fn bad(&self) -> Vec<BadPartial> {
        self.bad.iter().map(|(index, fault)| BadPartial { index: *index, fault: fault.clone() }).collect()
    }

    /// Takes one answer's partials; tries to make the keys of all there are.
    pub(crate) fn take(&mut self, outs: &[Out], committed: &CommittedIntent) -> Result<Gathered, ClientError> {
        for (place, out) in outs.iter().enumerate() {
            let is_first = outs.iter().take(place).all(|earlier| earlier.index != out.index);
            if is_first {
                self.open(out);
            }
        }
        let groups = self.combiner.groups();
        let vouched =
            |group: &AnswerGroup| (group.pos, group.size, group.log_root) == (committed.pos(), committed.size(), *committed.log_root());
        let mut short = None;
        // Newest epoch first; holders of an older one are no liars, they are asked again.
        for (group, pool) in groups.iter().rev().filter(|(group, _)| vouched(group)) {
            match self.combine(group, pool) {
                Ok(combined) => return self.keys(group, pool, combined, committed),
                Err(source) => short = short.or_else(|| Some(Gathered::Short { pool: pool.clone(), source })),
            }
        }
        if let Some(short) = short {
            return Ok(short);
        }
        let heads: Vec<VouchedHead> = groups.iter().flat_map(|(group, pool)| heads(group, pool)).collect();
        match committed.agrees_with(&heads) {
            Err(error @ AuditError::HolderDisagrees { .. }) => Ok(Gathered::ReceiptContradicted(error)),
            // Not one partial was well formed.
            _ => Ok(Gathered::Short { pool: Vec::new(), source: CombineError::TooFew { have: 0, need: 2, culprits: Vec::new() } }),
        }
    }

    fn open(&mut self, out: &Out) {
        let context = AnswerContext { cluster_id: &self.request.cluster_id, generation: self.request.generation, req_hash: &self.req_hash };
        let plain = match open_partial(out, &context, &self.recipient) {
            Ok(plain) => plain,
            Err(error) => {
                self.bad.insert(out.index, BadPartialFault::Sealed(error));
                return;
            }
        };
        // What was there before led to no key: anyone can seal an answer in another's name, so the newer one counts.
        self.combiner.remove(out.index);
        match self.combiner.add(&plain) {
            Ok(_) => {
                self.bad.remove(&out.index);
            }
            Err(error) => {
                self.bad.insert(out.index, BadPartialFault::Evaluation(error.fault));
            }
        }
    }

    /// The largest set that leads to the pinned key. The threshold is not known here and need not be: proofs and the pinned key decide
    /// (threshold.md §1.3), and more than `t` honest holders lead to it as well as `t`.
    fn combine(&self, group: &AnswerGroup, pool: &[NodeIndex]) -> Result<Combined, CombineError> {
        let mut worst = CombineError::TooFew { have: pool.len(), need: 2, culprits: Vec::new() };
        let mut tried = 0_usize;
        for size in (2..=pool.len()).rev() {
            match self.combiner.combine(group, u16::try_from(size).unwrap_or(u16::MAX), None) {
                Ok(combined) => return Ok(combined),
                Err(error) => {
                    if let CombineError::NoSet { failed_sets, .. } = &error {
                        tried = tried.saturating_add(failed_sets.len());
                    }
                    worst = error;
                }
            }
            if tried > SETS_TRIED_MAX {
                break;
            }
        }
        Err(worst)
    }

    fn keys(
        &mut self,
        group: &AnswerGroup,
        pool: &[NodeIndex],
        combined: Combined,
        committed: &CommittedIntent,
    ) -> Result<Gathered, ClientError> {
        // threshold.md §2.7: `(pos, size, log_root)` equal those in all responses of Q. No key is used without a receipt.
        if let Err(error) = committed.agrees_with(&heads(group, &combined.used)) {
            return Ok(Gathered::ReceiptContradicted(error));
        }
        for index in pool.iter().filter(|index| !combined.used.contains(index)) {
            self.bad.insert(*index, BadPartialFault::OffThePolynomial);
        }
        let wishes = &self.request.wishes;
        assert_eq!(combined.outputs.len(), wishes.len(), "one output a wish, by the combiner's contract");
        let keys = wishes.iter().zip(&combined.outputs).map(|(wish, output)| derive(wish, &self.request.app_id, output));
        Ok(Gathered::Keys(keys.collect::<Result<_, _>>()?, combined.used))
    }
}

fn heads(group: &AnswerGroup, holders: &[NodeIndex]) -> Vec<VouchedHead> {
    let AnswerGroup { pos, size, log_root, .. } = *group;
    holders.iter().map(|holder| VouchedHead { holder: *holder, pos, size, log_root }).collect()
}
