//! `dstack cluster status`: what each node says of itself, beside what its evidence proves. Owns: the table.
//! Never: takes a node's word for more than its word.

use clap::Args;
use dstack_protocol::rpc::PATH_STATUS;
use serde_json::{Map, Value};

use crate::failure::{Done, Failure};
use crate::nodes::{Answer, CallError, NodeArguments, Nodes, block_on};

pub(crate) const HELP: &str = "Exit code 1 if fewer than a majority of the nodes answered.

Example: dstack cluster status --genesis cluster --json";

#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    nodes: NodeArguments,
    /// One JSON array instead of text.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Done {
    let nodes = Nodes::new(&arguments.nodes)?;
    let rows = block_on(async {
        let mut rows = Vec::new();
        for address in &nodes.addresses {
            rows.push(row(&nodes, address, nodes.get(address, PATH_STATUS).await));
        }
        Ok(rows)
    })?;
    let answered = rows.iter().filter(|row| row.contains_key("status")).count();
    let text = if arguments.json {
        format!("{}\n", Value::Array(rows.into_iter().map(Value::Object).collect()))
    } else {
        format!("cluster {}\n{}", nodes.folder.cluster_id, rows.iter().map(lines).collect::<String>())
    };
    let majority = usize::from(nodes.folder.genesis.n) / 2 + 1;
    if answered >= majority.min(nodes.addresses.len()) {
        return Ok(text);
    }
    let what = format!("{answered} of {} nodes answered, {majority} are a majority", nodes.addresses.len());
    Err(Failure::wrong(what, "bring nodes back; their logs say why they do not serve").with_stdout(text))
}

fn row(nodes: &Nodes, address: &str, answer: Result<Answer, CallError>) -> Map<String, Value> {
    let mut row = Map::new();
    row.insert("address".to_owned(), address.into());
    let status = answer.and_then(|answer| {
        let status: Value = serde_json::from_slice(&answer.body)
            .map_err(|error| CallError::Answer { address: address.to_owned(), what: format!("status that is not JSON: {error}") })?;
        Ok((answer.identity, status))
    });
    match status {
        Ok((identity, status)) => {
            let seat = nodes.folder.genesis.seats.iter().find(|seat| seat.platform_identity == identity.platform_identity());
            row.insert("seat".to_owned(), seat.map(|seat| seat.seat.0).into());
            row.insert("platform".to_owned(), identity.platform().name().into());
            row.insert("tcb_status".to_owned(), identity.tcb_status().name().into());
            row.insert("software_root".to_owned(), identity.software_root().into());
            row.insert("status".to_owned(), status);
        }
        Err(error) => {
            row.insert("error".to_owned(), error.to_string().into());
        }
    }
    row
}

fn lines(row: &Map<String, Value>) -> String {
    let text = |name: &str| row.get(name).map(plain).unwrap_or_default();
    if row.contains_key("error") {
        return format!("{}: {}\n", text("address"), text("error"));
    }
    let software = if row.get("software_root") == Some(&Value::Bool(true)) { ", SOFTWARE ROOT: no hardware" } else { "" };
    let mut out = format!("{}: seat {}, {}{software}\n", text("address"), text("seat"), text("platform"));
    if let Some(status) = row.get("status") {
        members("", status, &mut out);
    }
    out
}

/// Members of an object, a line each; those of objects inside it under `outer.inner`.
fn members(prefix: &str, value: &Value, out: &mut String) {
    let Value::Object(object) = value else { return };
    for (name, value) in object {
        match value {
            // serde_json bounds how deep a node's answer can be.
            Value::Object(_) => members(&format!("{prefix}{name}."), value, out),
            _ => *out += &format!("  {prefix}{name} = {}\n", plain(value)),
        }
    }
}

/// A value as people read it: control characters of a node's texts are escaped.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.escape_debug().to_string(),
        other => other.to_string(),
    }
}
