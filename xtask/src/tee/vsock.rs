//! The vsock device of the emulated machine: rust-vmm's vhost-device-vsock. Owns: its version.

use std::path::PathBuf;

use crate::cache::{Cache, key};
use crate::shell::Shell;
use crate::step::Step;

/// Its program.
pub(super) const PROGRAM: &str = "vhost-device-vsock";
const VERSION: &str = "0.3.0";

/// The folder with the program.
pub(super) fn have(shell: &Shell, cache: &Cache) -> anyhow::Result<PathBuf> {
    let key = key(&[VERSION]);
    if let Some(there) = cache.find(PROGRAM, &key) {
        return Ok(there);
    }
    let workshop = cache.workshop(PROGRAM)?;
    let step = Step::begin("vsock device", "about two minutes of processor time", workshop.join("log"));
    let root = workshop.join("root");
    let mut install = shell.cargo(&["install", "--locked", "--version", VERSION, PROGRAM, "--root"]);
    // The lints and flags of the caller are not for a foreign program.
    install.arg(&root).env("CARGO_TARGET_DIR", workshop.join("target")).env_remove("RUSTFLAGS");
    step.run(&mut install)?;
    step.end();
    cache.keep(&workshop, &root.join("bin"), PROGRAM, VERSION, &key)
}
