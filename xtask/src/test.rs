//! All tests: nextest for the workspace, then documentation tests. Owns: how they are called. Never: retries a failure.

use crate::setup;
use crate::shell::{Shell, seconds};

/// Runs them; the lines say how long each part took. The counts are in the runner's own summary above.
pub(crate) fn run(shell: &Shell, packages: &[String], filters: &[String]) -> anyhow::Result<Vec<String>> {
    setup::for_tests(shell)?;
    let mut scope = Vec::new();
    for package in packages {
        scope.extend(["--package", package.as_str()]);
    }
    if packages.is_empty() {
        scope.push("--workspace");
    }

    let mut nextest = shell.cargo(&["nextest", "run", "--locked"]);
    nextest.args(&scope).args(filters);
    let units = shell.run(nextest)?;

    let mut lines = vec![format!("tests: passed, {}", seconds(units))];
    if filters.is_empty() && packages.is_empty() {
        let mut doctests = shell.cargo(&["test", "--locked", "--doc"]);
        doctests.args(&scope);
        let elapsed = shell.run(doctests)?;
        lines.push(format!("documentation tests: passed, {}", seconds(elapsed)));
    }
    for line in &lines {
        eprintln!("{line}");
    }
    Ok(lines)
}
