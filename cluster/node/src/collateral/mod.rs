//! Collateral at this node: what the log pins, what an operator brought, what has to be fetched.
//!
//! Owns: reading pinned bundles for the judges, renewal before they end. Never: decides what may be pinned (`apply` does), reaches
//! the network on the way of a request. Source: architecture.md §6 `Collateral`; ADR 0010.

pub(crate) mod pinned;
pub(crate) mod service;
mod sources;

use std::sync::Arc;
use std::time::Duration;

use dstack_actors::ports::{Log, Now, read};
use dstack_protocol::collateral::Pin;
use dstack_protocol::command::{Command, CommandAnswer};
use dstack_protocol::{Refusal, RefusalCode};
use dstack_raft::machine::Birth;
use dstack_raft::machine::collateral::{Standing, judge};

pub(crate) use pinned::Pinned;

use crate::node::Services;

const PATIENCE: Duration = Duration::from_secs(8);

/// What a pin passes through at this node.
#[derive(Clone)]
pub(crate) struct Gate {
    /// Roots to judge under.
    pub(crate) birth: Arc<Birth>,
    /// The log.
    pub(crate) log: Arc<dyn Log>,
    /// Bundles here.
    pub(crate) pinned: Arc<Pinned>,
    /// Own clock.
    pub(crate) now: Now,
}

impl Gate {
    /// Judges a pin by this node's clock and keeps its bundle for connections between nodes.
    ///
    /// # Errors
    /// The first rule broken.
    pub(crate) async fn stage(&self, pin: &Pin) -> Result<(), Refusal> {
        let standing = read(&*self.log, Standing::of)?.at((self.now)());
        let bundle = self.judged(standing, pin).await?;
        self.pinned.stage(bundle);
        Ok(())
    }

    /// Judges a pin at log time and proposes it: what the log would refuse costs no entry.
    ///
    /// # Errors
    /// The first rule broken, or what the log says.
    pub(crate) async fn propose(&self, pin: Pin) -> Result<CommandAnswer, Refusal> {
        let standing = read(&*self.log, Standing::of)?;
        self.judged(standing, &pin).await?;
        let answer = self.log.propose(Command::Collateral(pin), PATIENCE).await?;
        match answer.outcomes.first().and_then(|outcome| RefusalCode::from_number(outcome.code)) {
            None => Ok(answer),
            Some(code) => Err(Refusal::new(code, "collateral that the log accepts", "rejected; it is recorded")),
        }
    }

    /// Judged on a blocking thread, guarded against the parsers' panics.
    async fn judged(&self, standing: Standing, pin: &Pin) -> Result<dstack_attest::CollateralBundle, Refusal> {
        let (birth, pin) = (Arc::clone(&self.birth), pin.clone());
        let judged = tokio::task::spawn_blocking(move || dstack_runtime::guard::run(|| judge(&standing, birth.roots(), &pin))).await;
        match judged {
            Ok(Ok(verdict)) => verdict,
            _ => Err(Refusal::new(RefusalCode::InternalParser, "a verdict", "the parser failed on this bundle")),
        }
    }
}

/// Takes a pin from an operator.
///
/// # Errors
/// The first rule broken; [`RefusalCode::NotYet`] where it is good and the log cannot take it at once: then this node goes on trying.
pub(crate) async fn bring(services: &Services, pin: Pin) -> Result<CommandAnswer, Refusal> {
    let gate = services.collateral_gate();
    gate.stage(&pin).await?;
    let proposed = gate.propose(pin).await;
    proposed.map_err(|refusal| match refusal.code {
        RefusalCode::CollateralInvalid | RefusalCode::NoLeader | RefusalCode::NoQuorum | RefusalCode::DeadlineExceeded => {
            let got = format!("kept here and proposed again: {}: {}", refusal.code, refusal.got);
            Refusal::new(RefusalCode::NotYet, "the log takes the bundle", got).retry_after(2_000)
        }
        _ => refusal,
    })
}

impl Services {
    /// What a pin of collateral passes through.
    pub(crate) fn collateral_gate(&self) -> Gate {
        Gate {
            birth: Arc::clone(&self.birth),
            log: Arc::clone(&self.log),
            pinned: Arc::clone(&self.trust.pinned),
            now: Arc::clone(&self.now),
        }
    }
}
