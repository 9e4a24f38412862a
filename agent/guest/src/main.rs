//! `dstack-agent`: the guest agent behind the dstack socket. Owns: arguments, start and end of the process.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use dstack_guest::config::{Config, load};
use dstack_guest::{admin, boot, http, metrics};
use dstack_ratls::limits::HttpLimits;
use dstack_ratls::plain::{PlainLimits, PlainServer, UnixServer};
use dstack_runtime::clock::{Clock as _, SystemClock};
use dstack_runtime::hardening::{Hardening, harden};
use dstack_runtime::shutdown::Shutdown;
use dstack_runtime::telemetry::{Catalogue, Metrics, init_logging};

#[derive(Parser)]
#[command(
    name = "dstack-agent",
    version,
    about = "Fetches an app's keys from a dstack KMS cluster and serves dstack's guest API on a unix socket",
    after_help = "Every key of the file can be set by the environment: DSTACK_AGENT__SECTION__KEY.\nReference: docs/agent.md"
)]
struct Arguments {
    /// Configuration file (TOML).
    #[arg(short, long, default_value = "/etc/dstack/agent.toml")]
    config: PathBuf,
    /// Check the configuration, print what is in force, and end.
    #[arg(long)]
    check_config: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let loaded = load(arguments.config)?;
    let effective = loaded.effective();
    let config = Config::try_from(loaded.raw)?;
    if arguments.check_config {
        config.trust.judge().context("section [trust]")?;
        print!("{effective}");
        return Ok(());
    }
    init_logging(config.log_format, &config.log_filter)?;
    // The software device measures its caller by looking at the process.
    harden(Hardening { lock_memory: config.lock_memory, inspectable: config.device.starts_with("software:") });
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?;
    let outcome = runtime.block_on(run(config));
    runtime.shutdown_timeout(Duration::from_secs(2));
    if let Err(error) = &outcome {
        tracing::error!(reason = format!("{error:#}"), "agent ends");
    }
    outcome
}

async fn run(config: Config) -> anyhow::Result<()> {
    let shutdown = Shutdown::on_signals().context("signal handlers")?;
    let catalogue = Catalogue::new()
        .with("ratls", dstack_ratls::metrics::METRICS)?
        .with("client", dstack_client::metrics::METRICS)?
        .with("guest", metrics::METRICS)?;
    let recorder = Metrics::install(&catalogue)?;
    let clock = SystemClock::new();
    let guest = tokio::select! {
        guest = boot::start(&config, Arc::new(move || clock.now())) => Arc::new(guest?),
        () = shutdown.requested() => return Ok(()),
    };
    if guest.is_software {
        tracing::warn!("software TEE or software root in use: no hardware protects these keys");
    }
    let client = HttpLimits { body_bytes_max: http::BODY_READ_BYTES_MAX, ..HttpLimits::client() };
    let limits = PlainLimits { connections_max: config.connections_max, http: client, ..PlainLimits::default() };
    let server = UnixServer::bind(&config.socket, config.socket_mode, limits)?;
    let admin = match config.admin_listen {
        Some(address) => {
            let server = PlainServer::bind(address, PlainLimits::default()).await?;
            tracing::info!(address = %server.local_address()?, "admin listener");
            Some(tokio::spawn(server.run(admin::router(&guest, recorder), shutdown.token())))
        }
        None => None,
    };
    tracing::info!(socket = %config.socket.display(), app_id = %guest.identity.app_id, "ready");
    server.run(http::router(guest), shutdown.token()).await;
    if let Some(admin) = admin {
        let _ = admin.await;
    }
    tracing::info!("ended in order");
    Ok(())
}
