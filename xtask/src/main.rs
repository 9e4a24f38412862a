//! One entry to everything: what a person runs, and what CI runs, is `cargo xtask …`.
//!
//! Owns: the order of the steps and their options. Never: holds logic of the product; needs nothing but a Rust toolchain to start.
#![forbid(unsafe_code)]

mod bench;
mod cache;
mod check;
mod checks;
mod ci;
mod conformance;
mod demo;
mod deny;
mod docs;
mod doctests;
mod fuzz;
mod methods;
mod setup;
mod shell;
mod step;
mod tee;
mod test;
mod tidy;
mod tools;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::shell::Shell;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Setup, check, test, bench and documentation of the KMS cluster")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what the other commands need and say what was installed
    Setup {
        /// Also build and keep what tests of devices need, see `test --help`
        #[arg(long)]
        tee: bool,
    },
    /// The story of the README on this machine: three nodes, two apps, a killed leader, a refused change
    Demo {
        /// Leave the cluster up until interrupted
        #[arg(long)]
        keep: bool,
    },
    /// Read-only: format, lints, tidy, dependency rules, documentation
    Check,
    /// Only the rules of the tree itself: arrows, module docs, lengths, words, generated files
    Tidy,
    /// All tests: nextest, then documentation tests
    ///
    /// The first run on a machine builds QEMU and what belongs to an enclave, about ten minutes of processor time, and keeps it in
    /// $XDG_CACHE_HOME/dstack-kms, else ~/.cache/dstack-kms. Where that cannot be had, one test says that it is skipped; in CI it fails.
    Test {
        /// Only tests of devices against something real: configfs-tsm by FUSE, a TPM by swtpm, a Nitro enclave in QEMU
        #[arg(long, conflicts_with_all = ["packages", "filters"])]
        tee: bool,
        /// Only packages of this name (repeatable); all by default
        #[arg(short, long = "package", value_name = "NAME")]
        packages: Vec<String>,
        /// Passed on to nextest, for example a test name
        #[arg(trailing_var_arg = true)]
        filters: Vec<String>,
    },
    /// dstack's published SDKs, unmodified, against an agent and three nodes: part of `test`
    Conformance,
    /// The only command that rewrites files: format, and lints that fix themselves
    Fix,
    /// Exactly what CI runs: check, then test
    Ci,
    /// Benchmarks; without options all of them, for figures
    Bench {
        /// Only build them and run each once
        #[arg(long)]
        once: bool,
        /// Only benchmarks whose name contains this
        filter: Option<String>,
    },
    /// Fuzz the decoders, each for some seconds
    Fuzz {
        /// Seconds for each target
        #[arg(long, default_value_t = 30)]
        seconds: u64,
        /// Only this target
        target: Option<String>,
    },
    /// Write the generated documents (docs/errors.md, docs/metrics.md)
    Docs,
}

fn main() -> ExitCode {
    match Shell::at_workspace_root().and_then(|shell| run(&shell, Arguments::parse().command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            // Not the backtrace: what failed is a step, and it has said why above.
            eprintln!("xtask: {cause:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(shell: &Shell, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Setup { tee } => setup::run(shell).and_then(|()| if tee { tee::kit(shell, true).map(drop) } else { Ok(()) }),
        Command::Demo { keep } => demo::run(shell, keep),
        Command::Check => check::run(shell).map(drop),
        Command::Tidy => tidy::run(shell).map(drop),
        Command::Test { tee: true, .. } => test::devices(shell).map(drop),
        Command::Test { packages, filters, .. } => test::run(shell, &packages, &filters).map(drop),
        Command::Conformance => conformance::alone(shell).map(drop),
        Command::Fix => check::fix(shell),
        Command::Ci => ci::run(shell),
        Command::Bench { once: true, .. } => bench::once(shell).map(drop),
        Command::Bench { once: false, filter } => bench::run(shell, filter.as_deref()),
        Command::Fuzz { seconds, target } => fuzz::run(shell, seconds, target.as_deref()),
        Command::Docs => docs::write(shell),
    }
}
