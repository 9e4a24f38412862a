//! The actor that takes part in key generation, and leads it when this node leads the log.
//!
//! Owns: this node's secrets of the open attempt, in memory only; when it looks at the state. Never: decides what is valid (`apply`
//! and the threshold core do). Of an attempt nothing is persisted outside the log but the finished share, sealed, before `Ready`: a
//! restart before `Ready` makes the attempt fail, one after it does not. Source: threshold.md §3, §6.

mod attempt;
mod seen;
mod shares;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, ActorFutureExt, AsyncContext, Context, Handler, Message, WrapFuture};
use dstack_protocol::ceremony::{MessageKind, Open, ReadyBody, What};
use dstack_protocol::command::Command;
use dstack_protocol::{ClusterId, Epoch, Generation, Refusal, RefusalCode, RootTag, Seat};
use dstack_secret::{Locked, Secret, SecretBytes};
use dstack_threshold::dkg::{EncryptionKey, RootParticipant};
use dstack_threshold::message::NodeKey;
use dstack_threshold::share_file::ShareName;
use tracing::{info, warn};

use self::seen::{Seen, see};
use crate::ports::{Evidence, Log, read};
use crate::share_holder::ShareHolderPool;
use crate::signing::pairwise::Setups;

/// How often the state is looked at, beside every change.
const LOOK_EVERY: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(5);
/// Attempts that the leader opens by itself. Each aborted one leaves its last dealer one bit of choice (threshold.md §3), so after
/// these the operators decide.
pub const ATTEMPTS_UNATTENDED_MAX: u32 = 8;

/// Judges the evidence in another node's Join: who it is, what it measures, that it binds `report_data`.
pub type NodeJudge = Arc<dyn Fn(Seat, &[u8], &[u8; 64]) -> Result<(), Refusal> + Send + Sync>;

/// Receives a dealer constant of a root.
#[cfg(feature = "insecure-test-export")]
pub type Export = Arc<dyn Fn(RootTag, &[u8; 32]) + Send + Sync>;

/// Shares at rest, where the platform can seal.
pub trait ShareFiles: Send + Sync {
    /// The sealed share of that name, if there is one that opens.
    fn load(&self, name: &ShareName) -> Option<Secret<32>>;
    /// Seals a share.
    ///
    /// # Errors
    /// Says why; the share stays in memory only.
    fn save(&self, name: &ShareName, share: &Locked<32>) -> Result<(), String>;
    /// The sealed secrets of pairs that belong to the share of that name.
    fn load_pairs(&self, name: &ShareName) -> Option<SecretBytes>;
    /// Seals secrets of pairs.
    ///
    /// # Errors
    /// As [`ShareFiles::save`].
    fn save_pairs(&self, name: &ShareName, pairs: &SecretBytes) -> Result<(), String>;
}

/// What the actor works with.
#[derive(Clone)]
pub struct Parts {
    /// Cluster.
    pub cluster_id: ClusterId,
    /// This node's seat.
    pub seat: Seat,
    /// This node's key.
    pub node_key: Arc<NodeKey>,
    /// The log.
    pub log: Arc<dyn Log>,
    /// This node's device.
    pub evidence: Arc<dyn Evidence>,
    /// Judges other nodes.
    pub judge: NodeJudge,
    /// Takes the shares into use.
    pub shares: ShareHolderPool,
    /// Shares at rest.
    pub files: Arc<dyn ShareFiles>,
    /// Pairwise setups of the ECDSA roots.
    pub setups: Arc<Setups>,
    /// Receives this node's dealer constants, for the memory-search test.
    #[cfg(feature = "insecure-test-export")]
    pub export: Export,
}

/// See the module text.
pub struct Ceremony {
    parts: Parts,
    mine: Option<Mine>,
    busy: bool,
}

/// This node's part in one attempt.
struct Mine {
    attempt: u32,
    /// Keys of its Join, until each is used up by its root's participant.
    keys: BTreeMap<RootTag, EncryptionKey>,
    participants: BTreeMap<RootTag, RootParticipant>,
    /// Readys whose deals were checked, while their pairwise setup is still under way.
    checked: BTreeMap<RootTag, ReadyBody>,
    /// Whether every Join was judged; a rejected one means that this node posts no Ready.
    joins_judged: Option<Result<(), Refusal>>,
    joined: bool,
    /// Messages posted, which the state may not show yet, so that none is posted twice.
    posted: BTreeSet<(RootTag, MessageKind)>,
}

impl Ceremony {
    /// An actor that knows nothing of earlier attempts.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        Self { parts, mine: None, busy: false }
    }

    fn look(&mut self, context: &mut Context<Self>) {
        if self.busy {
            return;
        }
        self.busy = true;
        let (parts, mine) = (self.parts.clone(), self.mine.take());
        let step = async move {
            let mut mine = mine;
            let outcome = advance(&parts, &mut mine).await;
            (mine, outcome)
        };
        context.spawn(step.into_actor(self).map(|(mine, outcome), this, _context| {
            this.mine = mine;
            this.busy = false;
            if let Err(refusal) = outcome
                && !refusal.code.retryable()
                && refusal.code != RefusalCode::Duplicate
                && refusal.code != RefusalCode::OutOfOrder
            {
                warn!(code = %refusal.code, expected = refusal.expected, got = refusal.got, "ceremony step refused");
            }
        }));
    }
}

impl Actor for Ceremony {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.set_mailbox_capacity(64);
        context.run_interval(LOOK_EVERY, |this, context| this.look(context));
    }
}

impl actix::Supervised for Ceremony {
    fn restarting(&mut self, _context: &mut Self::Context) {
        // The state says where the attempt is; what this node held for it is gone, and the attempt times out.
        self.mine = None;
        self.busy = false;
    }
}

/// The state changed: look now.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Look;

impl Handler<Look> for Ceremony {
    type Result = ();
    fn handle(&mut self, _message: Look, context: &mut Self::Context) {
        self.look(context);
    }
}

async fn advance(parts: &Parts, mine: &mut Option<Mine>) -> Result<(), Refusal> {
    let seen = read(&*parts.log, |state| see(parts, state))?;
    for root in &seen.roots {
        shares::take(parts, mine, &seen, root)?;
    }
    match &seen.attempt {
        Some(open) => attempt::take_part(parts, mine, &seen, open).await,
        None => {
            // What an attempt left behind is wiped with it, once its roots are in use or it was aborted.
            *mine = None;
            open_next(parts, &seen).await
        }
    }
}

/// Opens an attempt for every root that the cluster lacks: all of them at genesis, later those that its first release did not have.
async fn open_next(parts: &Parts, seen: &Seen) -> Result<(), Refusal> {
    let ready = parts.log.leads() && seen.beacon.is_some() && !seen.everyone.is_empty();
    if seen.missing_roots.is_empty() || !ready || seen.attempts_failed >= ATTEMPTS_UNATTENDED_MAX {
        return Ok(());
    }
    let open = Open {
        generation: Generation(0),
        what: What::Dkg,
        old_epoch: Epoch(0),
        new_epoch: seen.new_epoch,
        attempt: seen.attempts.saturating_add(1),
        t: seen.t,
        roots: seen.missing_roots.clone(),
        dealers: seen.everyone.clone(),
        holders: seen.everyone.clone(),
    };
    let roots: Vec<&str> = open.roots.iter().map(|root| root.name()).collect();
    info!(attempt = open.attempt, ?roots, "opening key generation");
    propose(parts, Command::Open(open)).await
}

async fn propose(parts: &Parts, command: Command) -> Result<(), Refusal> {
    let answer = parts.log.propose(command, PATIENCE).await?;
    let code = answer.outcomes.first().map_or(0, |outcome| outcome.code);
    match RefusalCode::from_number(code) {
        None => Ok(()),
        Some(code) => Err(Refusal::new(code, "a step that the log accepts", "rejected")),
    }
}
