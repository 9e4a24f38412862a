//! What a machine in QEMU has outside: the forwarder to nodes, and the device of its vsock. Owns: their start, their end when dropped.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::kit::Kit;
use crate::cluster::{ClusterError, Process, until};

/// For the forwarder and the device to listen.
const STARTING: Duration = Duration::from_secs(20);
/// Port of the forwarder on the parent, which has this number under QEMU.
const FORWARDER_PORT: u32 = 3128;

/// See the module text.
pub(super) struct Parent {
    _forwarder: Process,
    _device: Process,
    socket: PathBuf,
}

impl Parent {
    /// Starts both; sockets and logs lie in `dir`. `allowed`: `host:port` that may be connected to.
    pub(super) fn start(kit: &Kit, forwarder: &Path, dir: &Path, allowed: &[String]) -> Result<Self, ClusterError> {
        let (socket, vsock) = (dir.join("device.sock"), vsock(dir));
        let mut command = Command::new(forwarder);
        command.args(["forward", "--listen", &format!("unix:{}_{FORWARDER_PORT}", vsock.display()), "--allow", &allowed.join(",")]);
        let mut parent = Process::spawn("forwarder", &command, &dir.join("forwarder.log"))?;
        until("the forwarder to listen", STARTING, || {
            parent.check_running()?;
            let is_up = parent.log_text().contains("listening at");
            if is_up { Ok(()) } else { Err(ClusterError::unexpected("forwarder", "not up")) }
        })?;

        let mut command = Command::new(kit.path("vhost-device-vsock")?);
        command.args(["--vm", &format!("guest-cid=4,socket={},uds-path={}", socket.display(), vsock.display())]);
        let mut device = Process::spawn("vsock device", &command, &dir.join("device.log"))?;
        until("the vsock device", STARTING, || {
            device.check_running()?;
            if socket.exists() { Ok(()) } else { Err(ClusterError::unexpected("vsock device", "no socket yet")) }
        })?;
        Ok(Self { _forwarder: parent, _device: device, socket })
    }

    /// QEMU's character device with the name `c`, behind which the vsock is.
    pub(super) fn channel(&self) -> String {
        format!("socket,id=c,path={}", self.socket.display())
    }
}

/// The vsock's base path: port `P` of the parent is the socket `<path>_P`; the machine's own ports are behind the path itself.
pub(super) fn vsock(dir: &Path) -> PathBuf {
    dir.join("vsock")
}
