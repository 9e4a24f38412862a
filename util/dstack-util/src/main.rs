//! `dstack-util`: the helper inside a confidential VM or an enclave. Owns: dispatch, exit status, what goes to standard output.

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Parser as _;
use dstack_client::{NodeUrl, Trust};
use dstack_runtime::clock::{Clock as _, SystemClock};
use dstack_runtime::hardening::{Hardening, harden};
use dstack_runtime::telemetry::{LogFormat, init_logging};
use dstack_util::cli::{Arguments, Command, GatewayRefresh, GetKeys, HostShared, Setup, Tee};
use dstack_util::commands::{attestation, bytes, certificates, events, orphans};
use dstack_util::config::{Config, load, settings};
use dstack_util::forward::{Listen, Target};
use dstack_util::gateway::{self, Refresh, Refreshed};
use dstack_util::host_api::{DEFAULT_URL, HostUrl};
use dstack_util::machine::{Machine, events_below};
use dstack_util::setup::host_shared::{self, SYS_CONFIG, SysConfig};
use dstack_util::{files, get_keys, setup, show};
use tokio::signal::unix::{SignalKind, signal};

/// Overwrites what is freed: buffers of answers and documents that held keys.
#[global_allocator]
static ALLOCATOR: dstack_secret::Wiping = dstack_secret::Wiping::system();

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(get_keys::status(&error))
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Quote(tee) => events::quote(&open(&tee)?),
        Command::Eventlog(tee) => events::eventlog(&open(&tee)?),
        Command::Extend { tee, event, payload } => events::extend(&open(&tee)?, &event, &payload),
        Command::ReplayImr(tee) => events::replay_imr(&open(&tee)?),
        Command::Show { device, events } => {
            let line = show::run(&open(&Tee { tee: device, events })?)?;
            Ok(writeln!(std::io::stdout(), "{line}")?)
        }
        Command::Hex { filename } => bytes::hex(filename.as_deref()),
        Command::Rand { bytes: count, output, hex } => bytes::rand(count, output.as_deref(), hex),
        Command::GenRaCert { tee, ca_cert, ca_key, cert_path, key_path } => {
            certificates::gen_ra_cert(&open(&tee)?, &ca_cert, &ca_key, &cert_path, &key_path)
        }
        Command::GenCaCert { tee, cert, key, ca_level } => certificates::gen_ca_cert(&open(&tee)?, &cert, &key, ca_level),
        Command::GenAppKeys { tee, ca_level, output } => certificates::gen_app_keys(&open(&tee)?, ca_level, &output),
        Command::Setup(arguments) => set_up(*arguments),
        Command::HostShared { command: HostShared::Mount { mount_point } } => Ok(host_shared::mount(&mount_point)?),
        Command::HostShared { command: HostShared::Unmount { mount_point } } => Ok(host_shared::unmount(&mount_point)?),
        Command::GatewayRefresh(arguments) => gateway_refresh(&arguments),
        Command::NotifyHost { url, event, payload, sys_config } => notify_host(url, &event, &payload, &sys_config),
        Command::RemoveOrphans { compose, dry_run, no_dockerd: false, .. } => orphans::remove(&compose, dry_run),
        Command::RemoveOrphans { compose, dry_run, no_dockerd: true, docker_root } => {
            orphans::remove_below(&docker_root, &compose, dry_run)
        }
        Command::VtpmAttest { root_ca, nonce, format, tpm } => tpm::vtpm_attest(&tpm, &root_ca, &nonce, &format),
        Command::TpmQuote { data, output, hash_algo, tpm } => tpm::quote(&tpm, data.as_deref(), &hash_algo, output.as_deref()),
        Command::TpmVerify { root_ca, quote } => tpm::verify(&root_ca, &quote),
        Command::QuoteReport { tee, report_data, sys_config, output, debug: _ } => {
            attestation::quote_report(&attestation::evidence(&open(&tee)?, report_data.as_deref(), None, &sys_config)?, output.as_deref())
        }
        Command::Attest { tee, report_data, app_id, sys_config, output, hex } => {
            let evidence = attestation::evidence(&open(&tee)?, report_data.as_deref(), app_id.as_deref(), &sys_config)?;
            attestation::attest(&evidence, output, hex)
        }
        Command::AttestInfo { input } => attestation::info(input),
        Command::AttestJson { input, output } => attestation::to_json(input, output.as_deref()),
        Command::AttestStrip { input, output } => attestation::strip(input, output),
        Command::GetKeys(arguments) => get_keys(&arguments),
        Command::Forward { listen, allow, log } => forward(&listen, allow, &log),
    }
}

fn open(tee: &Tee) -> anyhow::Result<Machine> {
    Ok(Machine::open(tee.tee.as_deref(), tee.events.as_deref())?)
}

#[cfg(feature = "tpm")]
mod tpm {
    use super::{Path, SystemClock};
    use dstack_runtime::clock::Clock as _;
    use dstack_tee::tpm::Tpm;
    use dstack_util::commands::tpm;

    pub(super) fn quote(tcti: &str, data: Option<&str>, hash: &str, output: Option<&Path>) -> anyhow::Result<()> {
        tpm::tpm_quote(&Tpm::open(tcti)?, data, hash, output)
    }

    pub(super) fn verify(root_ca: &Path, quote: &Path) -> anyhow::Result<()> {
        tpm::tpm_verify(root_ca, quote, SystemClock::new().now())
    }

    pub(super) fn vtpm_attest(tcti: &str, root_ca: &Path, nonce: &str, format: &str) -> anyhow::Result<()> {
        tpm::vtpm_attest(&Tpm::open(tcti)?, root_ca, nonce, format, SystemClock::new().now())
    }
}

/// This build has no TPM.
#[cfg(not(feature = "tpm"))]
mod tpm {
    use super::Path;

    const MISSING: &str = "this build has no TPM (feature `tpm`)";

    pub(super) fn quote(_: &str, _: Option<&str>, _: &str, _: Option<&Path>) -> anyhow::Result<()> {
        anyhow::bail!(MISSING)
    }

    pub(super) fn verify(_: &Path, _: &Path) -> anyhow::Result<()> {
        anyhow::bail!(MISSING)
    }

    pub(super) fn vtpm_attest(_: &str, _: &Path, _: &str, _: &str) -> anyhow::Result<()> {
        anyhow::bail!(MISSING)
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.context("cannot start the runtime")
}

fn set_up(arguments: Setup) -> anyhow::Result<()> {
    init_logging(LogFormat::Pretty, &arguments.log)?;
    let is_emulated = arguments.tee.as_deref().is_some_and(|tee| tee.starts_with("software:"));
    harden(Hardening { lock_memory: false, inspectable: is_emulated });
    std::fs::create_dir_all(&arguments.work_dir).with_context(|| format!("cannot make {}", arguments.work_dir.display()))?;
    let options = setup::Options {
        work_dir: arguments.work_dir,
        host_shared: arguments.host_shared,
        tee: arguments.tee,
        data_disk: arguments.device,
        mount_point: arguments.mount_point,
        local_provider: arguments.local_key_provider,
        provider_collateral: arguments.provider_collateral,
        accept_unverified_provider: arguments.insecure_unverified_provider,
        tpm: arguments.tpm,
        trust: Trust {
            software_roots: arguments.software_roots,
            collateral: arguments.collateral,
            node_measurements: arguments.node_measurements,
            ..Trust::default()
        },
        route: arguments.proxy.parse().context("--proxy")?,
        settings: settings(arguments.patience_s, !arguments.no_discovery),
        os_release: arguments.os_release,
        kernel_command_line: arguments.kernel_command_line,
        engine_config: arguments.engine_config,
        dstack_urls: nodes_of(&arguments.dstack_urls)?,
        wireguard_config: arguments.wireguard_config,
        wireguard_key: arguments.wireguard_key,
    };
    let clock = SystemClock::new();
    let now: dstack_ratls::Now = Arc::new(move || clock.now());
    let done = setup::run(&options, &now, &runtime()?)?;
    println!("app_id={}", hex::encode(done.identity.app_id));
    println!("instance_id={}", hex::encode(&done.identity.instance_id));
    println!("key_provider={}", done.provider.name());
    if done.gateway != Refreshed::Disabled {
        println!("gateway={}", options.wireguard_config.display());
    }
    Ok(())
}

fn nodes_of(urls: &[String]) -> anyhow::Result<Vec<NodeUrl>> {
    urls.iter().map(|url| url.parse()).collect::<Result<_, _>>().context("--dstack-url")
}

fn gateway_refresh(arguments: &GatewayRefresh) -> anyhow::Result<()> {
    init_logging(LogFormat::Pretty, &arguments.log)?;
    // The software device measures its caller by looking at the process.
    harden(Hardening { lock_memory: false, inspectable: arguments.tee.as_deref().is_some_and(|device| device.starts_with("software:")) });
    let (tee, events) = (arguments.tee.clone(), events_below(&arguments.work_dir));
    // opened where it is needed: a guest without a gateway needs none
    let evidence_of: dstack_client::EvidenceOf = Arc::new(move |report_data| {
        let machine = Machine::open(tee.as_deref(), Some(&events)).map_err(|error| error.to_string())?;
        machine.device().evidence(report_data).map_err(|error| error.to_string())
    });
    let dstack_urls = nodes_of(&arguments.dstack_urls)?;
    let clock = SystemClock::new();
    let now: dstack_ratls::Now = Arc::new(move || clock.now());
    let refresh = Refresh {
        work_dir: &arguments.work_dir,
        config: &arguments.wireguard_config,
        key: &arguments.wireguard_key,
        force: arguments.force,
        dstack_urls: &dstack_urls,
        route: &arguments.proxy.parse().context("--proxy")?,
        now: &now,
        evidence_of: &evidence_of,
    };
    match runtime()?.block_on(gateway::refresh(&refresh))? {
        Refreshed::Disabled => println!("disabled"),
        Refreshed::Same => println!("same"),
        Refreshed::Written(file) => println!("written {}", file.display()),
    }
    Ok(())
}

fn notify_host(url: Option<String>, event: &str, payload: &str, sys_config: &Path) -> anyhow::Result<()> {
    let of_host = || -> anyhow::Result<Option<String>> {
        let Some(bytes) = files::read_if_there(sys_config, SYS_CONFIG.limit_bytes)? else { return Ok(None) };
        Ok(Some(SysConfig::parse(&bytes)?.host_api_url).filter(|url| !url.is_empty()))
    };
    let url = match url {
        Some(url) => url,
        None => of_host()?.unwrap_or_else(|| DEFAULT_URL.to_owned()),
    };
    let host: HostUrl = url.parse()?;
    Ok(runtime()?.block_on(host.notify(event, payload))?)
}

fn forward(listen: &Listen, allow: Vec<Target>, log: &str) -> anyhow::Result<()> {
    init_logging(LogFormat::Pretty, log)?;
    let runtime = runtime()?;
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
    harden(Hardening { lock_memory: false, inspectable: config.device.as_deref().is_some_and(|device| device.starts_with("software:")) });
    let runtime = runtime()?;
    let clock = SystemClock::new();
    let keys = runtime.block_on(get_keys::run(&config, Arc::new(move || clock.now())))?;
    let document = keys.document();
    match &config.output {
        Some(file) => document.expose(|bytes| files::write(file, bytes, 0o600)).with_context(|| format!("cannot write {}", file.display())),
        None => document.expose(|bytes| std::io::stdout().lock().write_all(bytes)).context("standard output"),
    }
}
