//! `dstack policy propose`. Owns: the flags of a policy.

use std::path::PathBuf;

use clap::Args;
use dstack_protocol::Wire as _;
use dstack_protocol::governance::{ActionKind, Object};

use super::draft::Draft;
use super::entry::{self, Signing};
use crate::failure::Done;
use crate::files;
use crate::nodes::{NodeArguments, Nodes};

pub(crate) const HELP: &str = r#"Prints the policy in words, then action=ID and state=applied, pending (approvals or timelock missing) or signed.

Example:
  dstack policy propose --genesis cluster --app-id $APP --name web --platform tdx --compose-hash $HASH \
    --any-os-image --class disk,env,k256,custom --path prefix:/ --key alice.key

The same as a file (--file policy.toml):
  app_id = "<20 bytes>"
  name = "web"
  platforms = ["tdx"]
  compose_hashes = ["<32 bytes>"]
  any_os_image = true               # or os_images = ["<32 bytes>"]
  classes = ["disk", "env", "k256", "custom"]
  paths = ["prefix:/"]              # of class custom
  # tcb = ["UpToDate"]  tcb_grace = "30d"  min_evaluation = 17  refuse_advisories = ["INTEL-SA-00828"]  accept_vlek = false
  # rate = 100  burst = 3000  session_s = 3600  allow_legacy = false
  # ask_authority = true            # beside all this each node asks its own webhook authority; compose_hashes may be empty then

Leave apps to the authority (`auth-simple`, `auth-eth`) instead of registering each: one policy for every app that is not registered.
  dstack policy propose --genesis cluster --delegation --ask-authority --name by-authority --platform tdx \
    --any-os-image --class disk,env,k256,p256 --allow-legacy --key alice.key
In a file: delegation = true in place of app_id. Undone at once by `dstack policy revoke --delegation`."#;

#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    nodes: NodeArguments,
    #[command(flatten)]
    signing: Signing,
    /// The whole policy as TOML.
    #[arg(long, conflicts_with_all = ["app_id", "delegation", "ask_authority", "name", "platforms", "compose_hashes", "any_os_image", "os_images", "tcb", "tcb_grace", "min_evaluation", "refuse_advisories", "accept_vlek", "classes", "paths", "rate", "burst", "session_s", "allow_legacy"])]
    file: Option<PathBuf>,
    /// App id, hex.
    #[arg(long, required_unless_present_any = ["file", "delegation"])]
    app_id: Option<String>,
    /// Instead of an app: the policy of every app that is not registered and that the authority allows.
    #[arg(long, conflicts_with = "app_id", requires = "ask_authority")]
    delegation: bool,
    /// Beside the policy's own rules each node asks its webhook authority.
    #[arg(long)]
    ask_authority: bool,
    /// Name for people.
    #[arg(long, required_unless_present = "file")]
    name: Option<String>,
    /// Platforms that may run the app.
    #[arg(long = "platform", value_delimiter = ',', required_unless_present = "file")]
    platforms: Vec<String>,
    /// Compose hashes that may run; on Nitro the image hash. With --ask-authority without it any that the authority allows.
    #[arg(long = "compose-hash", num_args = 1.., value_delimiter = ',', required_unless_present_any = ["file", "ask_authority"])]
    compose_hashes: Vec<String>,
    /// Any OS image may run it.
    #[arg(long, conflicts_with = "os_images")]
    any_os_image: bool,
    /// OS images that may run it: SHA-256 of the boot registers.
    #[arg(long = "os-image", num_args = 1.., value_delimiter = ',')]
    os_images: Vec<String>,
    /// TCB statuses allowed; without it UpToDate only.
    #[arg(long, value_delimiter = ',')]
    tcb: Vec<String>,
    /// How long a platform may be out of date after a TCB recovery, like 30d; without it not at all.
    #[arg(long)]
    tcb_grace: Option<String>,
    /// Least TCB evaluation number of the collateral.
    #[arg(long, default_value_t = 0)]
    min_evaluation: u32,
    /// Advisories that may not apply to the platform, like INTEL-SA-00828.
    #[arg(long = "refuse-advisory", num_args = 1.., value_delimiter = ',')]
    refuse_advisories: Vec<String>,
    /// Accept SEV-SNP reports signed by a VLEK.
    #[arg(long)]
    accept_vlek: bool,
    /// Key classes: disk, env, k256, custom, p256.
    #[arg(long = "class", value_delimiter = ',', required_unless_present = "file")]
    classes: Vec<String>,
    /// Paths of class custom: exact:PATH or prefix:PATH; repeat it.
    #[arg(long = "path")]
    paths: Vec<String>,
    /// Releases a second.
    #[arg(long)]
    rate: Option<u32>,
    /// Releases at once; without it 30 s of the rate.
    #[arg(long)]
    burst: Option<u32>,
    /// Longest session, seconds, at most 3600.
    #[arg(long)]
    session_s: Option<u64>,
    /// Allow mode L.
    #[arg(long)]
    allow_legacy: bool,
}

/// Largest policy file read.
const FILE_BYTES_MAX: usize = 256 * 1024;

pub(crate) fn run(arguments: &Arguments) -> Done {
    let draft = match &arguments.file {
        Some(path) => Draft::parse(&files::read_text(path, FILE_BYTES_MAX)?)?,
        None => arguments.draft(),
    };
    let (object, policy) = draft.policy()?;
    let kind = if object == Object::Delegation { ActionKind::SetDelegation } else { ActionKind::SetAppPolicy };
    let nodes = Nodes::new(&arguments.nodes)?;
    entry::propose(&nodes, &arguments.signing, kind, object, policy.encode())
}

impl Arguments {
    fn draft(&self) -> Draft {
        Draft {
            app_id: self.app_id.clone().unwrap_or_default(),
            delegation: self.delegation,
            ask_authority: self.ask_authority,
            name: self.name.clone().unwrap_or_default(),
            platforms: self.platforms.clone(),
            compose_hashes: self.compose_hashes.clone(),
            any_os_image: self.any_os_image,
            os_images: self.os_images.clone(),
            tcb: self.tcb.clone(),
            tcb_grace: self.tcb_grace.clone(),
            min_evaluation: self.min_evaluation,
            refuse_advisories: self.refuse_advisories.clone(),
            accept_vlek: self.accept_vlek,
            classes: self.classes.clone(),
            paths: self.paths.clone(),
            rate: self.rate,
            burst: self.burst,
            session_s: self.session_s,
            allow_legacy: self.allow_legacy,
        }
    }
}
