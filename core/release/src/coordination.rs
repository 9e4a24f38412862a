//! How a coordinator drives one request: ask early, record, then `go`; intent before partials, always.
//!
//! Owns: whom to ask, when to hedge, when to answer or give up. Never: opens a partial (they are sealed to the client), waits.
//! Source: architecture.md §4; style.md §5.

use std::collections::{BTreeMap, BTreeSet};

use dstack_protocol::receipt::Receipt;
use dstack_protocol::release::Out;
use dstack_protocol::rpc::ReleaseAnswer;
use dstack_protocol::{NodeIndex, Refusal, RefusalCode, UnixMillis};

/// What one request needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Partials that make a key.
    pub threshold: usize,
    /// Holders, nearest first, without those the client excluded.
    pub holders: Vec<NodeIndex>,
    /// Holders asked beyond the threshold from the start.
    pub hedge: usize,
    /// When to give up.
    pub deadline: UnixMillis,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// The intent is committed and applied here.
    Recorded(Receipt),
    /// The intent was refused.
    RecordRefused(Refusal),
    /// A holder refused the early ask.
    AskRefused(NodeIndex, Refusal),
    /// A holder answered.
    PartialArrived(Out),
    /// A holder refused, or could not be reached.
    PartialRefused(NodeIndex, Refusal),
    /// Time passed.
    Tick,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Hand the request to a holder.
    Ask(NodeIndex),
    /// Commit the intent.
    Record,
    /// Tell a holder that asked before where the intent is.
    Go(NodeIndex, u64),
    /// Done.
    Answer(Box<ReleaseAnswer>),
    /// Done, without a key.
    Refuse(Refusal),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    AwaitingRecord,
    AwaitingPartials { receipt: Box<Receipt>, outs: BTreeMap<NodeIndex, Out> },
    Done,
}

/// One request on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coordination {
    plan: Plan,
    stage: Stage,
    asked: BTreeSet<NodeIndex>,
    failed: BTreeMap<NodeIndex, Refusal>,
    again: BTreeMap<NodeIndex, u8>,
}

/// How often one holder is told `go` when it answers that it may succeed later.
pub const GO_TRIES_MAX: u8 = 4;

impl Coordination {
    /// Begins: asks the threshold and the hedge, and commits the intent at the same time.
    #[must_use]
    pub fn begin(plan: Plan, out: &mut Vec<Effect>) -> Self {
        let mut this = Self { plan, stage: Stage::AwaitingRecord, asked: BTreeSet::new(), failed: BTreeMap::new(), again: BTreeMap::new() };
        if this.plan.holders.len() < this.plan.threshold {
            out.push(Effect::Refuse(this.too_few()));
            this.stage = Stage::Done;
            return this;
        }
        let wanted = this.plan.threshold.saturating_add(this.plan.hedge).min(this.plan.holders.len());
        for index in this.plan.holders.iter().take(wanted) {
            this.asked.insert(*index);
            out.push(Effect::Ask(*index));
        }
        out.push(Effect::Record);
        this
    }

    /// Whether an answer or a refusal was given.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.stage == Stage::Done
    }

    /// Advances by one input. Same state, time and input always give the same effects; nothing follows an answer.
    #[must_use]
    pub fn step(mut self, now: UnixMillis, input: Input, out: &mut Vec<Effect>) -> Self {
        if self.is_done() {
            return self;
        }
        match input {
            Input::Recorded(receipt) => self.recorded(receipt, out),
            Input::RecordRefused(refusal) => self.finish(Effect::Refuse(refusal), out),
            Input::AskRefused(from, refusal) => self.lost(from, refusal, out),
            Input::PartialRefused(from, refusal) => self.retry_or_lose(from, refusal, out),
            Input::PartialArrived(partial) => self.arrived(partial, out),
            Input::Tick => {}
        }
        if !self.is_done() && now >= self.plan.deadline {
            let refusal = self.worst().unwrap_or_else(|| {
                Refusal::new(RefusalCode::DeadlineExceeded, format!("{} partials", self.plan.threshold), format!("{}", self.count()))
                    .retry_after(200)
            });
            self.finish(Effect::Refuse(refusal), out);
        }
        self
    }

    fn recorded(&mut self, receipt: Receipt, out: &mut Vec<Effect>) {
        if self.stage != Stage::AwaitingRecord {
            return;
        }
        let pos = receipt.record.pos;
        for index in &self.asked {
            if !self.failed.contains_key(index) {
                out.push(Effect::Go(*index, pos));
            }
        }
        self.stage = Stage::AwaitingPartials { receipt: Box::new(receipt), outs: BTreeMap::new() };
        self.give_up_if_hopeless(out);
    }

    fn arrived(&mut self, partial: Out, out: &mut Vec<Effect>) {
        let threshold = self.plan.threshold;
        let Stage::AwaitingPartials { receipt, outs } = &mut self.stage else { return };
        if !self.asked.contains(&partial.index) {
            return;
        }
        outs.insert(partial.index, partial);
        if outs.len() >= threshold {
            let answer = ReleaseAnswer { receipt: (**receipt).clone(), outs: outs.values().cloned().collect() };
            self.finish(Effect::Answer(Box::new(answer)), out);
        }
    }

    fn retry_or_lose(&mut self, from: NodeIndex, refusal: Refusal, out: &mut Vec<Effect>) {
        let later = matches!(refusal.code, RefusalCode::NotYet | RefusalCode::NoCert | RefusalCode::IntentUnknown);
        let tries = self.again.entry(from).or_insert(0);
        if later
            && *tries < GO_TRIES_MAX
            && let Stage::AwaitingPartials { receipt, .. } = &self.stage
        {
            *tries += 1;
            out.push(Effect::Go(from, receipt.record.pos));
            return;
        }
        self.lost(from, refusal, out);
    }

    /// A holder is out: the next one takes its place.
    fn lost(&mut self, from: NodeIndex, refusal: Refusal, out: &mut Vec<Effect>) {
        if !self.asked.contains(&from) || self.failed.contains_key(&from) {
            return;
        }
        self.failed.insert(from, refusal);
        let next = self.plan.holders.iter().find(|index| !self.asked.contains(index)).copied();
        if let Some(next) = next {
            self.asked.insert(next);
            out.push(Effect::Ask(next));
            if let Stage::AwaitingPartials { receipt, .. } = &self.stage {
                out.push(Effect::Go(next, receipt.record.pos));
            }
        }
        self.give_up_if_hopeless(out);
    }

    fn give_up_if_hopeless(&mut self, out: &mut Vec<Effect>) {
        let hopeful = self.plan.holders.iter().filter(|index| !self.failed.contains_key(index)).count();
        if hopeful < self.plan.threshold {
            let refusal = self.worst().unwrap_or_else(|| self.too_few());
            self.finish(Effect::Refuse(refusal), out);
        }
    }

    /// The refusal that explains best: a final one before one that may pass.
    fn worst(&self) -> Option<Refusal> {
        self.failed.values().find(|refusal| !refusal.code.retryable()).or_else(|| self.failed.values().next()).cloned()
    }

    fn too_few(&self) -> Refusal {
        Refusal::new(RefusalCode::NotEnoughPartials, format!("{} holders", self.plan.threshold), self.plan.holders.len().to_string())
            .retry_after(500)
    }

    fn count(&self) -> usize {
        match &self.stage {
            Stage::AwaitingPartials { outs, .. } => outs.len(),
            Stage::AwaitingRecord | Stage::Done => 0,
        }
    }

    fn finish(&mut self, effect: Effect, out: &mut Vec<Effect>) {
        self.stage = Stage::Done;
        out.push(effect);
    }
}

#[cfg(test)]
mod tests {
    use dstack_protocol::log::{Record, RecordKind};
    use dstack_protocol::release::{Intent, KeyClass, Mode};
    use dstack_protocol::{AppId, Epoch, Generation};
    use proptest::prelude::*;

    use super::*;

    fn plan(holders: u16, threshold: usize) -> Plan {
        Plan { threshold, holders: (1..=holders).map(NodeIndex).collect(), hedge: 1, deadline: UnixMillis(100) }
    }

    fn receipt() -> Receipt {
        let intent = Intent {
            req_hash: [1; 32],
            evidence_hash: [2; 32],
            generation: Generation(0),
            mode: Mode::Client,
            coordinator: NodeIndex(0),
            beacon_pos: 0,
            app_id: AppId([3; 20]),
            wishes: vec![(KeyClass::K256, [0; 32])],
        };
        let record = Record { pos: 7, log_time: UnixMillis(1), epoch: Epoch(1), kind: RecordKind::Intent, outcome: 0, body_hash: [0; 32] };
        Receipt { generation: Generation(0), intent, record, size: 8, log_root: [0; 32], path: vec![] }
    }

    fn partial(index: u16) -> Out {
        Out { index: NodeIndex(index), epoch: Epoch(1), kem: [0; 32], ct: vec![] }
    }

    fn refusal(code: RefusalCode) -> Refusal {
        Refusal::new(code, "a", "b")
    }

    fn run(plan: Plan, inputs: Vec<Input>) -> (Coordination, Vec<Effect>) {
        let mut out = Vec::new();
        let mut c = Coordination::begin(plan, &mut out);
        for input in inputs {
            c = c.step(UnixMillis(1), input, &mut out);
        }
        (c, out)
    }

    #[test]
    fn asks_threshold_and_hedge_and_answers_with_the_first_t() {
        let (c, out) = run(
            plan(5, 3),
            vec![
                Input::Recorded(receipt()),
                Input::PartialArrived(partial(2)),
                Input::PartialArrived(partial(1)),
                Input::PartialArrived(partial(4)),
            ],
        );
        assert!(c.is_done());
        let asks = out.iter().filter(|e| matches!(e, Effect::Ask(_))).count();
        let goes = out.iter().filter(|e| matches!(e, Effect::Go(_, 7))).count();
        assert_eq!((asks, goes), (4, 4));
        assert!(matches!(out.last(), Some(Effect::Answer(answer)) if answer.outs.len() == 3));
    }

    #[test]
    fn no_go_before_the_intent_is_recorded() {
        let (_, out) =
            run(plan(5, 3), vec![Input::AskRefused(NodeIndex(1), refusal(RefusalCode::Overloaded)), Input::PartialArrived(partial(2))]);
        assert!(!out.iter().any(|e| matches!(e, Effect::Go(..) | Effect::Answer(_))));
        assert!(out.contains(&Effect::Ask(NodeIndex(5))));
    }

    #[test]
    fn a_lost_holder_is_replaced_and_too_many_lost_explain_why() {
        let gone = |i| Input::PartialRefused(NodeIndex(i), refusal(RefusalCode::NotReady));
        let (_, out) = run(
            plan(3, 2),
            vec![Input::Recorded(receipt()), gone(1), Input::PartialRefused(NodeIndex(2), refusal(RefusalCode::AppRevoked))],
        );
        assert_eq!(out.last(), Some(&Effect::Refuse(refusal(RefusalCode::AppRevoked))), "the final reason before the passing one");
    }

    #[test]
    fn a_holder_that_is_behind_is_asked_again_but_not_for_ever() {
        let behind = || Input::PartialRefused(NodeIndex(1), refusal(RefusalCode::NotYet));
        let inputs = [vec![Input::Recorded(receipt())], (0..=GO_TRIES_MAX).map(|_| behind()).collect()].concat();
        let (_, out) = run(plan(3, 2), inputs);
        assert_eq!(out.iter().filter(|e| **e == Effect::Go(NodeIndex(1), 7)).count(), 1 + usize::from(GO_TRIES_MAX));
    }

    #[test]
    fn the_deadline_ends_it_and_unknown_senders_do_not_count() {
        let mut out = Vec::new();
        let c = Coordination::begin(plan(3, 2), &mut out);
        let c = c.step(UnixMillis(1), Input::Recorded(receipt()), &mut out);
        let c = c.step(UnixMillis(1), Input::PartialArrived(partial(9)), &mut out);
        let c = c.step(UnixMillis(100), Input::Tick, &mut out);
        assert!(c.is_done());
        assert!(matches!(out.last(), Some(Effect::Refuse(r)) if r.code == RefusalCode::DeadlineExceeded));
    }

    #[test]
    fn too_few_holders_are_refused_before_anything_is_recorded() {
        let (c, out) = run(plan(1, 2), vec![]);
        assert!(c.is_done());
        assert!(!out.contains(&Effect::Record));
    }

    proptest! {
        /// Whatever comes in whatever order: at most one end, nothing after it, never a `go` before the record.
        #[test]
        fn ends_at_most_once(script in proptest::collection::vec((0u8..6, 1u16..6), 0..40)) {
            let mut out = Vec::new();
            let mut c = Coordination::begin(plan(5, 3), &mut out);
            let mut recorded = false;
            for (what, who) in script {
                let before = out.len();
                let input = match what {
                    0 => { recorded = true; Input::Recorded(receipt()) }
                    1 => Input::AskRefused(NodeIndex(who), refusal(RefusalCode::Overloaded)),
                    2 => Input::PartialArrived(partial(who)),
                    3 => Input::PartialRefused(NodeIndex(who), refusal(RefusalCode::NotYet)),
                    4 => Input::PartialRefused(NodeIndex(who), refusal(RefusalCode::AppRevoked)),
                    _ => Input::Tick,
                };
                let was_done = c.is_done();
                c = c.step(UnixMillis(1), input, &mut out);
                if was_done { prop_assert_eq!(out.len(), before); }
                if !recorded { prop_assert!(!out.iter().any(|e| matches!(e, Effect::Go(..)))); }
            }
            let ends = out.iter().filter(|e| matches!(e, Effect::Answer(_) | Effect::Refuse(_))).count();
            prop_assert!(ends <= 1);
            prop_assert_eq!(ends == 1, c.is_done());
        }
    }
}
