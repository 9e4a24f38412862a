//! Benchmarks. Owns: how they are called. Never: judges a figure; `docs/performance.md` holds them with their conditions.

use crate::shell::Shell;

/// Runs all benchmarks, or each once to see that it works.
pub(crate) fn run(shell: &Shell, once: bool, filter: Option<&str>) -> anyhow::Result<()> {
    let mut command = shell.cargo(&["bench", "--locked", "--package", "dstack-benches", "--"]);
    if once {
        command.arg("--test");
    }
    command.args(filter);
    shell.run(command).map(drop)
}
