//! All tests: nextest for the workspace, then documentation tests. Owns: how they are called, and that the programs which tests run as
//! processes are built before. Never: retries a failure.

use std::fs;
use std::time::Duration;

use anyhow::Context as _;

use crate::shell::{Shell, seconds};
use crate::{conformance, doctests, setup, tee};

/// Runs them; the lines say how long each part took. The counts are in the runner's own summary above.
pub(crate) fn run(shell: &Shell, packages: &[String], filters: &[String]) -> anyhow::Result<Vec<String>> {
    setup::for_tests(shell)?;
    // The kit first: its programs have names of others, which are built after it.
    let with_enclave = packages.is_empty() || packages.iter().any(|package| package == TESTKIT);
    let kit = if with_enclave { tee::kit(shell, false)? } else { None };
    let programs = programs(shell, packages)?;
    let mut scope = Vec::new();
    for package in packages {
        scope.extend(["--package", package.as_str()]);
    }
    if packages.is_empty() {
        scope.push("--workspace");
    }

    let mut nextest = shell.cargo(&["nextest", "run", "--locked"]);
    nextest.args(&scope).args(filters);
    nextest.envs(kit.map(|kit| (tee::KIT_VARIABLE, kit)));
    nextest.env(THREADS_VARIABLE, threads().to_string());
    let units = shell.run(nextest)?;

    let mut lines = vec![format!("programs of the tests: built, {}", seconds(programs)), format!("tests: passed, {}", seconds(units))];
    if filters.is_empty() && packages.is_empty() {
        lines.push(match doctests::first(shell.root())? {
            None => "documentation tests: there are none".to_owned(),
            Some(first) => {
                let mut doctests = shell.cargo(&["test", "--locked", "--doc"]);
                doctests.args(&scope);
                format!("documentation tests (the first may be in {}): passed, {}", first.display(), seconds(shell.run(doctests)?))
            }
        });
        lines.push(conformance::within_tests(shell)?);
    }
    for line in &lines {
        eprintln!("{line}");
    }
    Ok(lines)
}

/// Runs tests of devices against something real, and prepares what they need.
pub(crate) fn devices(shell: &Shell) -> anyhow::Result<Duration> {
    setup::for_tests(shell)?;
    let kit = tee::kit(shell, true)?;
    programs(shell, &[])?;
    let mut nextest = shell.cargo(&["nextest", "run", "--locked", "--workspace", "-E", tee::TESTS]);
    nextest.envs(kit.map(|kit| (tee::KIT_VARIABLE, kit)));
    shell.run(nextest)
}

/// Builds what tests start as processes. The node that exports dealers' constants to the memory search, and lies on command, is built
/// first and moved aside, so that the folder of the others never keeps it.
fn programs(shell: &Shell, packages: &[String]) -> anyhow::Result<Duration> {
    let mut elapsed = Duration::ZERO;
    if packages.is_empty() || packages.iter().any(|package| package == NODE) {
        let feature = format!("{NODE}/insecure-rogue");
        // The whole workspace, so that crates of others have the features that they have in the next build, and are compiled once.
        let build = ["build", "--locked", "--workspace", "--bin", "dstack-kms", "--features", &feature];
        elapsed += shell.run(shell.cargo(&build))?;
        let aside = shell.target().join("insecure-test");
        fs::create_dir_all(&aside).with_context(|| format!("cannot make {}", aside.display()))?;
        let (from, to) = (shell.target().join("debug/dstack-kms"), aside.join("dstack-kms"));
        // A name of its own first: a running program's file cannot be written over.
        let fresh = aside.join("dstack-kms.new");
        fs::copy(&from, &fresh).and_then(|_| fs::rename(&fresh, &to)).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    elapsed += shell.run(shell.cargo(&["build", "--locked", "--workspace", "--bins", "--tests"]))?;
    Ok(elapsed)
}

/// Tests at once: one more than cores, for most tests of clusters wait for others or for time to pass (`.config/nextest.toml`).
fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).saturating_add(1)
}

/// How the runner of tests is told so, unless an argument says otherwise.
const THREADS_VARIABLE: &str = "NEXTEST_TEST_THREADS";
/// The package of the test with the enclave.
const TESTKIT: &str = "dstack-testkit";
/// The node's package.
const NODE: &str = "dstack-node";
