//! Keeps the pinned collateral fresh: the leader asks the publishers, in a thread of its own, and proposes what is newer.
//!
//! Owns: when to ask and when to propose. Never: runs on the way of a request, decides what may be pinned, asks while another node
//! leads (unless nobody does and the collateral is over: then nodes could not form a quorum to pin any).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dstack_actors::ports::Peers;
use dstack_attest::CollateralBundle;
use dstack_collateral::{Backoff, Refreshed};
use dstack_protocol::collateral::{Pin, Wants};
use dstack_protocol::rpc::PATH_PEER_WANTS;
use dstack_protocol::{Refusal, RefusalCode, Seat, Wire as _};
use tracing::{debug, info, warn};

use super::Gate;
use super::pinned::dates;
use super::sources::Sources;
use crate::config::CollateralConfig;

/// How often it looks whether something is to be done.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A staged bundle is proposed this often until the log has it.
const PROPOSE_EVERY: Duration = Duration::from_secs(5);

/// After what was missing was asked for, it is not asked for again for so long, whatever evidence names meanwhile.
const MISSING_EVERY: Duration = Duration::from_secs(30);
/// How long the leader may take to note what is missing here.
const TELL_PATIENCE: Duration = Duration::from_secs(3);

/// What evidence here needed and the collateral in force lacks, since the last look.
pub(crate) type Missing = Arc<dyn Fn() -> Wants + Send + Sync>;

/// What other nodes told this one, and what was noted here; bounded as one message is.
#[derive(Debug, Default)]
pub(crate) struct Noted(Mutex<Wants>);

impl Noted {
    /// Adds what there is room for.
    pub(crate) fn add(&self, wants: Wants) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).add(wants.0);
    }

    fn take(&self) -> Wants {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn is_empty(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0.is_empty()
    }
}

/// Who leads, as this node knows.
pub(crate) type Leader = Arc<dyn Fn() -> Option<Seat> + Send + Sync>;

/// What one round asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Round {
    /// Everything in force anew, and what is missing.
    All,
    /// What is missing.
    Missing,
}

/// See the module text.
pub(crate) struct Service {
    /// What a pin passes through.
    pub(crate) gate: Gate,
    /// How.
    pub(crate) config: CollateralConfig,
    /// What evidence here lacked.
    pub(crate) missing: Missing,
    /// The same of all nodes, where this one leads.
    pub(crate) noted: Arc<Noted>,
    /// Who leads.
    pub(crate) leader: Leader,
    /// Other nodes.
    pub(crate) peers: Arc<dyn Peers>,
}

impl Service {
    /// Runs until it is dropped.
    pub(crate) async fn run(self) {
        let sources = Sources::of(&self.config);
        let mut backoff = Backoff::new(Duration::from_secs(2), self.config.refresh_every.max(Duration::from_secs(2)));
        let missing_every = MISSING_EVERY.min(self.config.refresh_every);
        let mut missing_backoff = Backoff::new(missing_every, self.config.refresh_every.max(missing_every));
        // A node that begins to lead asks soon: the one before may have gone without.
        let mut next = Instant::now();
        let mut next_missing = Instant::now();
        let mut proposed: Option<Instant> = None;
        let mut led = false;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            if self.gate.pinned.staged().is_some() && proposed.is_none_or(|at| at.elapsed() >= PROPOSE_EVERY) {
                proposed = Some(Instant::now());
                self.propose_staged().await;
            }
            let leads = self.gate.log.leads();
            if leads && !led {
                next = Instant::now();
            }
            led = leads;
            self.noted.add((self.missing)());
            if !leads {
                self.tell().await;
            }
            let Some(current) = self.gate.pinned.current() else { continue };
            if !self.config.fetch || !(leads || self.is_over(&current)) {
                continue;
            }
            let now = Instant::now();
            if now >= next {
                let pause = match self.fetch(&sources, current, Round::All).await {
                    Ok(()) => {
                        backoff.reset();
                        self.config.refresh_every
                    }
                    Err(()) => backoff.next(jitter()),
                };
                next = Instant::now() + pause.min(self.until_renewal());
            } else if now >= next_missing && !self.noted.is_empty() {
                // Strangers name what is missing: what nobody has is asked for ever more rarely.
                let pause = match self.fetch(&sources, current, Round::Missing).await {
                    Ok(()) => {
                        missing_backoff.reset();
                        missing_every
                    }
                    Err(()) => missing_backoff.next(jitter()),
                };
                next_missing = Instant::now() + pause;
            }
        }
    }

    /// Tells the leader what evidence here lacked. Kept where it could not be told.
    async fn tell(&self) {
        let Some(leader) = (self.leader)() else { return };
        let wants = self.noted.take();
        if wants.0.is_empty() {
            return;
        }
        if let Err(refusal) = self.peers.post(leader, PATH_PEER_WANTS, wants.encode(), TELL_PATIENCE).await {
            debug!(%leader, %refusal, "what is missing could not be told");
            self.noted.add(wants);
        }
    }

    /// Whether some part has ended by this node's clock.
    fn is_over(&self, bundle: &CollateralBundle) -> bool {
        dates(bundle).is_some_and(|dates| dates.next_update < (self.gate.now)())
    }

    /// Time until renewal begins; inside it, the refresh interval is shortened to a tenth of what is left.
    fn until_renewal(&self) -> Duration {
        let now = (self.gate.now)();
        let Some(dates) = self.gate.pinned.dates() else { return Duration::MAX };
        let ends = dates.next_update.min(dates.renewed_issue.plus_ms(self.config.age_ms_max));
        let left = Duration::from_millis(ends.since(now));
        match left.checked_sub(self.config.renew_before) {
            Some(before) if !before.is_zero() => before,
            _ => (left / 10).clamp(Duration::from_secs(1), self.config.refresh_every),
        }
    }

    /// Asks, and proposes or stages what is newer. `Err`: ask again sooner.
    async fn fetch(&self, sources: &Sources, current: Arc<CollateralBundle>, round: Round) -> Result<(), ()> {
        let (sources, birth, now, wants) = (sources.clone(), Arc::clone(&self.gate.birth), (self.gate.now)(), self.noted.take());
        let asked =
            tokio::task::spawn_blocking(move || dstack_runtime::guard::run(|| sources.ask(&current, &wants, round, birth.roots(), now)));
        let refreshed: Refreshed = match asked.await {
            Ok(Ok(Ok(refreshed))) => refreshed,
            Ok(Ok(Err(error))) => {
                warn!(%error, "collateral not renewed");
                return fetched("failed", Err(()));
            }
            _ => {
                warn!("the parser failed on what a collateral endpoint answered");
                return fetched("failed", Err(()));
            }
        };
        for failure in &refreshed.failures {
            warn!(error = %failure, "collateral endpoint");
        }
        let complete = if refreshed.unanswered.is_empty() && refreshed.unanswered_others == 0 { Ok(()) } else { Err(()) };
        let Some(bundle) = refreshed.bundle else {
            return fetched(if complete.is_ok() { "unchanged" } else { "failed" }, complete);
        };
        let pin = Pin { dropped: Vec::new(), bundle: bundle.bytes().to_vec() };
        match self.gate.propose(pin.clone()).await {
            Ok(_) => {
                info!(collateral_id = hex::encode(bundle.id()), platforms = refreshed.renewed.len(), "collateral renewed");
                fetched("renewed", complete)
            }
            Err(refusal) => {
                self.refused(&refusal);
                // Good by this node's clock and not yet by log time, or there is no quorum: tried again from here.
                let staged = self.gate.stage(&pin).await;
                fetched("staged", staged.map_err(drop).and(complete))
            }
        }
    }

    async fn propose_staged(&self) {
        let Some(staged) = self.gate.pinned.staged() else { return };
        let pin = Pin { dropped: Vec::new(), bundle: staged.bytes().to_vec() };
        match self.gate.propose(pin).await {
            Ok(_) => info!(collateral_id = hex::encode(staged.id()), "staged collateral pinned"),
            Err(refusal) => self.refused(&refusal),
        }
    }

    fn refused(&self, refusal: &Refusal) {
        match refusal.code {
            RefusalCode::CollateralUnchanged => {}
            code if code.retryable() || code == RefusalCode::CollateralInvalid => {
                debug!(%code, got = refusal.got, "collateral not pinned yet");
            }
            code => warn!(%code, expected = refusal.expected, got = refusal.got, "collateral refused"),
        }
    }
}

fn fetched<T>(outcome: &'static str, result: T) -> T {
    metrics::counter!("kms_node_collateral_fetches_total", "outcome" => outcome).increment(1);
    result
}

fn jitter() -> u32 {
    let mut bytes = [0; 4];
    // Without randomness the pause is the shortest: no harm.
    let _ = getrandom::fill(&mut bytes);
    u32::from_be_bytes(bytes)
}
