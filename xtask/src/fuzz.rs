//! Fuzzing of the decoders. Owns: which targets there are, what they begin with and how cargo-fuzz is called on a stable toolchain.
//! Never: part of CI; there the same targets run over seeds and mutations without the fuzzer (`chaos/fuzz-targets/tests/smoke.rs`).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use toml::Value;

use crate::shell::Shell;
use crate::tools;
use crate::workspace::read_toml;

/// The target that takes published evidence as it is.
const OF_VECTORS: &str = "attest_raw";

/// Runs each target for some seconds.
pub(crate) fn run(shell: &Shell, seconds: u64, only: Option<&str>) -> anyhow::Result<()> {
    let folder = shell.root().join("fuzz");
    let manifest = read_toml(&folder.join("Cargo.toml")).context("there are no fuzz targets")?;
    let bins = manifest.get("bin").and_then(Value::as_array).context("fuzz/Cargo.toml lists its targets as [[bin]]")?;
    let targets = bins.iter().filter_map(|bin| bin.get("name")).filter_map(Value::as_str);
    let targets: Vec<&str> = targets.filter(|name| only.is_none_or(|only| only == *name)).collect();
    if targets.is_empty() {
        bail!("no such fuzz target: {}", only.unwrap_or("any"));
    }
    let tool = tools::fuzz(shell)?;
    for target in targets {
        let mut command = shell.command(&tool, &["fuzz", "run", target]);
        command.args(inputs(&folder, target)?).args(["--", "-rss_limit_mb=2048"]).arg(format!("-max_total_time={seconds}"));
        // cargo-fuzz passes unstable flags; the stable compiler accepts them when told so.
        command.env("RUSTC_BOOTSTRAP", "1");
        shell.run(command)?;
    }
    Ok(())
}

/// Folders of inputs: first the one that grows, then what is committed, then what lies outside the repository.
fn inputs(folder: &Path, target: &str) -> anyhow::Result<Vec<PathBuf>> {
    let corpus = folder.join("corpus").join(target);
    fs::create_dir_all(&corpus).with_context(|| format!("cannot make {}", corpus.display()))?;
    let mut inputs = vec![corpus];
    inputs.extend(Some(folder.join("seeds").join(target)).filter(|seeds| seeds.is_dir()));
    if target == OF_VECTORS {
        let vectors = std::env::var_os("DSTACK_VECTORS").map_or_else(|| folder.join("../../shared/vectors"), PathBuf::from);
        inputs.extend(Some(vectors).filter(|vectors| vectors.is_dir()));
    }
    Ok(inputs)
}
