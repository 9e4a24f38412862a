//! The story of the README: three nodes, two apps, one killed leader, one refused change.
//!
//! Owns: building what the story runs. The subcommand `demo` comes with the story itself:
//! `pub(crate) fn run(shell: &Shell, keep: bool) -> anyhow::Result<()>`, which calls `setup::for_tests`, then [`Binaries::build`], starts
//! three nodes with software TEEs, ends by itself and leaves no process and no file behind; `keep` leaves the cluster up until an
//! interrupt and prints `AGENT_SOCK=…` and `KMS_URLS=…` when it is ready. Never: links a crate of the product; it runs binaries.

use std::path::PathBuf;

use anyhow::ensure;

use crate::shell::Shell;

/// The programs that the story runs, built in the dev profile.
pub(crate) struct Binaries {
    folder: PathBuf,
}

impl Binaries {
    const NAMES: [&str; 5] = ["dstack-kms", "dstack-agent", "dstack-util", "dstack", "dstack-testkit"];

    /// Builds all of them in one run of cargo.
    pub(crate) fn build(shell: &Shell) -> anyhow::Result<Self> {
        let mut command = shell.cargo(&["build", "--locked"]);
        for name in Self::NAMES {
            command.args(["--bin", name]);
        }
        shell.run(command)?;
        let binaries = Self { folder: shell.target().join("debug") };
        for name in Self::NAMES {
            ensure!(binaries.path(name).is_file(), "cargo built no {name}");
        }
        Ok(binaries)
    }

    /// Where a program is.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}
