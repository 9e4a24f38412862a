//! How a coordinator drives one request: ask early, record, then `go`; intent before partials, always.
//!
//! Owns: whom to ask, when to ask one more, when to answer or give up. Never: opens a partial (they are sealed to the client), waits.
//! Source: architecture.md §4; ADR 0015; style.md §5.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

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
    /// How long partials may be outstanding before as many further holders are asked.
    pub hedge_after: Duration,
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
    /// A holder took the early ask.
    AskTaken(NodeIndex),
    /// A holder refused the early ask.
    AskRefused(NodeIndex, Refusal),
    /// A holder answered.
    PartialArrived(Out),
    /// The coordinator's own holder evaluated, and the partial stays in this process: it combines itself (modes L and E).
    OwnEvaluated(NodeIndex),
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
    /// Tell a holder that took the ask where the intent is.
    Go(NodeIndex, u64),
    /// Step with [`Input::Tick`] at that time.
    WakeAt(UnixMillis),
    /// Done. The coordinator's own partial, where it stays here, is not in it.
    Answer(Box<ReleaseAnswer>),
    /// Done, without a key.
    Refuse(Refusal),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    AwaitingRecord,
    AwaitingPartials(Box<AwaitingPartials>),
    Done,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct AwaitingPartials {
    receipt: Receipt,
    outs: BTreeMap<NodeIndex, Out>,
    /// The coordinator's own holder, once its partial is here.
    own: Option<NodeIndex>,
    /// When further holders are asked; none once all were.
    hedge_at: Option<UnixMillis>,
}

impl AwaitingPartials {
    /// Partials that are here.
    fn count(&self) -> usize {
        self.outs.len().saturating_add(usize::from(self.own.is_some()))
    }
}

/// One request on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coordination {
    plan: Plan,
    stage: Stage,
    asked: BTreeSet<NodeIndex>,
    taken: BTreeSet<NodeIndex>,
    failed: BTreeMap<NodeIndex, Refusal>,
    again: BTreeMap<NodeIndex, u8>,
}

/// How often one holder is told `go`, or asked, again when it answers that it may succeed later.
pub const GO_TRIES_MAX: u8 = 4;

impl Coordination {
    /// Begins: asks as many holders as partials are needed, and commits the intent at the same time.
    #[must_use]
    pub fn begin(plan: Plan, out: &mut Vec<Effect>) -> Self {
        let mut this = Self {
            plan,
            stage: Stage::AwaitingRecord,
            asked: BTreeSet::new(),
            taken: BTreeSet::new(),
            failed: BTreeMap::new(),
            again: BTreeMap::new(),
        };
        if this.plan.holders.len() < this.plan.threshold {
            out.push(Effect::Refuse(this.too_few()));
            this.stage = Stage::Done;
            return this;
        }
        out.push(Effect::WakeAt(this.plan.deadline));
        this.ask_next(this.plan.threshold, out);
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
            Input::Recorded(receipt) => self.recorded(now, receipt, out),
            Input::RecordRefused(refusal) => self.finish(Effect::Refuse(refusal), out),
            Input::AskTaken(from) => self.taken(from, out),
            Input::AskRefused(from, refusal) => self.lost(from, refusal, out),
            Input::PartialRefused(from, refusal) => self.retry_or_lose(from, refusal, out),
            Input::PartialArrived(partial) => self.arrived(partial, out),
            Input::OwnEvaluated(index) => self.own_evaluated(index, out),
            Input::Tick => self.hedge(now, out),
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

    /// Asks the next holders that were not asked yet.
    fn ask_next(&mut self, count: usize, out: &mut Vec<Effect>) {
        let next: Vec<NodeIndex> = self.plan.holders.iter().filter(|index| !self.asked.contains(index)).take(count).copied().collect();
        for index in next {
            self.asked.insert(index);
            out.push(Effect::Ask(index));
        }
    }

    fn recorded(&mut self, now: UnixMillis, receipt: Receipt, out: &mut Vec<Effect>) {
        if self.stage != Stage::AwaitingRecord {
            return;
        }
        let pos = receipt.record.pos;
        for index in self.taken.iter().filter(|index| !self.failed.contains_key(index)) {
            out.push(Effect::Go(*index, pos));
        }
        self.stage = Stage::AwaitingPartials(Box::new(AwaitingPartials { receipt, outs: BTreeMap::new(), own: None, hedge_at: None }));
        self.wait_for_partials(now, out);
        self.give_up_if_hopeless(out);
    }

    /// A holder that took the ask before the intent was recorded is told `go` then, a later one at once.
    fn taken(&mut self, from: NodeIndex, out: &mut Vec<Effect>) {
        let expected = self.asked.contains(&from) && !self.failed.contains_key(&from);
        if !expected || !self.taken.insert(from) {
            return;
        }
        if let Stage::AwaitingPartials(awaiting) = &self.stage {
            out.push(Effect::Go(from, awaiting.receipt.record.pos));
        }
    }

    /// Partials are late: a further holder for each that is missing. A silent holder costs this delay, not the release.
    fn hedge(&mut self, now: UnixMillis, out: &mut Vec<Effect>) {
        let Stage::AwaitingPartials(awaiting) = &self.stage else { return };
        if awaiting.hedge_at.is_none_or(|at| now < at) {
            return;
        }
        let missing = self.plan.threshold.saturating_sub(awaiting.count());
        self.ask_next(missing, out);
        self.wait_for_partials(now, out);
    }

    fn wait_for_partials(&mut self, now: UnixMillis, out: &mut Vec<Effect>) {
        let more = self.asked.len() < self.plan.holders.len();
        let delay_ms = u64::try_from(self.plan.hedge_after.as_millis()).unwrap_or(u64::MAX).max(1);
        if let Stage::AwaitingPartials(awaiting) = &mut self.stage {
            awaiting.hedge_at = more.then(|| now.plus_ms(delay_ms));
            out.extend(awaiting.hedge_at.map(Effect::WakeAt));
        }
    }

    fn arrived(&mut self, partial: Out, out: &mut Vec<Effect>) {
        let Stage::AwaitingPartials(awaiting) = &mut self.stage else { return };
        if !self.asked.contains(&partial.index) {
            return;
        }
        awaiting.outs.insert(partial.index, partial);
        self.answer_if_enough(out);
    }

    fn own_evaluated(&mut self, index: NodeIndex, out: &mut Vec<Effect>) {
        let Stage::AwaitingPartials(awaiting) = &mut self.stage else { return };
        if !self.asked.contains(&index) {
            return;
        }
        awaiting.own = Some(index);
        self.answer_if_enough(out);
    }

    fn answer_if_enough(&mut self, out: &mut Vec<Effect>) {
        let Stage::AwaitingPartials(awaiting) = &self.stage else { return };
        if awaiting.count() >= self.plan.threshold {
            let answer = ReleaseAnswer { receipt: awaiting.receipt.clone(), outs: awaiting.outs.values().cloned().collect() };
            self.finish(Effect::Answer(Box::new(answer)), out);
        }
    }

    fn retry_or_lose(&mut self, from: NodeIndex, refusal: Refusal, out: &mut Vec<Effect>) {
        if let Stage::AwaitingPartials(awaiting) = &self.stage
            && matches!(refusal.code, RefusalCode::NotYet | RefusalCode::NoCert | RefusalCode::IntentUnknown)
            && !self.failed.contains_key(&from)
        {
            let tries = self.again.entry(from).or_insert(0);
            if *tries < GO_TRIES_MAX {
                *tries += 1;
                if refusal.code == RefusalCode::IntentUnknown {
                    // It took the ask and knows it no more: it was restarted, or has forgotten the oldest of too many.
                    self.taken.remove(&from);
                    out.push(Effect::Ask(from));
                } else {
                    out.push(Effect::Go(from, awaiting.receipt.record.pos));
                }
                return;
            }
        }
        self.lost(from, refusal, out);
    }

    /// A holder is out: the next one takes its place.
    fn lost(&mut self, from: NodeIndex, refusal: Refusal, out: &mut Vec<Effect>) {
        if !self.asked.contains(&from) || self.failed.contains_key(&from) {
            return;
        }
        self.failed.insert(from, refusal);
        self.ask_next(1, out);
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
            Stage::AwaitingPartials(awaiting) => awaiting.count(),
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

    const HEDGE_MS: u64 = 20;

    fn plan(holders: u16, threshold: usize) -> Plan {
        Plan {
            threshold,
            holders: (1..=holders).map(NodeIndex).collect(),
            hedge_after: Duration::from_millis(HEDGE_MS),
            deadline: UnixMillis(100),
        }
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
        timed(plan, inputs.into_iter().map(|input| (1, input)))
    }

    /// Inputs at their times.
    fn timed(plan: Plan, inputs: impl IntoIterator<Item = (u64, Input)>) -> (Coordination, Vec<Effect>) {
        let mut out = Vec::new();
        let mut c = Coordination::begin(plan, &mut out);
        for (at, input) in inputs {
            c = c.step(UnixMillis(at), input, &mut out);
        }
        (c, out)
    }

    fn asks(out: &[Effect]) -> Vec<u16> {
        out.iter().filter_map(|effect| if let Effect::Ask(index) = effect { Some(index.0) } else { None }).collect()
    }

    fn goes(out: &[Effect]) -> Vec<u16> {
        out.iter().filter_map(|effect| if let Effect::Go(index, 7) = effect { Some(index.0) } else { None }).collect()
    }

    fn taken(index: u16) -> Input {
        Input::AskTaken(NodeIndex(index))
    }

    #[test]
    fn asks_no_more_than_the_threshold_and_answers_with_it() {
        let (c, out) = timed(
            plan(5, 3),
            vec![
                (1, taken(2)),
                (1, taken(3)),
                (2, Input::Recorded(receipt())),
                (3, taken(1)),
                (4, Input::PartialArrived(partial(2))),
                (9, Input::Tick),
                (20, Input::PartialArrived(partial(1))),
                (21, Input::PartialArrived(partial(3))),
            ],
        );
        assert!(c.is_done());
        assert_eq!((asks(&out), goes(&out)), (vec![1, 2, 3], vec![2, 3, 1]), "who took the ask late is told to go late");
        assert!(matches!(out.last(), Some(Effect::Answer(answer)) if answer.outs.len() == 3));
    }

    #[test]
    fn a_partial_that_stays_here_counts_and_is_not_in_the_answer() {
        let asked = vec![(1, taken(1)), (1, taken(2)), (2, Input::Recorded(receipt()))];
        for (first, second) in [
            (Input::OwnEvaluated(NodeIndex(1)), Input::PartialArrived(partial(2))),
            (Input::PartialArrived(partial(2)), Input::OwnEvaluated(NodeIndex(1))),
        ] {
            let inputs = asked.clone().into_iter().chain([(3, first), (4, second)]);
            let (c, out) = timed(plan(3, 2), inputs);
            assert!(c.is_done());
            assert!(matches!(out.last(), Some(Effect::Answer(answer)) if answer.outs == [partial(2)]));
        }
        // Of one that was not asked it says nothing, and twice is once.
        let strange = asked.into_iter().chain([
            (3, Input::OwnEvaluated(NodeIndex(3))),
            (4, Input::OwnEvaluated(NodeIndex(1))),
            (4, Input::OwnEvaluated(NodeIndex(1))),
        ]);
        assert!(!timed(plan(3, 2), strange).0.is_done());
    }

    #[test]
    fn late_partials_are_hedged_once_the_delay_is_over_by_as_many_holders_as_are_missing() {
        let recorded =
            vec![(1, taken(1)), (1, taken(2)), (1, taken(3)), (10, Input::Recorded(receipt())), (12, Input::PartialArrived(partial(1)))];
        let (c, out) = timed(plan(7, 3), recorded);
        assert!(out.contains(&Effect::WakeAt(UnixMillis(10 + HEDGE_MS))));
        let mut out = Vec::new();
        let c = c.step(UnixMillis(10 + HEDGE_MS - 1), Input::Tick, &mut out);
        assert_eq!(out, vec![], "not yet");
        let c = c.step(UnixMillis(10 + HEDGE_MS), Input::Tick, &mut out);
        // Two are missing, so two more at once: two silent holders cost one delay.
        let again = Effect::WakeAt(UnixMillis(10 + 2 * HEDGE_MS));
        assert_eq!(out, vec![Effect::Ask(NodeIndex(4)), Effect::Ask(NodeIndex(5)), again]);
        out.clear();
        let c = c.step(UnixMillis(31), taken(4), &mut out);
        let c = c.step(UnixMillis(31), taken(5), &mut out);
        assert_eq!(out, vec![Effect::Go(NodeIndex(4), 7), Effect::Go(NodeIndex(5), 7)]);
        // The slow one may still win; what is missing after another delay is asked for again, until nobody is left.
        let c = c.step(UnixMillis(32), Input::PartialArrived(partial(2)), &mut out);
        out.clear();
        let c = c.step(UnixMillis(50), Input::Tick, &mut out);
        assert_eq!(out, vec![Effect::Ask(NodeIndex(6)), Effect::WakeAt(UnixMillis(70))]);
        out.clear();
        let c = c.step(UnixMillis(70), Input::Tick, &mut out);
        assert_eq!(out, vec![Effect::Ask(NodeIndex(7))], "the last one: no further hedge");
        let c = c.step(UnixMillis(71), Input::PartialArrived(partial(5)), &mut out);
        assert!(c.is_done());
    }

    #[test]
    fn a_holder_silent_since_the_ask_is_hedged_too() {
        let mut inputs = vec![(1, taken(1)), (1, Input::Recorded(receipt())), (2, Input::PartialArrived(partial(1)))];
        inputs.extend([(1 + HEDGE_MS, Input::Tick), (22, taken(3)), (23, Input::PartialArrived(partial(3)))]);
        let (c, out) = timed(plan(3, 2), inputs);
        assert!(c.is_done());
        assert_eq!((asks(&out), goes(&out)), (vec![1, 2, 3], vec![1, 3]));
    }

    #[test]
    fn time_before_the_record_is_no_reason_to_hedge() {
        let (_, out) = timed(plan(5, 3), vec![(1, taken(1)), (90, Input::Tick)]);
        assert_eq!(asks(&out), vec![1, 2, 3]);
    }

    #[test]
    fn no_go_before_the_intent_is_recorded() {
        let (_, out) = run(
            plan(5, 3),
            vec![taken(2), Input::AskRefused(NodeIndex(1), refusal(RefusalCode::Overloaded)), taken(4), Input::PartialArrived(partial(2))],
        );
        assert!(!out.iter().any(|e| matches!(e, Effect::Go(..) | Effect::Answer(_))));
        assert_eq!(asks(&out), vec![1, 2, 3, 4], "the next one takes the place of who refused, at once");
    }

    #[test]
    fn a_holder_that_forgot_the_ask_is_asked_again() {
        let forgot = || Input::PartialRefused(NodeIndex(1), refusal(RefusalCode::IntentUnknown));
        let (c, out) = run(plan(3, 2), vec![taken(1), Input::Recorded(receipt()), forgot(), taken(1), taken(1)]);
        assert_eq!((asks(&out), goes(&out)), (vec![1, 2, 1], vec![1, 1]));
        let mut out = Vec::new();
        let _ = (0..GO_TRIES_MAX).fold(c, |c, _| c.step(UnixMillis(2), forgot(), &mut out).step(UnixMillis(2), taken(1), &mut out));
        assert_eq!(asks(&out).last(), Some(&3), "but not for ever");
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
        let inputs = [vec![taken(1), Input::Recorded(receipt())], (0..=GO_TRIES_MAX).map(|_| behind()).collect()].concat();
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
        fn ends_at_most_once(script in proptest::collection::vec((0u8..7, 1u16..6, 0u64..9), 0..40)) {
            let mut out = Vec::new();
            let mut c = Coordination::begin(plan(5, 3), &mut out);
            let mut recorded = false;
            let mut now = UnixMillis(1);
            for (what, who, passed) in script {
                now = now.plus_ms(passed);
                let before = out.len();
                let input = match what {
                    0 => { recorded = true; Input::Recorded(receipt()) }
                    1 => Input::AskRefused(NodeIndex(who), refusal(RefusalCode::Overloaded)),
                    2 => Input::PartialArrived(partial(who)),
                    3 => Input::PartialRefused(NodeIndex(who), refusal(RefusalCode::NotYet)),
                    4 => Input::PartialRefused(NodeIndex(who), refusal(RefusalCode::AppRevoked)),
                    5 => taken(who),
                    _ => Input::Tick,
                };
                let was_done = c.is_done();
                c = c.step(now, input, &mut out);
                if was_done { prop_assert_eq!(out.len(), before); }
                if !recorded { prop_assert!(!out.iter().any(|e| matches!(e, Effect::Go(..)))); }
            }
            let ends = out.iter().filter(|e| matches!(e, Effect::Answer(_) | Effect::Refuse(_))).count();
            prop_assert!(ends <= 1);
            prop_assert_eq!(ends == 1, c.is_done());
        }

        /// Whichever holders are silent: with `t` that answer, the release is served, and it costs one delay.
        #[test]
        fn enough_honest_holders_serve_after_at_most_one_delay(n in 2u16..8, t in 1usize..6, silent in proptest::collection::vec(any::<bool>(), 8)) {
            let honest = |index: &NodeIndex| !silent[usize::from(index.0)];
            let plan = Plan { deadline: UnixMillis(10_000), ..plan(n, t) };
            let answering = plan.holders.iter().filter(|index| honest(index)).count();
            // As many as were asked first can be silent: what is missing then is asked for at once.
            let first_enough = plan.holders.iter().take(t).filter(|index| !honest(index)).count();
            let spare_honest = plan.holders.iter().skip(t).take(first_enough).all(honest);
            prop_assume!(answering >= t && spare_honest);
            let mut queue = Vec::new();
            let mut c = Coordination::begin(plan, &mut queue).step(UnixMillis(1), Input::Recorded(receipt()), &mut queue);
            let mut now = UnixMillis(1);
            while !c.is_done() {
                let effects = std::mem::take(&mut queue);
                let idle = !effects.iter().any(|effect| matches!(effect, Effect::Ask(who) | Effect::Go(who, _) if honest(who)));
                for effect in effects {
                    c = match effect {
                        Effect::Ask(who) if honest(&who) => c.step(now, Input::AskTaken(who), &mut queue),
                        Effect::Go(who, _) if honest(&who) => c.step(now, Input::PartialArrived(partial(who.0)), &mut queue),
                        _ => c,
                    };
                }
                if idle && !c.is_done() {
                    now = now.plus_ms(HEDGE_MS);
                    prop_assert!(now <= UnixMillis(1 + HEDGE_MS), "a second delay");
                    c = c.step(now, Input::Tick, &mut queue);
                }
            }
            prop_assert!(matches!(queue.last(), Some(Effect::Answer(_))));
        }
    }
}
