//! `dstack policy revoke` and `unrevoke`. Owns: naming what is revoked.

use clap::Args;
use dstack_protocol::governance::{ActionKind, Object};
use dstack_protocol::limits::MEASUREMENT_BYTES_MAX;
use dstack_protocol::{AppId, Generation, Platform, Seat};

use super::entry::{self, Signing};
use crate::args;
use crate::failure::{Done, Failure};
use crate::nodes::{NodeArguments, Nodes};

pub(crate) const HELP: &str = "A revocation needs r signatures, waits for nothing, and voids what is pending on the object.
For objects other than apps and the delegation give --base-version if they were touched before.

Examples: dstack policy revoke --genesis cluster --app-id $APP --key alice.key
          dstack policy revoke --genesis cluster --measurement $COMPOSE_HASH --key alice.key";

#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    nodes: NodeArguments,
    #[command(flatten)]
    signing: Signing,
    #[command(flatten)]
    target: Target,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Target {
    /// An app.
    #[arg(long, value_parser = args::app_id)]
    app_id: Option<AppId>,
    /// A measurement of nodes, a compose hash or an image hash, hex.
    #[arg(long)]
    measurement: Option<String>,
    /// A platform.
    #[arg(long, value_parser = args::platform)]
    platform: Option<Platform>,
    /// A seat.
    #[arg(long)]
    seat: Option<u16>,
    /// A generation.
    #[arg(long)]
    generation: Option<u32>,
    /// The delegation: what was adopted under it is served no more.
    #[arg(long)]
    delegation: bool,
}

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Revoke,
    Undo,
}

pub(crate) fn run(arguments: &Arguments, way: Way) -> Done {
    let object = arguments.target.object()?;
    let nodes = Nodes::new(&arguments.nodes)?;
    let kind = match way {
        Way::Revoke => ActionKind::Revoke,
        Way::Undo => ActionKind::Unrevoke,
    };
    entry::propose(&nodes, &arguments.signing, kind, object, Vec::new())
}

impl Target {
    fn object(&self) -> Result<Object, Failure> {
        if let Some(app_id) = self.app_id {
            return Ok(Object::App(app_id));
        }
        if let Some(text) = &self.measurement {
            let bytes = args::hex_bytes(text).map_err(|why| Failure::usage(format!("--measurement: {why}"), "give its bytes in hex"))?;
            if bytes.len() > MEASUREMENT_BYTES_MAX {
                let what = format!("--measurement has {} bytes, at most {MEASUREMENT_BYTES_MAX}", bytes.len());
                return Err(Failure::usage(what, "give a compose hash (32), or a node's measurement"));
            }
            return Ok(Object::Measurement(bytes));
        }
        if let Some(platform) = self.platform {
            return Ok(Object::Platform(platform));
        }
        if let Some(seat) = self.seat {
            return Ok(Object::Seat(Seat(seat)));
        }
        if self.delegation {
            return Ok(Object::Delegation);
        }
        match self.generation {
            Some(generation) => Ok(Object::Generation(Generation(generation))),
            None => Err(Failure::usage(
                "nothing to revoke is named",
                "give --app-id, --measurement, --platform, --seat, --generation or --delegation",
            )),
        }
    }
}
