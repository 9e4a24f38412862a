//! What Raft asks of the replicated state machine, of the audit store and of those who watch it.
//! Owns: the traits between consensus and everything above. Never: a rule of the KMS; those live in the machine.
//! Source: architecture.md §7 (commands, snapshots, seats), threshold.md §2.6 (leaves, checkpoint positions).

use std::{collections::BTreeSet, io};

use dstack_protocol::Seat;

/// One leaf of the audit log, made by applying a command (threshold.md §2.6).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    /// Its number, counted from 0 over the whole log.
    pub pos: u64,
    /// The record: the bytes that are hashed into the tree.
    pub record: Vec<u8>,
    /// The body whose hash the record holds.
    pub body: Vec<u8>,
}

/// What applying one command produced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied<E> {
    /// For the proposer, and only for the proposer; at most [`crate::transport::RESPONSE_BYTES_MAX`].
    pub response: Vec<u8>,
    /// Leaves made by this command, ascending and without a gap; made durable before the response is sent.
    pub leaves: Vec<Leaf>,
    /// For the observer of this node: a head to sign, a ceremony step to answer. Called before the response is sent.
    pub effects: Vec<E>,
}

/// The replicated state: pure, synchronous, deterministic. Same commands in the same order give the same state on all nodes.
///
/// It lives in memory. A start rebuilds it from the newest snapshot and the log behind it, so `apply` runs again for entries that
/// were applied before the stop.
pub trait Machine: Send + Sync + Sized + 'static {
    /// What the observer is told of an applied command.
    type Effect: Send + 'static;

    /// Applies one committed command. Never fails and never panics, whatever the bytes: a bad command is answered with a refusal.
    fn apply(&mut self, command: &[u8]) -> Applied<Self::Effect>;

    /// The canonical serialization of the state.
    fn snapshot(&self) -> Vec<u8>;

    /// A machine holding the state of `snapshot`, with what is not replicated (trust roots, own seat) taken from `self`.
    ///
    /// A snapshot is data from a stranger: everything in it is checked (signatures, admissions, commitments).
    /// # Errors
    /// Says what is wrong with it; the snapshot is then refused and `self` stays in use.
    fn restored(&self, snapshot: &[u8]) -> Result<Self, String>;

    /// Whether the state is now at a checkpoint position: the only positions where snapshots are taken.
    fn at_checkpoint(&self) -> bool;

    /// The number of leaves so far; the next leaf has this `pos`.
    fn size(&self) -> u64;

    /// Seats that may vote in a Raft configuration; `None` before genesis, when nothing is known yet.
    fn seats(&self) -> Option<BTreeSet<Seat>>;
}

/// Where an applied entry stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AppliedAt {
    /// Raft log index.
    pub index: u64,
    /// Raft term it was written in.
    pub term: u64,
    /// Whether this node starts and repeats what it knows to have applied before. The newest entries before a stop may come again
    /// without this mark: observers do nothing that may not be done twice.
    pub replayed: bool,
}

/// Told of every applied command on this node, in order, after its leaves are durable and before its proposer hears of it.
///
/// Called on the apply task: implementations hand the effects to a queue and return; whatever blocks here blocks the log.
pub trait AppliedObserver<M: Machine>: Send + Sync + 'static {
    /// One command was applied.
    fn applied(&self, at: AppliedAt, effects: Vec<M::Effect>);

    /// The state was replaced by a snapshot whose last entry is `index`.
    fn restored(&self, index: u64);
}

/// An observer for nodes that need none (tests, read-only tools).
#[derive(Debug, Default, Clone, Copy)]
pub struct NoObserver;

impl<M: Machine> AppliedObserver<M> for NoObserver {
    fn applied(&self, _at: AppliedAt, _effects: Vec<M::Effect>) {}
    fn restored(&self, _index: u64) {}
}

/// The audit store as Raft sees it. Blocking; called on a worker thread.
pub trait LeafSink: Send + 'static {
    /// Makes `leaves` durable. Those already stored with equal bytes are skipped, so a replay is harmless.
    /// # Errors
    /// Says why, a full disk as [`io::ErrorKind::StorageFull`]; also when a stored leaf differs, which means that this node's log was
    /// rewritten. The node then stops.
    fn append(&mut self, leaves: &[Leaf]) -> io::Result<()>;

    /// The state now comes from a snapshot of `size` leaves: what is missing below is fetched by others. No effect when
    /// at least `size` leaves are stored.
    /// # Errors
    /// Says why the store cannot; the node then stops.
    fn skip_to(&mut self, size: u64) -> io::Result<()>;
}
