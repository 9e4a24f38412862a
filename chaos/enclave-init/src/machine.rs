//! From a kernel's first process to a machine with devices. Owns: mounts, modules, the end. Never: continues without the devices that the
//! image names.

use std::ffi::CString;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, init_module, reboot};

use crate::say;

/// Loaded in the order of their names.
const MODULES: &str = "/modules";
/// The one that makes devices of what the command line says.
const COMMAND_LINE_MODULE: &str = "vmmio_cmdline";
/// What has to be there, one path a line.
const DEVICES: &str = "/app/devices";
/// How QEMU names a device on the command line.
const DEVICE_WORD: &str = "virtio_mmio.";
/// For the devices to appear.
const PATIENCE: Duration = Duration::from_secs(20);

/// Mounts, loads the modules, waits for the devices.
pub(crate) fn prepare() -> anyhow::Result<()> {
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp"), ("tmpfs", "/run")] {
        fs::create_dir_all(place).with_context(|| format!("cannot make {place}"))?;
        let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
        mount(kind, place, kind, flags, c"").with_context(|| format!("cannot mount {kind} at {place}"))?;
    }
    let mut modules = Vec::new();
    for entry in fs::read_dir(MODULES).context("no modules")? {
        modules.push(entry?.path());
    }
    modules.sort();
    for file in &modules {
        load(file).with_context(|| format!("cannot load {}", file.display()))?;
    }
    let begun = Instant::now();
    for device in fs::read_to_string(DEVICES).with_context(|| format!("cannot read {DEVICES}"))?.lines() {
        while !Path::new(device).exists() {
            if begun.elapsed() > PATIENCE {
                bail!("no {device} within {PATIENCE:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    say("clock", &clock_s().to_string());
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "what the guest's clock says is what is reported")]
fn clock_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn load(file: &Path) -> anyhow::Result<()> {
    let is_command_line = file.file_stem().is_some_and(|name| name.to_string_lossy().ends_with(COMMAND_LINE_MODULE));
    let parameters = if is_command_line {
        let words = fs::read_to_string("/proc/cmdline")?;
        words.split_whitespace().filter_map(|word| word.strip_prefix(DEVICE_WORD)).collect::<Vec<_>>().join(" ")
    } else {
        String::new()
    };
    init_module(&fs::read(file)?, &CString::new(parameters)?)?;
    Ok(())
}

/// Ends the machine. Returns only where the kernel refuses.
pub(crate) fn end() {
    if let Err(error) = reboot(RebootCommand::Restart) {
        say("failed", &format!("cannot end: {error}"));
    }
}
