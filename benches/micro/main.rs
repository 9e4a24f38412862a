//! Benchmarks of single parts, the pure cores first, the replicated machine last. Owns: their order and the table at the end.
//! Never: starts a node; that is `load`. `cargo bench` measures; without `--bench` each runs once, to see that it works.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "whatever fails here ends the benchmark")]

mod attest;
mod audit;
mod raft;
mod ratios;
mod ratls;
mod storage;
mod threshold;

use std::path::{Path, PathBuf};
use std::time::Duration;

use criterion::measurement::{Measurement, WallTime};
use criterion::{Bencher, BenchmarkId, Criterion, SamplingMode};
use dstack_benches::clock::CpuTime;
use dstack_benches::{estimates, report};

fn main() {
    let (mut cpu, mut wall) = (settings(CpuTime), settings(WallTime));
    attest::all(&mut cpu);
    threshold::all(&mut cpu);
    ratls::cpu(&mut cpu);
    ratls::wall(&mut wall);
    storage::all(&mut wall);
    storage::cpu(&mut cpu);
    audit::all(&mut cpu);
    raft::all(&mut cpu);
    if std::env::args().any(|argument| argument == "--bench") {
        println!("\n{}\n{}", report::table(&folder()), report::over_ecdsa(&folder()));
        if std::env::args().skip(1).all(|argument| argument.starts_with("--") || argument.starts_with("attest")) {
            println!("{}", ratios::table());
        }
    }
}

/// Runs one benchmark; its name needs an estimate.
fn measure<M: Measurement>(criterion: &mut Criterion<M>, name: &'static str, mut routine: impl FnMut(&mut Bencher<'_, M>)) {
    let estimate = estimates::of(name);
    let mut parts = estimate.name.splitn(3, '/');
    let mut part = || parts.next().unwrap_or_default();
    let (core, operation, size) = (part(), part(), part());
    let mut group = criterion.benchmark_group(core);
    if estimate.clock == estimates::Clock::Wall {
        // A disk's time does not grow with the number of iterations in a sample.
        group.sampling_mode(SamplingMode::Flat);
    }
    if estimate.expected > Duration::from_millis(200) {
        group.sample_size(10);
    }
    group.bench_function(BenchmarkId::new(operation, size), |bencher| routine(bencher));
    group.finish();
}

fn settings<M: Measurement>(measurement: M) -> Criterion<M> {
    Criterion::default()
        .with_measurement(measurement)
        .output_directory(&folder())
        .sample_size(40)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args()
}

/// Where results are kept: with what else the build made.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("criterion")
}
