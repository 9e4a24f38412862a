//! The story of the README: three nodes, two apps, one killed leader, one refused change.
//!
//! Owns: installing and building what the story runs; `dstack-testkit demo` tells it. Never: links a crate of the product.

use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, ensure};

use crate::setup;
use crate::shell::Shell;

/// Sets up, builds, and becomes the story: an interrupt or SIGTERM to us is one to it, and it leaves nothing running.
pub(crate) fn run(shell: &Shell, keep: bool) -> anyhow::Result<()> {
    setup::for_demo(shell)?;
    let binaries = Binaries::build(shell)?;
    let mut story = shell.command(binaries.path("dstack-testkit"), &["demo", "--examples"]);
    story.arg(shell.root().join("examples"));
    if keep {
        story.arg("--keep");
    }
    let cause = story.exec();
    Err(cause).context("cannot start dstack-testkit")
}

/// The programs that the story runs, built in the dev profile.
pub(crate) struct Binaries {
    folder: PathBuf,
}

impl Binaries {
    const NAMES: [&str; 5] = ["dstack-kms", "dstack-agent", "dstack-util", "dstack", "dstack-testkit"];

    /// Builds all of them in one run of cargo.
    pub(crate) fn build(shell: &Shell) -> anyhow::Result<Self> {
        let mut command = shell.cargo(&["build", "--locked", "--workspace"]);
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
