//! Learns the cluster's nodes from its nodes. Owns: when they are asked, which, and what of their answers counts.
//! Never: takes an address that the pin does not prove; takes a configured node away; holds a request up.
//! Source: architecture.md §5 ("find a node"), ADR 0030.
//!
//! A node answers with the genesis document, whose hash is the pinned cluster id, and with the seats it sees filled. So no node can lead
//! a client anywhere but to addresses that the operators wrote down when the cluster was founded, and one answer is enough for these.
//! The seats are one node's word: what any names is used, and what neither of two names is used no longer. A lying node
//! can keep others' addresses back, as one that is silent can, and change nothing for the nodes of the configuration. A node that is
//! learnt is judged at each connection like any other.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dstack_protocol::ClusterId;
use dstack_protocol::rpc::{NodesAnswer, PATH_NODES};
use hyper::Method;
use tokio::task::JoinSet;

use crate::channel::{Channel, Question};
use crate::error::NodeFault;
use crate::metrics;
use crate::nodes::Nodes;

/// Answers that one look needs.
const ANSWERS: usize = 2;
/// Nodes asked for them at most.
const ASKED_MAX: usize = 4;
/// Between two looks at least, when nodes fail.
const AFTER_FAULTS: Duration = Duration::from_secs(5);

/// See the module text.
pub(crate) struct Discovery {
    every: Option<Duration>,
    looking: Mutex<Looking>,
}

#[derive(Default)]
struct Looking {
    began: Option<Instant>,
    /// Faults that were known then.
    faults: u64,
    turn: usize,
    /// The look under way. It ends with its client.
    task: JoinSet<()>,
}

/// One look at the list: whoever is asked first, then others in turn, so that all are seen to serve or not in time.
pub(crate) struct Look {
    pub(crate) cluster_id: ClusterId,
    pub(crate) nodes: Arc<Nodes>,
    pub(crate) channel: Arc<Channel>,
    pub(crate) timeout: Duration,
    pub(crate) request_id: String,
}

impl Discovery {
    /// `None`: never looks.
    pub(crate) fn new(every: Option<Duration>) -> Self {
        Self { every, looking: Mutex::default() }
    }

    /// Begins a look beside the caller: at the first request, then every so often, and sooner after nodes failed.
    pub(crate) fn look_if_due(&self, look: impl FnOnce() -> Look, faults: u64) {
        let Some(every) = self.every else { return };
        // Plain data: a holder that panicked left it whole.
        let mut looking = self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        while looking.task.try_join_next().is_some() {}
        let wait = if looking.faults == faults { every } else { every.min(AFTER_FAULTS) };
        if !looking.task.is_empty() || looking.began.is_some_and(|began| began.elapsed() < wait) {
            return;
        }
        (looking.began, looking.faults, looking.turn) = (Some(Instant::now()), faults, looking.turn.wrapping_add(1));
        let turn = looking.turn;
        looking.task.spawn(look().run(turn));
    }
}

impl Look {
    async fn run(self, turn: usize) {
        let mut order = self.nodes.order();
        if let Some((_, others)) = order.split_first_mut()
            && !others.is_empty()
        {
            others.rotate_left(turn % others.len());
        }
        let (mut named, mut answers) = (BTreeSet::new(), 0_usize);
        for place in order.into_iter().take(ASKED_MAX) {
            let Some(answer) = self.ask(place).await else { continue };
            named.extend(answer.seats);
            self.nodes.serves(place, answer.own);
            self.nodes.learn(&answer.genesis, &named);
            answers = answers.saturating_add(1);
            if answers == ANSWERS {
                break;
            }
        }
        metrics::looked(answers > 0, self.nodes.len());
        // One node's word takes nobody away.
        if answers == ANSWERS {
            self.nodes.keep(&named);
        }
        tracing::debug!(nodes = self.nodes.len(), answers, "looked for nodes of the cluster");
    }

    async fn ask(&self, place: usize) -> Option<NodesAnswer> {
        let question = Question {
            method: Method::GET,
            path: PATH_NODES,
            body: Vec::new().into(),
            request_id: &self.request_id,
            timeout: self.timeout,
        };
        let answer: NodesAnswer = self.channel.probe(&self.nodes, place, &question).await.ok()?;
        let got = answer.genesis.cluster_id();
        if got == self.cluster_id {
            return Some(answer);
        }
        let fault = NodeFault::WrongCluster { pinned: self.cluster_id, got };
        metrics::node_fault(&fault);
        self.nodes.failed(place);
        tracing::warn!(node = self.nodes.name(place), reason = %fault, "list of nodes refused");
        None
    }
}
