//! One enclave from start to end: the parent's forwarder, the vsock device, QEMU. Owns: their order, the time that they get, their end.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use dstack_runtime::clock::{Clock as _, SystemClock};

use super::kit::Kit;
use super::report::Report;
use crate::cluster::{ClusterError, Process, until};
use crate::eif::Image;
use crate::nitro::EnclaveHost;

/// For the forwarder and the device to listen.
const STARTING: Duration = Duration::from_secs(20);
/// From power on to power off. An idle machine takes ten seconds.
const RUNNING: Duration = Duration::from_secs(240);
/// Port of the forwarder on the parent, which has this number under QEMU.
const FORWARDER_PORT: u32 = 3128;
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
    let dir = &enclave.dir;
    fs::create_dir(dir).map_err(|error| ClusterError::file(dir, error))?;
    let file = dir.join("image.eif");
    fs::write(&file, enclave.image.to_bytes()).map_err(|error| ClusterError::file(&file, error))?;
    let (device_socket, vsock) = (dir.join("device.sock"), dir.join("vsock"));

    let mut command = Command::new(forwarder);
    command.args(["forward", "--listen", &format!("unix:{}_{FORWARDER_PORT}", vsock.display()), "--allow", &enclave.allowed.join(",")]);
    let mut parent = Process::spawn("forwarder", &command, &dir.join("forwarder.log"))?;
    until("the forwarder to listen", STARTING, || {
        parent.check_running()?;
        let is_up = parent.log_text().contains("listening at");
        if is_up { Ok(()) } else { Err(ClusterError::unexpected("forwarder", "not up")) }
    })?;

    let mut command = Command::new(kit.path("vhost-device-vsock")?);
    command.args(["--vm", &format!("guest-cid=4,socket={},uds-path={}", device_socket.display(), vsock.display())]);
    let mut device = Process::spawn("vsock device", &command, &dir.join("device.log"))?;
    until("the vsock device", STARTING, || {
        device.check_running()?;
        if device_socket.exists() { Ok(()) } else { Err(ClusterError::unexpected("vsock device", "no socket yet")) }
    })?;

    let signing = enclave.host.signing_files(dir, SystemClock::new().now().0).map_err(|error| ClusterError::file(dir, error))?;
    let mut command = Command::new(kit.path("qemu-system-x86_64")?);
    let machine = format!(
        "nitro-enclave,vsock=c,rtc=on,id={},parent-role=arn:aws:iam::123456789012:role/test,parent-id={PARENT_ID}",
        enclave.host.module_id()
    );
    // Never kvm: a device file that is there may be a hypervisor inside one, which does not run this machine.
    command.args(["-M", &machine, "-accel", "tcg", "-cpu", "max", "-m", MEMORY, "-nographic", "-no-reboot", "-kernel"]).arg(&file);
    command.arg("-L").arg(kit.firmware()).args(["-chardev", &format!("socket,id=c,path={}", device_socket.display())]);
    command.envs(signing);
    let mut machine = Process::spawn("enclave", &command, &dir.join("console.log"))?;
    let status = until("the end of the enclave", RUNNING, || {
        machine.ended().ok_or_else(|| ClusterError::unexpected("enclave", format!("it runs; its console:\n{}", machine.tail())))
    })?;
    let report = Report::of(machine.log_text());
    if !status.success() || !report.has("end") {
        return Err(ClusterError::unexpected("enclave", format!("{status}; its console:\n{}", report.console)));
    }
    Ok(report)
}
