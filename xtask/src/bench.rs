//! Benchmarks. Owns: how they are called. Never: judges a figure; `docs/performance.md` holds them with their conditions.

use crate::shell::{Shell, seconds};

/// What a cluster of processes is made of.
const PROGRAMS: [&str; 5] = ["dstack-kms", "dstack-agent", "dstack-util", "dstack", "dstack-testkit"];

/// Measures everything in the release profile: single parts, then, unless a part is named, releases on three local nodes.
pub(crate) fn run(shell: &Shell, filter: Option<&str>) -> anyhow::Result<()> {
    let bench = |name| shell.cargo(&["bench", "--locked", "--package", "dstack-benches", "--bench", name, "--"]);
    let mut micro = bench("micro");
    micro.args(filter);
    shell.run(micro)?;
    if filter.is_none_or(|filter| filter == "load") {
        let mut programs = shell.cargo(&["build", "--locked", "--release", "--workspace"]);
        programs.args(PROGRAMS.iter().flat_map(|name| ["--bin", name]));
        shell.run(programs)?;
        shell.run(bench("load"))?;
    }
    Ok(())
}

/// Builds them in the dev profile and runs each once: whether they work, not how fast.
pub(crate) fn once(shell: &Shell) -> anyhow::Result<String> {
    // The whole workspace, so that features and with them artifacts are those of the tests.
    let elapsed = shell.run(shell.cargo(&["test", "--locked", "--workspace", "--bench", "micro", "--", "--quiet"]))?;
    Ok(format!("benches: each ran once, {}", seconds(elapsed)))
}
