//! Benchmarks. Owns: how they are called. Never: judges a figure; `docs/performance.md` holds them with their conditions.

use crate::shell::{Shell, seconds};

/// What a cluster of processes is made of.
const PROGRAMS: [&str; 5] = ["dstack-kms", "dstack-agent", "dstack-util", "dstack", "dstack-testkit"];

/// Benchmarks on three local nodes.
const CLUSTERS: [&str; 2] = ["load", "dstack"];

/// Measures everything in the release profile: single parts, then, unless one of them is named, releases on three local nodes.
pub(crate) fn run(shell: &Shell, filter: Option<&str>) -> anyhow::Result<()> {
    let bench = |name| shell.cargo(&["bench", "--locked", "--package", "dstack-benches", "--bench", name, "--"]);
    let clusters: Vec<&str> = CLUSTERS.into_iter().filter(|name| filter.is_none_or(|filter| filter == *name)).collect();
    if filter.is_none() || clusters.is_empty() {
        let mut micro = bench("micro");
        micro.args(filter);
        shell.run(micro)?;
    }
    if !clusters.is_empty() {
        shell.run(programs(shell, &["--release"]))?;
    }
    for name in clusters {
        shell.run(bench(name))?;
    }
    Ok(())
}

/// Builds them in the dev profile and runs each once: whether they work, not how fast.
pub(crate) fn once(shell: &Shell) -> anyhow::Result<String> {
    let mut elapsed = shell.run(programs(shell, &[]))?;
    // The whole workspace, so that features and with them artifacts are those of the tests.
    for name in ["micro", "dstack"] {
        elapsed += shell.run(shell.cargo(&["test", "--locked", "--workspace", "--bench", name, "--", "--quiet"]))?;
    }
    Ok(format!("benches: each ran once, {}", seconds(elapsed)))
}

fn programs(shell: &Shell, profile: &[&str]) -> std::process::Command {
    let mut build = shell.cargo(&["build", "--locked", "--workspace"]);
    build.args(profile).args(PROGRAMS.iter().flat_map(|name| ["--bin", name]));
    build
}
