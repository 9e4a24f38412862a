//! A holder's side: `ask` early, `go` when the intent is committed.
//!
//! Owns: what was asked and not yet answered, bounded. Never: answers without a committed row, or by another node's word.
//! Source: threshold.md §2.2 "Holder".

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dstack_attest::VerifiedIdentity;
use dstack_policy::Permit;
use dstack_protocol::limits::HOLDER_WAIT_MS_MAX;
use dstack_protocol::release::{Ask, Go, Mode, Out, RelReq};
use dstack_protocol::{NodeIndex, Refusal, RefusalCode};
use dstack_release::AttributedAsk;
use dstack_release::asker::expected_intent_id;
use dstack_release::clearance::Clearance;
use dstack_release::session::check_evidence_hash;

use crate::authority::OwnAuthority;
use crate::metrics;
use crate::policy::Policy;
use crate::ports::{Log, Now, read};
use crate::share_holder::{OwnPartial, ShareHolderPool};
use crate::verifier::VerifierPool;

/// Asks kept until their `go`.
pub const PENDING_MAX: usize = 8192;
/// Judged sessions kept, so that later asks come without evidence.
pub const SESSIONS_MAX: usize = 4096;

#[derive(Clone)]
struct Pending {
    attributed: AttributedAsk,
    identity: Option<Arc<VerifiedIdentity>>,
}

struct Bounded<V> {
    by_key: HashMap<[u8; 32], V>,
    oldest_first: VecDeque<[u8; 32]>,
    max: usize,
}

impl<V: Clone> Bounded<V> {
    fn new(max: usize) -> Self {
        Self { by_key: HashMap::new(), oldest_first: VecDeque::new(), max }
    }

    fn put(&mut self, key: [u8; 32], value: V) {
        if self.by_key.insert(key, value).is_none() {
            self.oldest_first.push_back(key);
        }
        while self.oldest_first.len() > self.max {
            if let Some(oldest) = self.oldest_first.pop_front() {
                self.by_key.remove(&oldest);
            }
        }
    }

    fn get(&self, key: &[u8; 32]) -> Option<V> {
        self.by_key.get(key).cloned()
    }
}

/// See the module text. Cheap to share.
pub struct Holder {
    log: Arc<dyn Log>,
    now: Now,
    verifier: VerifierPool,
    policy: Arc<Policy>,
    shares: ShareHolderPool,
    authority: Option<OwnAuthority>,
    pending: Mutex<Bounded<Pending>>,
    sessions: Mutex<Bounded<Arc<VerifiedIdentity>>>,
}

impl Holder {
    /// A holder with nothing asked.
    #[must_use]
    pub fn new(log: Arc<dyn Log>, now: Now, verifier: VerifierPool, policy: Arc<Policy>, shares: ShareHolderPool) -> Self {
        Self {
            log,
            now,
            verifier,
            policy,
            shares,
            authority: None,
            pending: Mutex::new(Bounded::new(PENDING_MAX)),
            sessions: Mutex::new(Bounded::new(SESSIONS_MAX)),
        }
    }

    /// With an authority of this node's own; without one, every policy that asks it refuses here.
    #[must_use]
    pub fn asking(self, authority: Option<OwnAuthority>) -> Self {
        Self { authority, ..self }
    }

    /// This node's authority.
    #[must_use]
    pub fn authority(&self) -> Option<&OwnAuthority> {
        self.authority.as_ref()
    }

    /// The share holder.
    #[must_use]
    pub fn shares(&self) -> &ShareHolderPool {
        &self.shares
    }

    /// Judges evidence, or finds the session it judged before: with the collateral that the intent's row names, before there is
    /// a row with the collateral in force. `from`: index of the node that brings the request, 0 for a client. Mode E has no evidence.
    ///
    /// # Errors
    /// [`RefusalCode::NeedEvidence`] when it is neither sent nor known; the verifier's refusal.
    pub async fn identify(&self, ask: &Ask, from: NodeIndex) -> Result<Option<Arc<VerifiedIdentity>>, Refusal> {
        if ask.request.mode == Mode::Env {
            return Ok(None);
        }
        let hash = ask.request.evidence_hash;
        let id = expected_intent_id(ask, from);
        let collateral_id = read(&*self.log, |state| state.intents.get(&id).map_or(state.collateral_id, |row| row.collateral_id))?;
        if ask.evidence.is_empty() {
            let needed = || Refusal::new(RefusalCode::NeedEvidence, "evidence judged here before, or sent", "neither");
            return self.judged(&hash, &collateral_id).map(Some).ok_or_else(needed);
        }
        check_evidence_hash(&ask.request, &ask.evidence)?;
        if let Some(identity) = self.judged(&hash, &collateral_id) {
            return Ok(Some(identity));
        }
        let identity = self.verifier.verify(Arc::from(ask.evidence.as_slice()), collateral_id).await?;
        lock(&self.sessions).put(hash, Arc::clone(&identity));
        Ok(Some(identity))
    }

    /// Whether evidence of this hash was judged here, whatever became of the verdict.
    pub(crate) fn has_judged(&self, hash: &[u8; 32]) -> bool {
        lock(&self.sessions).get(hash).is_some()
    }

    /// The verdict on evidence of this hash, while it holds.
    fn judged(&self, hash: &[u8; 32], collateral_id: &[u8; 32]) -> Option<Arc<VerifiedIdentity>> {
        let known = lock(&self.sessions).get(hash);
        known.filter(|identity| identity.earliest_expiry() > (self.now)() && identity.collateral_id() == collateral_id)
    }

    /// Judges evidence with the collateral in force.
    ///
    /// # Errors
    /// The verifier's refusal.
    pub async fn verify(&self, evidence: Arc<[u8]>) -> Result<Arc<VerifiedIdentity>, Refusal> {
        let collateral_id = read(&*self.log, |state| state.collateral_id)?;
        self.verifier.verify(evidence, collateral_id).await
    }

    /// Takes a request early: verifies and judges it beside the commit. `from`: index of the node that brings it.
    ///
    /// # Errors
    /// The first rule broken.
    pub async fn ask(&self, mut ask: Ask, from: NodeIndex) -> Result<(), Refusal> {
        let identity = self.identify(&ask, from).await?;
        ask.evidence.clear();
        let attributed = self.judge(Arc::new(ask), from, &identity).await?;
        self.keep(attributed, identity);
        Ok(())
    }

    /// Judges a request against the applied state, who asks it included; the proof of that is the answer.
    ///
    /// # Errors
    /// The first rule broken.
    pub async fn judge(&self, ask: Arc<Ask>, from: NodeIndex, identity: &Option<Arc<VerifiedIdentity>>) -> Result<AttributedAsk, Refusal> {
        let request = Arc::clone(&ask);
        self.permitted(&request.request, identity, |permit| self.policy.precheck(Arc::clone(&ask), from, identity.as_deref(), permit)).await
    }

    /// Judges with what is leased; where the judgement wants the authority's word and has none, asks for it and judges again. So nobody
    /// is asked about a guest that any other rule refuses, and a lease that is in use costs no wait.
    async fn permitted<T>(
        &self,
        request: &RelReq,
        identity: &Option<Arc<VerifiedIdentity>>,
        judge: impl Fn(Option<&Permit>) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let (Some(authority), Some(identity)) = (&self.authority, identity) else { return judge(None) };
        match judge(authority.leased(request, identity).as_ref()) {
            Err(refusal) if refusal.code == RefusalCode::AuthorityMissing => {}
            judged => return judged,
        }
        let permit = authority.permit(request, identity).await?;
        judge(Some(&permit))
    }

    /// Keeps a request that was judged here until its `go`.
    pub fn keep(&self, attributed: AttributedAsk, identity: Option<Arc<VerifiedIdentity>>) {
        let id = attributed.intent().id();
        lock(&self.pending).put(id, Pending { attributed, identity });
    }

    /// Answers a request whose intent is committed at `go.pos`.
    ///
    /// # Errors
    /// [`RefusalCode::NotYet`] when this node has not applied that position within 500 ms; else the first rule broken.
    pub async fn go(&self, go: Go) -> Result<Out, Refusal> {
        let answer = async { self.shares.evaluate(self.cleared(go).await?).await }.await;
        metrics::partial(metrics::outcome(&answer));
        answer
    }

    /// The same for a request that this node combines itself.
    ///
    /// # Errors
    /// As [`Self::go`].
    pub(crate) async fn go_own(&self, go: Go, is_known: bool) -> Result<OwnPartial, Refusal> {
        let answer = async { self.shares.evaluate_own(self.cleared(go).await?, is_known).await }.await;
        metrics::partial(metrics::outcome(&answer));
        answer
    }

    /// Judges what was asked before against its row.
    async fn cleared(&self, go: Go) -> Result<Clearance, Refusal> {
        let pending = lock(&self.pending).get(&go.intent_id);
        let Some(Pending { attributed, identity }) = pending else {
            return Err(Refusal::new(RefusalCode::IntentUnknown, "an ask before its go", "none").retry_after(50));
        };
        self.applied(go.pos).await?;
        let clear = |permit: Option<&Permit>| self.policy.clear(&attributed, &go, identity.as_deref(), permit);
        self.permitted(&attributed.ask().request, &identity, clear).await
    }

    async fn applied(&self, pos: u64) -> Result<(), Refusal> {
        let mut applied = self.log.applied();
        let reached = async {
            while read(&*self.log, |state| state.size)? <= pos {
                applied.changed().await.map_err(|_| crate::mailbox::gone("raft"))?;
            }
            Ok(())
        };
        match tokio::time::timeout(Duration::from_millis(HOLDER_WAIT_MS_MAX), reached).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let size = read(&*self.log, |state| state.size)?;
                Err(Refusal::new(RefusalCode::NotYet, format!("position {pos} applied"), format!("{size} leaves applied")).retry_after(100))
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
