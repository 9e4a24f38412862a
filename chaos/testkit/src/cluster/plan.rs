//! From a specification to the folder of a genesis document, by the operators' own program. Owns: keys of operators, the plan's text.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::binaries::Binaries;
use super::device::{Device, measure_executable, value};
use super::error::ClusterError;
use super::node::Node;
use super::process::run;
use super::spec::ClusterSpec;

/// An operator's key file and public key.
#[derive(Debug, Clone)]
pub struct Operator {
    /// File with the private half.
    pub key: PathBuf,
    /// Public half, in hex.
    pub public_key: String,
}

/// Makes the operators' keys.
pub(crate) fn operators(binaries: &Binaries, dir: &Path, count: u8) -> Result<Vec<Operator>, ClusterError> {
    let make = |number: u8| {
        let key = dir.join(format!("operator-{number}.key"));
        let out = run(Command::new(binaries.path("dstack")?).args(["operator", "keygen", "--out"]).arg(&key))?;
        Ok(Operator { key, public_key: value(&out, "public_key")? })
    };
    (1..=count).map(make).collect()
}

/// Makes the genesis folder; its cluster id in hex.
pub(crate) fn genesis(
    binaries: &Binaries,
    dir: &Path,
    spec: &ClusterSpec,
    device: &Device,
    nodes: &[Node],
    operators: &[Operator],
) -> Result<(PathBuf, String), ClusterError> {
    let programs: BTreeSet<&Path> = nodes.iter().map(|node| node.program.as_path()).collect();
    let measurements =
        programs.into_iter().map(|program| measure_executable(binaries, spec.kind, program)).collect::<Result<Vec<_>, _>>()?;
    let plan = dir.join("plan.toml");
    std::fs::write(&plan, plan_text(spec, device, nodes, operators, &measurements)?).map_err(|error| ClusterError::file(&plan, error))?;
    let folder = dir.join("cluster");
    let out = run(Command::new(binaries.path("dstack")?).args(["cluster", "plan", "--plan"]).arg(&plan).arg("--out").arg(&folder))?;
    Ok((folder, value(&out, "cluster_id")?))
}

fn plan_text(
    spec: &ClusterSpec,
    device: &Device,
    nodes: &[Node],
    operators: &[Operator],
    measurements: &[String],
) -> Result<String, ClusterError> {
    let quoted = |paths: &[PathBuf]| paths.iter().map(|path| format!("{:?}", path.display().to_string())).collect::<Vec<_>>().join(", ");
    let keys: Vec<String> = operators.iter().map(|operator| format!("{:?}", operator.public_key)).collect();
    let mut text = format!(
        "ca_algorithm = \"{}\"\ntimelock_s = {}\ncollateral = {}\nsoftware_roots = [{}]\n\n[operators]\nk = {}\nr = 1\nkeys = [{}]\n",
        spec.ca_algorithm,
        spec.timelock_s,
        quoted(&[device.collateral()]),
        quoted(&spec.roots(device)),
        spec.approvals,
        keys.join(", "),
    );
    let kind = spec.kind.name();
    for node in nodes {
        let identity = device.identity(&node.name())?;
        let _ = write!(text, "\n[[seat]]\naddress = \"{}\"\nplatform = \"{kind}\"\nplatform_identity = \"{identity}\"\n", node.address);
    }
    for measurement in measurements {
        let _ = write!(text, "\n[[allowed_node]]\nplatform = \"{kind}\"\nmeasurement = \"{measurement}\"\n");
    }
    Ok(text)
}
