//! Commits intents: collects while one proposal is in flight, proposes them together.
//!
//! Owns: the batch and who waits for which intent; this node's word for those that it combines itself (ADR 0032). Never: answers before
//! this node has applied the entry. Source: architecture.md §6; dependencies.md §3.4 (group commit); ADR 0031.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dstack_protocol::command::{Command, CommandAnswer};
use dstack_protocol::coordinated::Coordinated;
use dstack_protocol::limits::INTENT_BATCH_MAX;
use dstack_protocol::receipt::Receipt;
use dstack_protocol::release::{Intent, Mode};
use dstack_protocol::{ClusterId, Refusal, RefusalCode};
use dstack_threshold::message::NodeKey;
use tokio::sync::oneshot;

use crate::board::Board;
use crate::mailbox::full;
use crate::metrics;
use crate::ports::{Log, read};

/// Name in refusals and metrics.
pub const NAME: &str = "recorder";
/// Intents that may wait beside the batch in flight.
pub const QUEUE_MAX: usize = 4096;
/// How long a proposal may take.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// How long this node may lag behind the leader before the request is refused.
const APPLY_PATIENCE: Duration = Duration::from_secs(2);
/// How long a receipt may lag behind the state: one flush, on a busy disk.
const POST_PATIENCE: Duration = Duration::from_millis(500);

struct Waiting {
    intent: Intent,
    statement_id: Option<[u8; 32]>,
    reply: oneshot::Sender<Result<Receipt, Refusal>>,
}

/// Makes a receipt from the audit log where the board has none: after a restart.
pub type Rebuild = Arc<dyn Fn(&Intent) -> Option<Receipt> + Send + Sync>;

/// Signs for this node.
#[derive(Clone)]
pub struct Author {
    /// Cluster.
    pub cluster_id: ClusterId,
    /// The key that the log knows this node by.
    pub node_key: Arc<NodeKey>,
}

impl Author {
    /// The command that records these intents. Those of modes L and E name this node: it combines them. Beside each in mode L the
    /// statement of its evidence.
    #[must_use]
    pub fn command(&self, batch: Vec<(Intent, Option<[u8; 32]>)>) -> Command {
        let named: Vec<_> = batch.iter().filter(|(intent, _)| intent.mode != Mode::Client).collect();
        let Some(coordinator) = named.first().map(|(intent, _)| intent.coordinator) else {
            return Command::Intents(batch.into_iter().map(|(intent, _)| intent).collect());
        };
        let statements = named.into_iter().map(|(_, statement_id)| statement_id.unwrap_or_default()).collect();
        let intents = batch.into_iter().map(|(intent, _)| intent).collect();
        let mut batch = Coordinated { coordinator, sig: [0; 64], intents, statements };
        batch.sig = self.node_key.sign(&batch.word().signed_bytes(&self.cluster_id));
        Command::Coordinated(batch)
    }
}

/// See the module text. Clones share the batch.
#[derive(Clone)]
pub struct Recorder {
    shared: Arc<Shared>,
}

struct Shared {
    author: Author,
    log: Arc<dyn Log>,
    board: Arc<Board>,
    rebuild: Rebuild,
    batch: Mutex<Batch>,
}

#[derive(Default)]
struct Batch {
    queue: VecDeque<Waiting>,
    in_flight: bool,
}

impl Recorder {
    /// A recorder with nothing to do.
    #[must_use]
    pub fn new(author: Author, log: Arc<dyn Log>, board: Arc<Board>, rebuild: Rebuild) -> Self {
        Self { shared: Arc::new(Shared { author, log, board, rebuild, batch: Mutex::default() }) }
    }

    /// Queues `intent` at once, and gives its receipt when it is committed and applied here. Inside a tokio runtime. `statement_id`: of
    /// the evidence, in mode L.
    ///
    /// # Errors
    /// [`RefusalCode::Overloaded`] when full, what the log refuses, or that the outcome is unknown.
    pub fn record(&self, intent: Intent, statement_id: Option<[u8; 32]>) -> impl Future<Output = Result<Receipt, Refusal>> + Send + use<> {
        let (reply, answer) = oneshot::channel();
        let begin = {
            let mut batch = self.shared.batch();
            if batch.queue.len() >= QUEUE_MAX {
                // Nobody listens yet, so this cannot fail.
                let _ = reply.send(Err(full(NAME)));
                false
            } else {
                batch.queue.push_back(Waiting { intent, statement_id, reply });
                !std::mem::replace(&mut batch.in_flight, true)
            }
        };
        if begin {
            // On its own: it proposes for all who wait, whoever of them leaves.
            tokio::spawn(propose(Arc::clone(&self.shared)));
        }
        async move { answer.await.unwrap_or_else(|_| Err(crate::mailbox::gone(NAME))) }
    }

    /// What it holds, for tests.
    #[must_use]
    pub fn observed(&self) -> Observed {
        let batch = self.shared.batch();
        Observed { queued: batch.queue.len(), in_flight: batch.in_flight }
    }
}

/// Snapshot of a recorder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observed {
    /// Intents waiting.
    pub queued: usize,
    /// Whether a proposal is in flight.
    pub in_flight: bool,
}

/// Proposes batch after batch until nobody waits.
async fn propose(shared: Arc<Shared>) {
    loop {
        let batch: Vec<Waiting> = {
            let mut batch = shared.batch();
            let count = batch.queue.len().min(INTENT_BATCH_MAX);
            batch.in_flight = count > 0;
            batch.queue.drain(..count).collect()
        };
        if batch.is_empty() {
            return;
        }
        metrics::batch(batch.len());
        let began = Instant::now();
        let command = shared.author.command(batch.iter().map(|waiting| (waiting.intent.clone(), waiting.statement_id)).collect());
        let answer = shared.log.propose(command, PATIENCE).await;
        metrics::stage("record", began.elapsed());
        shared.answer(batch, answer);
    }
}

impl Shared {
    fn batch(&self) -> MutexGuard<'_, Batch> {
        // Whole after every statement, so also where one panicked.
        self.batch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(self: &Arc<Self>, batch: Vec<Waiting>, answer: Result<CommandAnswer, Refusal>) {
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
        let mut lagging = Vec::new();
        for (waiting, outcome) in batch.into_iter().zip(answer.outcomes) {
            match RefusalCode::from_number(outcome.code) {
                None if outcome.code == 0 => match self.board.receipt(&waiting.intent.id()) {
                    Some(receipt) => reply(waiting, Ok(receipt)),
                    None => lagging.push((waiting, outcome.pos)),
                },
                code => {
                    let code = code.unwrap_or(RefusalCode::Internal);
                    let refusal = Refusal::new(code, "an intent that the log accepts", format!("rejected at position {}", outcome.pos));
                    reply(waiting, Err(refusal.retry_after(outcome.retry_after_ms)));
                }
            }
        }
        if lagging.is_empty() {
            return;
        }
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            for (waiting, pos) in lagging {
                let receipt = receipt_of(&*shared.log, &shared.board, &shared.rebuild, &waiting.intent, pos).await;
                reply(waiting, receipt);
            }
        });
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
