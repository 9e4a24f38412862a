//! The client library when one node of three fails, in every way a node can: what that costs is counted by the client itself.
//!
//! The next node is asked at once when one fails, and after `hedge_after` when it is silent. Where a test is of failures that show by
//! themselves, that delay is longer than the test.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use dstack_client::{ClientError, KmsClient, NodeFault, Settings};
use dstack_protocol::RefusalCode;
use dstack_ratls::{JudgeError, PeerError};
use dstack_testkit::cluster::process::run;
use dstack_testkit::cluster::{Cluster, ClusterError, ClusterSpec, FORMING, MachineKind, free_port, until};

use crate::genesis::modified_binary;
use crate::releases::audit_verifies;
use crate::workload::{Workload, check_values, registered, runtime, wishes};

const NEVER: Duration = Duration::from_secs(3600);

/// Once, at the first request: what a look finds out about a node is not in the way of counts.
const AT_FIRST: Option<Duration> = Some(NEVER);

/// Asked and faults, by node.
fn tallies(client: &KmsClient) -> Vec<(u64, u64)> {
    client.nodes().tallies().iter().map(|tally| (tally.asked, tally.faults)).collect()
}

/// Of a client that asks the nodes it is given and no other.
fn settings(hedge_after: Duration) -> Settings {
    let waits = Duration::from_secs(40);
    Settings { hedge_after, request_timeout: waits, patience: waits, discover_every: None, ..Settings::default() }
}

/// Waits until the client has these nodes in use, in this order.
fn knows(client: &KmsClient, what: &str, urls: &[String], mut ask: impl FnMut(&KmsClient)) {
    until(what, FORMING, || {
        ask(client);
        let known: Vec<String> = client.nodes().tallies().iter().map(|tally| tally.url.to_string()).collect();
        if known == urls { Ok(()) } else { Err(ClusterError::Unexpected { from: "the client".to_owned(), got: known.join(",") }) }
    })
    .unwrap();
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
    let released = |client: &KmsClient| check_values(&runtime.block_on(client.release(&web.app_id, &wishes())).unwrap());
    let whole = web.client_with(&urls, settings(NEVER));
    let keys = released(&whole);
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
        assert_eq!(released(&client), keys, "{name}");
        let one_retry = [(1, faults), (2, 0), (0, 0)];
        assert_eq!(tallies(&client), one_retry, "{name}: asked once for a beacon, then passed by");
        released(&client);
        assert_eq!(tallies(&client), [(1, faults), (3, 0), (0, 0)], "{name}: nor asked the next time");
        intents += 2;
        recorded(&mut cluster, intents);
    }

    // A node that stands still, with the connection open. It does not lead, so nothing waits for an election.
    let leader = cluster.leader().unwrap();
    let mut order: Vec<u16> = (1..=3).filter(|seat| *seat != leader).collect();
    order.push(leader);
    let urls: Vec<String> = order.iter().map(|seat| cluster.node(*seat).url()).collect();
    let client = web.client_with(&urls.join(","), settings(Duration::from_secs(8)));
    assert_eq!(released(&client), keys);
    cluster.node(order[0]).pause().unwrap();
    assert_eq!(released(&client), keys);
    assert_eq!(tallies(&client), [(3, 0), (1, 0), (0, 0)], "the next one is asked as well");
    assert_eq!(released(&client), keys);
    assert_eq!(tallies(&client), [(3, 0), (2, 0), (0, 0)], "and stays the one to ask");
    cluster.node(order[0]).resume().unwrap();
    intents += 3;
    recorded(&mut cluster, intents);
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
    let asked = runtime.spawn(async move { asking.release(&app_id, &wishes()).await });
    until("the question to be put", FORMING, || match tallies(&client)[0] {
        (3, 0) => Ok(()),
        other => Err(ClusterError::Unexpected { from: "the client".to_owned(), got: format!("{other:?}") }),
    })
    .unwrap();
    cluster.node(first).kill();
    let again = runtime.block_on(asked).unwrap().unwrap();
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
    let again = runtime.block_on(client.release(&web.app_id, &wishes())).unwrap();
    assert_eq!(check_values(&again), keys);
    // One retry where the election is over before the node that was asked next gives up waiting for it, which is after 5 s.
    assert!(tallies(&client)[0].1 >= 1);
    recorded(&mut cluster, intents + 4);

    cluster.node(leader).start().unwrap();
    cluster.wait_ready(FORMING).unwrap();
    audit_verifies(&mut cluster);
}

#[test]
fn a_client_of_one_node_learns_the_others_and_outlives_it() {
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let intents = recorded_before(&mut cluster);
    let leader = cluster.leader().unwrap();
    let own = leader % 3 + 1;
    let others: Vec<u16> = (1..=3).filter(|seat| *seat != own).collect();
    let url = |cluster: &mut Cluster, seat: u16| cluster.node(seat).url();
    let all: Vec<String> = [own, others[0], others[1]].map(|seat| url(&mut cluster, seat)).into();
    let released = |client: &KmsClient| check_values(&runtime.block_on(client.release(&web.app_id, &wishes())).unwrap());

    let alone = web.client_with(&all[0], settings(NEVER));
    let keys = released(&alone);
    let client = web.client_with(&all[0], Settings { discover_every: AT_FIRST, ..settings(NEVER) });
    assert_eq!(released(&client), keys);
    knows(&client, "the others to be learnt", &all, |_| {});
    assert_eq!(tallies(&client), [(2, 0), (0, 0), (0, 0)], "the list is not counted");
    assert!(client.nodes().tallies().iter().map(|tally| tally.is_learnt).eq([false, true, true]));
    recorded(&mut cluster, intents + 2);

    // The one that it was given is gone. It is no leader, so nothing waits for an election.
    cluster.node(own).kill();
    assert_eq!(released(&client), keys);
    assert_eq!(tallies(&client), [(3, 1), (1, 0), (0, 0)], "one retry, through a node that it learnt");
    let lost = web.client_with(&all[0], Settings { patience: Duration::ZERO, ..settings(NEVER) });
    assert!(matches!(runtime.block_on(lost.release(&web.app_id, &wishes())), Err(ClientError::NoNode { .. })), "and none without");
    recorded(&mut cluster, intents + 3);
    cluster.node(own).start().unwrap();
    cluster.wait_ready(FORMING).unwrap();

    // A seat that operators revoke is learnt no longer; the configured node is asked whatever becomes of its seat.
    let looks = Settings { discover_every: Some(Duration::ZERO), ..settings(NEVER) };
    let (client, second) = (web.client_with(&all[1], looks), web.client_with(&all[0], looks));
    // A look begins beside each request, whatever becomes of that.
    let ask = |client: &KmsClient| {
        let _one_that_only_begins_a_look = runtime.block_on(client.beacon());
    };
    let mut order: Vec<u16> = vec![others[0]];
    order.extend((1..=3).filter(|seat| *seat != others[0]));
    let seen: Vec<String> = order.iter().map(|seat| url(&mut cluster, *seat)).collect();
    knows(&client, "all", &seen, ask);
    knows(&second, "all", &all, ask);
    let decide = |what: &str, version: &str| {
        run(cluster.policy(what).unwrap().args(["--seat", &own.to_string(), "--base-version", version])).unwrap();
    };
    decide("revoke", "0");
    let left: Vec<String> = seen.iter().filter(|url| **url != all[0]).cloned().collect();
    knows(&client, "the revoked seat to leave", &left, ask);
    knows(&second, "the configured node to stay", &all, ask);
    decide("unrevoke", "1");
    knows(&client, "the seat to come back", &seen, ask);
    audit_verifies(&mut cluster);
}

#[test]
fn a_node_that_refuses_costs_one_retry_and_what_two_refuse_for_good_is_passed_on() {
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    recorded_before(&mut cluster);
    let released = |client: &KmsClient| check_values(&runtime.block_on(client.release(&web.app_id, &wishes())).unwrap());
    let keys = released(&web.client_with(&cluster.kms_urls(), settings(NEVER)));

    // A node of code that the cluster does not allow, on an empty disk: nobody lets it in, so it has no log and says so.
    let program = modified_binary(cluster.dir());
    let node = cluster.node(3);
    node.kill();
    std::fs::remove_dir_all(node.data_dir()).unwrap();
    node.program = program;
    node.start().unwrap();
    let outsider = node.url();
    let alone = web.client_with(&outsider, Settings { patience: Duration::ZERO, ..settings(NEVER) });
    until("its refusal", FORMING, || {
        let error = runtime.block_on(alone.beacon()).map(|_| "a beacon".to_owned()).map_err(|error| error.code());
        if error == Err(RefusalCode::NoGenesis.text()) { Ok(()) } else { Err(unexpected(format!("{error:?}"))) }
    })
    .unwrap();
    let urls = [outsider.clone(), cluster.node(1).url(), cluster.node(2).url()].join(",");
    let client = web.client_with(&urls, settings(NEVER));
    for asked in [2, 3] {
        assert_eq!(released(&client), keys);
        assert_eq!(tallies(&client), [(1, 1), (asked, 0), (0, 0)], "one retry, then passed by");
    }
    // Where the measurements of nodes are pinned, it is not even asked.
    let measured = runtime.block_on(async { web.anonymous(cluster.node(1).address).await.identity().measurement().to_vec() });
    let strict = |urls: &str| web.client_of_measurements(urls, &[hex::encode(&measured)], settings(NEVER));
    let client = strict(&urls);
    assert_eq!(released(&client), keys);
    assert_eq!(tallies(&client), [(1, 1), (2, 0), (0, 0)]);
    let error = runtime.block_on(strict(&outsider).beacon()).unwrap_err();
    let ClientError::NoNode { faults } = &error else { panic!("{error}") };
    let untrusted =
        |fault: &NodeFault| matches!(fault, NodeFault::Connection(PeerError::Untrusted { error: JudgeError::NotAccepted { .. }, .. }));
    assert!(faults.len() == 1 && untrusted(&faults[0].1), "{error}");
    // A final refusal is believed when a second node says so, and nobody else is asked.
    assert_eq!(cluster.revoke(&app.app_id).unwrap(), "applied");
    let nodes = [cluster.node(1).url(), cluster.node(2).url(), outsider].join(",");
    until("both nodes to know of the revocation", FORMING, || {
        for seat in [1, 2] {
            let url = cluster.node(seat).url();
            let error = runtime.block_on(web.client_with(&url, settings(NEVER)).release(&web.app_id, &wishes())).map(|_| ());
            match error {
                Err(error) if error.code() == RefusalCode::AppRevoked.text() => {}
                other => return Err(unexpected(format!("{other:?}"))),
            }
        }
        Ok(())
    })
    .unwrap();
    let client = web.client_with(&nodes, settings(NEVER));
    let error = runtime.block_on(client.release(&web.app_id, &wishes())).unwrap_err();
    assert_eq!(error.code(), RefusalCode::AppRevoked.text());
    assert_eq!(tallies(&client), [(2, 1), (1, 1), (0, 0)], "a beacon and a refusal, and a second opinion");
}

fn unexpected(got: String) -> ClusterError {
    ClusterError::Unexpected { from: "a node".to_owned(), got }
}
