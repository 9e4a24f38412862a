//! `dstack policy allow-node`. Owns: naming the measurement. Never: judges whether that code is any good; operators do.

use clap::Args;
use dstack_protocol::Platform;
use dstack_protocol::governance::{ActionKind, Object};
use dstack_protocol::limits::MEASUREMENT_BYTES_MAX;

use super::entry::{self, Signing};
use crate::args;
use crate::failure::{Done, Failure};
use crate::nodes::{NodeArguments, Nodes};

pub(crate) const HELP: &str =
    "Needs k approvals and waits for the timelock. A node that is refused tells the measurement: call Onboard on it, or
`dstack evidence show` with its evidence. Give --base-version if the measurement was allowed or revoked before.

Example: dstack policy allow-node --genesis cluster --platform tdx --measurement $MEASUREMENT --key alice.key";

#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    nodes: NodeArguments,
    #[command(flatten)]
    signing: Signing,
    /// Platform of these nodes.
    #[arg(long, value_parser = args::platform)]
    platform: Platform,
    /// Their measurement, hex.
    #[arg(long)]
    measurement: String,
}

pub(crate) fn run(arguments: &Arguments) -> Done {
    let bytes =
        args::hex_bytes(&arguments.measurement).map_err(|why| Failure::usage(format!("--measurement: {why}"), "give its bytes in hex"))?;
    if bytes.is_empty() || bytes.len() > MEASUREMENT_BYTES_MAX {
        let what = format!("--measurement has {} bytes, expected 1 to {MEASUREMENT_BYTES_MAX}", bytes.len());
        return Err(Failure::usage(what, "give the measurement as the refused node tells it"));
    }
    let nodes = Nodes::new(&arguments.nodes)?;
    let (object, body) = (Object::Measurement(bytes), vec![arguments.platform.byte()]);
    entry::propose(&nodes, &arguments.signing, ActionKind::AllowNodeMeasurement, object, body)
}
