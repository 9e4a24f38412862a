//! The manifests of the workspace. Owns: reading them and telling whose dependency is whose. Never: asks cargo, so it works offline.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use toml::{Table, Value};

/// One crate of ours.
pub(crate) struct Package {
    /// Name in its manifest.
    pub(crate) name: String,
    /// Its folder, relative to the root.
    pub(crate) folder: PathBuf,
    /// What it links: dependencies and build dependencies, of all targets. Not what only its tests link.
    pub(crate) uses: BTreeSet<String>,
}

/// Reads every member of the workspace at `root`.
pub(crate) fn packages(root: &Path) -> anyhow::Result<Vec<Package>> {
    let manifest = read_toml(&root.join("Cargo.toml"))?;
    let workspace = manifest.get("workspace").and_then(Value::as_table).context("Cargo.toml has a [workspace]")?;
    let members = workspace.get("members").and_then(Value::as_array).context("[workspace] has members")?;
    members.iter().filter_map(Value::as_str).map(|member| package(root, Path::new(member))).collect()
}

/// Reads a TOML file.
pub(crate) fn read_toml(path: &Path) -> anyhow::Result<Table> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    text.parse().with_context(|| format!("{} is no TOML", path.display()))
}

fn package(root: &Path, folder: &Path) -> anyhow::Result<Package> {
    let manifest = read_toml(&root.join(folder).join("Cargo.toml"))?;
    let name = manifest.get("package").and_then(|package| package.get("name")).and_then(Value::as_str);
    let name = name.with_context(|| format!("{} names its package", folder.display()))?.to_owned();
    let mut uses = BTreeSet::new();
    collect(&manifest, &mut uses);
    let targets = manifest.get("target").and_then(Value::as_table).into_iter().flat_map(Table::values);
    for target in targets.filter_map(Value::as_table) {
        collect(target, &mut uses);
    }
    Ok(Package { name, folder: folder.to_owned(), uses })
}

fn collect(table: &Table, uses: &mut BTreeSet<String>) {
    uses.extend(dependencies(table, "dependencies"));
    uses.extend(dependencies(table, "build-dependencies"));
}

/// The packages of one section, by their real names.
fn dependencies(table: &Table, section: &str) -> impl Iterator<Item = String> {
    let section = table.get(section).and_then(Value::as_table);
    section.into_iter().flatten().map(|(name, how)| {
        let real = how.get("package").and_then(Value::as_str);
        real.unwrap_or(name).to_owned()
    })
}
