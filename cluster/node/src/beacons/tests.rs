//! Readings of real node keys over a real log: whose count, what one bad answer costs.

use std::sync::Mutex;

use dstack_actors::ports::Later;
use dstack_protocol::UnixMillis;

use super::*;
use crate::support::cluster::Cluster;
use crate::support::{TestNow, until};

const TEN_YEARS_MS: u64 = 315_360_000_000;

/// How another node answers the leader.
enum Manner {
    Honest(Beacons),
    Says(Vec<u8>),
}

#[derive(Default)]
struct Others(Mutex<BTreeMap<Seat, Manner>>);

impl Peers for Others {
    fn post(&self, seat: Seat, _path: &'static str, body: Vec<u8>, _timeout: Duration) -> Later<Result<Vec<u8>, Refusal>> {
        let answer = match self.0.lock().unwrap().get(&seat) {
            Some(Manner::Honest(node)) => node.reading(ClockAsk::decode(&body).unwrap()).map(|reading| reading.encode(&node.cluster_id)),
            Some(Manner::Says(bytes)) => Ok(bytes.clone()),
            None => Err(Refusal::new(RefusalCode::NotReady, "a running node", "none")),
        };
        Box::pin(std::future::ready(answer))
    }
    fn latency(&self, _seat: Seat) -> Option<Duration> {
        None
    }
}

fn node(cluster: &Cluster, seat: u16, now: &TestNow, peers: Arc<Others>) -> Beacons {
    Beacons {
        cluster_id: cluster.id,
        seat: Seat(seat),
        node_key: Arc::clone(&cluster.keys[usize::from(seat) - 1]),
        log: cluster.log.node(seat == 1),
        peers,
        others: (1..=cluster.n()).filter(|other| *other != seat).map(Seat).collect(),
        now: now.port(),
    }
}

fn ask(cluster: &Cluster) -> ClockAsk {
    let (prev_beacon_pos, prev_beacon) = cluster.latest_beacon();
    ClockAsk { prev_beacon_pos, prev_beacon }
}

async fn propose(leader: &Beacons, cluster: &Cluster) -> Result<(), Refusal> {
    let due = cluster.log.read(|state| leader.due(state)).unwrap();
    leader.propose(&due).await
}

/// What a node with a clock ten years ahead and a wrong signature says.
fn forged(cluster: &Cluster, index: u16) -> Vec<u8> {
    let ask = ask(cluster);
    let reading = Reading {
        prev_beacon_pos: ask.prev_beacon_pos,
        prev_beacon: ask.prev_beacon,
        index: NodeIndex(index),
        unix_ms: cluster.born.plus_ms(TEN_YEARS_MS),
        rand: [3; 32],
        sig: [4; 64],
    };
    reading.encode(&cluster.id)
}

#[test]
fn a_clock_is_read_for_the_latest_beacon_only() {
    let cluster = Cluster::new(3, 0);
    let now = TestNow::at(cluster.born.plus_ms(77));
    let second = node(&cluster, 2, &now, Arc::default());
    let reading = second.reading(ask(&cluster)).unwrap();
    assert_eq!((reading.index, reading.unix_ms), (NodeIndex(2), cluster.born.plus_ms(77)));
    assert!(verify(&cluster.keys[1].public(), &reading.signed_bytes(&cluster.id), &reading.sig));
    assert_ne!(second.reading(ask(&cluster)).unwrap().rand, reading.rand, "fresh randomness");

    let old = ask(&cluster);
    assert_eq!(cluster.beacon(cluster.born.plus_ms(1000)), None);
    let mut ahead = ask(&cluster);
    ahead.prev_beacon_pos += 1;
    let mut forked = ask(&cluster);
    forked.prev_beacon[0] ^= 1;
    for wrong in [old, ahead, forked, ClockAsk { prev_beacon_pos: 0, prev_beacon: cluster.id.0 }] {
        let refusal = second.reading(wrong).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::NotYet);
        assert!(refusal.retry_after_ms > 0);
    }
    assert!(second.reading(ask(&cluster)).is_ok());
}

#[test]
fn a_key_that_is_not_admitted_reads_nothing() {
    let cluster = Cluster::new(3, 0);
    let now = TestNow::at(cluster.born);
    let mut restarted = node(&cluster, 2, &now, Arc::default());
    restarted.node_key = Arc::new(NodeKey::new(dstack_secret::Secret::from_fn(|seed| seed.fill(99))));
    assert_eq!(restarted.reading(ask(&cluster)).unwrap_err().code, RefusalCode::NotAdmitted);
}

#[tokio::test]
async fn log_time_is_the_earliest_of_the_latest_t_clocks() {
    let cluster = Cluster::new(5, 0);
    let offsets = [5_000, 6_000, 1_000, TEN_YEARS_MS, 7_000];
    let peers = Arc::new(Others::default());
    for (seat, offset) in (1..).zip(offsets).skip(1) {
        let clock = TestNow::at(cluster.born.plus_ms(offset));
        peers.0.lock().unwrap().insert(Seat(seat), Manner::Honest(node(&cluster, seat, &clock, Arc::default())));
    }
    let leader = node(&cluster, 1, &TestNow::at(cluster.born.plus_ms(offsets[0])), peers);
    propose(&leader, &cluster).await.unwrap();
    assert_eq!(cluster.log_time(), cluster.born.plus_ms(6_000), "neither the slow clock nor the one ten years ahead decides");
}

#[tokio::test]
async fn one_bad_answer_does_not_stop_a_beacon() {
    let cluster = Cluster::new(3, 0);
    let now = TestNow::at(cluster.born.plus_ms(5_000));
    let honest = || Manner::Honest(node(&cluster, 2, &now, Arc::default()));
    let stale = {
        // Genuine, but over the beacon before.
        let reading = node(&cluster, 3, &now, Arc::default()).reading(ask(&cluster)).unwrap().encode(&cluster.id);
        assert_eq!(cluster.beacon(cluster.born.plus_ms(1)), None);
        reading
    };
    let long = || {
        let mut bytes = node(&cluster, 3, &now, Arc::default()).reading(ask(&cluster)).unwrap().encode(&cluster.id);
        bytes.push(0);
        bytes
    };
    let bad: [&dyn Fn() -> Vec<u8>; 7] = [
        &|| forged(&cluster, 3),
        &|| forged(&cluster, 1),
        &|| forged(&cluster, 9),
        &|| stale.clone(),
        &long,
        &|| b"noise".to_vec(),
        &Vec::new,
    ];
    for bad in bad {
        let before = cluster.latest_beacon();
        let peers = Arc::new(Others(Mutex::new(BTreeMap::from([(Seat(2), honest()), (Seat(3), Manner::Says(bad()))]))));
        propose(&node(&cluster, 1, &now, peers), &cluster).await.unwrap();
        assert_ne!(cluster.latest_beacon(), before);
        assert!(cluster.log_time() <= now.get());
    }
}

#[tokio::test]
async fn too_few_readings_make_no_beacon() {
    let cluster = Cluster::new(3, 0);
    let now = TestNow::at(cluster.born.plus_ms(5_000));
    let before = cluster.log.size();
    let peers = Arc::new(Others(Mutex::new(BTreeMap::from([(Seat(3), Manner::Says(forged(&cluster, 2)))]))));
    let refusal = propose(&node(&cluster, 1, &now, peers), &cluster).await.unwrap_err();
    assert_eq!(refusal.code, RefusalCode::TooFewReadings);
    assert!(refusal.retry_after_ms > 0);
    assert_eq!(cluster.log.size(), before, "nothing is proposed that must fail");
}

#[tokio::test]
async fn a_new_leader_makes_a_beacon_at_once_and_a_follower_none() {
    let cluster = Cluster::new(3, 0);
    let now = TestNow::at(cluster.born.plus_ms(2_000));
    let follower = tokio::spawn(Arc::new(node(&cluster, 2, &now, Arc::default())).run());
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(cluster.log_time(), cluster.born);
    let peers = Arc::new(Others(Mutex::new(BTreeMap::from([(Seat(3), Manner::Honest(node(&cluster, 3, &now, Arc::default())))]))));
    let leader = tokio::spawn(Arc::new(node(&cluster, 1, &now, peers)).run());
    let wanted: UnixMillis = now.get();
    let made = until("a beacon", || (cluster.log_time() == wanted).then_some(()));
    tokio::time::timeout(Duration::from_secs(10), made).await.unwrap();
    follower.abort();
    leader.abort();
}
