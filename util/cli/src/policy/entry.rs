//! Governance entries: from an action and a key to bytes, to a file, to the cluster. Owns: the file form (the entry's own
//! encoding) and the word for what became of it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use dstack_protocol::governance::{Action, ActionKind, Entry, Object};
use dstack_protocol::{UnixMillis, Wire};
use dstack_runtime::clock::{Clock as _, SystemClock};

use super::{DELEGATION, TIMEOUT, progress, words};
use crate::args;
use crate::failure::{Done, Failure};
use crate::files;
use crate::nodes::{Nodes, PAUSE, block_on};
use crate::operator::OperatorKey;

/// What every new action needs.
#[derive(Args)]
pub(crate) struct Signing {
    /// Operator's key file.
    #[arg(long)]
    pub(crate) key: PathBuf,
    /// Version that the action builds on; without it the current version of app or delegation is asked for (0 for other objects).
    #[arg(long)]
    pub(crate) base_version: Option<u64>,
    /// The action is void after this long; at most 90 days.
    #[arg(long, default_value = "7d", value_parser = args::duration)]
    pub(crate) valid_for: Duration,
    /// Sign and write the entry to this file; send it later with `policy submit`. With --base-version no node is needed.
    #[arg(long)]
    pub(crate) sign_only: Option<PathBuf>,
}

/// Makes an action with a random id, shows it, signs it, and sends it or writes it.
pub(crate) fn propose(nodes: &Nodes, signing: &Signing, kind: ActionKind, object: Object, body: Vec<u8>) -> Done {
    let key = OperatorKey::load(&signing.key)?;
    let base_version = match (signing.base_version, &object) {
        (Some(version), _) => version,
        (None, object) => match told(object) {
            Some(name) => block_on(async { progress(nodes, &name).await.map_err(|error| error.failure()) })?.version,
            None => 0,
        },
    };
    let mut action_id = [0; 16];
    getrandom::fill(&mut action_id)
        .map_err(|error| Failure::unable(format!("no randomness: {error}"), "see the operating system's log"))?;
    let valid_ms = u64::try_from(signing.valid_for.as_millis()).unwrap_or(u64::MAX);
    let not_after = SystemClock::new().now().plus_ms(valid_ms);
    let action = Action { cluster_id: nodes.folder.cluster_id, action_id, kind, object, base_version, body, not_after };
    // What a node would not decode is not signed.
    let action = Action::decode(&action.encode()).map_err(|error| Failure::usage(error.to_string(), "mend the arguments"))?;
    let shown = words::describe(&action);
    let approvals = vec![key.approve(&action)];
    finish(nodes, &Entry::Propose { action, approvals }, signing.sign_only.as_deref(), &shown)
}

/// Writes or sends a signed entry.
pub(crate) fn finish(nodes: &Nodes, entry: &Entry, sign_only: Option<&Path>, shown: &str) -> Done {
    let id = hex::encode(action_id(entry));
    match sign_only {
        Some(path) => {
            files::write_new(path, &entry.encode())?;
            Ok(format!("{shown}action={id}\nstate=signed\n"))
        }
        None => {
            let state = block_on(send(nodes, entry))?;
            Ok(format!("{shown}action={id}\nstate={state}\n"))
        }
    }
}

/// The action that an entry is about.
pub(crate) fn action_id(entry: &Entry) -> [u8; 16] {
    match entry {
        Entry::Propose { action, .. } => action.action_id,
        Entry::Approve { action_id, .. } | Entry::Activate { action_id, .. } => *action_id,
    }
}

/// Reads an entry file.
pub(crate) fn load(path: &Path) -> Result<Entry, Failure> {
    let bytes = files::read(path, Entry::BYTES_MAX)?;
    Entry::decode(&bytes).map_err(|error| Failure::wrong(format!("{}: {error}", path.display()), "give a file that --sign-only wrote"))
}

/// Sends an entry and says how far its action is: `applied`, `pending`, or `recorded` where that cannot be told.
pub(crate) async fn send(nodes: &Nodes, entry: &Entry) -> Result<&'static str, Failure> {
    let before = match entry {
        Entry::Approve { action_id, .. } => super::approve::fetch(nodes, action_id).await.ok(),
        Entry::Propose { action, .. } => Some(action.clone()),
        Entry::Activate { .. } => None,
    };
    nodes.submit(entry, TIMEOUT).await?;
    let Some((Action { action_id, base_version, .. }, name)) = before.and_then(|action| told(&action.object).map(|name| (action, name)))
    else {
        return Ok("recorded");
    };
    // An applied action raises the version of its object; one that waits stands in the list.
    for _ in 0..4 {
        match progress(nodes, &name).await {
            Ok(progress) if progress.version > base_version => return Ok("applied"),
            Ok(progress) if progress.pending.contains(&hex::encode(action_id)) => return Ok("pending"),
            _ => tokio::time::sleep(PAUSE).await,
        }
    }
    Ok("recorded")
}

/// By what name a node tells the version of an object, if it does.
fn told(object: &Object) -> Option<String> {
    match object {
        Object::App(app_id) => Some(app_id.to_string()),
        Object::Delegation => Some(DELEGATION.to_owned()),
        _ => None,
    }
}

/// Whether an action's time is over by this machine's clock.
pub(crate) fn is_over(action: &Action, now: UnixMillis) -> bool {
    action.not_after < now
}
