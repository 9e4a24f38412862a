//! Keeps the pinned collateral fresh: the leader asks the publishers, in a thread of its own, and proposes what is newer.
//!
//! Owns: when to ask and when to propose. Never: runs on the way of a request, decides what may be pinned, asks while another node
//! leads (unless nobody does and the collateral is over: then nodes could not form a quorum to pin any).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dstack_attest::CollateralBundle;
use dstack_collateral::{Backoff, Endpoint, Http, Intel, Refreshed, refresh};
use dstack_protocol::collateral::Pin;
use dstack_protocol::{Refusal, RefusalCode};
use tracing::{debug, info, warn};

use super::Gate;
use super::pinned::dates;
use crate::config::CollateralConfig;

/// How often it looks whether something is to be done.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A staged bundle is proposed this often until the log has it.
const PROPOSE_EVERY: Duration = Duration::from_secs(5);

/// Platforms whose collateral is missing, as evidence named them since the last look.
pub(crate) type Missing = Arc<dyn Fn() -> BTreeSet<[u8; 6]> + Send + Sync>;

/// See the module text.
pub(crate) struct Service {
    /// What a pin passes through.
    pub(crate) gate: Gate,
    /// How.
    pub(crate) config: CollateralConfig,
    /// Platforms to ask for beside those of the bundle in force.
    pub(crate) missing: Missing,
}

impl Service {
    /// Runs until it is dropped.
    pub(crate) async fn run(self) {
        let endpoints = self.endpoints();
        let mut backoff = Backoff::new(Duration::from_secs(2), self.config.refresh_every.max(Duration::from_secs(2)));
        // A node that begins to lead asks soon: the one before may have gone without.
        let mut next = Instant::now();
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
            let Some(current) = self.gate.pinned.current() else { continue };
            if !self.config.fetch || !(leads || self.is_over(&current)) || Instant::now() < next {
                continue;
            }
            let pause = match self.fetch(&endpoints, current).await {
                Ok(()) => {
                    backoff.reset();
                    self.config.refresh_every
                }
                Err(()) => backoff.next(jitter()),
            };
            next = Instant::now() + pause.min(self.until_renewal());
        }
    }

    fn endpoints(&self) -> Vec<Intel> {
        let parsed = self.config.intel.iter().map(|url| Endpoint::parse(url));
        parsed.filter_map(Result::ok).map(|endpoint| Intel::new(Http::default(), endpoint)).collect()
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
    async fn fetch(&self, endpoints: &[Intel], current: Arc<CollateralBundle>) -> Result<(), ()> {
        let (endpoints, birth, now, more) = (endpoints.to_vec(), Arc::clone(&self.gate.birth), (self.gate.now)(), (self.missing)());
        let asked =
            tokio::task::spawn_blocking(move || dstack_runtime::guard::run(|| refresh(&current, &more, &endpoints, birth.roots(), now)));
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
        let complete = if refreshed.unanswered.is_empty() { Ok(()) } else { Err(()) };
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
