//! `dstack-testkit`: makes software roots, serves software TEEs, says what they will measure. For tests and demos only.

mod demo;
mod guest;

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand, ValueEnum};
use dstack_runtime::clock::{Clock as _, SystemClock};
use dstack_runtime::shutdown::Shutdown;
use dstack_runtime::telemetry::{LogFormat, init_logging};
use dstack_tee::software::frame::{read_frame, write_frame};
use dstack_tee::software::protocol::{Request, Response};
use dstack_testkit::device::{Executables, MachineSpec, serve};
use dstack_testkit::tdx::{CollateralSpec, bundle_json};
use dstack_testkit::tsm::{SoftwareTd, mount};
use dstack_testkit::{Measured, SoftwareRoots, Validity, public_files};
use sha2::{Digest as _, Sha256};

#[derive(Parser)]
#[command(name = "dstack-testkit", version, about = "Software TEEs for tests and demos: not hardware, not for production")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make new software roots and their collateral, valid from a day ago until 365 days from now.
    Init {
        /// Directory for them; it must not hold roots yet.
        #[arg(long)]
        dir: PathBuf,
    },
    /// Serve emulated machines, one unix socket each, until SIGTERM or SIGINT.
    Tee {
        /// Directory that `init` made.
        #[arg(long)]
        dir: PathBuf,
        /// NAME=SOCKET[,platform=tdx|nitro][,quote=4|5|5.td15][,tcb=up-to-date|out-of-date|revoked][,platform-key=none]
        #[arg(long = "machine", required = true)]
        machines: Vec<MachineSpec>,
        /// Permissions of the sockets, octal.
        #[arg(long, default_value = "600", value_parser = octal)]
        mode: u32,
        /// End when the process that started this one ends (Linux: the thread that did, so start it from one that stays).
        #[arg(long)]
        with_parent: bool,
    },
    /// Mount the files by which a TD's kernel gives quotes and registers (configfs-tsm, RTMRs), until SIGTERM or SIGINT. Needs root.
    Tsm {
        /// Directory that `init` made.
        #[arg(long)]
        dir: PathBuf,
        /// Name of the machine.
        #[arg(long, default_value = "machine")]
        name: String,
        /// Executable that the TD is measured as.
        #[arg(long)]
        exe: PathBuf,
        /// Empty directory to mount at.
        #[arg(long)]
        mount: PathBuf,
    },
    /// Print what a software TEE measures for an executable (a node) or a compose document (an app).
    Measure {
        /// Emulated platform.
        #[arg(long)]
        platform: PlatformName,
        /// A node's executable.
        #[arg(long, required_unless_present = "compose", conflicts_with = "compose")]
        exe: Option<PathBuf>,
        /// An app's app-compose.json.
        #[arg(long)]
        compose: Option<PathBuf>,
    },
    /// Print what a served machine says of itself and of this program as its caller, as JSON.
    Describe {
        /// Its socket.
        #[arg(long)]
        socket: PathBuf,
    },
    /// Run the story of the README on this machine; the other programs are looked for beside this one.
    Demo {
        /// Folder with the example apps.
        #[arg(long)]
        examples: PathBuf,
        /// Leave the cluster up until interrupted.
        #[arg(long)]
        keep: bool,
    },
    /// Start three nodes, an app and its agent, run a command with their addresses in its environment, end them. Ends as the command does.
    Guest {
        /// Folder with the example apps.
        #[arg(long)]
        examples: PathBuf,
        /// The command.
        #[arg(required = true, trailing_var_arg = true)]
        command: Vec<String>,
    },
    /// Sign the TDX collateral anew and write it as a bundle, for tests of its refresh and expiry.
    Collateral {
        /// Directory that `init` made.
        #[arg(long)]
        dir: PathBuf,
        /// File to write.
        #[arg(long)]
        out: PathBuf,
        /// How long it holds from now, in seconds; it begins an hour ago.
        #[arg(long, default_value_t = 30 * 86_400)]
        valid_s: u64,
        /// Number of the TCB recovery.
        #[arg(long, default_value_t = 20)]
        evaluation: u32,
    },
    /// Serve a collateral bundle as Intel's service would, on loopback, until ended. Reads the file again for every change of it.
    Pccs {
        /// Bundle to serve.
        #[arg(long)]
        bundle: PathBuf,
        /// Port; 0 takes a free one.
        #[arg(long, default_value_t = 0)]
        port: u16,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum PlatformName {
    Tdx,
    Nitro,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            eprintln!("dstack-testkit: {cause:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Init { dir } => init(&dir),
        Command::Tee { dir, machines, mode, with_parent } => tee(&dir, &machines, mode, with_parent),
        Command::Tsm { dir, name, exe, mount } => tsm(&dir, &name, &exe, &mount),
        Command::Measure { platform, exe, compose } => measure(platform, exe, compose),
        Command::Describe { socket } => describe(&socket),
        Command::Demo { examples, keep } => demo::run(&examples, keep),
        Command::Guest { examples, command } => guest::run(&examples, &command),
        Command::Pccs { bundle, port } => pccs(&bundle, port),
        Command::Collateral { dir, out, valid_s, evaluation } => collateral(&dir, &out, valid_s, evaluation),
    }
}

fn pccs(path: &std::path::Path, port: u16) -> anyhow::Result<()> {
    let server = dstack_testkit::pccs::Pccs::start(port)?;
    writeln!(std::io::stdout().lock(), "url={}", server.url())?;
    let mut served = Vec::new();
    loop {
        let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
        if bytes != served {
            server.serve(&dstack_attest::CollateralBundle::parse(&bytes).with_context(|| path.display().to_string())?);
            served = bytes;
        }
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}

fn init(dir: &std::path::Path) -> anyhow::Result<()> {
    let roots = SoftwareRoots::generate(SystemClock::new().now())?;
    roots.save(dir)?;
    let [tdx_root, nitro_root, collateral, _] = public_files(dir);
    let summary = roots.summary();
    let mut out = std::io::stdout().lock();
    writeln!(out, "tdx_root={}", tdx_root.display())?;
    writeln!(out, "tdx_root_spki_sha256={}", summary.tdx_root_spki_sha256)?;
    writeln!(out, "nitro_root={}", nitro_root.display())?;
    writeln!(out, "nitro_root_spki_sha256={}", summary.nitro_root_spki_sha256)?;
    writeln!(out, "collateral={}", collateral.display())?;
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn tee(dir: &std::path::Path, machines: &[MachineSpec], mode: u32, with_parent: bool) -> anyhow::Result<()> {
    init_logging(LogFormat::Pretty, "info")?;
    let shutdown = Shutdown::on_signals().context("signal handlers")?;
    if with_parent {
        let term = Some(rustix::process::Signal::TERM);
        rustix::process::set_parent_process_death_signal(term).context("parent death signal")?;
    }
    let roots = SoftwareRoots::load(dir)?;
    let executables = Arc::new(Executables::default());
    let mut serving = Vec::new();
    for machine in machines {
        let socket = &machine.socket;
        let one = serve(machine.host(&roots)?, socket, mode, executables.clone(), Arc::new(SystemClock::new()))
            .with_context(|| format!("serving {} at {}", machine.name, socket.display()))?;
        serving.push(one);
    }
    {
        let mut out = std::io::stdout().lock();
        for (one, machine) in serving.iter().zip(machines) {
            let host = one.host();
            let identity = hex::encode(host.identity());
            writeln!(out, "machine={} socket={} identity={identity}", machine.name, machine.socket.display())?;
        }
        writeln!(out, "ready")?;
        out.flush()?;
    }
    tracing::warn!(machines = serving.len(), "serving software TEEs: their evidence proves nothing about hardware");
    shutdown.requested().await;
    serving.into_iter().for_each(dstack_testkit::device::Serving::stop);
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn tsm(dir: &std::path::Path, name: &str, exe: &std::path::Path, at: &std::path::Path) -> anyhow::Result<()> {
    init_logging(LogFormat::Pretty, "info")?;
    let shutdown = Shutdown::on_signals().context("signal handlers")?;
    let roots = SoftwareRoots::load(dir)?;
    let measured = Measured::executable(&std::fs::read(exe).with_context(|| exe.display().to_string())?);
    let mounted = mount(at, SoftwareTd::new(name, &roots, &measured)?).with_context(|| format!("mounting at {}", at.display()))?;
    {
        let mut out = std::io::stdout().lock();
        writeln!(out, "device=tdx:{};rtmr={};ccel=none", mounted.tsm_root().display(), mounted.measurements().display())?;
        writeln!(out, "ready")?;
        out.flush()?;
    }
    tracing::warn!("an emulated TD is mounted: its quotes prove nothing about hardware");
    shutdown.requested().await;
    drop(mounted);
    Ok(())
}

fn measure(platform: PlatformName, exe: Option<PathBuf>, compose: Option<PathBuf>) -> anyhow::Result<()> {
    let read = |path: &PathBuf| std::fs::read(path).with_context(|| path.display().to_string());
    let measured = match (&exe, &compose) {
        (Some(path), _) => Measured::executable(&read(path)?),
        (None, Some(path)) => Measured::compose(&read(path)?),
        (None, None) => anyhow::bail!("give --exe or --compose"),
    };
    let measurement = match platform {
        PlatformName::Tdx => measured.tdx_measurement(),
        PlatformName::Nitro => measured.nitro_measurement(),
    };
    let booted = match (platform, &measured) {
        (_, Measured::Executable(_) | Measured::Started(_)) => None,
        (PlatformName::Tdx, Measured::Guest(guest)) => Some(guest.booted_tdx()),
        (PlatformName::Nitro, Measured::Guest(guest)) => Some(guest.booted_nitro()),
    };
    let mut out = std::io::stdout().lock();
    writeln!(out, "measurement={}", hex::encode(&measurement))?;
    writeln!(out, "measurement_sha256={}", hex::encode(Sha256::digest(&measurement)))?;
    if let Some(booted) = booted {
        writeln!(out, "compose_hash={}", hex::encode(booted.compose_hash.0))?;
        writeln!(out, "app_id={}", hex::encode(booted.app_id.0))?;
    }
    Ok(())
}

fn describe(socket: &std::path::Path) -> anyhow::Result<()> {
    let mut stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    write_frame(&mut stream, &serde_json::to_vec(&Request::Describe)?)?;
    let frame = read_frame(&mut stream)?.context("the device closed the connection")?;
    match serde_json::from_slice(&frame)? {
        Response::Description(description) => {
            writeln!(std::io::stdout().lock(), "{}", serde_json::to_string_pretty(&description)?)?;
            Ok(())
        }
        Response::Refused(refused) => anyhow::bail!("refused ({:?}): {}", refused.code, refused.message),
        other => anyhow::bail!("an answer to another question: {other:?}"),
    }
}

fn collateral(dir: &std::path::Path, out: &std::path::Path, valid_s: u64, evaluation: u32) -> anyhow::Result<()> {
    let roots = SoftwareRoots::load(dir)?;
    let validity = Validity::window(SystemClock::new().now().0 / 1000, 3600, valid_s);
    let spec = CollateralSpec { evaluation, ..CollateralSpec::new(validity) };
    std::fs::write(out, bundle_json(&[roots.collateral(&spec)?])).with_context(|| out.display().to_string())
}

fn octal(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode @ 0..=0o777) => Ok(mode),
        _ => Err("want up to three octal digits".to_owned()),
    }
}
