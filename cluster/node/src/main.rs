//! `dstack-kms`: one node of the KMS cluster.
//!
//! Owns: arguments, the order of start and stop. Never: a rule. Source: architecture.md §5, style.md §8.
#![forbid(unsafe_code)]

mod admin;
mod admission;
mod authority_config;
mod beacons;
mod budget;
mod checkpoints;
mod collateral;
mod config;
mod confirming;
mod dstack;
mod ending;
mod env_api;
mod env_attempts;
mod env_combiner;
#[cfg(feature = "insecure-test-export")]
mod export;
mod files;
mod heads;
mod identity;
mod joining;
mod latency;
mod native_api;
mod node;
mod observer;
mod origin;
mod peer_api;
mod ports;
mod receipts;
mod responses;
#[cfg(feature = "insecure-rogue")]
mod rogue;
mod standing;
mod status;
mod timelocks;
mod trust;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use dstack_runtime::hardening::{Hardening, harden};
use dstack_runtime::telemetry::{Catalogue, Metrics, init_logging};

use crate::config::Config;

/// Overwrites what is freed: the engines behind threshold signatures free secrets as they are (ADR 0017).
#[global_allocator]
static ALLOCATOR: dstack_secret::Wiping = dstack_secret::Wiping::system();

/// One node of a threshold KMS cluster.
///
/// It holds a share of the root, never the root; it answers a key request only after the request is recorded by a majority, and only
/// after it has judged evidence and policy itself.
#[derive(Debug, Parser)]
#[command(
    name = "dstack-kms",
    version,
    after_help = "Example:\n  dstack-kms --config node-1.toml --check-config\n  dstack-kms --config node-1.toml\n\nEvery key of the file can be set by environment: DSTACK_KMS__NODE__LISTEN=127.0.0.1:7001\nDSTACK_KMS_ADMIN_TOKEN or ADMIN_API_TOKEN sets dstack.admin.auth_token where nothing else does.\n\nExit status: 0 ended in order, 1 a human must look, 74 the store failed (start again), 75 the disk is full (free space, start again)"
)]
struct Arguments {
    /// TOML file with sections [cluster] and [node].
    #[arg(long)]
    config: PathBuf,
    /// Check the configuration, print what is in force, and end.
    #[arg(long)]
    check_config: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(reason = format!("{error:#}"), "node ends");
            // Before logging is up this is the only word.
            eprintln!("dstack-kms: {error:#}");
            ExitCode::from(ending::status(&error))
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let loaded = Config::load(&arguments.config)?;
    if arguments.check_config {
        print!("{}", loaded.effective);
        return Ok(());
    }
    let config = loaded.config;
    init_logging(config.log_format, &config.log_level).context("logging")?;
    let software = config.device.starts_with("software:");
    harden(Hardening { lock_memory: false, inspectable: software });
    let catalogue = catalogue().context("metrics")?;
    let metrics = Metrics::install(&catalogue).context("metrics")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(runtime_threads()).enable_all().build().context("runtime")?;
    let handle = runtime.handle().clone();
    // Actors need an actix system around them; everything else runs on the multi-thread runtime.
    let system = actix::System::with_tokio_rt(move || runtime);
    system.block_on(node::run(config, metrics, handle))
}

/// One for every two cores (ADR 0031): more only wake each other to look for work. What computes for long has pools of its own.
fn runtime_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 2).max(1))
}

/// Every metric of this binary.
fn catalogue() -> anyhow::Result<Catalogue> {
    Ok(Catalogue::new()
        .with("ratls", dstack_ratls::metrics::METRICS)?
        .with("raft", dstack_raft::metrics::METRICS)?
        .with("actors", dstack_actors::metrics::METRICS)?
        .with("node", status::METRICS)?)
}

#[cfg(test)]
#[path = "../../../actors/tests/support/mod.rs"]
mod support;

#[cfg(test)]
mod tests {
    #[test]
    fn every_metric_is_listed_once() {
        super::catalogue().unwrap();
    }
}
