//! Fuzzing of the decoders. Owns: which targets there are and how cargo-fuzz is called on a stable toolchain.
//! Never: part of CI; property tests there cover the same decoders.

use anyhow::{Context, bail};
use toml::Value;

use crate::shell::Shell;
use crate::tools;
use crate::workspace::read_toml;

/// Runs each target for some seconds.
pub(crate) fn run(shell: &Shell, seconds: u64, only: Option<&str>) -> anyhow::Result<()> {
    let manifest = read_toml(&shell.root().join("fuzz").join("Cargo.toml")).context("there are no fuzz targets")?;
    let bins = manifest.get("bin").and_then(Value::as_array).context("fuzz/Cargo.toml lists its targets as [[bin]]")?;
    let targets = bins.iter().filter_map(|bin| bin.get("name")).filter_map(Value::as_str);
    let targets: Vec<&str> = targets.filter(|name| only.is_none_or(|only| only == *name)).collect();
    if targets.is_empty() {
        bail!("no such fuzz target: {}", only.unwrap_or("any"));
    }
    let tool = tools::fuzz(shell)?;
    for target in targets {
        let time = format!("-max_total_time={seconds}");
        let mut command = shell.command(&tool, &["fuzz", "run", target, "--", &time, "-rss_limit_mb=2048"]);
        // cargo-fuzz passes unstable flags; the stable compiler accepts them when told so.
        command.env("RUSTC_BOOTSTRAP", "1");
        shell.run(command)?;
    }
    Ok(())
}
