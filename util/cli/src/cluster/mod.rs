//! `dstack cluster`: from a plan to a pin. Owns: which step comes when. Never: takes a pin from fewer than all nodes.

mod folder;
mod init;
mod plan;
mod status;

use clap::Subcommand;

use crate::failure::Done;

pub(crate) use folder::{ClusterFolder, current_collateral, with_root};

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Make the genesis document of a new cluster from a plan.
    #[command(after_help = plan::HELP)]
    Plan(plan::Arguments),
    /// Wait until all nodes prove the new root, verify all of them, print the pin.
    #[command(after_help = init::HELP)]
    Init(init::Arguments),
    /// What each node says of itself.
    #[command(after_help = status::HELP)]
    Status(status::Arguments),
}

pub(crate) fn run(command: Command) -> Done {
    match command {
        Command::Plan(arguments) => plan::run(&arguments),
        Command::Init(arguments) => init::run(&arguments),
        Command::Status(arguments) => status::run(&arguments),
    }
}
