//! The pool that judges evidence: CPU bound, on its own threads, bounded, refusing early.
//!
//! Owns: the threads and their gate. Never: keeps a verdict (the judge's cache does), decides policy. Source: architecture.md §6.

use std::sync::Arc;
use std::time::Instant;

use actix::{Actor, Addr, Handler, Message, SyncArbiter, SyncContext};
use dstack_attest::VerifiedIdentity;
use dstack_protocol::Refusal;

use crate::mailbox::{Gate, of_mailbox};
use crate::metrics;
use crate::ports::{Judge, Now};

const NAME: &str = "verifier";

/// One thread of the pool.
struct Verifier {
    judge: Judge,
    now: Now,
}

impl Actor for Verifier {
    type Context = SyncContext<Self>;
}

/// Evidence to judge.
#[derive(Message)]
#[rtype(result = "Result<Arc<VerifiedIdentity>, Refusal>")]
struct Verify {
    evidence: Arc<[u8]>,
    collateral_id: [u8; 32],
}

impl Handler<Verify> for Verifier {
    type Result = Result<Arc<VerifiedIdentity>, Refusal>;

    fn handle(&mut self, message: Verify, _context: &mut Self::Context) -> Self::Result {
        let began = Instant::now();
        let verdict = (self.judge)(&message.evidence, &message.collateral_id, (self.now)());
        metrics::stage("verify", began.elapsed());
        verdict
    }
}

/// The pool, for callers.
#[derive(Clone)]
pub struct VerifierPool {
    address: Addr<Verifier>,
    gate: Gate,
}

impl VerifierPool {
    /// Starts `threads` threads with room for `capacity` pieces of evidence, waiting ones included. Inside an actix system.
    #[must_use]
    pub fn start(threads: usize, capacity: usize, judge: Judge, now: Now) -> Self {
        let address = SyncArbiter::start(threads.max(1), move || Verifier { judge: Arc::clone(&judge), now: Arc::clone(&now) });
        Self { address, gate: Gate::new(NAME, capacity) }
    }

    /// Judges evidence with the collateral bundle of that id.
    ///
    /// # Errors
    /// The judge's refusal, or [`dstack_protocol::RefusalCode::Overloaded`] at once.
    pub async fn verify(&self, evidence: Arc<[u8]>, collateral_id: [u8; 32]) -> Result<Arc<VerifiedIdentity>, Refusal> {
        let _place = self.gate.enter()?;
        self.address.send(Verify { evidence, collateral_id }).await.map_err(|error| of_mailbox(NAME, error))?
    }

    /// Places that are free.
    #[must_use]
    pub fn free(&self) -> usize {
        self.gate.free()
    }
}
