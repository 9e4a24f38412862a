//! Clusters without faults, and nodes that stop and start.

use std::{collections::BTreeSet, time::Duration};

use dstack_protocol::Seat;
use dstack_storage::EngineKind;

use super::{Cluster, Fault, PATIENCE, eventually};
use crate::{Abstention, MembersError, ProposeError, RpcKind, Voting, toy::Toy};

#[tokio::test(flavor = "multi_thread")]
async fn one_node_elects_itself_and_applies() {
    let cluster = Cluster::formed(1, EngineKind::Memory).await;
    assert_eq!(cluster.set(1, "a", "1").await.unwrap().response, b"was nothing");
    assert_eq!(cluster.set(1, "a", "2").await.unwrap().response, b"was 1");
    assert_eq!(cluster.node(1).initialize(&BTreeSet::from([Seat(1)])).await, Err(MembersError::AlreadyFormed));
}

async fn every_node_proposes(count: u16, engine: EngineKind) {
    let cluster = Cluster::formed(count, engine).await;
    let seats: Vec<u16> = (1..=count).collect();
    for seat in &seats {
        let done = cluster.set(*seat, &format!("k{seat}"), "v").await.unwrap();
        assert_eq!(done.response, b"was nothing");
    }
    // A read on any node sees what was acknowledged on any other.
    for seat in &seats {
        cluster.node(*seat).linearizable_read(PATIENCE).await.unwrap();
        assert_eq!(cluster.node(*seat).with_state(|toy| toy.map.len()).unwrap(), usize::from(count));
    }
    let state = cluster.assert_equal(&seats).await;
    assert_eq!(state.size, u64::from(count));
    for node in cluster.nodes.values() {
        let leaves = node.ledger.0.lock().unwrap();
        assert_eq!(leaves.keys().copied().collect::<Vec<_>>(), (0..state.size).collect::<Vec<_>>());
        assert_eq!(node.watcher.told.lock().unwrap().len() as u64, state.size);
    }
    let proposes = cluster.wires.delivered(RpcKind::Propose);
    assert!(proposes >= u64::from(count) - 1, "followers did not forward: {proposes}");
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_propose_through_any_of_them_in_memory() {
    every_node_proposes(3, EngineKind::Memory).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_propose_through_any_of_them_on_sled() {
    every_node_proposes(3, EngineKind::Sled).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn five_nodes_propose_through_any_of_them_on_redb() {
    every_node_proposes(5, EngineKind::Redb).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn proposals_side_by_side_are_all_applied_in_one_order() {
    let cluster = Cluster::formed(3, EngineKind::Memory).await;
    let proposals = (0..300u32).map(|number| {
        let handle = cluster.node(1 + (number % 3) as u16).clone();
        tokio::spawn(async move { handle.propose(format!("set k{number} {number}").into_bytes(), PATIENCE).await })
    });
    let indices: BTreeSet<u64> = futures::future::join_all(proposals).await.into_iter().map(|done| done.unwrap().unwrap().index).collect();
    assert_eq!(indices.len(), 300);
    assert_eq!(cluster.assert_equal(&[1, 2, 3]).await.map.len(), 300);
}

async fn comes_back_from_disk(engine: EngineKind) {
    let mut cluster = Cluster::formed(3, engine).await;
    for number in 0..20 {
        cluster.set(1, &format!("k{number}"), "v").await.unwrap();
    }
    let before = cluster.assert_equal(&[1, 2, 3]).await;
    for seat in 1..=3 {
        cluster.kill(seat).await;
    }
    for seat in 1..=3 {
        cluster.restart(seat).await;
    }
    cluster.leader(&[1, 2, 3]).await;
    cluster.set(2, "after", "restart").await.unwrap();
    let after = cluster.assert_equal(&[1, 2, 3]).await;
    assert_eq!(after.size, before.size + 1);
    assert!(before.map.iter().all(|(key, value)| after.map.get(key) == Some(value)));
    // Entries were applied again and marked so; their leaves were the same (the ledger refuses others).
    let replays = |seat: u16| cluster.nodes[&seat].watcher.told.lock().unwrap().iter().filter(|(at, _)| at.replayed).count();
    assert!((1..=3).any(|seat| replays(seat) > 0), "nothing was replayed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_comes_back_from_sled() {
    comes_back_from_disk(EngineKind::Sled).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_comes_back_from_redb() {
    comes_back_from_disk(EngineKind::Redb).await;
}

async fn snapshot_and_restart(engine: EngineKind) {
    let mut cluster = Cluster::formed(1, engine).await;
    for number in 0..10 {
        cluster.set(1, &format!("k{number}"), "v").await.unwrap();
    }
    let checkpoint = cluster.node(1).propose(b"checkpoint".to_vec(), PATIENCE).await.unwrap();
    cluster.set(1, "late", "v").await.unwrap();
    let status = eventually("a purged log", || {
        let status = cluster.node(1).status();
        (status.purged_index == Some(checkpoint.index)).then_some(status)
    })
    .await;
    // The snapshot is the state at the checkpoint and nothing else.
    assert_eq!(status.snapshot_index, Some(checkpoint.index));
    let before = cluster.node(1).with_state(Toy::clone).unwrap();
    cluster.kill(1).await;
    cluster.restart(1).await;
    eventually("the state before the stop", || {
        let state = cluster.node(1).with_state(Toy::clone).unwrap();
        (state.map == before.map && state.size == before.size).then_some(())
    })
    .await;
    assert_eq!(cluster.nodes[&1].watcher.restored.lock().unwrap().as_slice(), [checkpoint.index]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_is_stored_the_log_purged_and_both_used_at_start_on_sled() {
    snapshot_and_restart(EngineKind::Sled).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_is_stored_the_log_purged_and_both_used_at_start_on_redb() {
    snapshot_and_restart(EngineKind::Redb).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_snapshot_without_a_checkpoint() {
    let cluster = Cluster::formed(1, EngineKind::Memory).await;
    for number in 0..50 {
        cluster.set(1, &format!("k{number}"), "v").await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(cluster.node(1).status().snapshot_index, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_learner_becomes_a_voter_only_with_an_admitted_seat() {
    let cluster = Cluster::start(4, EngineKind::Memory).await;
    let three: BTreeSet<Seat> = (1..=3).map(Seat).collect();
    cluster.node(1).initialize(&three).await.unwrap();
    let leader = cluster.leader(&[1, 2, 3]).await;
    let handle = cluster.node(leader);
    handle.propose(b"seats 1,2,3".to_vec(), PATIENCE).await.unwrap();
    handle.add_learner(Seat(4), PATIENCE).await.unwrap();
    let four: BTreeSet<Seat> = (1..=4).map(Seat).collect();
    assert_eq!(handle.change_voters(&four, PATIENCE).await, Err(MembersError::NotAdmitted { seats: vec![4] }));
    handle.propose(b"seats 1,2,3,4".to_vec(), PATIENCE).await.unwrap();
    handle.change_voters(&four, PATIENCE).await.unwrap();
    eventually("four voters everywhere", || (1..=4).all(|seat| cluster.node(seat).status().voters == four).then_some(())).await;
    assert_eq!(cluster.assert_equal(&[1, 2, 3, 4]).await.size, 2);
    // And out again.
    let leader = cluster.leader(&[1, 2, 3, 4]).await;
    let rest: BTreeSet<Seat> = four.iter().copied().filter(|seat| seat.0 != leader).collect();
    cluster.node(leader).change_voters(&rest, PATIENCE).await.unwrap();
    let rest: Vec<u16> = rest.iter().map(|seat| seat.0).collect();
    assert!(rest.contains(&cluster.leader(&rest).await));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_hands_over_before_it_shuts_down() {
    let mut cluster = Cluster::formed(3, EngineKind::Memory).await;
    let leader = cluster.leader(&[1, 2, 3]).await;
    let term = cluster.node(leader).status().leadership.term;
    let started = std::time::Instant::now();
    cluster.node(leader).shutdown(PATIENCE).await;
    cluster.kill(leader).await;
    let rest: Vec<u16> = (1..=3).filter(|seat| *seat != leader).collect();
    let next = cluster.leader(&rest).await;
    // Faster than any election timeout: the others did not have to notice a silence.
    assert!(started.elapsed() < Duration::from_millis(cluster.config.election_min_ms), "took {:?}", started.elapsed());
    assert!(cluster.node(next).status().leadership.term > term);
    cluster.set(rest[0], "a", "1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_lost_its_disk_votes_after_the_others_said_from_where_on() {
    let mut cluster = Cluster::formed(3, EngineKind::Memory).await;
    for number in 0..5 {
        cluster.set(1, &format!("k{number}"), "v").await.unwrap();
    }
    let leader = cluster.leader(&[1, 2, 3]).await;
    let rest: Vec<u16> = (1..=3).filter(|seat| *seat != leader).collect();
    let (stays, lost) = (rest[0], rest[1]);
    let others = [Seat(leader), Seat(stays)];
    cluster.kill(lost).await;
    cluster.nodes.get_mut(&lost).unwrap().wipe();
    // One of the others is away too: its word is missing, and nobody knows what the lost node acknowledged.
    cluster.wires.cut(&[stays], &[leader, lost], Some(Fault::Down));
    cluster.restart_abstaining(lost).await;
    let node = cluster.node(lost).clone();
    let alone = tokio::time::timeout(Duration::from_secs(2), node.confirm(&others, false)).await;
    assert!(alone.is_err(), "confirmed by one: {alone:?}");
    assert_eq!(node.status().voting, Voting::AwaitingConfirmation);
    cluster.wires.heal();
    let reached = cluster.node(leader).status().last_index.unwrap();
    let confirmation = tokio::time::timeout(PATIENCE, node.confirm(&others, false)).await.unwrap().unwrap();
    assert!(!confirmation.forming && confirmation.abstention.until_index >= reached, "{confirmation:?}");
    assert!(confirmation.abstention.terms_to >= cluster.node(leader).status().leadership.term);
    node.vote_again(confirmation.abstention);
    cluster.assert_equal(&[1, 2, 3]).await;
    eventually("its vote", || (node.status().voting == Voting::Votes).then_some(())).await;
    // And its vote counts: the leader goes, and the two elect one of them.
    cluster.kill(leader).await;
    cluster.set(lost, "after", "v").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn new_nodes_form_a_cluster_by_telling_each_other_that_they_are_new() {
    let mut cluster = Cluster::start(3, EngineKind::Memory).await;
    for seat in 1..=3 {
        cluster.kill(seat).await;
        cluster.restart_abstaining(seat).await;
    }
    let all: BTreeSet<Seat> = (1..=3).map(Seat).collect();
    let joins: Vec<_> = (1..=3)
        .map(|seat| {
            let (node, all) = (cluster.node(seat).clone(), all.clone());
            tokio::spawn(async move {
                let others: Vec<Seat> = all.iter().copied().filter(|other| *other != Seat(seat)).collect();
                let confirmation = node.confirm(&others, true).await.unwrap();
                node.vote_again(confirmation.abstention);
                if confirmation.forming {
                    let _may_be_formed_by_now = node.initialize(&all).await;
                }
            })
        })
        .collect();
    for join in joins {
        tokio::time::timeout(PATIENCE, join).await.unwrap().unwrap();
    }
    cluster.set(2, "a", "1").await.unwrap();
    assert_eq!(cluster.assert_equal(&[1, 2, 3]).await.size, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_not_confirmed_gives_no_vote() {
    let mut cluster = Cluster::formed(3, EngineKind::Memory).await;
    cluster.set(1, "a", "1").await.unwrap();
    let leader = cluster.leader(&[1, 2, 3]).await;
    let rest: Vec<u16> = (1..=3).filter(|seat| *seat != leader).collect();
    cluster.kill(rest[1]).await;
    cluster.restart_abstaining(rest[1]).await;
    cluster.kill(leader).await;
    // Two of three run, but one abstains: nobody can be elected.
    let candidate = cluster.node(rest[0]);
    let failed = candidate.propose(b"set b 2".to_vec(), Duration::from_secs(4)).await;
    assert!(matches!(failed, Err(ProposeError::NoLeader { .. } | ProposeError::Unknown { .. })), "{failed:?}");
    let status = cluster.node(rest[1]).status();
    assert_ne!(status.leadership.leader, Some(Seat(rest[1])));
    // Confirmed by the others: it votes again, above the highest term that they reported.
    let terms_to = candidate.status().voted_term.max(status.voted_term);
    cluster.node(rest[1]).vote_again(Abstention { terms_to, until_index: status.applied_index.unwrap_or(0) });
    candidate.propose(b"set c 3".to_vec(), PATIENCE).await.unwrap();
    assert!(cluster.node(rest[0]).status().leadership.term > terms_to);
}
