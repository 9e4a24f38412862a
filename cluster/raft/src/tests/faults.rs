//! Clusters with faults: crashes, cuts, slow and lossy wires, nodes that fell behind.

use std::time::{Duration, Instant};

use dstack_protocol::Seat;
use dstack_storage::EngineKind;

use super::{Cluster, Fault, PATIENCE, eventually};
use crate::{ProposeError, ReadError, RpcKind};

async fn survives_the_loss_of_its_leader(count: u16, engine: EngineKind) {
    let mut cluster = Cluster::formed(count, engine).await;
    let all: Vec<u16> = (1..=count).collect();
    let first = cluster.leader(&all).await;
    cluster.set(first, "a", "1").await.unwrap();
    let term = cluster.node(first).status().leadership.term;
    cluster.kill(first).await;
    let rest: Vec<u16> = all.iter().copied().filter(|seat| *seat != first).collect();
    // The caller need not know: the proposal finds the next leader.
    let started = Instant::now();
    cluster.set(rest[0], "b", "2").await.unwrap();
    let bound = Duration::from_millis(3 * cluster.config.election_max_ms) + Duration::from_secs(4);
    assert!(started.elapsed() < bound, "failover took {:?}", started.elapsed());
    let second = cluster.leader(&rest).await;
    assert!(cluster.node(second).status().leadership.term > term);
    // The old leader comes back, follows, and has everything.
    cluster.restart(first).await;
    assert_eq!(cluster.leader(&all).await, second);
    assert_eq!(cluster.assert_equal(&all).await.map.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_survive_the_loss_of_their_leader_on_sled() {
    survives_the_loss_of_its_leader(3, EngineKind::Sled).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn five_nodes_survive_the_loss_of_their_leader_in_memory() {
    survives_the_loss_of_its_leader(5, EngineKind::Memory).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_off_leader_acknowledges_nothing_and_gives_way_when_the_cut_heals() {
    let cluster = Cluster::formed(5, EngineKind::Memory).await;
    let all = [1, 2, 3, 4, 5];
    let old = cluster.leader(&all).await;
    let with = all.iter().copied().find(|seat| *seat != old).unwrap();
    let majority: Vec<u16> = all.iter().copied().filter(|seat| *seat != old && *seat != with).collect();
    cluster.set(old, "before", "1").await.unwrap();
    cluster.wires.cut(&[old, with], &majority, Some(Fault::Lost));
    // The minority's leader cannot commit, nor confirm a read.
    let lost = cluster.node(old).propose(b"set minority 1".to_vec(), Duration::from_secs(2)).await;
    assert!(matches!(lost, Err(ProposeError::Unknown { .. } | ProposeError::NoLeader { .. })), "{lost:?}");
    let read = cluster.node(old).linearizable_read(Duration::from_secs(1)).await;
    assert!(matches!(read, Err(ReadError::NoLeader { .. })), "{read:?}");
    // The majority goes on.
    let new = cluster.leader(&majority).await;
    cluster.set(majority[0], "majority", "1").await.unwrap();
    cluster.wires.heal();
    assert_eq!(cluster.leader(&all).await, new);
    let state = cluster.assert_equal(&all).await;
    assert!(state.map.contains_key("before") && state.map.contains_key("majority"));
    assert!(!state.map.contains_key("minority"), "an entry of the minority was applied");
    // A node of the minority reads what the majority wrote.
    cluster.node(old).linearizable_read(PATIENCE).await.unwrap();
    assert!(cluster.node(old).with_state(|toy| toy.map.contains_key("majority")).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_cut_off_does_not_raise_the_term() {
    let cluster = Cluster::formed(3, EngineKind::Memory).await;
    let leader = cluster.leader(&[1, 2, 3]).await;
    let term = cluster.node(leader).status().leadership.term;
    let alone = (1..=3).find(|seat| *seat != leader).unwrap();
    let others: Vec<u16> = (1..=3).filter(|seat| *seat != alone).collect();
    cluster.wires.cut(&[alone], &others, Some(Fault::Down));
    tokio::time::sleep(Duration::from_millis(4 * cluster.config.election_max_ms)).await;
    cluster.wires.heal();
    assert_eq!(cluster.leader(&[1, 2, 3]).await, leader);
    // Pre-vote: it asked and was told no, so its return disturbs nobody.
    assert_eq!(cluster.node(leader).status().leadership.term, term);
}

async fn lagging_node_gets_a_snapshot(engine: EngineKind) {
    let mut cluster = Cluster::formed(3, engine).await;
    let leader = cluster.leader(&[1, 2, 3]).await;
    let lagging = (1..=3).find(|seat| *seat != leader).unwrap();
    cluster.kill(lagging).await;
    // More than one chunk of state.
    let value = "v".repeat(100_000);
    for number in 0..25 {
        cluster.set(leader, &format!("k{number}"), &value).await.unwrap();
    }
    let checkpoint = cluster.node(leader).propose(b"checkpoint".to_vec(), PATIENCE).await.unwrap();
    cluster.set(leader, "late", "v").await.unwrap();
    eventually("a purged log", || (cluster.node(leader).status().purged_index == Some(checkpoint.index)).then_some(())).await;
    let before = cluster.wires.delivered(RpcKind::Snapshot);
    cluster.restart(lagging).await;
    let state = cluster.assert_equal(&[1, 2, 3]).await;
    assert_eq!(state.map.len(), 26);
    assert!(cluster.wires.delivered(RpcKind::Snapshot) >= before + 3, "the snapshot did not come in chunks");
    assert_eq!(cluster.nodes[&lagging].watcher.restored.lock().unwrap().as_slice(), [checkpoint.index]);
    // What it received is its own snapshot now: it starts from it.
    cluster.kill(lagging).await;
    cluster.restart(lagging).await;
    cluster.assert_equal(&[1, 2, 3]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lagging_node_gets_a_snapshot_in_chunks_on_sled() {
    lagging_node_gets_a_snapshot(EngineKind::Sled).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lagging_node_gets_a_snapshot_in_chunks_on_redb() {
    lagging_node_gets_a_snapshot(EngineKind::Redb).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_is_unknown_and_the_command_is_applied_once() {
    let cluster = Cluster::formed(3, EngineKind::Memory).await;
    let leader = cluster.leader(&[1, 2, 3]).await;
    let follower = (1..=3).find(|seat| *seat != leader).unwrap();
    cluster.wires.fault(Seat(follower), Seat(leader), Some(Fault::AnswerLost));
    let lost = cluster.set(follower, "a", "1").await;
    assert!(matches!(lost, Err(ProposeError::Unknown { .. })), "{lost:?}");
    cluster.wires.heal();
    let state = cluster.assert_equal(&[1, 2, 3]).await;
    assert_eq!((state.size, state.map.len()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_wires_slow_the_cluster_down_and_break_nothing() {
    let cluster = Cluster::formed(3, EngineKind::Memory).await;
    for from in 1..=3 {
        for to in 1..=3 {
            cluster.wires.fault(Seat(from), Seat(to), Some(Fault::Slow(25)));
        }
    }
    for number in 0..10u16 {
        cluster.set(1 + number % 3, &format!("k{number}"), "v").await.unwrap();
    }
    assert_eq!(cluster.assert_equal(&[1, 2, 3]).await.map.len(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_writes_survive_crashes_of_changing_leaders() {
    let mut cluster = Cluster::formed(3, EngineKind::Redb).await;
    let all = [1, 2, 3];
    let mut acknowledged = Vec::new();
    for round in 0..4 {
        let leader = cluster.leader(&all).await;
        let writers: Vec<_> = (0..20)
            .map(|number| {
                let key = format!("r{round}n{number}");
                let handle = cluster.node(1 + number % 3).clone();
                tokio::spawn(async move {
                    let done = handle.propose(format!("set {key} v").into_bytes(), Duration::from_secs(3)).await;
                    done.is_ok().then_some(key)
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(3 * round)).await;
        cluster.kill(leader).await;
        for writer in writers {
            acknowledged.extend(writer.await.unwrap());
        }
        cluster.restart(leader).await;
    }
    let state = cluster.assert_equal(&all).await;
    assert!(!acknowledged.is_empty());
    for key in &acknowledged {
        assert!(state.map.contains_key(key), "acknowledged {key} is lost");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_lost_its_disk_is_sent_everything_again_by_the_same_leader() {
    let mut cluster = Cluster::formed(3, EngineKind::Memory).await;
    let leader = cluster.leader(&[1, 2, 3]).await;
    let term = cluster.node(leader).status().leadership.term;
    let wiped = (1..=3).find(|seat| *seat != leader).unwrap();
    for number in 0..10 {
        cluster.set(leader, &format!("k{number}"), "v").await.unwrap();
    }
    cluster.assert_equal(&[1, 2, 3]).await;
    cluster.kill(wiped).await;
    cluster.nodes.get_mut(&wiped).unwrap().wipe();
    cluster.restart_abstaining(wiped).await;
    cluster.set(leader, "after", "v").await.unwrap();
    assert_eq!(cluster.assert_equal(&[1, 2, 3]).await.map.len(), 11);
    // Nobody had to elect anyone, and the leader did not stop over a follower that lost what it had acknowledged.
    assert_eq!(cluster.node(leader).status().leadership.term, term);
    assert_eq!(cluster.leader(&[1, 2, 3]).await, leader);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_restarts_is_elected_again_before_it_leads() {
    let mut cluster = Cluster::formed(1, EngineKind::Redb).await;
    cluster.set(1, "a", "1").await.unwrap();
    let term = cluster.node(1).status().leadership.term;
    cluster.kill(1).await;
    cluster.restart(1).await;
    cluster.set(1, "b", "2").await.unwrap();
    // A new term: log ids of the old one are never used again.
    assert!(cluster.node(1).status().leadership.term > term);
}
