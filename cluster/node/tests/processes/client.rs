//! The client library when one node of three fails, in every way a node can: what that costs is counted by the client itself.
//!
//! The next node is asked at once when one fails, and after `hedge_after` when it is silent. Where a test is of failures that show by
//! themselves, that delay is longer than the test.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dstack_client::{KmsClient, Settings};
use dstack_testkit::cluster::{Cluster, ClusterError, ClusterSpec, FORMING, MachineKind, free_port, until};

use crate::releases::audit_verifies;
use crate::workload::{Workload, check_values, registered, runtime, wishes};

const NEVER: Duration = Duration::from_secs(3600);

/// Asked and faults, by node.
fn tallies(client: &KmsClient) -> Vec<(u64, u64)> {
    client.nodes().tallies().iter().map(|tally| (tally.asked, tally.faults)).collect()
}

fn settings(hedge_after: Duration) -> Settings {
    Settings { hedge_after, request_timeout: Duration::from_secs(40), patience: Duration::from_secs(40), ..Settings::default() }
}

/// Intents on record once the app's env key is published: making it is a release, too.
fn recorded_before(cluster: &mut Cluster) -> u64 {
    let node = cluster.node(1);
    until("the app's env key", FORMING, || {
        let state = node.status()?["state"].clone();
        let missing = || ClusterError::Unexpected { from: "node 1".to_owned(), got: state.to_string() };
        if state["env_keys"] == 1 { state["open_intents"].as_u64().ok_or_else(missing) } else { Err(missing()) }
    })
    .unwrap()
}

/// Waits until every running node has so many intents on record. Their rows stay for minutes, longer than a test.
fn recorded(cluster: &mut Cluster, intents: u64) {
    for node in cluster.nodes() {
        if node.runs() {
            until("the intents on record", FORMING, || {
                let seen = node.status()?["state"]["open_intents"].as_u64();
                let unexpected = || ClusterError::Unexpected { from: format!("node {}", node.seat), got: format!("{seen:?} intents") };
                if seen == Some(intents) { Ok(()) } else { Err(unexpected()) }
            })
            .unwrap();
        }
    }
}

/// A machine that is no node: it takes connections and answers what `answers` writes, until the test's process ends.
fn impostor(answers: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            if answers.is_empty() {
                // Open, and silent.
                kept.push(stream);
            } else {
                let _ = stream.read(&mut [0; 64]);
                let _ = stream.write_all(answers);
            }
        }
    });
    url
}

#[test]
fn one_failing_node_costs_one_retry() {
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let mut intents = recorded_before(&mut cluster);
    let urls = cluster.kms_urls();
    let timed = |client: &KmsClient| {
        let began = Instant::now();
        let keys = runtime.block_on(client.release(&web.app_id, &wishes())).unwrap();
        (check_values(&keys), began.elapsed())
    };
    let whole = web.client_with(&urls, settings(NEVER));
    let (keys, alone) = timed(&whole);
    assert_eq!(tallies(&whole), [(2, 0), (0, 0), (0, 0)], "a beacon and a release");
    intents += 1;
    recorded(&mut cluster, intents);

    // Nobody listens; noise instead of TLS; taken and never answered. Two nodes of three stand behind it.
    let behind: Vec<&str> = urls.split(',').skip(1).collect();
    let dead = format!("https://127.0.0.1:{}", free_port().unwrap());
    let hanging = Settings::default().hedge_after;
    let cases =
        [("dead", dead, NEVER, 1), ("noise", impostor(b"HTTP/1.1 200 OK\r\n\r\nkeys"), NEVER, 1), ("hanging", impostor(b""), hanging, 0)];
    for (name, url, hedge_after, faults) in cases {
        let client = web.client_with(&format!("{url},{}", behind.join(",")), settings(hedge_after));
        let (again, took) = timed(&client);
        assert_eq!(again, keys, "{name}");
        let one_retry = [(1, faults), (2, 0), (0, 0)];
        assert_eq!(tallies(&client), one_retry, "{name}: asked once for a beacon, then passed by");
        timed(&client);
        assert_eq!(tallies(&client), [(1, faults), (3, 0), (0, 0)], "{name}: nor asked the next time");
        println!("{name}: first release {took:?}, with all nodes well {alone:?}");
        intents += 2;
        recorded(&mut cluster, intents);
    }
    audit_verifies(&mut cluster);
}

#[test]
fn a_node_killed_while_it_answers_costs_one_retry_and_a_killed_leader_no_second_record() {
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let intents = recorded_before(&mut cluster);
    let leader = cluster.leader().unwrap();
    let others: Vec<u16> = (1..=3).filter(|seat| *seat != leader).collect();
    let first = others[0];
    let order = |cluster: &mut Cluster, seats: &[u16]| seats.iter().map(|seat| cluster.node(*seat).url()).collect::<Vec<_>>().join(",");

    // It has the question and cannot answer: it stands still, then it is gone.
    let urls = order(&mut cluster, &[first, leader, others[1]]);
    let client = Arc::new(web.client_with(&urls, settings(NEVER)));
    let keys = check_values(&runtime.block_on(client.release(&web.app_id, &wishes())).unwrap());
    assert_eq!(tallies(&client), [(2, 0), (0, 0), (0, 0)]);
    cluster.node(first).pause().unwrap();
    let (asking, app_id) = (Arc::clone(&client), web.app_id);
    let began = Instant::now();
    let asked = runtime.spawn(async move { asking.release(&app_id, &wishes()).await });
    until("the question to be put", FORMING, || match tallies(&client)[0] {
        (3, 0) => Ok(()),
        other => Err(ClusterError::Unexpected { from: "the client".to_owned(), got: format!("{other:?}") }),
    })
    .unwrap();
    cluster.node(first).kill();
    let killed = Instant::now();
    let again = runtime.block_on(asked).unwrap().unwrap();
    println!("killed while it answers: {:?} after the kill, {:?} in all", killed.elapsed(), began.elapsed());
    assert_eq!(check_values(&again), keys);
    assert_eq!(tallies(&client), [(3, 1), (1, 0), (0, 0)], "one retry");
    recorded(&mut cluster, intents + 2);

    // The leader, with the connection to it still open: the retry waits where it is for the election.
    cluster.node(first).start().unwrap();
    cluster.wait_ready(FORMING).unwrap();
    let leader = cluster.leader().unwrap();
    let others: Vec<u16> = (1..=3).filter(|seat| *seat != leader).collect();
    let urls = order(&mut cluster, &[leader, others[0], others[1]]);
    let client = web.client_with(&urls, settings(NEVER));
    assert_eq!(check_values(&runtime.block_on(client.release(&web.app_id, &wishes())).unwrap()), keys);
    assert_eq!(tallies(&client), [(2, 0), (0, 0), (0, 0)]);
    recorded(&mut cluster, intents + 3);
    cluster.node(leader).kill();
    let killed = Instant::now();
    let again = runtime.block_on(client.release(&web.app_id, &wishes())).unwrap();
    println!("leader killed: {:?} after the kill", killed.elapsed());
    assert_eq!(check_values(&again), keys);
    // One retry where the election is over before the node that was asked next gives up waiting for it, which is after 5 s.
    println!("leader killed: asked and faults {:?}", tallies(&client));
    assert!(tallies(&client)[0].1 >= 1);
    recorded(&mut cluster, intents + 4);

    cluster.node(leader).start().unwrap();
    cluster.wait_ready(FORMING).unwrap();
    audit_verifies(&mut cluster);
}
