//! A machine with a disk, from start to end: Debian's kernel with device-mapper, the system's own `cryptsetup`, `mkfs.ext4` and the like,
//! no TEE but what is relayed to it. Owns: its ramdisk, QEMU's words, the time it gets. Never: touches another disk than the file named.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::kit::{COMMAND_LINE, Kit};
use super::parent::{Parent, vsock};
use super::report::Report;
use super::system;
use super::tree::Tree;
use crate::cluster::{ClusterError, Process, until};

/// From power on to power off. An idle machine takes half a minute.
const RUNNING: Duration = Duration::from_secs(300);
const MEMORY: &str = "768M";
/// What setup calls, and what looks at its work.
const PROGRAMS: [&str; 10] = ["cryptsetup", "mkfs.ext4", "mount", "umount", "mkswap", "swapon", "swapoff", "sh", "cat", "sync"];
/// The first port of a relayed socket on the parent.
const RELAYS: u32 = 5000;

/// What runs.
#[derive(Debug)]
pub struct DiskMachine<'a> {
    /// One after the other; see [`Kit::image`].
    pub programs: &'a [&'a [&'a str]],
    /// Files below `/app`.
    pub files: &'a [(&'a str, &'a [u8])],
    /// Sockets: the path inside, and the one here that answers.
    pub relays: &'a [(&'a str, &'a Path)],
    /// `host:port` that its parent lets it connect to.
    pub allowed: &'a [String],
    /// Image of its disk, `/dev/vda`.
    pub disk: &'a Path,
    /// A new folder for its files. Short: sockets lie in it.
    pub dir: PathBuf,
}

/// Runs it to its end.
///
/// # Errors
/// [`ClusterError`]; a console without a last word is [`ClusterError::Unexpected`].
pub fn run_with_disk(kit: &Kit, forwarder: &Path, machine: &DiskMachine<'_>) -> Result<Report, ClusterError> {
    let dir = &machine.dir;
    fs::create_dir(dir).map_err(|error| ClusterError::file(dir, error))?;
    let mut tree = kit.boot("modules-disk")?;
    tree.add("app/devices", 0o644, b"/dev/vda\n/dev/mapper/control\n".to_vec());
    kit.add_programs(&mut tree, machine.programs, machine.files)?;
    system::add(&mut tree, &PROGRAMS)?;
    add_relays(&mut tree, machine.relays, dir)?;
    let ramdisk = dir.join("ramdisk");
    fs::write(&ramdisk, tree.ramdisk()).map_err(|error| ClusterError::file(&ramdisk, error))?;

    let parent = Parent::start(kit, forwarder, dir, machine.allowed)?;
    let mut command = Command::new(kit.path("qemu-system-x86_64")?);
    // Never kvm: see the enclave.
    command.args([
        "-M",
        "microvm,acpi=off,rtc=on,memory-backend=m",
        "-accel",
        "tcg",
        "-cpu",
        "max",
        "-m",
        MEMORY,
        "-nographic",
        "-no-reboot",
    ]);
    // memory that the vsock's device shares
    command.arg("-object").arg(format!("memory-backend-memfd,id=m,size={MEMORY},share=on"));
    command.arg("-chardev").arg(parent.channel()).args(["-device", "vhost-user-vsock-device,chardev=c"]);
    command.arg("-drive").arg(format!("id=d,if=none,format=raw,cache=unsafe,file={}", machine.disk.display()));
    command.args(["-device", "virtio-blk-device,drive=d"]);
    command.arg("-L").arg(kit.firmware()).arg("-kernel").arg(kit.path("vmlinuz")?).arg("-initrd").arg(&ramdisk);
    command.args(["-append", COMMAND_LINE]);
    let mut process = Process::spawn("machine", &command, &dir.join("console.log"))?;
    let status = until("the end of the machine", RUNNING, || {
        process.ended().ok_or_else(|| ClusterError::unexpected("machine", format!("it runs; its console:\n{}", process.tail())))
    })?;
    let report = Report::of(process.log_text());
    if !status.success() || !report.has("end") {
        return Err(ClusterError::unexpected("machine", format!("{status}; its console:\n{}", report.console)));
    }
    Ok(report)
}

/// A relayed socket is a port of the parent, hence a name beside the vsock's.
fn add_relays(tree: &mut Tree, relays: &[(&str, &Path)], dir: &Path) -> Result<(), ClusterError> {
    let mut lines = String::new();
    for (port, (inside, here)) in (RELAYS..).zip(relays) {
        let name = PathBuf::from(format!("{}_{port}", vsock(dir).display()));
        symlink(here, &name).map_err(|error| ClusterError::file(&name, error))?;
        lines.push_str(&format!("{inside} 2:{port}\n"));
    }
    tree.add("app/relays", 0o644, lines.into_bytes());
    Ok(())
}
