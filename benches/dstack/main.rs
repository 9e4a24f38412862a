//! dstack's `GetAppKey` on three node processes of this machine, and the guest agent on its socket: rate, latency, and what they cost.
//! Owns: the series and their bounds, the tables. Never: another address than loopback; more than four minutes of load.
//!
//! The yardstick: upstream's single process, with the root in memory, no record and no second opinion, in its release profile on two
//! busy cores, spent 2.8 ms of processor time a request on kept connections and 3.5 ms with a new handshake each.
//!
//! Estimates (written before the first run), processor time of the three nodes together. From the table of single parts: a release of
//! three keys in mode L is 2 partials with proof (0.42 ms each), sealed (0.12) and opened (0.08), combined (0.79), TLS and HTTP 0.16,
//! Raft and flushes 0.84 alone and 0.17 shared by 64, JSON, decisions and receipt 0.1: 3.1 ms alone, 2.5 ms of 64. Whole releases of
//! mode C took 2.9 and 1.6 times such a sum.
//!
//! | series | estimate |
//! | --- | --- |
//! | kept, 1 client | 7 ms |
//! | kept, 8 clients | 4.5 ms |
//! | kept, 64 clients | 4.0 ms |
//! | new handshake | 0.8 ms more: a node's half of a handshake |
//! | new handshake, new evidence | 1.6 ms more: the same, evidence verified by two nodes (0.27 each) and sent to the second |
//! | agent, `GetKey` | 0.25 ms of the agent: a public key and a recoverable signature |
//! | agent, `Sign` | 0.35 ms: two signatures |
//! | agent, `GetQuote` | 0.3 ms, and 0.6 ms of the device |
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "whatever fails here ends the benchmark")]

mod agent;
mod guests;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use dstack_benches::cpu::{Usage, Used};
use dstack_benches::meter::{Cost, Meter};
use dstack_benches::report::short;
use dstack_benches::series::Series;
use dstack_benches::stages;
use dstack_testkit::cluster::process::run;
use dstack_testkit::cluster::{Agent, AgentSpec, App, Cluster, ClusterSpec, MachineKind, value};
use guests::{Guests, Way};

/// Emulated machines of guests: an instance of the app each.
const MACHINES: usize = 64;
/// After this no request of a series is begun.
const PATIENCE: Duration = Duration::from_secs(15);
/// Machine of the agent.
const AGENT: &str = "agent";

fn main() {
    let measuring = std::env::args().any(|argument| argument == "--bench");
    let machines: Vec<String> = (1..=if measuring { MACHINES } else { 2 }).map(|number| format!("guest-{number}")).collect();
    let named = |name: &String| (name.clone(), MachineKind::Tdx);
    let mut all: Vec<(String, MachineKind)> = machines.iter().map(named).collect();
    all.push(named(&AGENT.to_owned()));
    let spec = ClusterSpec { guests: all, dstack: true, ..ClusterSpec::default() };
    let begun = Instant::now();
    let mut cluster = Cluster::start(&spec).unwrap();
    println!("cluster of {} nodes, engine {}, formed in {}", spec.nodes, spec.engine, short(begun.elapsed()));
    let compose = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/web-db/docker-compose.yml");
    let app = cluster.measure("load", &compose, MachineKind::Tdx).unwrap();
    register(&cluster, &app);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let guests = runtime.block_on(Guests::boot(&cluster, &app, &machines));
    runtime.block_on(guests.settle());

    let idle = if measuring { Duration::from_secs(5) } else { Duration::from_millis(200) };
    let meter = Meter::start(&mut cluster);
    std::thread::sleep(idle);
    let at_rest = meter.stop(&mut cluster);
    let idle_rate = at_rest.cluster().as_secs_f64() / idle.as_secs_f64();
    let wakes = at_rest.sleeps() as f64 / idle.as_secs_f64();
    println!("idle cluster: {:.1} ms of processor time and {wakes:.0} wake-ups a second", idle_rate * 1e3);

    let (mut table, mut details) = (String::new(), String::new());
    // Names some of the series, as `Kept, 1 client`; all without one. The agent comes with all.
    let only: Option<String> = std::env::args().skip(1).find(|argument| !argument.starts_with("--"));
    for (way, clients, requests) in series(measuring) {
        let name = format!("{way:?}, {clients} clients");
        if only.as_ref().is_some_and(|only| !name.starts_with(only)) {
            continue;
        }
        let ready = runtime.block_on(guests.clients(way, clients, requests));
        let meter = Meter::start(&mut cluster);
        let series = runtime.block_on(ready.run(requests, PATIENCE));
        let cost = meter.stop(&mut cluster);
        table.push_str(&row(&name, &series, &cost, idle_rate));
        details.push_str(&detail(&name, &series, &cost));
        check(&name, &series, measuring);
    }
    println!("\n## GetAppKey\n");
    println!("| series | requests | rate per s | p50 | p99 | cluster cpu each | less idle | by node | clients cpu each |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |\n{table}");
    println!("{details}");
    if only.is_none() {
        agent_series(&cluster, &app, &runtime, measuring);
    }
    println!("\nleader: seat {}; log of node 1: {}", cluster.leader().unwrap(), cluster.node(1).log().display());
}

/// Way, clients, requests.
fn series(measuring: bool) -> Vec<(Way, usize, usize)> {
    if !measuring {
        return [Way::Kept, Way::NewHandshake, Way::NewEvidence].map(|way| (way, 2, 4)).to_vec();
    }
    let of = |way, requests: [usize; 3]| [1, 8, 64].into_iter().zip(requests).map(move |(clients, requests)| (way, clients, requests));
    let kept = of(Way::Kept, [400, 2000, 4000]).chain(of(Way::NewHandshake, [400, 1500, 2500]));
    kept.chain(of(Way::NewEvidence, [300, 800, 1200])).collect()
}

/// Registers the app for guests of dstack, with a rate limit that the load does not reach.
fn register(cluster: &Cluster, app: &App) {
    let mut command = cluster.policy("propose").unwrap();
    command.args(["--app-id", &app.app_id, "--name", &app.name, "--platform", "tdx", "--any-os-image", "--allow-legacy"]);
    command.args(["--class", "disk,env,k256,custom,p256", "--path", "prefix:", "--compose-hash", &app.compose_hash]);
    command.args(["--rate", "100000", "--burst", "1000000"]);
    assert_eq!(value(&run(&mut command).unwrap(), "state").unwrap(), "applied");
}

fn each(used: Duration, series: &Series) -> String {
    short(used / u32::try_from(series.latencies.len().max(1)).unwrap())
}

fn row(name: &str, series: &Series, cost: &Cost, idle_rate: f64) -> String {
    let background = Duration::from_secs_f64((idle_rate * series.took.as_secs_f64()).max(0.0));
    let by_node: Vec<String> = cost.nodes.iter().map(|used| each(*used, series)).collect();
    format!(
        "| {name} | {} | {:.0} | {} | {} | {} | {} | {} | {} |\n",
        series.latencies.len(),
        series.rate(),
        short(series.percentile(50)),
        short(series.percentile(99)),
        each(cost.cluster(), series),
        each(cost.cluster().saturating_sub(background), series),
        by_node.join(", "),
        each(cost.clients, series),
    )
}

/// Threads and stages of one series.
fn detail(name: &str, series: &Series, cost: &Cost) -> String {
    let mut threads: Vec<(&String, &Used)> = cost.threads.iter().collect();
    threads.sort_by_key(|(_, used)| std::cmp::Reverse(used.time));
    let count = series.latencies.len().max(1) as f64;
    let shown = |(name, used): (&String, &Used)| format!("{name} {} ({:.1})", each(used.time, series), used.sleeps as f64 / count);
    let threads: Vec<String> = threads.into_iter().take(8).map(shown).collect();
    let stages: Vec<String> = cost
        .stages
        .iter()
        .filter(|(stage, _)| *stage != stages::BATCH)
        .map(|(stage, (mean, ran))| format!("{stage} {:.2} × {}", ran / count, short(*mean)))
        .collect();
    let batch = cost.stages.get(stages::BATCH).map_or(0.0, |(mean, _)| mean.as_secs_f64());
    let wakes = cost.sleeps() as f64 / count;
    format!(
        "{name}: {wakes:.1} wake-ups\n  threads (wake-ups): {}\n  stages on the wall: {}\n  intents in one entry: {batch:.1}\n",
        threads.join(", "),
        stages.join(", ")
    )
}

fn check(name: &str, series: &Series, measuring: bool) {
    let mut codes: BTreeMap<&str, usize> = BTreeMap::new();
    for code in &series.failures {
        *codes.entry(code).or_default() += 1;
    }
    if !codes.is_empty() {
        println!("{name}: failures {codes:?}");
    }
    assert!(!series.latencies.is_empty() && (codes.is_empty() || measuring), "{name}: {codes:?}");
}

fn agent_series(cluster: &Cluster, app: &App, runtime: &tokio::runtime::Runtime, measuring: bool) {
    let spec = AgentSpec { machine: AGENT, device: None, app, app_id: None, instance_seed: None, name: AGENT };
    let mut agent = Agent::start(cluster, &spec).unwrap();
    let pid = agent.process().pid();
    println!("\n## Agent\n");
    println!("| series | requests | rate per s | p50 | p99 | agent cpu each |\n| --- | ---: | ---: | ---: | ---: | ---: |");
    let loads: &[(usize, usize)] = if measuring { &[(1, 2000), (8, 4000), (64, 6000)] } else { &[(2, 4)] };
    for question in agent::QUESTIONS {
        for (clients, requests) in loads {
            let before = Usage::of(pid);
            let series = runtime.block_on(agent::run(agent.socket().to_owned(), question, *clients, *requests, PATIENCE / 2));
            let (used, _) = Usage::of(pid).since(&before);
            let name = format!("{}, {clients} clients", question.method);
            let (p50, p99) = (short(series.percentile(50)), short(series.percentile(99)));
            println!("| {name} | {} | {:.0} | {p50} | {p99} | {} |", series.latencies.len(), series.rate(), each(used, &series));
            check(&name, &series, measuring);
        }
    }
    agent.stop().unwrap();
}
