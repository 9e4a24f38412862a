//! Releases on three node processes of this machine, over real sockets, with evidence of emulated machines: latency, rate, and what
//! they cost the cluster. Owns: the series and their bounds, the tables. Never: another address than loopback; more than two minutes
//! of load.
//!
//! Estimates (written before the first run; two cores for three nodes, the client and the device):
//!
//! | series | estimate |
//! | --- | --- |
//! | warm, 1 client | p50 4 ms: two flushes of 0.4 ms on the way to a commit, partials 0.6 ms, client 1.3 ms, 12 messages of 0.1 ms |
//! | warm, 64 clients | 600 releases a second: 3.3 ms of processor time each for cluster and client, two cores |
//! | cold, 1 client | p50 22 ms: device 4 ms, two handshakes 3 ms, evidence verified by three nodes and the client 8 ms, the warm part |
//! | cold, 64 clients | 90 releases a second |
//! | cluster's processor time, warm | 2.0 ms a release: partials 1.2, sealing 0.2, TLS 0.2, storage 0.1, Raft and HTTP 0.3 |
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "whatever fails here ends the benchmark")]

mod workload;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dstack_benches::cpu::Used;
use dstack_benches::meter::{Cost, Meter};
use dstack_benches::report::short;
use dstack_benches::series::Series;
use dstack_benches::stages;
use dstack_testkit::cluster::process::run;
use dstack_testkit::cluster::{App, Cluster, ClusterSpec, MachineKind};
use workload::{Load, Workload};

fn main() {
    let measuring = std::env::args().any(|argument| argument == "--bench");
    let spec = ClusterSpec { guests: vec![("load".to_owned(), MachineKind::Tdx)], ..ClusterSpec::default() };
    let begun = Instant::now();
    let mut cluster = Cluster::start(&spec).unwrap();
    println!("cluster of {} nodes, engine {}, formed in {}", spec.nodes, spec.engine, short(begun.elapsed()));
    let compose = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/web-db/docker-compose.yml");
    let app = cluster.measure("load", &compose, MachineKind::Tdx).unwrap();
    register(&cluster, &app);
    let workload = Arc::new(Workload::boot(&cluster, &app, "load"));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(workload.settle());

    let idle = if measuring { Duration::from_secs(5) } else { Duration::from_millis(200) };
    let mut meter = Meter::start(&mut cluster);
    std::thread::sleep(idle);
    let cost = meter.stop(&mut cluster);
    let idle_rate = cost.cluster().as_secs_f64() / idle.as_secs_f64();
    println!("idle cluster: {:.1} ms of processor time a second", idle_rate * 1e3);

    let s = Duration::from_secs;
    let full = [
        ("warm", Load { clients: 1, releases: 1000, patience: s(20), cold: false }),
        ("warm", Load { clients: 64, releases: 6000, patience: s(25), cold: false }),
        ("cold", Load { clients: 1, releases: 150, patience: s(20), cold: true }),
        ("cold", Load { clients: 64, releases: 1000, patience: s(25), cold: true }),
    ];
    for (name, load) in full {
        let load = if measuring { load } else { Load { clients: load.clients.min(4), releases: 8, ..load } };
        let clients = runtime.block_on(workload.clients(load));
        meter = Meter::start(&mut cluster);
        let series = runtime.block_on(workload.run(load, clients));
        let cost = meter.stop(&mut cluster);
        print(&format!("{name}, {} clients", load.clients), &series, &cost, idle_rate);
        print_split(&series, &cost);
        assert!(series.failures.is_empty() || measuring, "{:?}", series.failures);
    }
    let leader = cluster.leader().unwrap();
    println!("leader: seat {leader}; log of node 1: {}", cluster.node(1).log().display());
}

/// Registers the app with a rate limit that the load does not reach.
fn register(cluster: &Cluster, app: &App) {
    let mut command = cluster.policy("propose").unwrap();
    command.args(["--app-id", &app.app_id, "--name", &app.name, "--platform", "tdx", "--any-os-image"]);
    command.args(["--class", "disk,env,k256,custom", "--path", "prefix:", "--compose-hash", &app.compose_hash]);
    command.args(["--rate", "100000", "--burst", "1000000"]);
    let out = run(&mut command).unwrap();
    assert!(out.lines().any(|line| line == "state=applied"), "{out}");
}

fn print(name: &str, series: &Series, cost: &Cost, idle_rate: f64) {
    let count = series.latencies.len().max(1);
    let each = |used: Duration| short(used / u32::try_from(count).unwrap());
    let background = Duration::from_secs_f64((idle_rate * series.took.as_secs_f64()).max(0.0));
    println!("\n## {name}\n");
    println!("| releases | failed | rate per s | p50 | p99 | cluster cpu each | less idle | clients cpu each | device cpu each |");
    println!("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    println!(
        "| {} | {} | {:.0} | {} | {} | {} | {} | {} | {} |",
        series.latencies.len(),
        series.failures.len(),
        series.latencies.len() as f64 / series.took.as_secs_f64(),
        short(series.percentile(50)),
        short(series.percentile(99)),
        each(cost.cluster()),
        each(cost.cluster().saturating_sub(background)),
        each(cost.clients),
        each(cost.device),
    );
    let mut codes: BTreeMap<&str, usize> = BTreeMap::new();
    for code in &series.failures {
        *codes.entry(code).or_default() += 1;
    }
    if !codes.is_empty() {
        println!("\nfailures: {codes:?}");
    }
}

fn print_split(series: &Series, cost: &Cost) {
    let count = series.latencies.len().max(1);
    println!("\n| thread of the nodes | cpu a release | wake-ups a release |\n| --- | ---: | ---: |");
    let mut threads: Vec<(&String, &Used)> = cost.threads.iter().collect();
    threads.sort_by_key(|(_, used)| std::cmp::Reverse(used.time));
    for (name, used) in threads {
        let each = used.time / u32::try_from(count).unwrap();
        if each >= Duration::from_micros(1) {
            println!("| `{name}` | {} | {:.1} |", short(each), used.sleeps as f64 / count as f64);
        }
    }
    println!("\n| stage | times a release | mean on the wall |\n| --- | ---: | ---: |");
    for (stage, (mean, ran)) in cost.stages.iter().filter(|(stage, _)| *stage != stages::BATCH) {
        println!("| {stage} | {:.2} | {} |", ran / count as f64, short(*mean));
    }
    if let Some((mean, _)) = cost.stages.get(stages::BATCH) {
        println!("\nintents in one Raft entry, mean: {:.1}", mean.as_secs_f64());
    }
}
