//! `dstack-util`: the minimal in-enclave helper. Owns: arguments, exit status, what goes to standard output.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use dstack_runtime::clock::{Clock as _, SystemClock};
use dstack_runtime::hardening::{Hardening, harden};
use dstack_runtime::telemetry::{LogFormat, init_logging};
use dstack_util::config::{Config, load};
use dstack_util::forward::{Listen, Target};
use dstack_util::{app_keys, get_keys, show};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Parser)]
#[command(name = "dstack-util", version, about = "The minimal helper inside an enclave or a confidential VM")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Fetch this machine's keys from a dstack KMS cluster and write them as dstack's AppKeys JSON
    #[command(
        after_help = "Exit status: 0 keys written; 1 settings, files or device; 2 usage; 3 refused by the cluster; 4 no node served \
                            the request, try later; 5 a key differs from the one used before.\n\
                            Each setting can also stand in the file of --config, or in the environment as DSTACK_UTIL__NAME.\n\
                            Empty in the output until the cluster has its CA and identity: k256_signature, gateway_app_id, ca_cert, and \
                            in key_provider all but url. Reference: docs/agent.md\n\n\
                            Example: dstack-util get-keys -k https://kms-1:12001 -k https://kms-2:12001 --device software:/run/tee.sock \
                            --compose app-compose.json -o .appkeys.json"
    )]
    GetKeys(Box<GetKeys>),
    /// Show what this machine is: its device, its measurement, what a policy has to list
    #[command(after_help = "Prints one line of JSON. Nothing of it is proven: verify evidence before you list it in a policy.\n\n\
                            Example: dstack-util show --device nsm")]
    Show {
        /// Device that makes the evidence: nsm, nsm:/dev/nsm or software:/path/to/socket
        #[arg(long)]
        device: String,
    },
    /// On the parent of an enclave: carry its connections to the nodes, and nowhere else
    #[command(after_help = "A CONNECT proxy. Inside the enclave: get-keys --proxy vsock:3:3128. Ends at SIGINT and SIGTERM.\n\n\
                            Example: dstack-util forward --listen vsock:3128 --allow kms-1:12001 --allow kms-2:12001")]
    Forward {
        /// Where: vsock:PORT, unix:/path/to/socket or tcp:ADDRESS:PORT
        #[arg(long)]
        listen: Listen,
        /// A node, host:port or https://host:port, that may be connected to
        #[arg(long, required = true, value_delimiter = ',')]
        allow: Vec<Target>,
        /// Log filter on standard error
        #[arg(long, default_value = "info")]
        log: String,
    },
}

#[derive(Args)]
struct GetKeys {
    /// A node, https://host:port; several are tried in order
    #[arg(short, long = "kms-url", value_delimiter = ',')]
    kms_url: Vec<String>,
    /// The app, 40 hex digits; else the one of the compose file
    #[arg(long)]
    app_id: Option<String>,
    /// Device that makes the evidence: nsm in an enclave, or software:/path/to/socket
    #[arg(long)]
    device: Option<String>,
    /// The measured app-compose.json, whose member dstack_kms pins the cluster
    #[arg(long)]
    compose: Option<PathBuf>,
    /// File to write, mode 0600; else standard output
    #[arg(short, long)]
    output: Option<PathBuf>,
    /// File of check values [default: the output's name and .kcv.json]
    #[arg(long)]
    kcv_file: Option<PathBuf>,
    /// Keys to fetch [default: disk,env,k256]
    #[arg(long = "key-class", value_delimiter = ',')]
    key_classes: Vec<String>,
    /// Way to the nodes: direct, vsock:3:3128 out of an enclave, or http://host:port [default: direct]
    #[arg(long)]
    proxy: Option<String>,
    /// DER file of a software root to trust in nodes; never in production
    #[arg(long = "software-root")]
    software_roots: Vec<PathBuf>,
    /// Collateral bundle that TDX nodes are judged with
    #[arg(long)]
    collateral: Option<PathBuf>,
    /// Measurement that a node may have, hex; without any, the pin alone decides
    #[arg(long = "node-measurement")]
    node_measurements: Vec<String>,
    /// For how long to try again what may succeed later, seconds [default: 60]
    #[arg(long)]
    patience_s: Option<u64>,
    /// TOML file with the same settings
    #[arg(long)]
    config: Option<PathBuf>,
    /// Check the settings, print what is in force, and end
    #[arg(long)]
    check_config: bool,
    /// Log filter on standard error
    #[arg(long, default_value = "warn")]
    log: String,
}

impl GetKeys {
    /// Flags as dotted keys with TOML values.
    fn flags(&self) -> Vec<(&'static str, String)> {
        let text = |text: &str| toml::Value::String(text.to_owned()).to_string();
        let path = |path: &PathBuf| text(&path.to_string_lossy());
        let list = |items: Vec<String>| format!("[{}]", items.join(", "));
        let mut flags = Vec::new();
        if !self.kms_url.is_empty() {
            flags.push(("kms_urls", list(self.kms_url.iter().map(|url| text(url)).collect())));
        }
        flags.extend(self.app_id.as_ref().map(|id| ("app_id", text(id))));
        flags.extend(self.device.as_ref().map(|device| ("device", text(device))));
        flags.extend(self.compose.as_ref().map(|file| ("compose", path(file))));
        flags.extend(self.output.as_ref().map(|file| ("output", path(file))));
        flags.extend(self.kcv_file.as_ref().map(|file| ("kcv_file", path(file))));
        if !self.key_classes.is_empty() {
            flags.push(("key_classes", list(self.key_classes.iter().map(|name| text(name)).collect())));
        }
        if !self.software_roots.is_empty() {
            flags.push(("trust.software_roots", list(self.software_roots.iter().map(path).collect())));
        }
        flags.extend(self.collateral.as_ref().map(|file| ("trust.collateral", path(file))));
        if !self.node_measurements.is_empty() {
            flags.push(("trust.node_measurements", list(self.node_measurements.iter().map(|hex| text(hex)).collect())));
        }
        flags.extend(self.proxy.as_ref().map(|proxy| ("proxy", text(proxy))));
        flags.extend(self.patience_s.map(|seconds| ("patience_s", seconds.to_string())));
        flags
    }
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::GetKeys(arguments) => get_keys(&arguments),
        Command::Show { device } => show::run(&device).and_then(|line| Ok(writeln!(std::io::stdout(), "{line}")?)),
        Command::Forward { listen, allow, log } => forward(&listen, allow, &log),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(get_keys::status(&error))
        }
    }
}

fn forward(listen: &Listen, allow: Vec<Target>, log: &str) -> anyhow::Result<()> {
    init_logging(LogFormat::Pretty, log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(async {
        let listener = listen.bind().await.with_context(|| format!("cannot listen at {listen}"))?;
        let place = listener.tcp_address().map_or_else(|| listen.to_string(), |address| format!("tcp:{address}"));
        println!("listening at {place}");
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        tokio::select! {
            outcome = dstack_util::forward::serve(listener, allow) => outcome.context("the listener failed"),
            _ = terminate.recv() => Ok(()),
            _ = tokio::signal::ctrl_c() => Ok(()),
        }
    })
}

fn get_keys(arguments: &GetKeys) -> anyhow::Result<()> {
    let loaded = load(arguments.config.clone(), &arguments.flags())?;
    let effective = loaded.effective();
    let config = Config::try_from(loaded.raw)?;
    if arguments.check_config {
        config.trust.judge().context("trust settings")?;
        print!("{effective}");
        return Ok(());
    }
    init_logging(LogFormat::Pretty, &arguments.log)?;
    // The software device measures its caller by looking at the process.
    harden(Hardening { lock_memory: false, inspectable: config.device.starts_with("software:") });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().context("cannot start the runtime")?;
    let clock = SystemClock::new();
    let released = runtime.block_on(get_keys::run(&config, Arc::new(move || clock.now())))?;
    let url = config.kms_urls.first().map(ToString::to_string).unwrap_or_default();
    let document = app_keys::document(&released.keys, &url);
    match &config.output {
        Some(file) => app_keys::write(file, &document).with_context(|| format!("cannot write {}", file.display())),
        None => document.expose(|bytes| std::io::stdout().lock().write_all(bytes)).context("standard output"),
    }
}
