//! Timelocks over a real log: who may say how long, what one bad answer costs, when an action takes effect.

use dstack_actors::ports::Later;

use super::*;
use crate::support::cluster::{APP, Cluster};
use crate::support::until;

#[derive(Default)]
struct Others(Mutex<BTreeMap<Seat, Manner>>);

enum Manner {
    Honest(Arc<Timelocks>),
    Says(Vec<u8>),
}

impl Peers for Others {
    fn post(&self, seat: Seat, _path: &'static str, body: Vec<u8>, _timeout: Duration) -> Later<Result<Vec<u8>, Refusal>> {
        let answer = match self.0.lock().unwrap().get(&seat) {
            Some(Manner::Honest(node)) => node.mono(&body.try_into().unwrap()).map(|mono| encode_mono(&mono)),
            Some(Manner::Says(bytes)) => Ok(bytes.clone()),
            None => Err(Refusal::new(RefusalCode::NotReady, "a running node", "none")),
        };
        Box::pin(std::future::ready(answer))
    }
    fn latency(&self, _seat: Seat) -> Option<Duration> {
        None
    }
}

fn node(cluster: &Cluster, seat: u16, peers: Vec<(u16, Manner)>) -> Arc<Timelocks> {
    let peers = peers.into_iter().map(|(seat, manner)| (Seat(seat), manner)).collect();
    Arc::new(Timelocks {
        cluster_id: cluster.id,
        seat: Seat(seat),
        node_key: Arc::clone(&cluster.keys[usize::from(seat) - 1]),
        log: cluster.log.node(seat == 1),
        peers: Arc::new(Others(Mutex::new(peers))),
        others: (1..=cluster.n()).filter(|other| *other != seat).map(Seat).collect(),
        began: Mutex::default(),
    })
}

/// A cluster with a timelock of 1 s and a policy that waits for it.
fn waiting() -> (Cluster, [u8; 16]) {
    let cluster = Cluster::new(3, 1);
    assert_eq!(cluster.set_policy(APP), None);
    let action_id = *cluster.log.timelocks().last().unwrap();
    assert!(!in_force(&cluster));
    (cluster, action_id)
}

fn in_force(cluster: &Cluster) -> bool {
    cluster.log.read(|state| state.apps.contains_key(&APP))
}

/// A second of every clock passes, the log's too.
async fn a_second_passes(cluster: &Cluster) {
    tokio::time::sleep(Duration::from_millis(1050)).await;
    assert_eq!(cluster.beacon(cluster.log_time().plus_ms(1000)), None);
}

#[tokio::test]
async fn a_node_speaks_only_of_what_it_saw_begin() {
    let (cluster, action_id) = waiting();
    let node = node(&cluster, 2, vec![]);
    assert_eq!(node.mono(&action_id).unwrap_err().code, RefusalCode::UnknownAction);
    node.started(action_id);
    tokio::time::sleep(Duration::from_millis(120)).await;
    // Told again (a replay, a look at the state), it does not begin anew.
    node.started(action_id);
    let mono = node.mono(&action_id).unwrap();
    assert_eq!(mono.index, NodeIndex(2));
    assert!((120..60_000).contains(&mono.elapsed_ms), "{}", mono.elapsed_ms);
    assert!(verify(&cluster.keys[1].public(), &mono.signed_bytes(&cluster.id, &action_id), &mono.sig));
    assert!(!verify(&cluster.keys[1].public(), &mono.signed_bytes(&cluster.id, &[0; 16]), &mono.sig), "of this action alone");
    assert_eq!(node.mono(&[0xee; 16]).unwrap_err().code, RefusalCode::UnknownAction);
}

#[test]
fn a_key_that_is_not_admitted_says_nothing() {
    let (cluster, action_id) = waiting();
    let mut node = Arc::into_inner(node(&cluster, 2, vec![])).unwrap();
    node.started(action_id);
    node.node_key = Arc::new(NodeKey::new(dstack_secret::Secret::from_fn(|seed| seed.fill(99))));
    assert_eq!(node.mono(&action_id).unwrap_err().code, RefusalCode::NotAdmitted);
}

#[test]
fn a_mono_has_one_encoding() {
    let mono = Mono { index: NodeIndex(7), elapsed_ms: 0x0102_0304_0506_0708, sig: [9; 64] };
    let bytes = encode_mono(&mono);
    assert_eq!(decode_mono(&bytes), Some(mono));
    assert_eq!(bytes.len(), 74);
    for cut in 0..bytes.len() {
        assert_eq!(decode_mono(&bytes[..cut]), None);
    }
    assert_eq!(decode_mono(&[bytes, vec![0]].concat()), None);
}

#[tokio::test]
async fn an_action_takes_effect_when_t_clocks_say_so() {
    let (cluster, action_id) = waiting();
    let second = node(&cluster, 2, vec![]);
    let leader = node(&cluster, 1, vec![(2, Manner::Honest(Arc::clone(&second)))]);
    assert_eq!(leader.activate(action_id).await.unwrap_err().code, RefusalCode::UnknownAction);
    leader.started(action_id);
    assert_eq!(leader.activate(action_id).await.unwrap_err().code, RefusalCode::TimelockRunning);
    a_second_passes(&cluster).await;
    assert_eq!(leader.activate(action_id).await.unwrap_err().code, RefusalCode::TimelockRunning, "one clock is not t");
    // A node that restarted counts anew.
    second.started(action_id);
    assert_eq!(leader.activate(action_id).await.unwrap_err().code, RefusalCode::TimelockRunning);
    assert!(!in_force(&cluster));
    a_second_passes(&cluster).await;
    leader.activate(action_id).await.unwrap();
    assert!(in_force(&cluster));
}

#[tokio::test]
async fn one_bad_answer_does_not_hold_an_action_back() {
    let forged = |index: u16| encode_mono(&Mono { index: NodeIndex(index), elapsed_ms: u64::MAX, sig: [1; 64] });
    for bad in [forged(3), forged(9), forged(1), b"noise".to_vec(), Vec::new()] {
        let (cluster, action_id) = waiting();
        let second = node(&cluster, 2, vec![]);
        second.started(action_id);
        let peers = vec![(2, Manner::Honest(second)), (3, Manner::Says(bad))];
        let leader = node(&cluster, 1, peers);
        leader.started(action_id);
        a_second_passes(&cluster).await;
        leader.activate(action_id).await.unwrap();
        assert!(in_force(&cluster));
    }
}

#[tokio::test]
async fn the_leader_activates_by_itself_and_counts_what_a_snapshot_brought() {
    let (cluster, action_id) = waiting();
    let second = node(&cluster, 2, vec![]);
    let leader = node(&cluster, 1, vec![(2, Manner::Honest(Arc::clone(&second)))]);
    // Neither was told that the timelock began: they find it in the state.
    let tasks = [tokio::spawn(Arc::clone(&second).run()), tokio::spawn(Arc::clone(&leader).run())];
    until("both to count", || (second.mono(&action_id).is_ok() && leader.mono(&action_id).is_ok()).then_some(())).await;
    assert_eq!(cluster.beacon(cluster.log_time().plus_ms(1000)), None);
    tokio::time::timeout(Duration::from_secs(10), until("the action", || in_force(&cluster).then_some(()))).await.unwrap();
    until("it to be forgotten", || second.mono(&action_id).is_err().then_some(())).await;
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
}
