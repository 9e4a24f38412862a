//! One enclave from start to end. Owns: QEMU's words, the time it gets, what it is asked from outside.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use dstack_runtime::clock::{Clock as _, SystemClock};

use super::kit::Kit;
use super::parent::{Parent, vsock};
use super::report::Report;
use crate::cluster::{ClusterError, Process, until};
use crate::eif::Image;
use crate::nitro::EnclaveHost;

/// From power on to power off. An idle machine takes ten seconds.
const RUNNING: Duration = Duration::from_secs(240);
const MEMORY: &str = "512M";
const PARENT_ID: &str = "i-0123456789abcdef0";

/// What runs.
#[derive(Debug)]
pub struct Enclave<'a> {
    /// The image.
    pub image: &'a Image,
    /// Signs its documents.
    pub host: &'a EnclaveHost,
    /// `host:port` that its parent lets it connect to.
    pub allowed: &'a [String],
    /// A new folder for its files. Short: sockets lie in it.
    pub dir: PathBuf,
}

/// Runs it to its end.
///
/// # Errors
/// [`ClusterError`]; a console without a last word is [`ClusterError::Unexpected`].
pub fn run(kit: &Kit, forwarder: &Path, enclave: &Enclave<'_>) -> Result<Report, ClusterError> {
    run_and_meet(kit, forwarder, enclave, &mut |_, _| Ok(()))
}

/// As [`run`]. While it runs `meet` looks again and again at its console, and may connect to its ports: by the socket that it is given,
/// `CONNECT PORT` in a line first.
///
/// # Errors
/// As [`run`]; what `meet` says.
pub fn run_and_meet(
    kit: &Kit,
    forwarder: &Path,
    enclave: &Enclave<'_>,
    meet: &mut dyn FnMut(&Path, &str) -> Result<(), ClusterError>,
) -> Result<Report, ClusterError> {
    let dir = &enclave.dir;
    fs::create_dir(dir).map_err(|error| ClusterError::file(dir, error))?;
    let file = dir.join("image.eif");
    fs::write(&file, enclave.image.to_bytes()).map_err(|error| ClusterError::file(&file, error))?;
    let parent = Parent::start(kit, forwarder, dir, enclave.allowed)?;

    let signing = enclave.host.signing_files(dir, SystemClock::new().now().0).map_err(|error| ClusterError::file(dir, error))?;
    let mut command = Command::new(kit.path("qemu-system-x86_64")?);
    let machine = format!(
        "nitro-enclave,vsock=c,rtc=on,id={},parent-role=arn:aws:iam::123456789012:role/test,parent-id={PARENT_ID}",
        enclave.host.module_id()
    );
    // Never kvm: a device file that is there may be a hypervisor inside one, which does not run this machine.
    command.args(["-M", &machine, "-accel", "tcg", "-cpu", "max", "-m", MEMORY, "-nographic", "-no-reboot", "-kernel"]).arg(&file);
    command.arg("-L").arg(kit.firmware()).arg("-chardev").arg(parent.channel());
    command.envs(signing);
    let mut machine = Process::spawn("enclave", &command, &dir.join("console.log"))?;
    let mut met = Ok(());
    let status = until("the end of the enclave", RUNNING, || {
        if met.is_ok() {
            met = meet(&vsock(dir), &machine.log_text());
        }
        machine.ended().ok_or_else(|| ClusterError::unexpected("enclave", format!("it runs; its console:\n{}", machine.tail())))
    })?;
    met?;
    let report = Report::of(machine.log_text());
    if !status.success() || !report.has("end") {
        return Err(ClusterError::unexpected("enclave", format!("{status}; its console:\n{}", report.console)));
    }
    Ok(report)
}
