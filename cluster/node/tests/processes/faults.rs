//! Nodes that stop, in order or not, and clocks that are wrong.

use std::time::Duration;

use dstack_protocol::RefusalCode;
use dstack_testkit::cluster::{Cluster, ClusterError, ClusterSpec, ENDING, FORMING, MachineKind, until};

use crate::releases::audit_verifies;
use crate::workload::{Workload, check_values, registered, runtime, wishes};

#[test]
fn sigterm_hands_leadership_over_and_lets_requests_finish() {
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let client = std::sync::Arc::new(web.client(&cluster.kms_urls()));
    let keys = runtime.block_on(async { check_values(&client.release(&web.app_id, &wishes()).await.unwrap()) });

    // Releases without a pause while the leader stops; none may fail.
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let load = {
        let (client, app_id, stop) = (client.clone(), web.app_id, stop.clone());
        runtime.spawn(async move {
            let mut all = Vec::new();
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                all.push(
                    client.release(&app_id, &wishes()).await.map(|released| check_values(&released)).map_err(|error| error.to_string()),
                );
            }
            all
        })
    };
    let leader = cluster.leader().unwrap();
    let term = cluster.node(leader).status().unwrap()["raft"]["term"].as_u64().unwrap();
    let status = cluster.node(leader).terminate(ENDING).unwrap().unwrap();
    assert!(status.success(), "{status}: {}", cluster.node(leader).log_text());
    let next = cluster.leader().unwrap();
    assert_ne!(next, leader);
    let after = cluster.node(next).status().unwrap();
    assert!(after["raft"]["term"].as_u64().unwrap() > term);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let outcomes = runtime.block_on(load).unwrap();
    assert!(!outcomes.is_empty());
    for outcome in outcomes {
        assert_eq!(outcome.unwrap(), keys);
    }
    let log = cluster.node(leader).log_text();
    assert!(log.contains("stopping") && log.contains("stopped"), "{log}");
    assert!(!cluster.node(leader).data_dir().join("audit").read_dir().unwrap().next().unwrap().unwrap().path().as_os_str().is_empty());
    audit_verifies(&mut cluster);
}

#[test]
fn without_a_majority_nothing_is_released_and_it_says_so() {
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let keys = check_values(&runtime.block_on(web.keys(&cluster.kms_urls())));

    cluster.node(2).kill();
    cluster.node(3).kill();
    let address = cluster.node(1).address;
    let refusal = runtime.block_on(async {
        let session = web.session(address).await;
        session.ask(&session.signed(session.request())).await.unwrap_err()
    });
    // NOT_READY names the dead leader, until node 1 has noticed that there is none.
    let unavailable = [RefusalCode::NoLeader, RefusalCode::NoQuorum, RefusalCode::DeadlineExceeded, RefusalCode::NotReady];
    assert!(unavailable.contains(&refusal.code) && refusal.code.retryable(), "{refusal}");
    // Alive, not ready, and it says why.
    until("node 1 not to be ready", FORMING, || match cluster.node(1).check_ready() {
        Err(ClusterError::Unexpected { got, .. }) if got.starts_with("503") => Ok(()),
        other => Err(ClusterError::Unexpected { from: "node 1".to_owned(), got: format!("{other:?}") }),
    })
    .unwrap();

    cluster.start_all().unwrap();
    cluster.wait_ready(FORMING).unwrap();
    assert_eq!(check_values(&runtime.block_on(web.keys(&cluster.kms_urls()))), keys);
}

#[test]
fn a_node_with_an_empty_disk_rejoins_without_a_share() {
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let keys = check_values(&runtime.block_on(web.keys(&cluster.kms_urls())));

    cluster.node(3).kill();
    let data = cluster.node(3).data_dir();
    std::fs::remove_dir_all(&data).unwrap();
    cluster.node(3).start().unwrap();
    // Its new key is admitted under a new index, it has the whole log, and it says what it lacks.
    until("node 3 to be admitted anew", FORMING, || {
        let (own, other) = (cluster.node(3).status()?, cluster.node(1).status()?);
        let seat =
            own["state"]["seats"].as_array().and_then(|seats| seats.iter().find(|row| row["seat"] == 3)).cloned().unwrap_or_default();
        let caught_up = own["state"]["size"] == other["state"]["size"] && seat["index"] == 4;
        if caught_up { Ok(()) } else { Err(ClusterError::Unexpected { from: "node 3".to_owned(), got: own.to_string() }) }
    })
    .unwrap();
    let lacking = cluster.node(3).check_ready().unwrap_err().to_string();
    assert!(lacking.contains("no share"), "{lacking}");

    // The two others hold enough, whoever coordinates.
    let url = cluster.node(1).url();
    assert_eq!(check_values(&runtime.block_on(web.keys(&url))), keys);
    assert_eq!(check_values(&runtime.block_on(web.keys(&cluster.kms_urls()))), keys);
    audit_verifies(&mut cluster);
}

#[test]
fn a_node_with_a_wrong_clock_refuses() {
    let Some(library) = libfaketime() else { return };
    let mut cluster = Cluster::start(&ClusterSpec::default()).unwrap();
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let keys = check_values(&runtime.block_on(web.keys(&cluster.kms_urls())));

    // One node comes back 200 s ahead; its monotonic clock stays right.
    cluster.node(3).terminate(ENDING).unwrap();
    let shift = [("LD_PRELOAD", library), ("FAKETIME", "+200s"), ("FAKETIME_DONT_FAKE_MONOTONIC", "1")];
    cluster.node(3).environment = shift.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec();
    cluster.node(3).start().unwrap();
    until("node 3 to refuse", FORMING, || match cluster.node(3).check_ready() {
        Err(ClusterError::Unexpected { got, .. }) if got.contains(RefusalCode::ClockSkew.text()) => Ok(()),
        other => Err(ClusterError::Unexpected { from: "node 3".to_owned(), got: format!("{other:?}") }),
    })
    .unwrap();
    let skew = until("its skew to be a metric", Duration::from_secs(10), || cluster.node(3).metric("kms_node_log_clock_skew_ms")).unwrap();
    assert!(skew > 90_000.0, "{skew}");

    // The others serve, and log time did not follow it.
    let urls = format!("{},{}", cluster.node(1).url(), cluster.node(2).url());
    assert_eq!(check_values(&runtime.block_on(web.keys(&urls))), keys);
    let address = cluster.node(3).address;
    let refusal = runtime.block_on(async {
        let beacon = web.beacon(address).await;
        let session = web.session_over(address, beacon, |data| data).await;
        session.ask(&session.signed(session.request())).await.unwrap_err()
    });
    assert_eq!(refusal.code, RefusalCode::ClockSkew, "{refusal}");
}

#[test]
fn a_request_over_an_old_beacon_is_refused() {
    let Some(library) = libfaketime() else { return };
    let mut cluster = Cluster::plan(&ClusterSpec::default()).unwrap();
    // All nodes read how far their clocks are ahead from one file.
    let clock = cluster.dir().join("clock");
    let ahead = |seconds: u32| std::fs::write(&clock, format!("+{seconds}\n")).unwrap();
    ahead(0);
    let file = clock.display().to_string();
    let faked = [
        ("LD_PRELOAD", library),
        ("FAKETIME_TIMESTAMP_FILE", file.as_str()),
        ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
    ];
    for node in cluster.nodes() {
        node.environment = faked.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec();
    }
    cluster.start_all().unwrap();
    cluster.init().unwrap();
    cluster.wait_ready(FORMING).unwrap();
    let runtime = runtime();
    let app = registered(&cluster, "web", MachineKind::Tdx);
    let web = Workload::boot(&cluster, "web", &app);
    let address = cluster.node(1).address;
    let session = runtime.block_on(web.session(address));
    let served = runtime.block_on(async { session.ask(&session.signed(session.request())).await.unwrap() });

    // Time passes: less than the skew that nodes bear at once, and a new leader's beacon makes it log time.
    for seconds in [80, 160] {
        ahead(seconds);
        let leader = cluster.leader().unwrap();
        cluster.node(leader).terminate(ENDING).unwrap();
        cluster.start_all().unwrap();
        until("log time to have moved", FORMING, || {
            let status = cluster.node(1).status()?;
            let skew = status["state"]["clock_skew_ms"].as_i64().unwrap_or(i64::MAX);
            if skew.abs() < 40_000 {
                Ok(())
            } else {
                Err(ClusterError::Unexpected { from: "node 1".to_owned(), got: format!("skew {skew} ms") })
            }
        })
        .unwrap();
        cluster.wait_ready(FORMING).unwrap();
    }
    let (refusal, retried) = runtime.block_on(async {
        let session = session.elsewhere(&web, address).await;
        // A new request over the beacon of before, in the session of before, which is still good.
        let refusal = session.ask(&session.signed(session.request())).await.unwrap_err();
        // With a new beacon it serves.
        let beacon = web.beacon(address).await;
        let mut request = session.request();
        (request.beacon_pos, request.beacon) = (beacon.beacon_pos, beacon.beacon);
        (refusal, session.ask(&session.signed(request)).await.unwrap())
    });
    assert_eq!(refusal.code, RefusalCode::BeaconStale, "{refusal}");
    assert!(retried.receipt.record.pos > served.receipt.record.pos);
    audit_verifies(&mut cluster);
}

/// The library that shifts a process's clock; without it a test is skipped.
fn libfaketime() -> Option<&'static str> {
    let places = ["/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1", "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1"];
    let found = places.into_iter().find(|path| std::path::Path::new(path).exists());
    if found.is_none() {
        println!("skipped: libfaketime is not installed (`cargo xtask setup` installs it)");
    }
    found
}
