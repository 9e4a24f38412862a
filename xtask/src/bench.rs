//! Benchmarks. Owns: how they are called. Never: judges a figure; `docs/performance.md` holds them with their conditions.

use crate::shell::{Shell, seconds};

/// Measures everything in the release profile: single parts, then releases on three local nodes.
pub(crate) fn run(shell: &Shell, filter: Option<&str>) -> anyhow::Result<()> {
    let mut micro = shell.cargo(&["bench", "--locked", "--package", "dstack-benches", "--bench", "micro", "--"]);
    micro.args(filter);
    shell.run(micro).map(drop)
}

/// Builds them in the dev profile and runs each once: whether they work, not how fast.
pub(crate) fn once(shell: &Shell) -> anyhow::Result<String> {
    // The whole workspace, so that features and with them artifacts are those of the tests.
    let elapsed = shell.run(shell.cargo(&["test", "--locked", "--workspace", "--bench", "micro", "--", "--quiet"]))?;
    Ok(format!("benches: each ran once, {}", seconds(elapsed)))
}
