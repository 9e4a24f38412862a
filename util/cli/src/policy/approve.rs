//! `dstack policy approve`. Owns: fetching or reading the exact action, showing it, signing it. Never: signs an action of
//! another cluster, of another id than asked for, or one that is over.

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::path::PathBuf;

use clap::Args;
use dstack_protocol::governance::{Action, Entry};
use dstack_protocol::rpc::PATH_ACTION;
use dstack_protocol::{Refusal, RefusalCode, Wire};
use dstack_runtime::clock::{Clock as _, SystemClock};

use super::{TIMEOUT, entry, words};
use crate::args;
use crate::failure::{Done, Failure};
use crate::nodes::{CallError, NodeArguments, Nodes, PAUSE, block_on};
use crate::operator::OperatorKey;

pub(crate) const HELP: &str = "On a terminal it asks before it signs. Offline: take the proposal's entry file there.

Examples: dstack policy approve --genesis cluster 6f1c… --key bob.key
          dstack policy approve --genesis cluster --entry proposal.bin --key bob.key --sign-only approval.bin";

#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    nodes: NodeArguments,
    /// Action id that `policy propose` printed.
    #[arg(value_parser = args::action_id, required_unless_present = "entry")]
    action_id: Option<[u8; 16]>,
    /// Entry file of the proposal, instead of asking a node.
    #[arg(long, conflicts_with = "action_id")]
    entry: Option<PathBuf>,
    /// Operator's key file.
    #[arg(long)]
    key: PathBuf,
    /// Sign and write the entry to this file; send it later with `policy submit`.
    #[arg(long)]
    sign_only: Option<PathBuf>,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Done {
    let nodes = Nodes::new(&arguments.nodes)?;
    let key = OperatorKey::load(&arguments.key)?;
    let action = match (&arguments.entry, &arguments.action_id) {
        (Some(path), _) => match entry::load(path)? {
            Entry::Propose { action, .. } => action,
            Entry::Approve { .. } | Entry::Activate { .. } => {
                return Err(Failure::usage(format!("{} holds no proposal", path.display()), "give the entry file of `policy propose`"));
            }
        },
        (None, Some(id)) => block_on(fetch(&nodes, id))?,
        (None, None) => return Err(Failure::usage("no action is named", "give its id, or --entry")),
    };
    if action.cluster_id != nodes.folder.cluster_id {
        let what = format!("the action is for cluster {}", action.cluster_id);
        return Err(Failure::wrong(what, "use the folder of that cluster, if you mean it"));
    }
    if entry::is_over(&action, SystemClock::new().now()) {
        return Err(Failure::refused("this machine's clock", &Refusal::new(RefusalCode::ActionExpired, "a time before not_after", "now")));
    }
    let shown = words::describe(&action);
    if !arguments.yes && std::io::stdin().is_terminal() {
        confirm(&shown)?;
    }
    let approve = Entry::Approve { action_id: action.action_id, approvals: vec![key.approve(&action)] };
    entry::finish(&nodes, &approve, arguments.sign_only.as_deref(), &shown)
}

/// Fetches a pending action. Its bytes come from one node; what is signed is what is shown.
pub(crate) async fn fetch(nodes: &Nodes, id: &[u8; 16]) -> Result<Action, Failure> {
    let path = format!("{PATH_ACTION}/{}", hex::encode(id));
    // A follower may not have applied the proposal yet.
    let mut tries = 10_u32;
    let answer = loop {
        match nodes.get_any(&path, TIMEOUT).await {
            Ok(answer) => break answer,
            Err(CallError::Refused(refusal)) if refusal.code == RefusalCode::UnknownAction && tries > 0 => {
                tries -= 1;
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) => return Err(error.failure()),
        }
    };
    let action = Action::decode(&answer.body)
        .map_err(|error| Failure::wrong(format!("the node's action: {error}"), "ask another node with --node"))?;
    if action.action_id != *id {
        return Err(Failure::wrong("the node gave another action than asked for", "ask another node, and find out about this one"));
    }
    Ok(action)
}

fn confirm(shown: &str) -> Result<(), Failure> {
    let mut error = std::io::stderr().lock();
    let asked = write!(error, "{shown}sign this? [y/N] ").and_then(|()| error.flush());
    let mut answer = String::new();
    let read = asked.and_then(|()| std::io::stdin().lock().read_line(&mut answer));
    match read {
        Ok(_) if matches!(answer.trim(), "y" | "Y" | "yes") => Ok(()),
        _ => Err(Failure::wrong("not signed", "answer y to sign")),
    }
}
