//! `dstack policy`: propose, approve, revoke, show. Owns: making and signing actions of the operator quorum.
//! Never: decides whether an action is valid; nodes do, each by itself. Source: architecture.md §9.

mod allow_node;
mod approve;
mod draft;
mod entry;
mod propose;
mod revoke;
mod words;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use dstack_protocol::RefusalCode;
use dstack_protocol::rpc::PATH_POLICY;
use serde_json::Value;

use crate::args;
use crate::failure::{Done, Failure};
use crate::nodes::{CallError, NodeArguments, Nodes, block_on};

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Propose an app's policy; the first registers the app. Or the policy of apps that only the authority knows.
    #[command(after_help = propose::HELP)]
    Propose(Box<propose::Arguments>),
    /// Show what a pending action does, and approve it.
    #[command(after_help = approve::HELP)]
    Approve(approve::Arguments),
    /// Let nodes with this measurement be admitted: a new version of the node, before it is started.
    #[command(after_help = allow_node::HELP)]
    AllowNode(allow_node::Arguments),
    /// Revoke at once: an app, a measurement, a platform, a seat, a generation, the delegation.
    #[command(after_help = revoke::HELP)]
    Revoke(revoke::Arguments),
    /// Undo a revocation; needs k approvals and waits for the timelock.
    Unrevoke(revoke::Arguments),
    /// Send entries that were signed offline.
    Submit(Submit),
    /// An app's policy and version, as a node tells them.
    Show(Show),
}

#[derive(Args)]
pub(crate) struct Submit {
    #[command(flatten)]
    nodes: NodeArguments,
    /// Entry files that `--sign-only` wrote, sent in this order.
    #[arg(required = true)]
    entries: Vec<PathBuf>,
}

#[derive(Args)]
pub(crate) struct Show {
    #[command(flatten)]
    nodes: NodeArguments,
    /// App id, hex, or `delegation`.
    #[arg(value_parser = app_or_delegation)]
    app_id: String,
}

/// Name of the delegation where an app id may stand.
pub(crate) const DELEGATION: &str = "delegation";

fn app_or_delegation(text: &str) -> Result<String, String> {
    if text == DELEGATION { Ok(text.to_owned()) } else { args::app_id(text).map(|app_id| app_id.to_string()) }
}

/// How long a command goes on trying.
const TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) fn run(command: Command) -> Done {
    match command {
        Command::Propose(arguments) => propose::run(&arguments),
        Command::AllowNode(arguments) => allow_node::run(&arguments),
        Command::Approve(arguments) => approve::run(&arguments),
        Command::Revoke(arguments) => revoke::run(&arguments, revoke::Way::Revoke),
        Command::Unrevoke(arguments) => revoke::run(&arguments, revoke::Way::Undo),
        Command::Submit(arguments) => submit(&arguments),
        Command::Show(arguments) => show(&arguments),
    }
}

fn submit(arguments: &Submit) -> Done {
    let nodes = Nodes::new(&arguments.nodes)?;
    let entries = arguments.entries.iter().map(|path| entry::load(path)).collect::<Result<Vec<_>, _>>()?;
    let mut out = String::new();
    for entry in &entries {
        let state = block_on(entry::send(&nodes, entry))?;
        out += &format!("action={}\nstate={state}\n", hex::encode(entry::action_id(entry)));
    }
    Ok(out)
}

fn show(arguments: &Show) -> Done {
    let nodes = Nodes::new(&arguments.nodes)?;
    let policy = block_on(async { policy(&nodes, &arguments.app_id).await.map_err(|error| error.failure()) })?;
    let text = policy.as_ref().map(|policy| format!("{policy:#}\n")).unwrap_or_default();
    match policy.and_then(|policy| policy.get("registered").and_then(Value::as_bool)) {
        Some(true) => Ok(text),
        _ => Err(Failure::wrong(format!("{} is not registered", arguments.app_id), RefusalCode::AppUnknown.fix()).with_stdout(text)),
    }
}

/// What a node tells about an app; `None` if it is not registered.
async fn policy(nodes: &Nodes, app_id: &str) -> Result<Option<Value>, CallError> {
    let answer = match nodes.get_any(&format!("{PATH_POLICY}/{app_id}"), TIMEOUT).await {
        Err(CallError::Refused(refusal)) if refusal.code == RefusalCode::AppUnknown => return Ok(None),
        other => other?,
    };
    serde_json::from_slice(&answer.body)
        .map(Some)
        .map_err(|error| CallError::Answer { address: "the node".to_owned(), what: format!("a policy that is not JSON: {error}") })
}

/// How far an app's object is.
struct Progress {
    /// 0 where it was never touched.
    version: u64,
    /// Ids of actions that wait, hex.
    pending: Vec<String>,
}

async fn progress(nodes: &Nodes, app_id: &str) -> Result<Progress, CallError> {
    let Some(policy) = policy(nodes, app_id).await? else {
        return Ok(Progress { version: 0, pending: Vec::new() });
    };
    let missing = || CallError::Answer { address: "the node".to_owned(), what: "a policy without a version".to_owned() };
    let version = policy.get("version").and_then(Value::as_u64).ok_or_else(missing)?;
    let pending = policy.get("pending_actions").and_then(Value::as_array).into_iter().flatten();
    Ok(Progress { version, pending: pending.filter_map(Value::as_str).map(str::to_owned).collect() })
}
