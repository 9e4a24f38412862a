//! The actor that commits intents: collects while one proposal is in flight, proposes them together.
//!
//! Owns: the batch and who waits for which intent. Never: answers before this node has applied the entry. Source: architecture.md §6;
//! dependencies.md §3.4 (group commit).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::{Actor, ActorFutureExt, AsyncContext, Context, Handler, Message, ResponseFuture, WrapFuture};
use dstack_protocol::command::{Command, CommandAnswer};
use dstack_protocol::limits::INTENT_BATCH_MAX;
use dstack_protocol::receipt::Receipt;
use dstack_protocol::release::Intent;
use dstack_protocol::{Refusal, RefusalCode};
use tokio::sync::oneshot;

use crate::board::Board;
use crate::mailbox::full;
use crate::metrics;
use crate::ports::{Log, read};

/// Name in refusals and metrics.
pub const NAME: &str = "recorder";
/// Intents that may wait beside the batch in flight.
pub const QUEUE_MAX: usize = 4096;
const CAPACITY: usize = 4096;
/// How long a proposal may take.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// How long this node may lag behind the leader before the request is refused.
const APPLY_PATIENCE: Duration = Duration::from_secs(2);
/// How long a receipt may lag behind the state: one flush, on a busy disk.
const POST_PATIENCE: Duration = Duration::from_millis(500);

/// An intent to commit.
#[derive(Message)]
#[rtype(result = "Result<Receipt, Refusal>")]
pub struct Record {
    /// The intent.
    pub intent: Intent,
}

struct Waiting {
    intent: Intent,
    reply: oneshot::Sender<Result<Receipt, Refusal>>,
}

/// Makes a receipt from the audit log where the board has none: after a restart.
pub type Rebuild = Arc<dyn Fn(&Intent) -> Option<Receipt> + Send + Sync>;

/// See the module text.
pub struct Recorder {
    log: Arc<dyn Log>,
    board: Arc<Board>,
    rebuild: Rebuild,
    queue: VecDeque<Waiting>,
    in_flight: bool,
}

impl Recorder {
    /// A recorder with nothing to do.
    #[must_use]
    pub fn new(log: Arc<dyn Log>, board: Arc<Board>, rebuild: Rebuild) -> Self {
        Self { log, board, rebuild, queue: VecDeque::new(), in_flight: false }
    }

    fn propose_next(&mut self, context: &mut Context<Self>) {
        if self.in_flight || self.queue.is_empty() {
            return;
        }
        let count = self.queue.len().min(INTENT_BATCH_MAX);
        let batch: Vec<Waiting> = self.queue.drain(..count).collect();
        self.in_flight = true;
        metrics::batch(batch.len());
        let began = Instant::now();
        let command = Command::Intents(batch.iter().map(|waiting| waiting.intent.clone()).collect());
        let proposal = self.log.propose(command, PATIENCE);
        context.spawn(proposal.into_actor(self).map(move |answer, this, context| {
            metrics::stage("record", began.elapsed());
            this.in_flight = false;
            this.answer(batch, answer, context);
            this.propose_next(context);
        }));
    }

    fn answer(&self, batch: Vec<Waiting>, answer: Result<CommandAnswer, Refusal>, context: &mut Context<Self>) {
        let answer = match answer {
            Ok(answer) if answer.outcomes.len() == batch.len() => answer,
            Ok(answer) => {
                let code = answer.outcomes.first().and_then(|outcome| RefusalCode::from_number(outcome.code));
                let refusal =
                    Refusal::new(code.unwrap_or(RefusalCode::Internal), "one outcome per intent", format!("{}", answer.outcomes.len()));
                return batch.into_iter().for_each(|waiting| reply(waiting, Err(refusal.clone())));
            }
            Err(refusal) => return batch.into_iter().for_each(|waiting| reply(waiting, Err(refusal.clone()))),
        };
        let mut accepted = Vec::new();
        for (waiting, outcome) in batch.into_iter().zip(answer.outcomes) {
            match RefusalCode::from_number(outcome.code) {
                None if outcome.code == 0 => accepted.push((waiting, outcome.pos)),
                code => {
                    let code = code.unwrap_or(RefusalCode::Internal);
                    let refusal = Refusal::new(code, "an intent that the log accepts", format!("rejected at position {}", outcome.pos));
                    reply(waiting, Err(refusal.retry_after(outcome.retry_after_ms)));
                }
            }
        }
        if accepted.is_empty() {
            return;
        }
        let (log, board, rebuild) = (Arc::clone(&self.log), Arc::clone(&self.board), Arc::clone(&self.rebuild));
        let wait = async move {
            for (waiting, pos) in accepted {
                let receipt = receipt_of(&*log, &board, &rebuild, &waiting.intent, pos).await;
                reply(waiting, receipt);
            }
        };
        context.spawn(wait.into_actor(self));
    }
}

fn reply(waiting: Waiting, answer: Result<Receipt, Refusal>) {
    // Who asked may have given up; then nobody waits for this.
    let _ = waiting.reply.send(answer);
}

/// Waits until this node has applied the intent, then gives its receipt.
async fn receipt_of(log: &dyn Log, board: &Board, rebuild: &Rebuild, intent: &Intent, pos: u64) -> Result<Receipt, Refusal> {
    let id = intent.id();
    let mut applied = log.applied();
    let lagging = || Refusal::new(RefusalCode::NotYet, format!("position {pos} applied"), "this node is behind").retry_after(200);
    let posted = async {
        loop {
            if let Some(receipt) = board.receipt(&id) {
                return Ok(receipt);
            }
            applied.changed().await.map_err(|_| crate::mailbox::gone("raft"))?;
        }
    };
    tokio::pin!(posted);
    // The state shows an entry before its leaves are durable and its receipts are posted, a moment later. Only what was posted before a
    // restart has to be rebuilt, which reads the log from its begin.
    if let Ok(receipt) = tokio::time::timeout(POST_PATIENCE, &mut posted).await {
        return receipt;
    }
    if read(log, |state| state.size > pos)? {
        return rebuild(intent).ok_or_else(lagging);
    }
    tokio::time::timeout(APPLY_PATIENCE, posted).await.unwrap_or_else(|_| Err(lagging()))
}

impl Actor for Recorder {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        context.set_mailbox_capacity(CAPACITY);
    }
}

impl actix::Supervised for Recorder {
    fn restarting(&mut self, _context: &mut Self::Context) {
        // Whoever waited learns that the outcome is unknown and retries: the log records an intent once.
        self.queue.clear();
        self.in_flight = false;
    }
}

impl Handler<Record> for Recorder {
    type Result = ResponseFuture<Result<Receipt, Refusal>>;

    fn handle(&mut self, message: Record, context: &mut Self::Context) -> Self::Result {
        if self.queue.len() >= QUEUE_MAX {
            return Box::pin(std::future::ready(Err(full(NAME))));
        }
        let (reply, answer) = oneshot::channel();
        self.queue.push_back(Waiting { intent: message.intent, reply });
        self.propose_next(context);
        Box::pin(async move { answer.await.unwrap_or_else(|_| Err(crate::mailbox::gone(NAME))) })
    }
}

/// What the recorder holds, for tests and the admin endpoint.
#[derive(Message)]
#[rtype(result = "Observed")]
pub struct Observe;

/// Snapshot of a recorder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, actix::MessageResponse)]
pub struct Observed {
    /// Intents waiting.
    pub queued: usize,
    /// Whether a proposal is in flight.
    pub in_flight: bool,
}

impl Handler<Observe> for Recorder {
    type Result = Observed;

    fn handle(&mut self, _message: Observe, _context: &mut Self::Context) -> Self::Result {
        Observed { queued: self.queue.len(), in_flight: self.in_flight }
    }
}
