//! One task per request that this node coordinates; its deadline is inside.
//!
//! Owns: carrying out the effects of [`Coordination`]. Never: opens a partial; they are sealed to the client.
//! Source: architecture.md §4, §6; ADR 0031.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dstack_attest::VerifiedIdentity;
use dstack_protocol::adopt::AdoptBasis;
use dstack_protocol::release::{Ask, Go, Intent, Mode, Out};
use dstack_protocol::rpc::{PATH_PEER_ASK, PATH_PEER_GO, ReleaseAnswer};
use dstack_protocol::{NodeIndex, Refusal, RefusalCode, RootTag, Seat, UnixMillis, Wire};
use dstack_release::coordination::{Coordination, Effect, Input, Plan};
use dstack_release::{AttributedAsk, Pace};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt as _};

use crate::adoption::Adoption;
use crate::holder::Holder;
use crate::mailbox::{Gate, gone};
use crate::metrics;
use crate::ports::{Log, Now, Peers, read};
use crate::recorder::Recorder;
use crate::share_holder::OwnPartial;

/// Name in refusals and metrics.
pub const NAME: &str = "release";
/// How long a request may take.
pub const DEADLINE: Duration = Duration::from_secs(8);
const PEER_TIMEOUT: Duration = Duration::from_secs(3);

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
    /// Commits intents.
    pub recorder: Recorder,
    /// Own clock.
    pub now: Now,
    /// Releases at once.
    pub gate: Gate,
    /// How long other holders took lately.
    pub pace: Arc<Mutex<Pace>>,
    /// Takes apps into the state that only the authority knows.
    pub adoption: Arc<Adoption>,
}

/// Who opens the partials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Opener {
    /// The client: this node's partial is sealed to it as any other.
    Client,
    /// This node: its own partial stays as it is, and has no proof where all outputs are known.
    ThisNode { index: NodeIndex, is_known: bool },
}

impl Opener {
    /// Index of the node that combines, 0 where the client does.
    fn from(self) -> NodeIndex {
        match self {
            Self::Client => NodeIndex(0),
            Self::ThisNode { index, .. } => index,
        }
    }
}

/// What this node needs to combine keys itself.
pub(crate) struct Gathered {
    /// Receipt, and the partials of others.
    pub(crate) answer: ReleaseAnswer,
    /// This node's, if it was among the first.
    pub(crate) own: Option<OwnPartial>,
}

impl Coordinator {
    /// Releases for a client: verifies, judges, records, collects `t` sealed partials.
    ///
    /// # Errors
    /// The refusal, with its explanation; nothing is recorded when this node can tell beforehand.
    pub async fn release(&self, ask: Ask, exclude: &[NodeIndex]) -> Result<ReleaseAnswer, Refusal> {
        self.counted(ask, Opener::Client, exclude).await.map(|gathered| gathered.answer)
    }

    /// The same for this node, which combines (modes L and E). `index`: its own; `is_known`: whether all outputs are.
    ///
    /// # Errors
    /// As [`Self::release`].
    pub(crate) async fn gather(&self, ask: Ask, index: NodeIndex, is_known: bool, exclude: &[NodeIndex]) -> Result<Gathered, Refusal> {
        self.counted(ask, Opener::ThisNode { index, is_known }, exclude).await
    }

    async fn counted(&self, ask: Ask, opener: Opener, exclude: &[NodeIndex]) -> Result<Gathered, Refusal> {
        let began = Instant::now();
        let answer = match self.gate.enter() {
            Ok(_place) => {
                metrics::running(1.0);
                let answer = self.run(ask, opener, exclude).await;
                metrics::running(-1.0);
                answer
            }
            Err(refusal) => Err(refusal),
        };
        metrics::stage("total", began.elapsed());
        metrics::release(metrics::outcome(&answer));
        answer
    }

    async fn run(&self, mut ask: Ask, opener: Opener, exclude: &[NodeIndex]) -> Result<Gathered, Refusal> {
        let from = opener.from();
        // Cheap refusal early, with its explanation: no other holder trusts anything of this. This node's own holder is the same judge.
        let is_new = !self.holder.has_judged(&ask.request.evidence_hash);
        let identity = self.holder.identify(&ask, from).await?;
        let evidence = std::mem::take(&mut ask.evidence);
        let attributed = self.holder.judge(Arc::new(ask), from, &identity).await?;
        // Judged, so allowed by this node's authority where nobody registered the app: from here on the state knows it.
        let request = &attributed.ask().request;
        if request.mode != Mode::Env {
            self.adoption.of(request.app_id, AdoptBasis::Booted).await?;
        }
        let (plan, seats) = self.plan(attributed.ask(), exclude)?;
        let intent = attributed.intent();
        let request = Request { intent_id: intent.id(), intent, attributed, evidence, is_new, identity, seats, opener };
        let release = Release {
            shared: self.clone(),
            request: Arc::new(request),
            own: None,
            started: (self.now)(),
            began: Instant::now(),
            under_way: FuturesUnordered::new(),
            wake_at: BTreeSet::new(),
        };
        // A task of its own: a client that leaves ends no request that the log may have recorded.
        tokio::spawn(release.run(plan)).await.unwrap_or_else(|_| Err(gone(NAME)))
    }

    /// Holders of the generation's root, nearest first: this node if it has a share, then by measured latency, then by index.
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
        let in_use = self.holder.shares().in_use().map(|share| share.index);
        holders.sort_by_cached_key(|index| {
            let seat = seats.get(index).copied().unwrap_or(Seat(0));
            let distance = match (seat == self.seat, in_use == Some(*index)) {
                (true, true) => Duration::ZERO,
                (true, false) => Duration::MAX,
                (false, _) => self.peers.latency(seat).unwrap_or(Duration::MAX),
            };
            (distance, *index)
        });
        let deadline = (self.now)().plus_ms(u64::try_from(DEADLINE.as_millis()).unwrap_or(u64::MAX));
        let hedge_after = lock(&self.pace).hedge_after();
        Ok((Plan { threshold, holders, hedge_after, deadline }, seats))
    }
}

/// What is asked, and of whom.
struct Request {
    intent: Intent,
    intent_id: [u8; 32],
    /// Without its evidence.
    attributed: AttributedAsk,
    evidence: Vec<u8>,
    /// Whether this node met the evidence with this request: then others hardly know it.
    is_new: bool,
    identity: Option<Arc<VerifiedIdentity>>,
    seats: BTreeMap<NodeIndex, Seat>,
    opener: Opener,
}

impl Request {
    /// Of the evidence, where the log notes when it first saw it.
    fn statement_id(&self) -> Option<[u8; 32]> {
        let identity = self.identity.as_deref().filter(|_| self.intent.mode == Mode::Legacy)?;
        Some(identity.statement_id())
    }
}

/// One request on its way.
struct Release {
    shared: Coordinator,
    request: Arc<Request>,
    own: Option<OwnPartial>,
    started: UnixMillis,
    began: Instant,
    /// What was begun, each with what it comes to.
    under_way: FuturesUnordered<BoxFuture<'static, Happened>>,
    /// When time is an input.
    wake_at: BTreeSet<UnixMillis>,
}

/// An input, and what came with it.
struct Happened {
    input: Input,
    own: Option<OwnPartial>,
}

impl From<Input> for Happened {
    fn from(input: Input) -> Self {
        Self { input, own: None }
    }
}

impl Release {
    async fn run(mut self, plan: Plan) -> Result<Gathered, Refusal> {
        let mut effects = Vec::new();
        let mut state = Coordination::begin(plan, &mut effects);
        loop {
            let mut inputs = Vec::new();
            for effect in std::mem::take(&mut effects) {
                if let Some(answer) = self.carry_out(effect, &mut inputs) {
                    return self.finished(answer);
                }
            }
            if inputs.is_empty() {
                inputs.push(self.next().await);
            }
            for input in inputs {
                let late = input == Input::Tick;
                state = state.step(self.now(), input, &mut effects);
                if late {
                    let hedges = effects.iter().filter(|effect| matches!(effect, Effect::Ask(_))).count();
                    metrics::hedged(u64::try_from(hedges).unwrap_or(u64::MAX));
                }
            }
        }
    }

    /// The wall clock at the start and what was measured since: a clock that stands still or was set back keeps no request alive.
    fn now(&self) -> UnixMillis {
        self.started.plus_ms(u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// Waits for what comes first: something begun, or a time.
    async fn next(&mut self) -> Input {
        let now = self.now();
        // The deadline is always among them.
        let first = self.wake_at.first().copied().unwrap_or(now);
        let wait = Duration::from_millis(first.since(now));
        tokio::select! {
            biased;
            Some(Happened { input, own }) = self.under_way.next() => {
                self.own = own.or(self.own.take());
                input
            }
            () = tokio::time::sleep(wait) => {
                self.wake_at.pop_first();
                Input::Tick
            }
        }
    }

    /// Begins `effect`; what it comes to at once is an input, an end is the answer.
    fn carry_out(&mut self, effect: Effect, inputs: &mut Vec<Input>) -> Option<Result<Gathered, Refusal>> {
        match effect {
            Effect::Ask(index) => inputs.extend(self.send_ask(index)),
            Effect::Record => self.record(),
            Effect::Go(index, pos) => self.send_go(index, pos),
            Effect::WakeAt(at) => {
                self.wake_at.insert(at);
            }
            Effect::Answer(answer) => return Some(Ok(Gathered { answer: *answer, own: self.own.take() })),
            Effect::Refuse(refusal) => return Some(Err(refusal)),
        }
        None
    }

    fn finished(&self, answer: Result<Gathered, Refusal>) -> Result<Gathered, Refusal> {
        metrics::stage("partials", self.began.elapsed());
        answer
    }

    fn record(&self) {
        let recorded = self.shared.recorder.record(self.request.intent.clone(), self.request.statement_id());
        self.under_way.push(Box::pin(async move {
            match recorded.await {
                Ok(receipt) => Input::Recorded(receipt).into(),
                Err(refusal) => Input::RecordRefused(refusal).into(),
            }
        }));
    }

    fn seat(&self, index: NodeIndex) -> Seat {
        self.request.seats.get(&index).copied().unwrap_or(Seat(0))
    }

    fn send_ask(&self, index: NodeIndex) -> Option<Input> {
        let seat = self.seat(index);
        if seat == self.shared.seat {
            // Judged here before anything was recorded.
            self.shared.holder.keep(self.request.attributed.clone(), self.request.identity.clone());
            return Some(Input::AskTaken(index));
        }
        let (request, peers) = (Arc::clone(&self.request), Arc::clone(&self.shared.peers));
        let asked = async move {
            // A holder that has judged this evidence needs only its hash.
            let light = request.attributed.ask();
            let whole = || Ask { evidence: request.evidence.clone(), ..light.clone() };
            let first = if request.is_new { whole().encode() } else { light.encode() };
            match peers.post(seat, PATH_PEER_ASK, first, PEER_TIMEOUT).await {
                Err(refusal) if refusal.code == RefusalCode::NeedEvidence => {
                    let whole = whole();
                    peers.post(seat, PATH_PEER_ASK, whole.encode(), PEER_TIMEOUT).await.map(drop)
                }
                other => other.map(drop),
            }
        };
        self.under_way.push(Box::pin(async move {
            match asked.await {
                Ok(()) => Input::AskTaken(index).into(),
                Err(refusal) => Input::AskRefused(index, refusal).into(),
            }
        }));
        None
    }

    /// This node's own partial, which stays here.
    fn go_own(&self, index: NodeIndex, go: Go, is_known: bool) {
        let (holder, request) = (Arc::clone(&self.shared.holder), Arc::clone(&self.request));
        let evaluated = async move {
            match holder.go_own(go, is_known).await {
                Err(refusal) if refusal.code == RefusalCode::CollateralChanged => {}
                other => return other,
            }
            let whole = Ask { evidence: request.evidence.clone(), ..request.attributed.ask().clone() };
            holder.ask(whole, request.attributed.coordinator()).await?;
            holder.go_own(go, is_known).await
        };
        self.under_way.push(Box::pin(async move {
            match evaluated.await {
                Ok(own) => Happened { input: Input::OwnEvaluated(index), own: Some(own) },
                Err(refusal) => Input::PartialRefused(index, refusal).into(),
            }
        }));
    }

    fn send_go(&self, index: NodeIndex, pos: u64) {
        let seat = self.seat(index);
        let own = seat == self.shared.seat;
        let go = Go { intent_id: self.request.intent_id, pos };
        if let Opener::ThisNode { is_known, .. } = self.request.opener
            && own
        {
            return self.go_own(index, go, is_known);
        }
        let (holder, peers, began) = (Arc::clone(&self.shared.holder), Arc::clone(&self.shared.peers), Instant::now());
        let request = Arc::clone(&self.request);
        let gone = async move {
            let once = async || {
                if own {
                    return holder.go(go).await;
                }
                let bytes = peers.post(seat, PATH_PEER_GO, go.encode(), PEER_TIMEOUT).await?;
                Ok(Out::decode(&bytes)?)
            };
            match once().await {
                Err(refusal) if refusal.code == RefusalCode::CollateralChanged => {}
                other => return other,
            }
            // Collateral was pinned between ask and intent: the holder judges again, with the bundle of the row.
            let whole = Ask { evidence: request.evidence.clone(), ..request.attributed.ask().clone() };
            if own {
                holder.ask(whole, request.attributed.coordinator()).await?;
            } else {
                peers.post(seat, PATH_PEER_ASK, whole.encode(), PEER_TIMEOUT).await?;
            }
            once().await
        };
        let pace = Arc::clone(&self.shared.pace);
        self.under_way.push(Box::pin(async move {
            let input = match gone.await {
                Ok(out) if out.index == index => {
                    if !own {
                        lock(&pace).answered(began.elapsed());
                    }
                    Input::PartialArrived(out)
                }
                Ok(out) => {
                    let refusal = Refusal::new(RefusalCode::Malformed, index.to_string(), out.index.to_string());
                    Input::PartialRefused(index, refusal)
                }
                Err(refusal) => Input::PartialRefused(index, refusal),
            };
            input.into()
        }));
    }
}

fn lock(pace: &Mutex<Pace>) -> MutexGuard<'_, Pace> {
    pace.lock().unwrap_or_else(PoisonError::into_inner)
}
