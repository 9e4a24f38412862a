//! `dstack cluster status`: what each node says of itself, beside what its evidence proves. Owns: the table.
//! Never: takes a node's word for more than its word.

use std::collections::BTreeMap;

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
        format!("cluster {}\n{}{}", nodes.folder.cluster_id, rows.iter().map(lines).collect::<String>(), differing(&rows))
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

/// A warning where the nodes' rules on each other's TCB differ: they are configuration of each node, and with different ones some
/// take a node that others refuse.
fn differing(rows: &[Map<String, Value>]) -> String {
    let policies: BTreeMap<String, Vec<String>> = rows.iter().fold(BTreeMap::new(), |mut policies, row| {
        if let Some(policy) = row.get("status").and_then(|status| status.get("node_policy")) {
            policies.entry(plain(policy)).or_insert_with(Vec::new).push(row.get("address").map(plain).unwrap_or_default());
        }
        policies
    });
    if policies.len() < 2 {
        return String::new();
    }
    let groups: String = policies.iter().map(|(policy, nodes)| format!("  {policy}: {}\n", nodes.join(" "))).collect();
    format!("warning: nodes judge each other by different TCB rules; make `node_tcb_*` of their configurations equal\n{groups}")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_with_different_rules_are_named() {
        let row = |address: &str, policy: Option<&str>| {
            let mut row = Map::new();
            row.insert("address".to_owned(), address.into());
            match policy {
                Some(policy) => row.insert("status".to_owned(), serde_json::json!({ "node_policy": policy })),
                None => row.insert("error".to_owned(), "unreachable".into()),
            };
            row
        };
        let same = [row("a:1", Some("aa")), row("b:1", Some("aa")), row("c:1", None)];
        assert_eq!(differing(&same), "");
        let told = differing(&[row("a:1", Some("aa")), row("b:1", Some("bb")), row("c:1", Some("aa"))]);
        assert!(told.starts_with("warning: ") && told.contains("  aa: a:1 c:1\n") && told.contains("  bb: b:1\n"), "{told}");
    }
}
