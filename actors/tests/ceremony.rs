//! Key generation by three ceremony actors over one log: completed, interrupted by a restart, spoiled by false evidence.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod support;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use actix::{Actor as _, Arbiter};
use dstack_actors::ceremony::{ATTEMPTS_UNATTENDED_MAX, Ceremony, Look, NodeJudge, Parts, ShareFiles};
use dstack_actors::share_holder::ShareHolderPool;
use dstack_protocol::ceremony::MessageKind;
use dstack_protocol::limits::CEREMONY_ROUND_MS_MAX;
use dstack_protocol::{Epoch, Generation, NodeIndex, Refusal, RefusalCode, RootTag, Seat};
use dstack_raft::machine::run_of;
use dstack_secret::{Locked, Secret};
use dstack_tee::Device as _;
use dstack_testkit::Machine;
use dstack_threshold::dkg::Stage;
use dstack_threshold::share::ShareId;
use dstack_threshold::share_file::{SealingKey, ShareName, open, seal};
use support::client::{Client, combine};
use support::cluster::{Cluster, DeviceEvidence};
use support::holders::Node;
use support::peers::{InProcess, Manner};
use support::{run, until};

/// Sealed shares of one machine, in memory.
struct Sealed {
    key: SealingKey,
    files: Mutex<BTreeMap<String, Vec<u8>>>,
}

impl Sealed {
    fn on(cluster: &Cluster, machine: &Machine) -> Arc<Self> {
        let platform_key = machine.platform_key(b"seal").unwrap().unwrap();
        let key = SealingKey::derive(&cluster.id, &machine.measurement(), None, Some(&platform_key)).unwrap();
        Arc::new(Self { key, files: Mutex::default() })
    }
}

impl ShareFiles for Sealed {
    fn load(&self, name: &ShareName) -> Option<Secret<32>> {
        open(&self.key, name, self.files.lock().unwrap().get(&format!("{name:?}"))?).ok()
    }
    fn save(&self, name: &ShareName, share: &Locked<32>) -> Result<(), String> {
        let mut nonce = [0; 24];
        getrandom::fill(&mut nonce).map_err(|error| error.to_string())?;
        self.files.lock().unwrap().insert(format!("{name:?}"), seal(&self.key, name, share, nonce));
        Ok(())
    }
}

/// What a node does with another's evidence: verified, of that seat's machine, of an allowed measurement, over that report data.
fn judge(cluster: &Cluster) -> NodeJudge {
    let (verify, birth, now) = (cluster.judge(), Arc::clone(&cluster.birth), cluster.born);
    Arc::new(move |seat, evidence, report_data| {
        let identity = verify(evidence, &birth.genesis().collateral_id, now)?;
        let refuse = |code, what: &str| Err(Refusal::new(code, what, "another"));
        if identity.report_data() != report_data {
            return refuse(RefusalCode::EvidenceInvalid, "the report data of a Join");
        }
        if !birth.genesis().allowed_nodes.iter().any(|allowed| allowed.measurement == identity.measurement()) {
            return refuse(RefusalCode::MeasurementNotAllowed, "an allowed measurement");
        }
        let grant = birth.genesis().seats.iter().find(|grant| grant.seat == seat);
        if grant.is_none_or(|grant| grant.platform_identity != identity.platform_identity()) {
            return refuse(RefusalCode::PlatformIdentity, "the seat's machine");
        }
        Ok(())
    })
}

/// One node's ceremony on a thread of its own, so that it can end like a process.
struct Member {
    arbiter: Arbiter,
    shares: ShareHolderPool,
    files: Arc<Sealed>,
}

impl Member {
    fn start(cluster: &Cluster, seat: u16, device: Arc<Machine>, files: Arc<Sealed>) -> Self {
        let shares = ShareHolderPool::start(1, 16, cluster.id);
        let parts = Parts {
            cluster_id: cluster.id,
            seat: Seat(seat),
            node_key: Arc::clone(&cluster.keys[usize::from(seat) - 1]),
            log: cluster.log.node(seat == 1),
            evidence: Arc::new(DeviceEvidence(device)),
            judge: judge(cluster),
            shares: shares.clone(),
            files: Arc::clone(&files) as Arc<dyn ShareFiles>,
            #[cfg(feature = "insecure-test-export")]
            export: Arc::new(|_, _| {}),
        };
        let arbiter = Arbiter::new();
        let address = Ceremony::start_in_arbiter(&arbiter.handle(), move |_| Ceremony::new(parts));
        address.try_send(Look).unwrap();
        Self { arbiter, shares, files }
    }

    fn honest(cluster: &Cluster, seat: u16) -> Self {
        let machine = Arc::clone(&cluster.machines[usize::from(seat) - 1]);
        let files = Sealed::on(cluster, &machine);
        Self::start(cluster, seat, machine, files)
    }

    /// Ends like a process that is killed: nothing of its memory is left.
    fn kill(self) -> Arc<Sealed> {
        self.arbiter.stop();
        self.arbiter.join().unwrap();
        self.files
    }
}

async fn root_in_force(cluster: &Cluster) -> u32 {
    let attempts = until("the roots", || {
        cluster.log.read(|state| {
            let row = |root| state.roots.get(&(Generation(0), root)).map(|row| row.attempt);
            RootTag::ALL.into_iter().map(row).collect::<Option<Vec<u32>>>()
        })
    })
    .await;
    assert!(attempts.windows(2).all(|pair| pair[0] == pair[1]), "one attempt made all roots: {attempts:?}");
    attempts[0]
}

async fn holds(member: &Member, index: u16) {
    for root in RootTag::ALL {
        let share = until("a share in use", || member.shares.in_use_of(root)).await;
        assert_eq!(share, ShareId { index: NodeIndex(index), generation: Generation(0), epoch: Epoch(1) });
    }
}

fn holds_nothing(member: &Member) -> bool {
    RootTag::ALL.into_iter().all(|root| member.shares.in_use_of(root).is_none())
}

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
        let answer = coordinator.release(client.ask(&request), NodeIndex(0), &[NodeIndex(excluded)]).await.unwrap();
        keys.push(combine(cluster, &request, &recipient, &answer).unwrap());
    }
    assert!(keys.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn three_nodes_make_a_root_and_release_from_it() {
    run(async {
        let cluster = Cluster::new(3, 0);
        let members: Vec<Member> = (1..=3).map(|seat| Member::honest(&cluster, seat)).collect();
        assert_eq!(root_in_force(&cluster).await, 1);
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
        let first = Member::honest(&cluster, 1);
        let second = Member::honest(&cluster, 2);
        let third = Member::honest(&cluster, 3);
        until("node 3 to join", || {
            cluster.log.read(|state| state.attempt.as_ref().filter(|row| row.joins.contains_key(&NodeIndex(3))).map(|_| ()))
        })
        .await;
        let files = third.kill();
        let third = Member::start(&cluster, 3, Arc::clone(&cluster.machines[2]), files);
        tokio::time::sleep(Duration::from_secs(2)).await;
        let (attempt, roots) = cluster.log.read(|state| (state.attempt.clone(), state.roots.len()));
        assert_eq!((attempt.map(|row| row.open.attempt), roots), (Some(1), 0), "its keys are gone: the attempt stands still");
        time_passes(&cluster);
        assert_eq!(root_in_force(&cluster).await, 2);
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
        let mut members: Vec<Member> = (1..=3).map(|seat| Member::honest(&cluster, seat)).collect();
        assert_eq!(root_in_force(&cluster).await, 1);
        for (index, member) in (1..).zip(&members) {
            holds(member, index).await;
        }
        let files = members.pop().unwrap().kill();
        assert_eq!(files.files.lock().unwrap().len(), 3, "one sealed share of each root");
        // Another machine's key does not open it.
        let stolen = Sealed::on(&cluster, &cluster.machines[0]);
        stolen.files.lock().unwrap().clone_from(&files.files.lock().unwrap());
        let thief = Member::start(&cluster, 3, Arc::clone(&cluster.machines[0]), stolen);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(holds_nothing(&thief));
        drop(thief.kill());
        members.push(Member::start(&cluster, 3, Arc::clone(&cluster.machines[2]), files));
        holds(&members[2], 3).await;
        release_agrees(&cluster, &members).await;
        members.into_iter().for_each(|member| drop(member.kill()));
    });
}

#[test]
fn a_join_with_anothers_evidence_gets_no_ready() {
    run(async {
        let cluster = Cluster::new(3, 0);
        let first = Member::honest(&cluster, 1);
        let second = Member::honest(&cluster, 2);
        // A genuine machine that runs the allowed binary, but not the one that the seat was granted to.
        let impostor = Arc::new(Machine::tdx("impostor", &cluster.roots).unwrap());
        let files = Sealed::on(&cluster, &impostor);
        let third = Member::start(&cluster, 3, impostor, files);
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
        let third = Member::honest(&cluster, 3);
        tokio::time::sleep(Duration::from_millis(500)).await;
        time_passes(&cluster);
        assert!(root_in_force(&cluster).await >= 2);
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
        let leader = Member::honest(&cluster, 1);
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
