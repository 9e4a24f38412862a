//! The replicated log of a test: the real machine behind a mutex, applied at once on "all nodes".

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dstack_actors::board::Board;
use dstack_actors::ports::{Later, Log};
use dstack_audit::{MemoryTree, make_receipt};
use dstack_protocol::command::{Command, CommandAnswer};
use dstack_protocol::coordinated::Coordinated;
use dstack_protocol::log::{Head, Record};
use dstack_protocol::receipt::Receipt;
use dstack_protocol::release::Intent;
use dstack_protocol::state::State;
use dstack_protocol::{Refusal, RefusalCode, Wire};
use dstack_raft::contract::{Leaf, Machine as _};
use dstack_raft::machine::{Birth, Effect, KmsMachine};
use tokio::sync::watch;

/// What may happen to a proposal on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It never reaches the log; who proposed cannot know.
    Lost,
    /// It is applied, the answer is lost.
    Unanswered,
}

/// One log for all nodes of a test.
pub struct SharedLog {
    pub board: Arc<Board>,
    machine: Mutex<KmsMachine>,
    leaves: Mutex<Vec<Leaf>>,
    commands: Mutex<Vec<Command>>,
    applied: watch::Sender<u64>,
    open: watch::Sender<bool>,
    faults: Mutex<VecDeque<Fault>>,
    batches: Mutex<Vec<usize>>,
    heads: Mutex<Vec<Head>>,
    timelocks: Mutex<Vec<[u8; 16]>>,
}

impl SharedLog {
    pub fn new(birth: Arc<Birth>) -> Arc<Self> {
        Arc::new(Self {
            board: Arc::default(),
            machine: Mutex::new(KmsMachine::new(birth)),
            leaves: Mutex::default(),
            commands: Mutex::default(),
            applied: watch::channel(0).0,
            open: watch::channel(true).0,
            faults: Mutex::default(),
            batches: Mutex::default(),
            heads: Mutex::default(),
            timelocks: Mutex::default(),
        })
    }

    /// Applies a command as it comes out of consensus.
    pub fn apply(&self, command: &Command) -> CommandAnswer {
        let mut machine = self.machine.lock().unwrap();
        let applied = machine.apply(&command.encode());
        self.commands.lock().unwrap().push(command.clone());
        self.leaves.lock().unwrap().extend(applied.leaves);
        for effect in applied.effects {
            match effect {
                Effect::IntentsRecorded(receipts) => self.board.post(receipts),
                Effect::HeadDue(head) => self.heads.lock().unwrap().push(head),
                Effect::TimelockStarted(action_id) => self.timelocks.lock().unwrap().push(action_id),
                _ => {}
            }
        }
        drop(machine);
        self.applied.send_modify(|count| *count += 1);
        CommandAnswer::decode(&applied.response).unwrap()
    }

    /// Applies a command of one outcome; `None` when it was accepted.
    pub fn code(&self, command: &Command) -> Option<RefusalCode> {
        RefusalCode::from_number(self.apply(command).outcomes[0].code)
    }

    pub fn read<T>(&self, read: impl FnOnce(&State) -> T) -> T {
        read(self.machine.lock().unwrap().state().expect("genesis is applied"))
    }

    /// Proposals wait from now on.
    pub fn close(&self) {
        self.open.send_replace(false);
    }
    /// Proposals go on.
    pub fn open(&self) {
        self.open.send_replace(true);
    }
    /// What happens to the next proposals.
    pub fn fault(&self, fault: Fault) {
        self.faults.lock().unwrap().push_back(fault);
    }
    /// Intents of each proposal so far.
    pub fn batches(&self) -> Vec<usize> {
        self.batches.lock().unwrap().clone()
    }
    /// Heads that were due, oldest first.
    pub fn heads(&self) -> Vec<Head> {
        self.heads.lock().unwrap().clone()
    }
    /// Actions whose timelock began, oldest first.
    pub fn timelocks(&self) -> Vec<[u8; 16]> {
        self.timelocks.lock().unwrap().clone()
    }
    pub fn size(&self) -> u64 {
        self.machine.lock().unwrap().size()
    }

    /// A receipt made from the leaves, as a node does that lost its board.
    pub fn rebuild(&self, intent: &Intent) -> Option<Receipt> {
        let pos = self.read(|state| state.intents.get(&intent.id()).map(|row| row.pos))?;
        let mut tree = MemoryTree::new();
        let leaves = self.leaves.lock().unwrap();
        for leaf in leaves.iter() {
            tree.append(Record::decode(&leaf.record).unwrap().leaf()).unwrap();
        }
        let record = Record::decode(&leaves.get(usize::try_from(pos).unwrap())?.record).unwrap();
        make_receipt(intent.clone(), record, &tree, tree.size()).ok()
    }

    /// A node that has not applied the last `missing` commands yet.
    pub fn behind(&self, missing: usize) -> Arc<Self> {
        let other = Self::new(Arc::clone(self.machine.lock().unwrap().birth()));
        let commands = self.commands.lock().unwrap();
        commands.iter().take(commands.len() - missing).for_each(|command| drop(other.apply(command)));
        drop(commands);
        other
    }

    /// Applies what `ahead` has applied beyond this log.
    pub fn catch_up(&self, ahead: &Self) {
        let applied = self.commands.lock().unwrap().len();
        let commands: Vec<Command> = ahead.commands.lock().unwrap().iter().skip(applied).cloned().collect();
        commands.iter().for_each(|command| drop(self.apply(command)));
    }

    /// The log as one node sees it.
    pub fn node(self: &Arc<Self>, leads: bool) -> Arc<NodeLog> {
        Arc::new(NodeLog { shared: Arc::clone(self), leads: AtomicBool::new(leads) })
    }
}

/// The port of one node.
pub struct NodeLog {
    pub shared: Arc<SharedLog>,
    leads: AtomicBool,
}

fn unknown() -> Refusal {
    Refusal::new(RefusalCode::DeadlineExceeded, "a confirmed write", "unconfirmed").retry_after(200)
}

impl Log for NodeLog {
    fn propose(&self, command: Command, patience: Duration) -> Later<Result<CommandAnswer, Refusal>> {
        let shared = Arc::clone(&self.shared);
        if let Command::Intents(batch) | Command::Coordinated(Coordinated { intents: batch, .. }) = &command {
            shared.batches.lock().unwrap().push(batch.len());
        }
        let mut open = shared.open.subscribe();
        Box::pin(async move {
            let opened = tokio::time::timeout(patience, open.wait_for(|open| *open)).await;
            drop(opened.map_err(|_| unknown())?.map_err(|_| unknown())?);
            let fault = shared.faults.lock().unwrap().pop_front();
            match fault {
                Some(Fault::Lost) => Err(unknown()),
                Some(Fault::Unanswered) => {
                    shared.apply(&command);
                    Err(unknown())
                }
                None => Ok(shared.apply(&command)),
            }
        })
    }

    fn show(&self, read: &mut dyn FnMut(Option<&State>)) -> Result<(), Refusal> {
        read(self.shared.machine.lock().unwrap().state());
        Ok(())
    }

    fn applied(&self) -> watch::Receiver<u64> {
        self.shared.applied.subscribe()
    }

    fn leads(&self) -> bool {
        self.leads.load(Ordering::SeqCst)
    }
}
