//! The only actor that touches a share: evaluates what was cleared, seals the partial.
//!
//! Owns: the share of the active epoch in locked memory, its threads. Never: evaluates without a [`Clearance`], evaluates a point
//! that came from outside. Source: threshold.md §1.2, §2.3.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use actix::{Actor, Addr, Handler, Message, SyncArbiter, SyncContext};
use dstack_protocol::release::Out;
use dstack_protocol::{ClusterId, Epoch, Generation, NodeIndex, Refusal, RefusalCode};
use dstack_release::clearance::Clearance;
use dstack_threshold::answer::{AnswerContext, seal_partial};
use dstack_threshold::prf::{Batch, PrfShare, evaluate};

use crate::mailbox::{Gate, of_mailbox};
use crate::metrics;
use crate::ports::{random, random_secret};

const NAME: &str = "share_holder";

type Slot = Arc<RwLock<Option<Arc<PrfShare>>>>;

struct ShareHolder {
    cluster_id: ClusterId,
    share: Slot,
}

impl Actor for ShareHolder {
    type Context = SyncContext<Self>;
}

/// A cleared request to evaluate.
#[derive(Message)]
#[rtype(result = "Result<Out, Refusal>")]
struct Evaluate {
    clearance: Clearance,
}

impl Handler<Evaluate> for ShareHolder {
    type Result = Result<Out, Refusal>;

    fn handle(&mut self, message: Evaluate, _context: &mut Self::Context) -> Self::Result {
        let began = Instant::now();
        let share = current(&self.share).ok_or_else(no_share)?;
        let out = partial(&self.cluster_id, &share, &message.clearance);
        metrics::stage("evaluate", began.elapsed());
        out
    }
}

fn partial(cluster_id: &ClusterId, share: &PrfShare, clearance: &Clearance) -> Result<Out, Refusal> {
    let (grant, row) = (clearance.grant(), clearance.row());
    if share.generation() != grant.generation() {
        return Err(Refusal::new(RefusalCode::UnknownGeneration, share.generation().to_string(), grant.generation().to_string()));
    }
    let internal = |what: String| Refusal::new(RefusalCode::Internal, "a partial", what);
    let batch = Batch::new(cluster_id, &grant.app_id(), grant.wishes()).map_err(|error| internal(error.to_string()))?;
    let evaluation = evaluate(share, &batch, &random::<64>()?);
    let plain = evaluation.into_plain(row.pos, row.size, row.log_root);
    #[cfg(feature = "insecure-rogue")]
    let plain = crate::rogue::twisted(plain);
    let context = AnswerContext { cluster_id, generation: grant.generation(), req_hash: clearance.req_hash() };
    seal_partial(plain, &context, clearance.epk(), random_secret()?)
        .map_err(|error| Refusal::new(RefusalCode::Malformed, "an X25519 key that is not of low order", error.to_string()))
}

fn current(slot: &Slot) -> Option<Arc<PrfShare>> {
    slot.read().unwrap_or_else(PoisonError::into_inner).clone()
}

fn no_share() -> Refusal {
    Refusal::new(RefusalCode::NotReady, "a share of the active epoch", "none").retry_after(1000)
}

/// What the share in use is; public.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShareInUse {
    /// Holder.
    pub index: NodeIndex,
    /// Generation of the root.
    pub generation: Generation,
    /// Epoch of the share.
    pub epoch: Epoch,
}

/// The share holder, for callers.
#[derive(Clone)]
pub struct ShareHolderPool {
    address: Addr<ShareHolder>,
    gate: Gate,
    share: Slot,
}

impl ShareHolderPool {
    /// Starts `threads` threads without a share. Inside an actix system.
    #[must_use]
    pub fn start(threads: usize, capacity: usize, cluster_id: ClusterId) -> Self {
        let share: Slot = Arc::default();
        let slot = Arc::clone(&share);
        let address = SyncArbiter::start(threads.max(1), move || ShareHolder { cluster_id, share: Arc::clone(&slot) });
        Self { address, gate: Gate::new(NAME, capacity), share }
    }

    /// Takes a share into use; the one before is wiped with its last evaluation.
    pub fn install(&self, share: PrfShare) {
        *self.share.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(share));
    }

    /// The share in use.
    #[must_use]
    pub fn in_use(&self) -> Option<ShareInUse> {
        current(&self.share).map(|share| ShareInUse { index: share.index(), generation: share.generation(), epoch: share.epoch() })
    }

    /// Evaluates a cleared request.
    ///
    /// # Errors
    /// [`RefusalCode::NotReady`] without a share, [`RefusalCode::Overloaded`] at once when full.
    pub async fn evaluate(&self, clearance: Clearance) -> Result<Out, Refusal> {
        let _place = self.gate.enter()?;
        self.address.send(Evaluate { clearance }).await.map_err(|error| of_mailbox(NAME, error))?
    }
}
