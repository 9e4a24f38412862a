//! What tests of devices need beyond a Rust toolchain: a Nitro enclave in QEMU, with a signing NSM, Debian's kernel and a real vsock; a
//! machine with a disk on the same kernel.
//!
//! Owns: building each part once, keeping it in the user's cache folder by version and hash of what made it, putting them together as a
//! kit. Never: writes to the system but by apt-get; uses KVM. About ten minutes of processor time on a machine without the cache.

mod apt;
mod kernel;
mod programs;
mod qemu;
mod vsock;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use crate::cache::Cache;
use crate::shell::{Shell, is_ci};

/// Names the kit's folder to tests.
pub(crate) const KIT_VARIABLE: &str = "DSTACK_ENCLAVE_KIT";
/// Tests of devices against something real, as nextest names them: FUSE, swtpm, QEMU.
pub(crate) const TESTS: &str = "binary(fuse_tdx) | binary(swtpm) | binary(enclave) | binary(data_disk) | binary(setup_devices)";

/// The kit's folder. `None` where it cannot be had, which CI does not accept: the test of the enclave says that it is skipped.
pub(crate) fn kit(shell: &Shell, is_wanted: bool) -> anyhow::Result<Option<PathBuf>> {
    match make(shell) {
        Ok(kit) => Ok(Some(kit)),
        Err(cause) if is_wanted || is_ci() => Err(cause.context("no enclave for the tests")),
        Err(cause) => {
            eprintln!("tee: no enclave for the tests ({cause:#}); its test will be SKIPPED");
            Ok(None)
        }
    }
}

fn make(shell: &Shell) -> anyhow::Result<PathBuf> {
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        bail!("the enclave's kernel and programs are built on x86-64 Linux only");
    }
    let cache = Cache::open()?;
    let kernel = kernel::have(shell, &cache)?;
    let vsock = vsock::have(shell, &cache)?;
    let qemu = qemu::have(shell, &cache)?;
    let programs = programs::build(shell)?;

    let kit = shell.target().join("enclave-kit");
    if kit.exists() {
        fs::remove_dir_all(&kit).with_context(|| format!("cannot empty {}", kit.display()))?;
    }
    fs::create_dir_all(&kit)?;
    let put = |from: &Path, name: &str| {
        let from = from.join(name);
        from.symlink_metadata().with_context(|| format!("{} is missing", from.display()))?;
        symlink(&from, kit.join(name)).with_context(|| format!("cannot link {name}"))
    };
    for name in [qemu::PROGRAM, qemu::FIRMWARE] {
        put(&qemu, name)?;
    }
    put(&vsock, vsock::PROGRAM)?;
    for name in [kernel::KERNEL, kernel::MODULES, kernel::DISK_MODULES] {
        put(&kernel, name)?;
    }
    for name in programs::NAMES {
        put(&programs, name)?;
    }
    Ok(kit)
}
