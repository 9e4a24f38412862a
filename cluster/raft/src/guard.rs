//! What is checked of every RPC before openraft sees it, and of every answer before it counts.
//! Owns: who may say what. Never: consensus itself. openraft trusts its peers and panics on some impossible messages; a compromised
//! member must not be able to use either.
//! Source: architecture.md §2 (each RPC's leader or candidate is the authenticated peer; a contradicted applied entry stops the
//! node), §7 (voters are admitted seats; abstention after a restart).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use dstack_protocol::Seat;
use tokio::sync::watch;

use crate::{
    confirm::Standing,
    rpc::{AppendRequest, AppendResponse, RpcFormatError, TransferRequest, VoteRequest},
    status::Voting,
    transport::RpcKind,
    types::{LogId, Membership, Payload, SnapshotMeta, Vote, node_id, seat_of},
};

/// A peer's term may lie at most this far above ours: else one message could exhaust the terms. Far beyond any real gap.
const TERM_STEP_MAX: u64 = 1 << 32;

/// Why an RPC of a peer is refused. The peer's fault unless a variant says otherwise; nothing of the RPC was done.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum Refused {
    /// The RPC speaks for another node than the one that sent it.
    #[error("{kind} names node {claimed} as its sender, but the peer is seat {peer}")]
    NotThePeer {
        /// What was called.
        kind: RpcKind,
        /// The node id in the leader or candidate field.
        claimed: u64,
        /// The authenticated peer.
        peer: u16,
    },
    /// Larger than any valid RPC of its kind.
    #[error("{kind} of {got_bytes} bytes, the limit is {max_bytes}")]
    TooLarge {
        /// What was called.
        kind: RpcKind,
        /// Its size.
        got_bytes: usize,
        /// The limit.
        max_bytes: usize,
    },
    /// Bytes that are no message of this version.
    #[error(transparent)]
    Malformed(#[from] RpcFormatError),
    /// The term is so far ahead that it can only serve to exhaust the terms.
    #[error("term {got} is too far above ours, {ours}")]
    TermTooFar {
        /// The peer's.
        got: u64,
        /// Ours.
        ours: u64,
    },
    /// Fields that contradict each other; no correct node sends them.
    #[error("impossible {kind}: {detail}")]
    Impossible {
        /// What was called.
        kind: RpcKind,
        /// Which rule is broken.
        detail: &'static str,
    },
    /// The leader contradicts an entry that this node has applied. This node stops; a human must look (`FORK`).
    #[error("{}", .0)]
    Fork(Fork),
    /// A Raft configuration whose voters hold no admitted seat in this node's applied state.
    #[error("configuration names voters without an admitted seat: {seats:?}")]
    Voters {
        /// Those voters.
        seats: Vec<u64>,
    },
    /// The snapshot, or a chunk of it, is not acceptable.
    #[error("snapshot refused: {detail}")]
    Snapshot {
        /// Why.
        detail: String,
    },
    /// This node gives no vote now: it restarted and is not yet confirmed. Nobody's fault; ask again later.
    #[error("not voting in term {term}: position after a restart is not confirmed")]
    Abstaining {
        /// The term asked for.
        term: u64,
    },
    /// This node's Raft has stopped. Ours to fix.
    #[error("raft on this node has stopped: {detail}")]
    Stopped {
        /// Why.
        detail: String,
    },
}

impl Refused {
    /// Stable short code: what the peer is told.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotThePeer { .. } => "raft.not-the-peer",
            Self::TooLarge { .. } => "raft.too-large",
            Self::Malformed(_) => "raft.malformed",
            Self::TermTooFar { .. } => "raft.term-too-far",
            Self::Impossible { .. } => "raft.impossible",
            Self::Fork(_) => "raft.fork",
            Self::Voters { .. } => "raft.voters",
            Self::Snapshot { .. } => "raft.snapshot",
            Self::Abstaining { .. } => "raft.abstaining",
            Self::Stopped { .. } => "raft.stopped",
        }
    }
}

/// A leader's log contradicts an entry that this node has applied.
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq, Eq)]
#[error("fork: leader seat {leader} (term {leader_term}) has term {theirs} at index {index}, this node applied term {ours} there")]
pub struct Fork {
    /// The log index.
    pub index: u64,
    /// Term of the entry this node has.
    pub ours: u64,
    /// Term of the entry the leader has.
    pub theirs: u64,
    /// The leader's seat.
    pub leader: u64,
    /// The leader's term.
    pub leader_term: u64,
}

/// The sender named in an RPC must be the authenticated peer, and its term within reach.
pub(crate) fn check_sender(kind: RpcKind, vote: &Vote, peer: Seat, our_term: u64) -> Result<(), Refused> {
    // architecture.md §2: every Raft RPC is refused unless the node id in its leader or candidate field is the authenticated peer.
    if vote.leader_id.node_id != node_id(peer) {
        return Err(Refused::NotThePeer { kind, claimed: vote.leader_id.node_id, peer: peer.0 });
    }
    check_term(vote, our_term)
}

/// A term that a peer names must be within reach of ours.
pub(crate) fn check_term(vote: &Vote, our_term: u64) -> Result<(), Refused> {
    let got = vote.leader_id.term;
    if got > our_term.saturating_add(TERM_STEP_MAX) { Err(Refused::TermTooFar { got, ours: our_term }) } else { Ok(()) }
}

/// The shape of a vote request: a candidate has not been granted anything yet.
pub(crate) fn check_vote_request(kind: RpcKind, request: &VoteRequest) -> Result<(), Refused> {
    let impossible = |detail| Err(Refused::Impossible { kind, detail });
    if request.vote.committed {
        return impossible("a candidate's vote is marked as granted");
    }
    if kind == RpcKind::PreVote && request.leadership_transfer {
        return impossible("a pre-vote claims a leadership transfer");
    }
    if request.last_log_id.is_some_and(|last| last.leader_id > request.vote.leader_id) {
        return impossible("the candidate's log is from its own future");
    }
    Ok(())
}

/// The shape of an append: granted vote, consecutive indices, leaders that never go back.
pub(crate) fn check_append(request: &AppendRequest) -> Result<(), Refused> {
    let impossible = |detail| Err(Refused::Impossible { kind: RpcKind::Append, detail });
    if !request.vote.committed {
        return impossible("a leader's vote is not granted");
    }
    let mut before = request.prev_log_id;
    for entry in &request.entries {
        let next_index = match before {
            None => Some(0),
            Some(log_id) => log_id.index.checked_add(1),
        };
        if next_index != Some(entry.log_id.index) {
            return impossible("entries are not consecutive");
        }
        if before.is_some_and(|before| before.leader_id > entry.log_id.leader_id) {
            return impossible("an entry is from an earlier leader than the one before");
        }
        before = Some(entry.log_id);
    }
    if before.is_some_and(|last| last.leader_id > request.vote.leader_id) {
        return impossible("an entry is from a later leader than the sender");
    }
    if request.leader_commit.is_some_and(|commit| commit.leader_id > request.vote.leader_id) {
        return impossible("the commit position is from a later leader than the sender");
    }
    Ok(())
}

/// The shape of a snapshot's description against the leader that sends it and what this node has committed.
///
/// openraft panics on two of these; see `Raft::install_full_snapshot`.
pub(crate) fn check_snapshot(vote: &Vote, meta: &SnapshotMeta, committed: Option<LogId>) -> Result<(), Refused> {
    let impossible = |detail| Err(Refused::Impossible { kind: RpcKind::Snapshot, detail });
    if !vote.committed {
        return impossible("a leader's vote is not granted");
    }
    let Some(last) = meta.last_log_id else { return impossible("a snapshot of nothing") };
    if last.leader_id > vote.leader_id {
        return impossible("the snapshot is from a later leader than the sender");
    }
    if committed.is_some_and(|committed| last > committed && last.index <= committed.index) {
        return impossible("the snapshot contradicts what is committed here");
    }
    if meta.last_membership.membership().get_joint_config().is_empty() {
        return impossible("the snapshot has no voters");
    }
    Ok(())
}

/// A request to take over must name this node.
pub(crate) fn check_transfer(request: &TransferRequest, this: Seat) -> Result<(), Refused> {
    let impossible = |detail| Err(Refused::Impossible { kind: RpcKind::TransferLeader, detail });
    if !request.from_leader().committed {
        return impossible("a leader's vote is not granted");
    }
    if *request.to_node_id() != node_id(this) {
        return impossible("another node is to take over");
    }
    Ok(())
}

/// What a follower may answer to an append. openraft indexes its own log by these and panics on some.
pub(crate) fn check_append_response(
    request: &[LogId],
    prev: Option<LogId>,
    response: &AppendResponse,
    our_term: u64,
) -> Result<(), Refused> {
    let impossible = |detail| Err(Refused::Impossible { kind: RpcKind::Append, detail });
    match response {
        AppendResponse::Success => Ok(()),
        AppendResponse::PartialSuccess(upto) if *upto == prev || upto.is_some_and(|upto| request.contains(&upto)) => Ok(()),
        AppendResponse::PartialSuccess(_) => impossible("part of the entries is acknowledged up to one that was not sent"),
        AppendResponse::Conflict if prev.is_some() => Ok(()),
        AppendResponse::Conflict => impossible("a conflict before the first entry"),
        AppendResponse::HigherVote(vote) => check_term(vote, our_term),
    }
}

/// Who may vote: the admitted seats of the applied state, and the voters of the configuration in force (a seat that was revoked
/// while a change of configuration is under way must not block that change).
pub(crate) struct Eligible {
    /// `None` before genesis: nothing is known yet.
    pub(crate) seats: Option<BTreeSet<Seat>>,
    /// Voters of the configuration in force.
    pub(crate) in_force: BTreeSet<u64>,
}

impl Eligible {
    /// Voters of `membership` that may not vote.
    pub(crate) fn strangers(&self, membership: &Membership) -> Vec<u64> {
        let Some(seats) = &self.seats else { return Vec::new() };
        let seated = |voter: u64| seat_of(voter).is_some_and(|seat| seats.contains(&seat));
        membership.voter_ids().filter(|voter| !seated(*voter) && !self.in_force.contains(voter)).collect()
    }

    /// Index in `request` of the first configuration with strangers among its voters, and those strangers.
    pub(crate) fn first_bad_membership(&self, request: &AppendRequest) -> Option<(usize, Vec<u64>)> {
        request.entries.iter().enumerate().find_map(|(at, entry)| match &entry.payload {
            Payload::Membership(membership) => {
                let strangers = self.strangers(membership);
                (!strangers.is_empty()).then_some((at, strangers))
            }
            Payload::Blank | Payload::Normal(_) => None,
        })
    }
}

/// The first position at which `request` contradicts what is applied here. `known`: our log ids, as far as they are still kept.
pub(crate) fn contradiction(request: &AppendRequest, applied: Option<LogId>, known: &BTreeMap<u64, LogId>) -> Option<Fork> {
    let applied = applied?;
    let ids = request.prev_log_id.into_iter().chain(request.entries.iter().map(|entry| entry.log_id));
    ids.take_while(|theirs| theirs.index <= applied.index).find_map(|theirs| {
        let ours = if theirs.index == applied.index { Some(&applied) } else { known.get(&theirs.index) };
        let contradicts = match ours {
            Some(ours) => *ours != theirs,
            // Purged here. Leaders never go back along a log, so one later than the applied entry's cannot stand before it.
            None => theirs.leader_id > applied.leader_id,
        };
        contradicts.then(|| Fork {
            index: theirs.index,
            ours: ours.unwrap_or(&applied).leader_id.term,
            theirs: theirs.leader_id.term,
            leader: request.vote.leader_id.node_id,
            leader_term: request.vote.leader_id.term,
        })
    })
}

/// What a restarted node learned from the others about where it must have been (architecture.md §7, "Rollback of a disk").
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Abstention {
    /// No vote in this term or any before it: this node may have voted there before its disk was rolled back.
    pub terms_to: u64,
    /// No vote before this log index is applied.
    pub until_index: u64,
}

/// Whether this node votes, and the alarm that a contradicted entry raises.
#[derive(Debug)]
pub(crate) struct Gate {
    closed: AtomicBool,
    /// Never took part, so that nothing it lost was ever counted.
    first_run: AtomicBool,
    terms_to: AtomicU64,
    until_index: AtomicU64,
    fork: watch::Sender<Option<Fork>>,
}

impl Gate {
    pub(crate) fn new(closed: bool) -> Self {
        Self {
            closed: AtomicBool::new(closed),
            first_run: AtomicBool::new(false),
            terms_to: AtomicU64::new(0),
            until_index: AtomicU64::new(0),
            fork: watch::Sender::new(None),
        }
    }

    pub(crate) fn open(&self, abstention: Abstention) {
        self.terms_to.fetch_max(abstention.terms_to, Ordering::SeqCst);
        self.until_index.fetch_max(abstention.until_index, Ordering::SeqCst);
        self.closed.store(false, Ordering::SeqCst);
    }

    /// Whether a vote may be given in `term` by a node that has applied `applied`.
    pub(crate) fn allows(&self, term: u64, applied: u64) -> bool {
        !self.closed.load(Ordering::SeqCst)
            && term > self.terms_to.load(Ordering::SeqCst)
            && applied >= self.until_index.load(Ordering::SeqCst)
    }

    /// Says that this node never took part.
    pub(crate) fn note_first_run(&self) {
        self.first_run.store(true, Ordering::SeqCst);
    }

    /// What this node's word about its position is worth once it has applied `applied`.
    pub(crate) fn standing(&self, applied: u64) -> Standing {
        match self.voting(applied) {
            Voting::Votes => Standing::Confirmed,
            _ if self.first_run.load(Ordering::SeqCst) => Standing::FirstRun,
            _ => Standing::Unconfirmed,
        }
    }

    /// Whether this node votes, and what it waits for.
    pub(crate) fn voting(&self, applied: u64) -> Voting {
        let until_index = self.until_index.load(Ordering::SeqCst);
        if self.closed.load(Ordering::SeqCst) {
            Voting::AwaitingConfirmation
        } else if applied < until_index {
            Voting::CatchingUp { until_index }
        } else {
            Voting::Votes
        }
    }

    /// No vote in this term or before it.
    pub(crate) fn terms_to(&self) -> u64 {
        self.terms_to.load(Ordering::SeqCst)
    }

    pub(crate) fn raise_fork(&self, fork: Fork) {
        self.fork.send_if_modified(|first| first.is_none() && first.replace(fork).is_none());
    }

    pub(crate) fn fork(&self) -> Option<Fork> {
        *self.fork.borrow()
    }

    pub(crate) fn watch_fork(&self) -> watch::Receiver<Option<Fork>> {
        self.fork.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use openraft::entry::RaftEntry as _;

    use super::*;
    use crate::types::{Entry, LeaderId};

    fn id(term: u64, seat: u64, index: u64) -> LogId {
        LogId::new(LeaderId { term, node_id: seat }, index)
    }

    fn append(prev: Option<LogId>, ids: &[LogId]) -> AppendRequest {
        AppendRequest {
            vote: Vote { leader_id: LeaderId { term: 5, node_id: 2 }, committed: true },
            prev_log_id: prev,
            entries: ids.iter().map(|log_id| Entry::new(*log_id, Payload::Blank)).collect(),
            leader_commit: None,
        }
    }

    fn impossible(detail: &'static str) -> Result<(), Refused> {
        Err(Refused::Impossible { kind: RpcKind::Append, detail })
    }

    #[test]
    fn refuses_a_member_that_speaks_for_another() {
        let vote = Vote { leader_id: LeaderId { term: 5, node_id: 2 }, committed: true };
        assert_eq!(check_sender(RpcKind::Append, &vote, Seat(2), 4), Ok(()));
        assert_eq!(
            check_sender(RpcKind::Append, &vote, Seat(3), 4),
            Err(Refused::NotThePeer { kind: RpcKind::Append, claimed: 2, peer: 3 })
        );
    }

    #[test]
    fn refuses_a_term_that_would_exhaust_the_terms() {
        let vote = Vote { leader_id: LeaderId { term: u64::MAX, node_id: 2 }, committed: false };
        assert_eq!(check_term(&vote, 7), Err(Refused::TermTooFar { got: u64::MAX, ours: 7 }));
    }

    #[test]
    fn refuses_appends_that_no_leader_sends() {
        assert_eq!(check_append(&append(Some(id(1, 1, 4)), &[id(2, 1, 5), id(5, 2, 6)])), Ok(()));
        assert_eq!(check_append(&append(None, &[id(1, 1, 1)])), impossible("entries are not consecutive"));
        assert_eq!(check_append(&append(Some(id(1, 1, u64::MAX)), &[id(1, 1, 0)])), impossible("entries are not consecutive"));
        assert_eq!(
            check_append(&append(Some(id(3, 1, 4)), &[id(2, 1, 5)])),
            impossible("an entry is from an earlier leader than the one before")
        );
        assert_eq!(check_append(&append(Some(id(6, 1, 4)), &[])), impossible("an entry is from a later leader than the sender"));
    }

    #[test]
    fn refuses_answers_that_acknowledge_what_was_not_sent() {
        let prev = Some(id(1, 1, 4));
        let sent = [id(2, 1, 5)];
        assert_eq!(check_append_response(&sent, prev, &AppendResponse::PartialSuccess(prev), 5), Ok(()));
        assert!(check_append_response(&sent, prev, &AppendResponse::PartialSuccess(Some(id(2, 1, 6))), 5).is_err());
        assert!(check_append_response(&sent, None, &AppendResponse::Conflict, 5).is_err());
    }

    #[test]
    fn finds_the_first_entry_that_contradicts_an_applied_one() {
        let known: BTreeMap<u64, LogId> = (3..=4).map(|index| (index, id(2, 1, index))).collect();
        let applied = Some(id(2, 1, 5));
        let fork = |index, ours, theirs| Some(Fork { index, ours, theirs, leader: 2, leader_term: 5 });
        let check = |prev, ids: &[LogId]| contradiction(&append(prev, ids), applied, &known);
        assert_eq!(check(Some(id(2, 1, 4)), &[id(2, 1, 5), id(5, 2, 6)]), None);
        assert_eq!(check(Some(id(2, 1, 4)), &[id(5, 2, 5)]), fork(5, 2, 5));
        assert_eq!(check(Some(id(1, 1, 3)), &[]), fork(3, 2, 1));
        // Index 1 is purged here: an earlier leader is possible there, a later one is not.
        assert_eq!(check(Some(id(1, 1, 1)), &[]), None);
        assert_eq!(check(Some(id(4, 2, 1)), &[]), fork(1, 2, 4));
    }

    #[test]
    fn refuses_voters_without_a_seat_unless_they_vote_already() {
        let voters = |set: &[u64]| Membership::new_with_defaults(vec![set.iter().copied().collect()], []);
        let mut eligible = Eligible { seats: None, in_force: BTreeSet::from([1, 2, 9]) };
        assert_eq!(eligible.strangers(&voters(&[1, 2, 7])), Vec::<u64>::new());
        eligible.seats = Some(BTreeSet::from([Seat(1), Seat(2), Seat(3)]));
        assert_eq!(eligible.strangers(&voters(&[1, 2, 3, 9])), Vec::<u64>::new());
        assert_eq!(eligible.strangers(&voters(&[1, 7, 70_000])), [7, 70_000]);
    }

    #[test]
    fn gives_no_vote_until_confirmed_caught_up_and_past_the_reported_term() {
        let gate = Gate::new(true);
        assert!(!gate.allows(9, 100));
        assert_eq!((gate.voting(100), gate.standing(100)), (Voting::AwaitingConfirmation, Standing::Unconfirmed));
        gate.open(Abstention { terms_to: 4, until_index: 50 });
        assert!(!gate.allows(4, 100));
        assert!(!gate.allows(5, 49));
        assert!(gate.allows(5, 50));
        assert_eq!((gate.voting(49), gate.standing(49)), (Voting::CatchingUp { until_index: 50 }, Standing::Unconfirmed));
        assert_eq!((gate.voting(50), gate.standing(50)), (Voting::Votes, Standing::Confirmed));
    }
}
