//! A whole release over holders in one process: some silent, some refusing, some lying; the client combines what it gets.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use dstack_actors::mailbox::FULL_RETRY_MS;
use dstack_actors::ports::Peers;
use dstack_actors::release::DEADLINE;
use dstack_actors::share_holder::ShareHolderPool;
use dstack_protocol::release::Out;
use dstack_protocol::rpc::{PATH_PEER_ASK, PATH_PEER_GO, ReleaseAnswer};
use dstack_protocol::{Epoch, Generation, NodeIndex, RefusalCode, Seat, Wire as _};
use dstack_release::pace::HEDGE_AFTER_FIRST;
use dstack_threshold::combine::CombineError;
use dstack_threshold::prf::PrfShare;
use support::client::{Client, combine, combine_certified};
use support::cluster::{Cluster, copy, direct, renamed};
use support::holders::Node;
use support::peers::{InProcess, Manner};
use support::run;

struct World {
    cluster: Cluster,
    shares: Vec<PrfShare>,
    nodes: Vec<Node>,
    client: Client,
}

impl World {
    fn new(n: u16) -> Self {
        let (cluster, shares) = Cluster::with_root(n);
        let nodes = (1..).zip(&shares).map(|(seat, share)| Node::start(&cluster, seat, copy(share))).collect();
        let client = Client::new(&cluster, "guest");
        Self { cluster, shares, nodes, client }
    }

    /// The other nodes as node 1 sees them, the named ones with other manners.
    fn peers(&self, others: &[(u16, Manner)]) -> Vec<(u16, Manner)> {
        let honest = self.nodes.iter().skip(1).map(|node| (node.seat.0, Manner::Honest(Arc::clone(&node.holder))));
        let changed = |seat: u16| others.iter().find(|(other, _)| *other == seat).map(|(_, manner)| manner.clone());
        honest.map(|(seat, manner)| (seat, changed(seat).unwrap_or(manner))).collect()
    }

    async fn release(&self, peers: Arc<dyn Peers>, exclude: &[u16]) -> Result<Vec<[u8; 64]>, dstack_protocol::Refusal> {
        let exclude: Vec<NodeIndex> = exclude.iter().map(|index| NodeIndex(*index)).collect();
        let (request, recipient) = self.client.request(&self.cluster, self.client.wishes());
        let coordinator = self.nodes[0].coordinator(peers, 8);
        let answer = coordinator.release(self.client.ask(&request), &exclude).await?;
        assert_eq!(answer.outs.len(), usize::from(self.cluster.log.read(|state| state.genesis.t)));
        let keys = combine(&self.cluster, &request, &recipient, &answer).unwrap();
        assert_eq!(keys, direct(&self.cluster, &self.shares, &request));
        Ok(keys)
    }
}

#[test]
fn an_honest_cluster_gives_the_same_key_to_each_request() {
    run(async {
        let w = World::new(3);
        let first = w.release(InProcess::new(w.peers(&[])), &[]).await.unwrap();
        let second = w.release(InProcess::new(w.peers(&[])), &[1]).await.unwrap();
        assert_eq!(first, second, "another set of holders, the same keys");
        assert_ne!(first[0], first[1]);
        let neighbour = Client::new(&w.cluster, "neighbour");
        let other = World { client: neighbour, ..w };
        let third = other.release(InProcess::new(other.peers(&[])), &[]).await.unwrap();
        assert_ne!(first[0], third[0], "the disk of another instance");
        assert_eq!(first[1], third[1], "the custom key is the app's");
    });
}

#[test]
fn one_silent_one_refusing_and_one_garbled_holder_do_not_stop_a_release() {
    run(async {
        let w = World::new(7);
        let faulty =
            [(2, Manner::Silent), (3, Manner::Refuses(RefusalCode::NotReady)), (4, Manner::Says(b"DKMS-V1-OUT and then noise".to_vec()))];
        let peers = InProcess::new(w.peers(&faulty));
        let began = Instant::now();
        w.release(peers.clone(), &[]).await.unwrap();
        assert!(began.elapsed() < DEADLINE);
        let reached = peers.reached(PATH_PEER_GO);
        assert!(reached.contains(&Seat(4)) && reached.contains(&Seat(7)), "the lost are replaced: {reached:?}");
        assert!(!reached.contains(&Seat(3)), "who refused the ask is not told to go");
    });
}

#[test]
fn an_answer_in_anothers_name_is_dropped() {
    run(async {
        let w = World::new(3);
        let forged = Out { index: NodeIndex(1), epoch: Epoch(1), kem: [1; 32], ct: vec![2; 64] };
        w.release(InProcess::new(w.peers(&[(2, Manner::Says(forged.encode()))])), &[]).await.unwrap();
    });
}

#[test]
fn the_client_finds_a_liar_and_excludes_it() {
    run(async {
        let w = World::new(3);
        let lie = Out { index: NodeIndex(2), epoch: Epoch(1), kem: [1; 32], ct: vec![2; 64] };
        let manners = [(2, Manner::Says(lie.encode())), (3, Manner::Refuses(RefusalCode::ShuttingDown))];
        let (request, recipient) = w.client.request(&w.cluster, w.client.wishes());
        let coordinator = w.nodes[0].coordinator(InProcess::new(w.peers(&manners)), 8);
        let answer: ReleaseAnswer = coordinator.release(w.client.ask(&request), &[]).await.unwrap();
        assert!(answer.outs.contains(&lie), "sealed to the client: the coordinator cannot tell");
        let failed = combine(&w.cluster, &request, &recipient, &answer).unwrap_err();
        assert_eq!(failed, CombineError::TooFew { have: 1, need: 2, culprits: vec![] });
        let peers = InProcess::new(w.peers(&manners[..1]));
        w.release(peers.clone(), &[2]).await.unwrap();
        assert!(peers.sent().iter().all(|(seat, ..)| *seat != Seat(2)), "an excluded holder is not asked");
    });
}

#[test]
fn the_same_request_again_is_recorded_once_and_gives_the_same_key() {
    run(async {
        let w = World::new(3);
        let coordinator = w.nodes[0].coordinator(InProcess::new(w.peers(&[])), 8);
        let (request, recipient) = w.client.request(&w.cluster, w.client.wishes());
        let size = w.cluster.log.size();
        let first = coordinator.release(w.client.ask(&request), &[]).await.unwrap();
        let again = coordinator.release(w.client.ask(&request), &[NodeIndex(1)]).await.unwrap();
        assert_eq!(w.cluster.log.size(), size + 1);
        assert_eq!(first.receipt, again.receipt);
        let keys = |answer| combine(&w.cluster, &request, &recipient, answer).unwrap();
        assert_eq!(keys(&first), keys(&again));
    });
}

#[test]
fn evidence_is_sent_only_to_holders_that_do_not_know_it() {
    run(async {
        let w = World::new(3);
        let first = InProcess::new(w.peers(&[]));
        w.release(first.clone(), &[1]).await.unwrap();
        let long = |sent: &InProcess| sent.sent().iter().filter(|(_, _, bytes)| *bytes > w.client.evidence.len()).count();
        assert_eq!((long(&first), first.reached(PATH_PEER_ASK).len()), (2, 2), "new to this node, so sent at once");
        let second = InProcess::new(w.peers(&[]));
        w.release(second.clone(), &[1]).await.unwrap();
        assert_eq!((long(&second), second.reached(PATH_PEER_ASK).len()), (0, 2), "the hash is enough");
        // One of them was restarted, and says so.
        let restarted = Node::start(&w.cluster, 2, copy(&w.shares[1]));
        let third = InProcess::new(w.peers(&[(2, Manner::Honest(Arc::clone(&restarted.holder)))]));
        w.release(third.clone(), &[1]).await.unwrap();
        assert_eq!((long(&third), third.reached(PATH_PEER_ASK).len()), (1, 3), "asked with the hash, then with the evidence");
    });
}

#[test]
fn the_nearest_holders_are_asked_first() {
    run(async {
        let w = World::new(5);
        let peers = InProcess::measured(w.peers(&[]), &[(2, 90), (3, 10), (4, 50), (5, 20)]);
        w.release(peers.clone(), &[]).await.unwrap();
        let mut asked = peers.reached(PATH_PEER_ASK);
        asked.sort_unstable();
        asked.dedup();
        assert_eq!(asked, vec![Seat(3), Seat(5)], "own and two near ones; the far ones rest");
        assert_eq!(peers.reached(PATH_PEER_GO).len(), 2, "each is told to go once");
    });
}

#[test]
fn a_silent_holder_costs_one_delay() {
    run(async {
        let w = World::new(3);
        let silent = [(2, Manner::Silent)];
        // Seat 2 is the nearest as far as anybody measured; it takes nothing and says nothing.
        let peers = InProcess::measured(w.peers(&silent), &[(2, 1), (3, 5)]);
        let began = Instant::now();
        w.release(peers.clone(), &[]).await.unwrap();
        let took = began.elapsed();
        assert!(took >= HEDGE_AFTER_FIRST, "{took:?}: seat 3 is asked only once seat 2 is late");
        assert!(took < HEDGE_AFTER_FIRST + Duration::from_secs(2), "{took:?}: far less than its connection's timeout of 3 s");
        assert_eq!(peers.reached(PATH_PEER_GO), vec![Seat(3)]);
    });
}

#[test]
fn holders_that_take_the_ask_and_never_answer_cost_one_delay_together() {
    run(async {
        let w = World::new(7);
        // 4 of 7: the node itself, and of the three nearest others two that never answer.
        let dumb = Manner::Dawdles(Duration::from_secs(60));
        let near: Vec<(u16, u64)> = (2..=7).map(|seat| (seat, u64::from(seat))).collect();
        let peers = InProcess::measured(w.peers(&[(2, dumb.clone()), (3, dumb)]), &near);
        let began = Instant::now();
        w.release(peers.clone(), &[]).await.unwrap();
        let took = began.elapsed();
        assert!(took >= HEDGE_AFTER_FIRST && took < Duration::from_secs(2), "{took:?}");
        let mut told = peers.reached(PATH_PEER_GO);
        told.sort_unstable();
        assert_eq!(told, [2, 3, 4, 5, 6].map(Seat), "one more for each that is late; the last one rests");
    });
}

#[test]
fn a_node_without_a_share_coordinates_by_others() {
    run(async {
        let w = World::new(3);
        let bare = Node::with(&w.cluster, 1, ShareHolderPool::start(1, 4, w.cluster.id), w.cluster.judge(), 4);
        let (request, recipient) = w.client.request(&w.cluster, w.client.wishes());
        let began = Instant::now();
        let peers = InProcess::new(w.peers(&[]));
        let answer = bare.coordinator(peers, 8).release(w.client.ask(&request), &[]).await.unwrap();
        assert!(began.elapsed() < HEDGE_AFTER_FIRST, "its own holder is not waited for");
        assert_eq!(answer.outs.iter().map(|out| out.index.0).collect::<Vec<_>>(), vec![2, 3]);
        assert!(combine(&w.cluster, &request, &recipient, &answer).is_ok());
    });
}

#[test]
fn a_wrong_partial_is_named_and_dropped_and_the_keys_are_served() {
    run(async {
        let w = World::new(3);
        let (request, recipient) = w.client.request(&w.cluster, w.client.wishes());
        // Seat 2 evaluates under a share of its own making: sealed well, proven well for the wrong key.
        let liar = Node::start(&w.cluster, 2, renamed(&w.shares[2], NodeIndex(2)));
        let manners = [(2, Manner::Honest(Arc::clone(&liar.holder)))];
        let coordinator = w.nodes[0].coordinator(InProcess::measured(w.peers(&manners), &[(2, 1), (3, 5)]), 8);
        let answer = coordinator.release(w.client.ask(&request), &[]).await.unwrap();
        assert_eq!(answer.outs.iter().map(|out| out.index.0).collect::<Vec<_>>(), vec![1, 2]);
        let failed = combine(&w.cluster, &request, &recipient, &answer).unwrap_err();
        assert_eq!(failed, CombineError::NoSet { failed_sets: vec![vec![NodeIndex(1), NodeIndex(2)]], culprits: vec![] });
        // The client knows the certified keys of the epoch and names it; the same request without it is served.
        let certified = w.shares.iter().map(|share| (share.index(), share.vk())).collect();
        let named = combine_certified(&w.cluster, &request, &recipient, &answer, Some(&certified)).unwrap_err();
        assert_eq!(named.culprits(), [NodeIndex(2)]);
        let again = coordinator.release(w.client.ask(&request), &[NodeIndex(2)]).await.unwrap();
        let keys = combine(&w.cluster, &request, &recipient, &again).unwrap();
        assert_eq!(keys, direct(&w.cluster, &w.shares, &request));
    });
}

#[test]
fn a_release_that_this_node_can_tell_to_fail_records_nothing() {
    run(async {
        let w = World::new(3);
        let peers = InProcess::new(w.peers(&[]));
        let coordinator = w.nodes[0].coordinator(peers.clone(), 8);
        let size = w.cluster.log.size();
        let (mut request, _) = w.client.request(&w.cluster, w.client.wishes());
        request.app_id = dstack_protocol::AppId([9; 20]);
        assert_eq!(coordinator.release(w.client.ask(&request), &[]).await.unwrap_err().code, RefusalCode::AppUnknown);
        let (request, _) = w.client.request(&w.cluster, w.client.wishes());
        let excluded = coordinator.release(w.client.ask(&request), &[NodeIndex(1), NodeIndex(2)]).await.unwrap_err();
        assert_eq!(excluded.code, RefusalCode::NotEnoughPartials);
        let (mut request, _) = w.client.request(&w.cluster, w.client.wishes());
        request.generation = Generation(1);
        let generation = coordinator.release(w.client.ask(&request), &[]).await.unwrap_err();
        assert_eq!(generation.code, RefusalCode::UnknownGeneration);
        assert_eq!(w.cluster.log.size(), size);
        assert!(peers.sent().is_empty());
    });
}

#[test]
fn fewer_than_t_holders_explain_why() {
    run(async {
        let w = World::new(3);
        let manners = [(2, Manner::Refuses(RefusalCode::NotReady)), (3, Manner::Refuses(RefusalCode::MeasurementRevoked))];
        let refusal = w.release(InProcess::new(w.peers(&manners)), &[]).await.unwrap_err();
        assert_eq!(refusal.code, RefusalCode::MeasurementRevoked, "the final reason before the passing one");
    });
}

#[test]
fn the_deadline_ends_a_release_even_when_the_wall_clock_stands_still() {
    run(async {
        // The nodes' clocks stand at log time for the whole test; the deadline is measured, not read.
        let w = World::new(3);
        let slow = Manner::Dawdles(Duration::from_millis(2_500));
        let peers = InProcess::new(w.peers(&[(2, slow.clone()), (3, slow)]));
        let began = Instant::now();
        let refusal = w.release(peers, &[]).await.unwrap_err();
        let took = began.elapsed();
        assert_eq!(refusal.code, RefusalCode::DeadlineExceeded);
        assert!(refusal.code.retryable() && refusal.retry_after_ms > 0);
        assert!(took >= DEADLINE && took < DEADLINE + Duration::from_secs(2), "{took:?}");
    });
}

#[test]
fn releases_at_once_are_bounded() {
    run(async {
        let w = World::new(3);
        let coordinator = w.nodes[0].coordinator(InProcess::new(w.peers(&[])), 1);
        let request = || w.client.ask(&w.client.request(&w.cluster, w.client.wishes()).0);
        let (served, refused) = futures::join!(coordinator.release(request(), &[]), coordinator.release(request(), &[]));
        assert!(served.is_ok());
        let refusal = refused.unwrap_err();
        assert_eq!((refusal.code, refusal.retry_after_ms), (RefusalCode::Overloaded, FULL_RETRY_MS));
        coordinator.release(request(), &[]).await.unwrap();
    });
}
