//! Members that lie: what a node refuses of them.

use std::{collections::BTreeSet, sync::Arc};

use dstack_protocol::Seat;
use dstack_storage::EngineKind;
use openraft::entry::RaftEntry as _;
use sha2::{Digest as _, Sha256};

use super::{Cluster, PATIENCE, eventually};
use crate::{
    Machine as _, Refused, RpcKind, format,
    rpc::{self, AppendRequest, SnapshotChunk, VoteRequest, VoteWire},
    toy::Toy,
    types::{Command, Entry, LeaderId, LogId, Membership, Payload, SnapshotMeta, StoredMembership, Vote},
};

fn vote(term: u64, seat: u64, committed: bool) -> Vote {
    Vote { leader_id: LeaderId { term, node_id: seat }, committed }
}

fn append(vote: Vote, prev: Option<LogId>, entries: Vec<Entry>) -> Vec<u8> {
    rpc::encode_append(&AppendRequest { vote, prev_log_id: prev, entries, leader_commit: None }).unwrap()
}

struct Scene {
    cluster: Cluster,
    leader: u16,
    victim: u16,
    liar: u16,
    term: u64,
}

impl Scene {
    async fn set() -> Self {
        let cluster = Cluster::formed(3, EngineKind::Memory).await;
        cluster.set(1, "a", "1").await.unwrap();
        cluster.assert_equal(&[1, 2, 3]).await;
        let leader = cluster.leader(&[1, 2, 3]).await;
        let others: Vec<u16> = (1..=3).filter(|seat| *seat != leader).collect();
        let term = cluster.node(leader).status().leadership.term;
        Self { cluster, leader, victim: others[0], liar: others[1], term }
    }

    /// The liar, authenticated as itself, sends `body` to the victim.
    async fn send(&self, kind: RpcKind, body: &[u8]) -> Result<Vec<u8>, Refused> {
        self.cluster.node(self.victim).handle(kind, Seat(self.liar), body).await
    }

    async fn still_works(&self) {
        self.cluster.set(self.victim, "z", "9").await.unwrap();
        assert_eq!(self.cluster.leader(&[1, 2, 3]).await, self.leader);
        assert_eq!(self.cluster.node(self.leader).status().leadership.term, self.term);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refuses_rpcs_that_name_another_node_as_their_sender() {
    let scene = Scene::set().await;
    let claimed = u64::from(scene.leader);
    let refusal = |kind| Err(Refused::NotThePeer { kind, claimed, peer: scene.liar });
    let stolen = vote(scene.term, claimed, true);
    assert_eq!(scene.send(RpcKind::Append, &append(stolen, None, vec![])).await, refusal(RpcKind::Append));
    let ballot = rpc::encode_vote_request(&VoteRequest::new(vote(scene.term + 1, claimed, false), None)).unwrap();
    assert_eq!(scene.send(RpcKind::Vote, &ballot).await, refusal(RpcKind::Vote));
    assert_eq!(scene.send(RpcKind::PreVote, &ballot).await, refusal(RpcKind::PreVote));
    let transfer = rpc::TransferRequest::new(stolen, u64::from(scene.victim), None);
    let transfer = rpc::encode_transfer(&transfer).unwrap();
    assert_eq!(scene.send(RpcKind::TransferLeader, &transfer).await, refusal(RpcKind::TransferLeader));
    let meta = format::encode_snapshot_meta(&SnapshotMeta::default()).unwrap();
    let chunk =
        SnapshotChunk { vote: VoteWire::try_from(&stolen).unwrap(), meta: &meta, digest: [0; 32], total_bytes: 1, offset: 0, bytes: &[0] };
    assert_eq!(scene.send(RpcKind::Snapshot, &rpc::encode(&chunk).unwrap()).await, refusal(RpcKind::Snapshot));
    scene.still_works().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refuses_impossible_and_oversized_rpcs_and_goes_on() {
    let scene = Scene::set().await;
    let seat = u64::from(scene.liar);
    for kind in RpcKind::ALL {
        assert!(matches!(scene.send(kind, &[]).await, Err(Refused::Malformed(_))), "{kind}");
        assert!(matches!(scene.send(kind, &[1, 0xff, 0xff, 0xff]).await, Err(Refused::Malformed(_))), "{kind}");
        let huge = vec![1; kind.request_bytes_max() + 1];
        assert!(matches!(scene.send(kind, &huge).await, Err(Refused::TooLarge { .. })), "{kind}");
    }
    let exhausting = rpc::encode_vote_request(&VoteRequest::new(vote(u64::MAX, seat, false), None)).unwrap();
    assert!(matches!(scene.send(RpcKind::Vote, &exhausting).await, Err(Refused::TermTooFar { .. })));
    // A candidate that claims to be elected already.
    let crowned = rpc::encode_vote_request(&VoteRequest::new(vote(scene.term + 1, seat, true), None)).unwrap();
    assert!(matches!(scene.send(RpcKind::Vote, &crowned).await, Err(Refused::Impossible { .. })));
    // A leader that nobody elected, an unelected one, and one with a hole in its entries.
    let unelected = append(vote(scene.term + 1, seat, false), None, vec![]);
    assert!(matches!(scene.send(RpcKind::Append, &unelected).await, Err(Refused::Impossible { .. })));
    let id = |index| LogId::new(LeaderId { term: scene.term + 1, node_id: seat }, index);
    let holed = vec![Entry::new(id(0), Payload::Blank), Entry::new(id(2), Payload::Blank)];
    let holed = append(vote(scene.term + 1, seat, true), None, holed);
    assert!(matches!(scene.send(RpcKind::Append, &holed).await, Err(Refused::Impossible { .. })));
    scene.still_works().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_contradicts_an_applied_entry_stops_the_node() {
    let scene = Scene::set().await;
    let victim = scene.cluster.node(scene.victim);
    let applied = victim.watch_applied().index().unwrap();
    let usurper = LeaderId { term: scene.term + 1, node_id: u64::from(scene.liar) };
    let rewritten = Entry::new(LogId::new(usurper, applied), Payload::Normal(Command(b"set a forged".to_vec())));
    let honest = LeaderId { term: scene.term, node_id: u64::from(scene.leader) };
    let prev = Some(LogId::new(honest, applied - 1));
    let body = append(Vote { leader_id: usurper, committed: true }, prev, vec![rewritten]);
    let Err(Refused::Fork(fork)) = scene.send(RpcKind::Append, &body).await else { panic!("fork was not seen") };
    assert_eq!((fork.index, fork.ours, fork.theirs, fork.leader), (applied, scene.term, scene.term + 1, u64::from(scene.liar)));
    assert_eq!(*victim.watch_fork().borrow(), Some(fork));
    assert_eq!(victim.status().fork, Some(fork));
    // It decides nothing any more, and keeps what it had.
    assert!(victim.with_state(|_| ()).is_err());
    assert!(victim.propose(b"set b 2".to_vec(), PATIENCE).await.is_err());
    assert!(matches!(scene.send(RpcKind::Vote, &[]).await, Err(Refused::Stopped { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn refuses_a_configuration_whose_voters_hold_no_seat() {
    let scene = Scene::set().await;
    scene.cluster.node(1).propose(b"seats 1,2,3".to_vec(), PATIENCE).await.unwrap();
    scene.cluster.assert_equal(&[1, 2, 3]).await;
    let victim = scene.cluster.node(scene.victim);
    // The liar won an election (by whatever means) and now brings its own voters.
    let liar = LeaderId { term: scene.term + 1, node_id: u64::from(scene.liar) };
    let status = victim.status();
    let prev = LogId::new(LeaderId { term: scene.term, node_id: u64::from(scene.leader) }, status.last_index.unwrap());
    let id = |offset| LogId::new(liar, prev.index + offset);
    let voters = Membership::new_with_defaults(vec![BTreeSet::from([u64::from(scene.liar), 77])], []);
    let entries = vec![Entry::new(id(1), Payload::Blank), Entry::new(id(2), Payload::Membership(voters.clone()))];
    let body = append(Vote { leader_id: liar, committed: true }, Some(prev), entries);
    // What stands before it is taken, for it may admit the voters; the configuration is not.
    let answer: rpc::AppendResponseWire = rpc::decode(&scene.send(RpcKind::Append, &body).await.unwrap()).unwrap();
    assert_eq!(rpc::AppendResponse::from(answer), rpc::AppendResponse::PartialSuccess(Some(id(1))));
    let again = append(Vote { leader_id: liar, committed: true }, Some(id(1)), vec![Entry::new(id(2), Payload::Membership(voters))]);
    assert_eq!(scene.send(RpcKind::Append, &again).await, Err(Refused::Voters { seats: vec![77] }));
    assert_eq!(victim.status().voters, (1..=3).map(Seat).collect());
}

#[tokio::test(flavor = "multi_thread")]
async fn refuses_snapshots_that_the_machine_does_not_accept() {
    let scene = Scene::set().await;
    let seat = u64::from(scene.liar);
    let leader = LeaderId { term: scene.term + 1, node_id: seat };
    let members = Membership::new_with_defaults(vec![BTreeSet::from([1, 2, 3])], []);
    let last = |index| Some(LogId::new(leader, index));
    let send = async |meta: SnapshotMeta, data: &[u8], total: u64| {
        let meta = format::encode_snapshot_meta(&meta).unwrap();
        let chunk = SnapshotChunk {
            vote: VoteWire::try_from(&Vote { leader_id: leader, committed: true }).unwrap(),
            meta: &meta,
            digest: Sha256::digest(data).into(),
            total_bytes: total,
            offset: 0,
            bytes: data,
        };
        scene.send(RpcKind::Snapshot, &rpc::encode(&chunk).unwrap()).await
    };
    let meta = |index, members: &Membership| SnapshotMeta {
        last_log_id: last(index),
        last_membership: StoredMembership::new(last(0), members.clone()),
    };
    let good = Toy::default().snapshot();
    // Below what is committed here: openraft would panic.
    assert!(matches!(send(meta(1, &members), &good, good.len() as u64).await, Err(Refused::Impossible { .. })));
    // Longer than announced as allowed, and bytes that are no state.
    assert!(matches!(send(meta(900, &members), &good, u64::MAX).await, Err(Refused::Snapshot { .. })));
    assert!(matches!(send(meta(900, &members), b"\xff\xff\xff", 3).await, Err(Refused::Snapshot { .. })));
    // A state that admits three seats, with a stranger among the voters.
    let mut seated = Toy::default();
    seated.apply(b"seats 1,2,3");
    let (seated, strange) = (seated.snapshot(), Membership::new_with_defaults(vec![BTreeSet::from([1, 2, 3, 66])], []));
    assert_eq!(send(meta(900, &strange), &seated, seated.len() as u64).await, Err(Refused::Voters { seats: vec![66] }));
    scene.still_works().await;
    let victim = scene.cluster.node(scene.victim);
    assert_eq!(victim.status().snapshot_index, None);
    eventually("the victim to go on", || victim.status().running.is_ok().then_some(())).await;
    let _ = Arc::clone(&scene.cluster.wires);
}
