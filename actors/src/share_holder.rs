//! The only actor that touches a share: evaluates what was cleared, seals the partial.
//!
//! Owns: the shares of the active epoch in locked memory, one of each root, its threads. Never: evaluates without a [`Clearance`],
//! evaluates a point that came from outside, uses a share of one root for another (each has a type of its own).
//! Source: threshold.md §0 "Roots", §1.2, §2.3.

mod pairs;
mod sign;

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Instant;

use actix::{Actor, Addr, Handler, Message, SyncArbiter, SyncContext};
use dstack_protocol::release::{Out, PartialPlain};
use dstack_protocol::{ClusterId, Refusal, RefusalCode, RootTag};
use dstack_release::clearance::Clearance;
use dstack_threshold::answer::{AnswerContext, seal_partial};
use dstack_threshold::prf::{Batch, Evaluation, HashedInputs, PrfShare, evaluate, evaluate_unproven};
use dstack_threshold::share::{CaShare, IdShare, RootShare, ShareId};

pub use self::pairs::Pairs;
use self::pairs::PairsInUse;
pub use self::sign::{EcdsaRun, Under};
use crate::mailbox::{Gate, of_mailbox};
use crate::metrics;
use crate::ports::{random, random_secret};

const NAME: &str = "share_holder";

/// The shares in use, each in its own type.
#[derive(Default)]
struct Shares {
    prf: Option<Arc<PrfShare>>,
    ca: Option<Arc<CaShare>>,
    id: Option<Arc<IdShare>>,
    pairs: PairsInUse,
}

type Slot = Arc<RwLock<Shares>>;

struct ShareHolder {
    cluster_id: ClusterId,
    shares: Slot,
    inputs: HashedInputs,
}

impl Actor for ShareHolder {
    type Context = SyncContext<Self>;
}

/// A cleared request to evaluate, for whoever holds its one-time key.
#[derive(Message)]
#[rtype(result = "Result<Out, Refusal>")]
struct Evaluate {
    clearance: Clearance,
}

/// A cleared request of this node itself: modes L and E.
#[derive(Message)]
#[rtype(result = "Result<OwnPartial, Refusal>")]
struct EvaluateOwn {
    clearance: Clearance,
    is_known: bool,
}

/// This node's partial of a request that it combines itself. It leaves the process as little as a share does.
pub enum OwnPartial {
    /// With its proof.
    Proven(PartialPlain),
    /// For outputs that are known: what comes out of the combination is compared with them.
    Unproven(Evaluation),
}

impl Handler<Evaluate> for ShareHolder {
    type Result = Result<Out, Refusal>;

    fn handle(&mut self, message: Evaluate, _context: &mut Self::Context) -> Self::Result {
        let began = Instant::now();
        let share = reading(&self.shares).prf.clone().ok_or_else(no_share)?;
        let out = self.batch(&share, &message.clearance).and_then(|batch| partial(&self.cluster_id, &share, &message.clearance, &batch));
        metrics::stage("evaluate", began.elapsed());
        out
    }
}

impl Handler<EvaluateOwn> for ShareHolder {
    type Result = Result<OwnPartial, Refusal>;

    fn handle(&mut self, message: EvaluateOwn, _context: &mut Self::Context) -> Self::Result {
        let began = Instant::now();
        let share = reading(&self.shares).prf.clone().ok_or_else(no_share)?;
        let batch = self.batch(&share, &message.clearance)?;
        let own = if message.is_known {
            OwnPartial::Unproven(evaluate_unproven(&share, &batch))
        } else {
            OwnPartial::Proven(proven(&share, &message.clearance, &batch)?)
        };
        metrics::stage("evaluate", began.elapsed());
        Ok(own)
    }
}

impl ShareHolder {
    /// What `clearance` allows, as group elements.
    fn batch(&mut self, share: &PrfShare, clearance: &Clearance) -> Result<Batch, Refusal> {
        let grant = clearance.grant();
        if share.generation() != grant.generation() {
            return Err(Refusal::new(RefusalCode::UnknownGeneration, share.generation().to_string(), grant.generation().to_string()));
        }
        Batch::remembered(&mut self.inputs, &self.cluster_id, &grant.app_id(), grant.wishes())
            .map_err(|error| Refusal::new(RefusalCode::Internal, "a partial", error.to_string()))
    }
}

fn proven(share: &PrfShare, clearance: &Clearance, batch: &Batch) -> Result<PartialPlain, Refusal> {
    let row = clearance.row();
    let evaluation = evaluate(share, batch, &random::<64>()?);
    let plain = evaluation.into_plain(row.pos, row.size, row.log_root);
    #[cfg(feature = "insecure-rogue")]
    let plain = crate::rogue::twisted(plain);
    Ok(plain)
}

fn partial(cluster_id: &ClusterId, share: &PrfShare, clearance: &Clearance, batch: &Batch) -> Result<Out, Refusal> {
    let (plain, grant) = (proven(share, clearance, batch)?, clearance.grant());
    let context = AnswerContext { cluster_id, generation: grant.generation(), req_hash: clearance.req_hash() };
    seal_partial(plain, &context, clearance.epk(), random_secret()?)
        .map_err(|error| Refusal::new(RefusalCode::Malformed, "an X25519 key that is not of low order", error.to_string()))
}

fn writing(slot: &Slot) -> RwLockWriteGuard<'_, Shares> {
    slot.write().unwrap_or_else(PoisonError::into_inner)
}

fn reading(slot: &Slot) -> RwLockReadGuard<'_, Shares> {
    slot.read().unwrap_or_else(PoisonError::into_inner)
}

fn no_share() -> Refusal {
    Refusal::new(RefusalCode::NotReady, "a share of the active epoch", "none").retry_after(1000)
}

/// The share holder, for callers.
#[derive(Clone)]
pub struct ShareHolderPool {
    address: Addr<ShareHolder>,
    gate: Gate,
    shares: Slot,
}

impl ShareHolderPool {
    /// Starts `threads` threads without any share. Inside an actix system.
    #[must_use]
    pub fn start(threads: usize, capacity: usize, cluster_id: ClusterId) -> Self {
        let shares: Slot = Arc::default();
        let slot = Arc::clone(&shares);
        let address = SyncArbiter::start(threads.max(1), move || ShareHolder {
            cluster_id,
            shares: Arc::clone(&slot),
            inputs: HashedInputs::default(),
        });
        Self { address, gate: Gate::new(NAME, capacity), shares }
    }

    /// Takes a share into use; the one of that root before it is wiped with its last use.
    pub fn install(&self, share: impl Into<RootShare>) {
        let share = share.into();
        let mut shares = writing(&self.shares);
        match share {
            RootShare::Prf(share) => shares.prf = Some(Arc::new(share)),
            RootShare::Ca(share) => shares.ca = Some(Arc::new(share)),
            RootShare::Id(share) => shares.id = Some(Arc::new(share)),
        }
    }

    /// The share of root `prf` in use.
    #[must_use]
    pub fn in_use(&self) -> Option<ShareId> {
        self.in_use_of(RootTag::Prf)
    }

    /// The share of `root` in use.
    #[must_use]
    pub fn in_use_of(&self, root: RootTag) -> Option<ShareId> {
        let shares = reading(&self.shares);
        match root {
            RootTag::Prf => shares.prf.as_ref().map(|share| share.share_id()),
            RootTag::Ca => shares.ca.as_ref().map(|share| share.id()),
            RootTag::Id => shares.id.as_ref().map(|share| share.id()),
        }
    }

    /// Evaluates a cleared request.
    ///
    /// # Errors
    /// [`RefusalCode::NotReady`] without a share, [`RefusalCode::Overloaded`] at once when full.
    pub async fn evaluate(&self, clearance: Clearance) -> Result<Out, Refusal> {
        let _place = self.gate.enter()?;
        self.address.send(Evaluate { clearance }).await.map_err(|error| of_mailbox(NAME, error))?
    }

    /// Evaluates a cleared request that this node combines itself. `is_known`: every output is, so that no proof is needed.
    ///
    /// # Errors
    /// As [`Self::evaluate`].
    pub(crate) async fn evaluate_own(&self, clearance: Clearance, is_known: bool) -> Result<OwnPartial, Refusal> {
        let _place = self.gate.enter()?;
        self.address.send(EvaluateOwn { clearance, is_known }).await.map_err(|error| of_mailbox(NAME, error))?
    }
}
