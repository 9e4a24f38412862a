//! One actor per request that this node coordinates; its deadline is inside.
//!
//! Owns: carrying out the effects of [`Coordination`]. Never: opens a partial; they are sealed to the client.
//! Source: architecture.md §4, §6.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::{Actor, ActorContext, ActorFutureExt, Addr, ArbiterHandle, AsyncContext, Context, WrapFuture};
use dstack_attest::VerifiedIdentity;
use dstack_protocol::release::{Ask, Go, Out};
use dstack_protocol::rpc::{PATH_PEER_ASK, PATH_PEER_GO, ReleaseAnswer};
use dstack_protocol::{NodeIndex, Refusal, RefusalCode, RootTag, Seat, UnixMillis, Wire};
use dstack_release::coordination::{Coordination, Effect, Input, Plan};
use tokio::sync::oneshot;

use crate::holder::Holder;
use crate::mailbox::{Gate, gone, of_mailbox};
use crate::metrics;
use crate::policy::{self, Policy, Precheck};
use crate::ports::{Log, Now, Peers, read};
use crate::recorder::{self, Record, Recorder};

/// Name in refusals and metrics.
pub const NAME: &str = "release";
/// How long a request may take.
pub const DEADLINE: Duration = Duration::from_secs(8);
const PEER_TIMEOUT: Duration = Duration::from_secs(3);
/// Pause before a holder that is behind is told `go` again.
const AGAIN: Duration = Duration::from_millis(60);

/// What every release of a node shares.
#[derive(Clone)]
pub struct Coordinator {
    /// This node's seat.
    pub seat: Seat,
    /// Applied state.
    pub log: Arc<dyn Log>,
    /// Other nodes.
    pub peers: Arc<dyn Peers>,
    /// This node's own holder.
    pub holder: Arc<Holder>,
    /// Judges before anything is recorded.
    pub policy: Addr<Policy>,
    /// Commits intents.
    pub recorder: Addr<Recorder>,
    /// Own clock.
    pub now: Now,
    /// Where request actors run.
    pub arbiter: ArbiterHandle,
    /// Releases at once.
    pub gate: Gate,
}

impl Coordinator {
    /// Releases: verifies, judges, records, collects `t` sealed partials.
    ///
    /// # Errors
    /// The refusal, with its explanation; nothing is recorded when this node can tell beforehand.
    pub async fn release(&self, ask: Ask, exclude: &[NodeIndex]) -> Result<ReleaseAnswer, Refusal> {
        let began = Instant::now();
        let answer = match self.gate.enter() {
            Ok(_place) => {
                metrics::running(1.0);
                let answer = self.run(ask, exclude).await;
                metrics::running(-1.0);
                answer
            }
            Err(refusal) => Err(refusal),
        };
        metrics::stage("total", began.elapsed());
        metrics::release(metrics::outcome(&answer));
        answer
    }

    async fn run(&self, ask: Ask, exclude: &[NodeIndex]) -> Result<ReleaseAnswer, Refusal> {
        // Cheap refusal early, with its explanation: nothing of this is trusted by any holder.
        let identity: Arc<VerifiedIdentity> = self.holder.identify(&ask).await?;
        let ask = Arc::new(ask);
        let message = Precheck { ask: Arc::clone(&ask), identity };
        self.policy.send(message).await.map_err(|error| of_mailbox(policy::NAME, error))??;
        let (plan, seats) = self.plan(&ask, exclude)?;
        let (reply, answer) = oneshot::channel();
        let shared = self.clone();
        let started = self.arbiter.spawn_fn(move || {
            let deadline = plan.deadline;
            Release { shared, ask, seats, deadline, plan: Some(plan), state: None, reply: Some(reply), began: Instant::now() }.start();
        });
        if !started {
            return Err(gone(NAME));
        }
        answer.await.unwrap_or_else(|_| Err(gone(NAME)))
    }

    /// Holders of the generation's root, nearest first: this node, then by measured latency, then by index.
    fn plan(&self, ask: &Ask, exclude: &[NodeIndex]) -> Result<(Plan, BTreeMap<NodeIndex, Seat>), Refusal> {
        let generation = ask.request.generation;
        let (threshold, seats) = read(&*self.log, |state| {
            let root = state.roots.get(&(generation, RootTag::Prf))?;
            let seats: BTreeMap<NodeIndex, Seat> =
                state.seats.iter().filter(|(_, row)| root.vks.contains_key(&row.index)).map(|(seat, row)| (row.index, *seat)).collect();
            Some((usize::from(root.t), seats))
        })?
        .ok_or_else(|| Refusal::new(RefusalCode::UnknownGeneration, "a generation with a root", generation.to_string()))?;
        let mut holders: Vec<NodeIndex> = seats.keys().filter(|index| !exclude.contains(index)).copied().collect();
        holders.sort_by_key(|index| {
            let seat = seats.get(index).copied().unwrap_or(Seat(0));
            let own = seat != self.seat;
            (own, self.peers.latency(seat).unwrap_or(Duration::MAX), *index)
        });
        let deadline = (self.now)().plus_ms(u64::try_from(DEADLINE.as_millis()).unwrap_or(u64::MAX));
        Ok((Plan { threshold, holders, hedge: 1, deadline }, seats))
    }
}

/// One request.
struct Release {
    shared: Coordinator,
    ask: Arc<Ask>,
    seats: BTreeMap<NodeIndex, Seat>,
    deadline: UnixMillis,
    plan: Option<Plan>,
    state: Option<Coordination>,
    reply: Option<oneshot::Sender<Result<ReleaseAnswer, Refusal>>>,
    began: Instant,
}

impl Actor for Release {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.set_mailbox_capacity(16);
        context.run_later(DEADLINE, |this, context| {
            // The timer is what measures: a wall clock that stands still or was set back keeps no request alive.
            let now = (this.shared.now)().max(this.deadline);
            this.step(now, Input::Tick, context);
        });
        let Some(plan) = self.plan.take() else { return context.stop() };
        let mut effects = Vec::new();
        self.state = Some(Coordination::begin(plan, &mut effects));
        self.carry_out(effects, context);
    }
}

impl Release {
    fn input(&mut self, input: Input, context: &mut Context<Self>) {
        self.step((self.shared.now)(), input, context);
    }

    fn step(&mut self, now: UnixMillis, input: Input, context: &mut Context<Self>) {
        let Some(state) = self.state.take() else { return };
        let mut effects = Vec::new();
        self.state = Some(state.step(now, input, &mut effects));
        self.carry_out(effects, context);
    }

    fn carry_out(&mut self, effects: Vec<Effect>, context: &mut Context<Self>) {
        for effect in effects {
            match effect {
                Effect::Ask(index) => self.send_ask(index, context),
                Effect::Record => self.record(context),
                Effect::Go(index, pos) => self.send_go(index, pos, context),
                Effect::Answer(answer) => self.finish(Ok(*answer), context),
                Effect::Refuse(refusal) => self.finish(Err(refusal), context),
            }
        }
    }

    fn finish(&mut self, answer: Result<ReleaseAnswer, Refusal>, context: &mut Context<Self>) {
        metrics::stage("partials", self.began.elapsed());
        if let Some(reply) = self.reply.take() {
            // The client may have gone; then nobody waits.
            let _ = reply.send(answer);
        }
        context.stop();
    }

    fn record(&self, context: &mut Context<Self>) {
        let intent = self.ask.request.intent(NodeIndex(0));
        let recorded = self.shared.recorder.send(Record { intent });
        context.spawn(recorded.into_actor(self).map(|answer, this, context| {
            let input = match answer.map_err(|error| of_mailbox(recorder::NAME, error)).and_then(|answer| answer) {
                Ok(receipt) => Input::Recorded(receipt),
                Err(refusal) => Input::RecordRefused(refusal),
            };
            this.input(input, context);
        }));
    }

    fn seat(&self, index: NodeIndex) -> Seat {
        self.seats.get(&index).copied().unwrap_or(Seat(0))
    }

    fn send_ask(&self, index: NodeIndex, context: &mut Context<Self>) {
        let (seat, ask) = (self.seat(index), Arc::clone(&self.ask));
        let (holder, peers, own) = (Arc::clone(&self.shared.holder), Arc::clone(&self.shared.peers), self.shared.seat);
        let asked = async move {
            if seat == own {
                return holder.ask((*ask).clone()).await;
            }
            // A holder that has judged this evidence needs only its hash.
            let mut light = (*ask).clone();
            light.evidence.clear();
            match peers.post(seat, PATH_PEER_ASK, light.encode(), PEER_TIMEOUT).await {
                Err(refusal) if refusal.code == RefusalCode::NeedEvidence => {
                    peers.post(seat, PATH_PEER_ASK, ask.encode(), PEER_TIMEOUT).await.map(drop)
                }
                other => other.map(drop),
            }
        };
        context.spawn(asked.into_actor(self).map(move |answer, this, context| {
            if let Err(refusal) = answer {
                this.input(Input::AskRefused(index, refusal), context);
            }
        }));
    }

    fn send_go(&self, index: NodeIndex, pos: u64, context: &mut Context<Self>) {
        let seat = self.seat(index);
        let go = Go { intent_id: self.ask.request.intent(NodeIndex(0)).id(), pos };
        let (holder, peers, own) = (Arc::clone(&self.shared.holder), Arc::clone(&self.shared.peers), self.shared.seat);
        let gone = async move {
            let mut tries = 0;
            loop {
                let answer = if seat == own {
                    holder.go(go).await
                } else {
                    let bytes = peers.post(seat, PATH_PEER_GO, go.encode(), PEER_TIMEOUT).await;
                    bytes.and_then(|bytes| Out::decode(&bytes).map_err(Refusal::from))
                };
                // The ask may still be on its way to that holder: its verification runs beside the commit.
                match answer {
                    Err(refusal) if refusal.code == RefusalCode::IntentUnknown && tries < 20 => {
                        tries += 1;
                        tokio::time::sleep(AGAIN).await;
                    }
                    other => return other,
                }
            }
        };
        context.spawn(gone.into_actor(self).map(move |answer, this, context| {
            let input = match answer {
                Ok(out) if out.index == index => Input::PartialArrived(out),
                Ok(out) => {
                    let refusal = Refusal::new(RefusalCode::Malformed, index.to_string(), out.index.to_string());
                    Input::PartialRefused(index, refusal)
                }
                Err(refusal) => Input::PartialRefused(index, refusal),
            };
            this.input(input, context);
        }));
    }
}
