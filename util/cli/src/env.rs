//! `dstack env`: env public keys of apps. Owns: showing one, signing the attempt that follows the nodes' own. Never: computes a key (the node
//! that the log names does), names a node. Source: threshold.md §2.5.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use dstack_protocol::env::EnvAttempt;
use dstack_protocol::rpc::{PATH_ENV_ATTEMPT, PATH_ENV_KEY};
use dstack_protocol::{AppId, Generation, RefusalCode, Wire as _};
use serde_json::Value;

use crate::args;
use crate::failure::{Done, Failure};
use crate::nodes::{NodeArguments, Nodes, PAUSE, block_on};
use crate::operator::OperatorKey;

#[derive(Subcommand)]
pub(crate) enum Command {
    /// What the log has of an app's env key: the attempts at it, the node that the last one names, the key.
    Show(Show),
    /// Begin the next attempt to compute an app's env key, after the nodes' own three; one operator's word is enough.
    #[command(after_help = RETRY_HELP)]
    Retry(Retry),
}

const RETRY_HELP: &str =
    "An app gets its env key by itself, within seconds of its registration: each attempt names one node, which has a minute. Three
attempts that failed mean that the nodes named were down, or could not reach t holders: see to that first.

Example: dstack env retry 6f1c… --genesis cluster --key alice.key --wait 90s";

#[derive(Args)]
pub(crate) struct Show {
    #[command(flatten)]
    nodes: NodeArguments,
    /// App id, hex.
    #[arg(value_parser = args::app_id)]
    app_id: AppId,
}

#[derive(Args)]
pub(crate) struct Retry {
    #[command(flatten)]
    nodes: NodeArguments,
    /// App id, hex.
    #[arg(value_parser = args::app_id)]
    app_id: AppId,
    /// Operator's key file.
    #[arg(long)]
    key: PathBuf,
    /// Wait for the key for this long, as in 90s; without it not at all.
    #[arg(long, value_parser = args::duration)]
    wait: Option<Duration>,
}

/// How long a command goes on trying.
const TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) fn run(command: Command) -> Done {
    match command {
        Command::Show(arguments) => show(&arguments),
        Command::Retry(arguments) => retry(&arguments),
    }
}

fn show(arguments: &Show) -> Done {
    let nodes = Nodes::new(&arguments.nodes)?;
    block_on(row(&nodes, &arguments.app_id)).map(|row| format!("{:#}\n", row.whole))
}

/// What a node tells of an app's env key.
struct Row {
    whole: Value,
    attempt: u8,
    open: bool,
    public_key: Option<String>,
}

async fn row(nodes: &Nodes, app_id: &AppId) -> Result<Row, Failure> {
    let answer = nodes.get_any(&format!("{PATH_ENV_KEY}/{app_id}"), TIMEOUT).await.map_err(|error| error.failure())?;
    let read = |body: &[u8]| {
        let whole: Value = serde_json::from_slice(body).ok()?;
        let attempt = whole.get("attempt")?.as_u64()?.try_into().ok()?;
        let open = whole.get("open")?.as_bool()?;
        let public_key = whole.get("public_key")?.as_str().map(str::to_owned);
        Some(Row { attempt, open, public_key, whole })
    };
    read(&answer.body)
        .ok_or_else(|| Failure::unable("the node answered something else than an env key", "use a `dstack` of the cluster's version"))
}

fn retry(arguments: &Retry) -> Done {
    let nodes = Nodes::new(&arguments.nodes)?;
    let key = OperatorKey::load(&arguments.key)?;
    block_on(async {
        let app_id = arguments.app_id;
        let before = row(&nodes, &app_id).await?;
        // The log decides; a number beyond a byte is none.
        let spent = || Failure::wrong("255 attempts were made", "register the app under another id");
        let attempt = before.attempt.checked_add(1).ok_or_else(spent)?;
        let attempt = EnvAttempt { app_id, generation: Generation(0), attempt, operator: None };
        let attempt = key.retry(&nodes.folder.cluster_id, attempt);
        nodes.hand_in(PATH_ENV_ATTEMPT, attempt.encode(), RefusalCode::EnvAttemptOpen, TIMEOUT).await?;
        let begun = format!("app_id={app_id}\nattempt={}\n", attempt.attempt);
        match arguments.wait {
            None => Ok(format!("{begun}state=begun\n")),
            Some(wait) => {
                published(&nodes, &app_id, attempt.attempt, wait).await.map(|key| format!("{begun}state=published\npublic_key={key}\n"))
            }
        }
    })
}

/// The key, once the attempt gave it.
async fn published(nodes: &Nodes, app_id: &AppId, attempt: u8, wait: Duration) -> Result<String, Failure> {
    let until = tokio::time::Instant::now() + wait;
    loop {
        let row = row(nodes, app_id).await?;
        if let Some(key) = row.public_key {
            return Ok(key);
        }
        let hint = "see `dstack env show` for the node that it named, and that node's log";
        if row.attempt == attempt && !row.open {
            return Err(Failure::wrong(format!("attempt {attempt} ended without a key"), hint));
        }
        if tokio::time::Instant::now() >= until {
            return Err(Failure::unable(format!("no key after {} s; attempt {} is open", wait.as_secs(), row.attempt), hint));
        }
        tokio::time::sleep(PAUSE).await;
    }
}
