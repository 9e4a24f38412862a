//! What this node learns while commands are applied.
//!
//! Owns: the queue from the apply task to the services, the count that waiters watch. Never: blocks applying.

use std::sync::Arc;

use dstack_actors::board::Board;
use dstack_raft::machine::{Effect, KmsMachine};
use dstack_raft::{AppliedAt, AppliedObserver};
use tokio::sync::{mpsc, watch};

/// An effect, with whether it is a repetition at start.
#[derive(Debug)]
pub(crate) struct Noted {
    /// What happened.
    pub(crate) effect: Effect,
    /// Whether the entry was applied before the stop.
    pub(crate) replayed: bool,
}

/// See the module text.
pub(crate) struct Observer {
    board: Arc<Board>,
    effects: mpsc::UnboundedSender<Noted>,
    applied: watch::Sender<u64>,
}

impl Observer {
    /// An observer with its two ends.
    pub(crate) fn new(board: Arc<Board>) -> (Self, mpsc::UnboundedReceiver<Noted>, watch::Receiver<u64>) {
        // Bounded by what is applied between two turns of the services, which consume at once and never wait for the log.
        let (effects, noted) = mpsc::unbounded_channel();
        let (applied, watched) = watch::channel(0);
        (Self { board, effects, applied }, noted, watched)
    }
}

impl AppliedObserver<KmsMachine> for Observer {
    fn applied(&self, at: AppliedAt, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::IntentsRecorded(receipts) => self.board.post(receipts),
                effect => {
                    // At shutdown nobody listens any more.
                    let _ = self.effects.send(Noted { effect, replayed: at.replayed });
                }
            }
        }
        self.applied.send_replace(at.index);
    }

    fn restored(&self, index: u64) {
        self.applied.send_replace(index);
    }
}
