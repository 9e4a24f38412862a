//! Our own programs for the enclave: static, because its image has no libraries. Owns: how they are built.

use std::fs;
use std::path::PathBuf;

use anyhow::Context as _;

use crate::shell::Shell;

/// The programs, which the kit names alike.
pub(super) const NAMES: [&str; 3] = ["dstack-util", "dstack-enclave-init", "dstack-agent"];
/// What an agent in an enclave needs beside the least.
const FEATURES: &str = "dstack-guest/nsm";
/// Calls the compiler for our own crates with one flag more; those of others are linked as they were built for everything else.
const STATICALLY: &str = "xtask/src/tee/assets/static-rustc";

/// Builds them; the folder with them, without symbols: every byte is measured and unpacked. Cargo's own folder keeps none, for the
/// programs of the same names that everybody else runs are not static.
pub(super) fn build(shell: &Shell) -> anyhow::Result<PathBuf> {
    // Without the TPM library, which is not there as a static one (ADR 0013). The whole workspace, so that the crates of others have the
    // features that they have everywhere.
    let mut command = shell.cargo(&["build", "--locked", "--workspace", "--no-default-features", "--features", FEATURES]);
    for name in NAMES {
        command.args(["--bin", name]);
    }
    command.env("RUSTC_WORKSPACE_WRAPPER", shell.root().join(STATICALLY));
    shell.run(command)?;
    let (from, to) = (shell.target().join("debug"), shell.target().join("enclave-programs"));
    fs::create_dir_all(&to).with_context(|| format!("cannot make {}", to.display()))?;
    for name in NAMES {
        let program = from.join(name);
        let mut strip = shell.command("strip", &["-o"]);
        strip.arg(to.join(name)).arg(&program);
        shell.run(strip)?;
        fs::remove_file(&program).with_context(|| format!("cannot remove {}", program.display()))?;
    }
    Ok(to)
}
