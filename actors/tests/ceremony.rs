//! Key generation by three ceremony actors over one log: completed, interrupted by a restart, spoiled by false evidence.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use dstack_actors::ceremony::ATTEMPTS_UNATTENDED_MAX;
use dstack_protocol::ceremony::MessageKind;
use dstack_protocol::limits::CEREMONY_ROUND_MS_MAX;
use dstack_protocol::{NodeIndex, RootTag};
use dstack_raft::machine::run_of;
use dstack_testkit::Machine;
use dstack_threshold::dkg::Stage;
use support::client::{Client, combine};
use support::cluster::Cluster;
use support::holders::Node;
use support::members::{Member, Net, Sealed, holds, holds_nothing, roots_in_force};
use support::peers::{InProcess, Manner};
use support::{run, until};

async fn stage(cluster: &Cluster, attempt: u32, wanted: Stage) {
    until("a stage of the run", || {
        cluster.log.read(|state| {
            let row = state.attempt.as_ref().filter(|row| row.open.attempt == attempt)?;
            RootTag::ALL.into_iter().try_for_each(|root| (run_of(state, &cluster.id, row, root)?.stage() == wanted).then_some(()))
        })
    })
    .await;
}

/// Log time passes the end of the round.
fn time_passes(cluster: &Cluster) {
    assert_eq!(cluster.beacon(cluster.log_time().plus_ms(CEREMONY_ROUND_MS_MAX + 1)), None);
}

/// Two sets of the members' shares give the same key.
async fn release_agrees(cluster: &Cluster, members: &[Member]) {
    assert_eq!(cluster.set_policy(support::cluster::APP), None);
    let client = Client::new(cluster, "guest");
    let nodes: Vec<Node> =
        (1..).zip(members).map(|(seat, member)| Node::with(cluster, seat, member.shares.clone(), cluster.judge(), 8)).collect();
    let peers = || InProcess::new(nodes.iter().skip(1).map(|node| (node.seat.0, Manner::Honest(Arc::clone(&node.holder)))));
    let (request, recipient) = client.request(cluster, client.wishes());
    let mut keys = Vec::new();
    for excluded in 1..=3 {
        let coordinator = nodes[0].coordinator(peers(), 8);
        let answer = coordinator.release(client.ask(&request), &[NodeIndex(excluded)]).await.unwrap();
        keys.push(combine(cluster, &request, &recipient, &answer).unwrap());
    }
    assert!(keys.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn three_nodes_make_a_root_and_release_from_it() {
    run(async {
        let cluster = Cluster::new(3, 0);
        let net = Net::new();
        let members: Vec<Member> = (1..=3).map(|seat| Member::honest(&cluster, &net, seat)).collect();
        assert_eq!(roots_in_force(&cluster).await, 1);
        for (index, member) in (1..).zip(&members) {
            holds(member, index).await;
        }
        release_agrees(&cluster, &members).await;
        members.into_iter().for_each(|member| drop(member.kill()));
    });
}

#[test]
fn a_restart_in_the_middle_ends_the_attempt_and_the_next_one_succeeds() {
    run(async {
        let cluster = Cluster::new(3, 0);
        let net = Net::new();
        let first = Member::honest(&cluster, &net, 1);
        let second = Member::honest(&cluster, &net, 2);
        let third = Member::honest(&cluster, &net, 3);
        until("node 3 to join", || {
            cluster.log.read(|state| state.attempt.as_ref().filter(|row| row.joins.contains_key(&NodeIndex(3))).map(|_| ()))
        })
        .await;
        let files = third.kill();
        let third = Member::start(&cluster, &net, 3, Arc::clone(&cluster.machines[2]), files);
        tokio::time::sleep(Duration::from_secs(2)).await;
        let (attempt, roots) = cluster.log.read(|state| (state.attempt.clone(), state.roots.len()));
        assert_eq!((attempt.map(|row| row.open.attempt), roots), (Some(1), 0), "its keys are gone: the attempt stands still");
        time_passes(&cluster);
        assert_eq!(roots_in_force(&cluster).await, 2);
        let members = [first, second, third];
        for (index, member) in (1..).zip(&members) {
            holds(member, index).await;
        }
        release_agrees(&cluster, &members).await;
        members.into_iter().for_each(|member| drop(member.kill()));
    });
}

#[test]
fn a_node_that_restarts_later_opens_its_sealed_share() {
    run(async {
        let cluster = Cluster::new(3, 0);
        let net = Net::new();
        let mut members: Vec<Member> = (1..=3).map(|seat| Member::honest(&cluster, &net, seat)).collect();
        assert_eq!(roots_in_force(&cluster).await, 1);
        for (index, member) in (1..).zip(&members) {
            holds(member, index).await;
        }
        let files = members.pop().unwrap().kill();
        assert_eq!(files.count(), 4, "one sealed share of each root, and the secrets of pairs of `id`");
        // Another machine's key does not open it.
        let stolen = Sealed::on(&cluster, &cluster.machines[0]);
        stolen.copy(&files);
        let thief = Member::start(&cluster, &net, 3, Arc::clone(&cluster.machines[0]), stolen);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(holds_nothing(&thief));
        drop(thief.kill());
        members.push(Member::start(&cluster, &net, 3, Arc::clone(&cluster.machines[2]), files));
        holds(&members[2], 3).await;
        release_agrees(&cluster, &members).await;
        members.into_iter().for_each(|member| drop(member.kill()));
    });
}

#[test]
fn a_join_with_anothers_evidence_gets_no_ready() {
    run(async {
        let cluster = Cluster::new(3, 0);
        let net = Net::new();
        let first = Member::honest(&cluster, &net, 1);
        let second = Member::honest(&cluster, &net, 2);
        // A genuine machine that runs the allowed binary, but not the one that the seat was granted to.
        let impostor = Arc::new(Machine::tdx("impostor", &cluster.roots).unwrap());
        let files = Sealed::on(&cluster, &impostor);
        let third = Member::start(&cluster, &net, 3, impostor, files);
        stage(&cluster, 1, Stage::AwaitingReady).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let (ready, roots) = cluster.log.read(|state| {
            let messages = &state.attempt.as_ref().unwrap().messages;
            (messages.iter().filter(|message| message.kind == MessageKind::Ready).count(), state.roots.len())
        });
        assert_eq!((ready, roots), (0, 0));
        time_passes(&cluster);
        until("the next attempt", || cluster.log.read(|state| (state.attempts == 2).then_some(()))).await;
        assert!([&first, &second, &third].into_iter().all(holds_nothing));
        // With the right machine on the seat, the cluster gets its root.
        drop(third.kill());
        let third = Member::honest(&cluster, &net, 3);
        tokio::time::sleep(Duration::from_millis(500)).await;
        time_passes(&cluster);
        assert!(roots_in_force(&cluster).await >= 2);
        let members = [first, second, third];
        for (index, member) in (1..).zip(&members) {
            holds(member, index).await;
        }
        members.into_iter().for_each(|member| drop(member.kill()));
    });
}

#[test]
fn a_leader_alone_gives_up_after_its_attempts() {
    run(async {
        let cluster = Cluster::new(3, 0);
        let net = Net::new();
        let leader = Member::honest(&cluster, &net, 1);
        for attempt in 1..=ATTEMPTS_UNATTENDED_MAX {
            until("an attempt", || cluster.log.read(|state| state.attempt.as_ref().filter(|row| row.open.attempt == attempt).map(|_| ())))
                .await;
            time_passes(&cluster);
        }
        until("the last abort", || cluster.log.read(|state| state.attempt.is_none().then_some(()))).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(cluster.log.read(|state| (state.attempts, state.attempt.is_none())), (ATTEMPTS_UNATTENDED_MAX, true));
        drop(leader.kill());
    });
}

#[test]
fn a_restart_after_ready_costs_nothing_where_the_share_was_sealed() {
    run(async {
        let cluster = Cluster::new(3, 0);
        let net = Net::new();
        let mut members: Vec<Member> = (1..=3).map(|seat| Member::honest(&cluster, &net, seat)).collect();
        until("node 3 to be ready for all roots", || {
            cluster.log.read(|state| {
                let row = state.attempt.as_ref().or_else(|| state.ceremonies.get(&1))?;
                let ready = row.messages.iter().filter(|m| m.kind == MessageKind::Ready && m.index == NodeIndex(3)).count();
                (ready == 3).then_some(())
            })
        })
        .await;
        let files = members.pop().unwrap().kill();
        members.push(Member::start(&cluster, &net, 3, Arc::clone(&cluster.machines[2]), files));
        assert_eq!(roots_in_force(&cluster).await, 1);
        for (index, member) in (1..).zip(&members) {
            holds(member, index).await;
        }
        release_agrees(&cluster, &members).await;
        members.into_iter().for_each(|member| drop(member.kill()));
    });
}
