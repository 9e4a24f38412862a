//! Commands of the binary `dstack`: form a cluster, govern it, measure apps, verify evidence and logs.
//! Owns: arguments, what is printed, exit codes. Never: holds a share, trusts what one node says as a pin, decides a rule
//! that a node enforces. Source: architecture.md §9, threshold.md §1.6; `docs/operations.md` shows them in order.
//!
//! Every command is a function from arguments to `failure::Done`: the text for stdout, or a `failure::Failure` that
//! knows its exit code and what to try.
#![forbid(unsafe_code)]

mod app;
mod args;
mod audit;
mod cluster;
mod collateral;
mod env;
mod evidence;
mod explain;
mod failure;
mod files;
mod nodes;
mod operator;
mod policy;

use std::io::Write as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::failure::Done;

#[derive(Parser)]
#[command(name = "dstack", version, about = "Operates a dstack KMS cluster and prepares apps for it", after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str =
    "Exit codes: 0 done; 1 judged and found wrong, or refused; 2 wrong arguments; 3 could not be judged (file, network).";

#[derive(Subcommand)]
enum Command {
    /// Plan, form and watch a cluster.
    #[command(subcommand)]
    Cluster(cluster::Command),
    /// Keys of operators.
    #[command(subcommand)]
    Operator(operator::Command),
    /// Policies of apps, revocations.
    #[command(subcommand)]
    Policy(policy::Command),
    /// Env public keys of apps: what deployers encrypt to.
    #[command(subcommand)]
    Env(env::Command),
    /// What an app will be measured as.
    #[command(subcommand)]
    App(app::Command),
    /// Attestation evidence.
    #[command(subcommand)]
    Evidence(evidence::Command),
    /// What evidence is judged with: show, check, fetch, bring it across an air gap.
    #[command(subcommand)]
    Collateral(collateral::Command),
    /// The log of a node.
    #[command(subcommand)]
    Audit(audit::Command),
    /// What a refusal means and what to do.
    Explain(explain::Arguments),
}

/// Runs the program's arguments; prints; answers the exit code.
#[must_use]
pub fn run() -> ExitCode {
    let arguments = Arguments::parse();
    let (text, code) = match dispatch(arguments) {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(failure) => {
            let _ = failure.report(&mut std::io::stderr().lock());
            (failure.stdout().to_owned(), failure.exit())
        }
    };
    // A reader that closed the pipe has what it wanted.
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    code
}

fn dispatch(arguments: Arguments) -> Done {
    match arguments.command {
        Command::Cluster(command) => cluster::run(command),
        Command::Operator(command) => operator::run(command),
        Command::Policy(command) => policy::run(command),
        Command::Env(command) => env::run(command),
        Command::App(command) => app::run(command),
        Command::Evidence(command) => evidence::run(command),
        Command::Collateral(command) => collateral::run(command),
        Command::Audit(command) => audit::run(command),
        Command::Explain(arguments) => explain::run(&arguments),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Arguments::command().debug_assert();
    }
}
