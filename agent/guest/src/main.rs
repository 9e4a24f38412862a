//! `dstack-agent`: the guest agent behind the dstack socket. Owns: arguments, start and end of the process.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use dstack_guest::config::{Config, load};
use dstack_guest::listen::Listeners;
use dstack_guest::{admin, boot, identity_signature, metrics, systemd};
use dstack_ratls::plain::{PlainLimits, PlainServer};
use dstack_runtime::clock::{Clock as _, SystemClock};
use dstack_runtime::hardening::{Hardening, harden};
use dstack_runtime::shutdown::Shutdown;
use dstack_runtime::telemetry::{Catalogue, Metrics, init_logging};

/// Overwrites what is freed: the buffers of HTTP hold answers with keys, and requests with data to sign.
#[global_allocator]
static ALLOCATOR: dstack_secret::Wiping = dstack_secret::Wiping::system();

#[derive(Parser)]
#[command(
    name = "dstack-agent",
    version,
    about = "Gets an app's keys, from a dstack KMS cluster or as the boot left them, and serves dstack's guest APIs",
    after_help = "Every key of the file can be set by the environment: DSTACK_AGENT__SECTION__KEY.\nReference: docs/agent.md"
)]
struct Arguments {
    /// Configuration file: TOML, or the JSON file of dstack's own agent.
    #[arg(short, long, default_value = "/etc/dstack/agent.toml")]
    config: PathBuf,
    /// Check the configuration, print what is in force, and end.
    #[arg(long)]
    check_config: bool,
    /// Answer systemd's watchdog, as long as the external port answers.
    #[arg(long)]
    watchdog: bool,
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
    let outcome = runtime.block_on(run(config, arguments.watchdog));
    runtime.shutdown_timeout(Duration::from_secs(2));
    if let Err(error) = &outcome {
        tracing::error!(reason = format!("{error:#}"), "agent ends");
    }
    outcome
}

async fn run(config: Config, wants_watchdog: bool) -> anyhow::Result<()> {
    let sockets = systemd::Sockets::take().context("sockets of systemd")?;
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
    let listeners = Listeners::bind(&config, sockets).await?;
    let admin = match config.admin_listen {
        Some(address) => {
            let server = PlainServer::bind(address, PlainLimits::default()).await?;
            tracing::info!(address = %server.local_address()?, "admin listener");
            Some(tokio::spawn(server.run(admin::router(&guest, recorder), shutdown.token())))
        }
        None => None,
    };
    let watchdog = match (wants_watchdog, listeners.external_address().zip(listeners.external_fullness())) {
        (true, Some((address, fullness))) => Some(tokio::spawn(systemd::watchdog(address, fullness, shutdown.token()))),
        (true, None) => anyhow::bail!("--watchdog asks the external port: set api.external"),
        (false, _) => None,
    };
    tracing::info!(
        socket = %config.socket.display(),
        external = listeners.external_address().map(tracing::field::display),
        app_id = %guest.identity.app_id,
        "ready"
    );
    systemd::ready();
    let signature = tokio::spawn(identity_signature::fetch(Arc::clone(&guest), shutdown.token()));
    listeners.run(&guest, &shutdown.token()).await;
    systemd::stopping();
    let _ = signature.await;
    if let Some(watchdog) = watchdog {
        let _ = watchdog.await;
    }
    if let Some(admin) = admin {
        let _ = admin.await;
    }
    tracing::info!("ended in order");
    Ok(())
}
