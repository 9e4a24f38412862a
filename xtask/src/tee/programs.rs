//! Our own programs for the enclave: static, because its image has no libraries. Owns: how they are built.

use std::fs;
use std::path::PathBuf;

use anyhow::Context as _;

use crate::shell::Shell;

/// The programs, which the kit names alike.
pub(super) const NAMES: [&str; 3] = ["dstack-util", "dstack-enclave-init", "dstack-agent"];
/// What they are in.
const PACKAGES: [&str; 3] = ["dstack-util", "dstack-enclave-init", "dstack-guest"];
/// What an agent in an enclave needs beside the least.
const FEATURES: &str = "dstack-guest/nsm";
/// Named, so that flags for the enclave are none for build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds them; the folder with them, without symbols: every byte is measured and unpacked.
pub(super) fn build(shell: &Shell) -> anyhow::Result<PathBuf> {
    // without the TPM library, which is not there as a static one (ADR 0013)
    let mut command = shell.cargo(&["build", "--locked", "--no-default-features", "--target", TARGET]);
    for name in NAMES {
        command.args(["--bin", name]);
    }
    for package in PACKAGES {
        command.args(["--package", package]);
    }
    command.args(["--features", FEATURES]);
    command.env("RUSTFLAGS", "-C target-feature=+crt-static");
    shell.run(command)?;
    let (from, to) = (shell.target().join(TARGET).join("debug"), shell.target().join("enclave-programs"));
    fs::create_dir_all(&to).with_context(|| format!("cannot make {}", to.display()))?;
    for name in NAMES {
        let mut strip = shell.command("strip", &["-o"]);
        strip.arg(to.join(name)).arg(from.join(name));
        shell.run(strip)?;
    }
    Ok(to)
}
