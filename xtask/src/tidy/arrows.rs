//! Who may lean on whom. Owns: the table of arrows between our crates, and the fences of deny.toml held against our manifests.
//! Never: judges dev-dependencies; tests may use anything. Source: style.md §1, architecture.md §5; a new arrow needs an ADR.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use toml::Value;

use crate::workspace::{Package, packages, read_toml};

/// What each crate may use beside `protocol` and `secret`.
const ARROWS: &[(&str, &[&str])] = &[
    ("attest", &[]),
    ("threshold", &[]),
    ("audit", &[]),
    ("prpc", &[]),
    ("certificates", &[]),
    ("policy", &["attest"]),
    ("release", &["attest", "policy", "threshold", "audit"]),
    ("storage", &["attest"]),
    ("ratls", &["attest", "certificates", "prpc"]),
    ("tee", &["attest"]),
    ("collateral", &["attest"]),
    ("authority", &["attest"]),
    ("onchain", &["attest"]),
    ("runtime", &["attest"]),
    ("raft", &["attest", "policy", "threshold", "audit", "certificates", "storage", "ratls"]),
    ("actors", &["attest", "authority", "policy", "threshold", "audit", "certificates", "release", "storage", "ratls", "raft", "onchain"]),
    ("client", &["attest", "threshold", "audit", "certificates", "prpc", "ratls"]),
    (
        "node",
        &[
            "attest",
            "policy",
            "threshold",
            "audit",
            "certificates",
            "prpc",
            "release",
            "storage",
            "ratls",
            "tee",
            "collateral",
            "authority",
            "onchain",
            "runtime",
            "raft",
            "actors",
            "client",
        ],
    ),
    ("guest", &["client", "attest", "audit", "certificates", "prpc", "ratls", "runtime", "tee"]),
    ("util", &["client", "attest", "audit", "certificates", "prpc", "ratls", "runtime", "tee"]),
    ("cli", &["client", "attest", "audit", "certificates", "prpc", "collateral", "ratls", "runtime", "policy", "threshold", "storage"]),
    ("deploy", &["client", "attest", "audit", "ratls", "runtime"]),
];

/// Crates that lean on nothing of ours.
const GROUND: &[&str] = &["protocol", "secret"];

/// Crates that may use anything, and that nothing may use except as dev-dependency.
const PROOF: &[&str] =
    &["dstack-testkit", "dstack-enclave-init", "dstack-sim", "dstack-harness", "dstack-fuzz-targets", "dstack-benches", "xtask"];

/// Independent oracles of tests: never linked into a product.
const TESTS_ONLY: &[&str] = &["shamir_secret_sharing", "voprf", "proptest", "criterion"];

/// Crates inside a fence of deny.toml (which knows no dev-dependencies) for their tests alone.
const FENCED_FOR_TESTS: &[(&str, &str)] = &[("dstack-client", "axum"), ("dstack-util", "axum")];

/// All findings of the workspace at `root`.
pub(crate) fn check(root: &Path) -> anyhow::Result<Vec<String>> {
    let packages = packages(root)?;
    let fences = fences(root)?;
    let mut findings = Vec::new();
    for package in &packages {
        findings.extend(arrow_findings(package));
        findings.extend(fence_findings(package, &fences));
    }
    Ok(findings)
}

fn arrow_findings(package: &Package) -> Vec<String> {
    let place = package.folder.join("Cargo.toml");
    let place = place.display();
    if PROOF.contains(&package.name.as_str()) {
        return Vec::new();
    }
    let Some(short) = package.name.strip_prefix("dstack-") else {
        return vec![format!("{place}: package {} is not named dstack-…", package.name)];
    };
    let allowed: Vec<&str> = if GROUND.contains(&short) {
        Vec::new()
    } else {
        match ARROWS.iter().find(|(name, _)| *name == short) {
            Some((_, allowed)) => allowed.iter().chain(GROUND).copied().collect(),
            None => return vec![format!("{place}: {} stands in no row of the table of arrows", package.name)],
        }
    };
    let ours = package.uses.iter().filter(|name| name.starts_with("dstack-") || PROOF.contains(&name.as_str()));
    let wrong = ours.filter(|name| !name.strip_prefix("dstack-").is_some_and(|short| allowed.contains(&short)));
    wrong.map(|name| format!("{place}: {} may not depend on {name} (style: workspace, table of arrows)", package.name)).collect()
}

fn fence_findings(package: &Package, fences: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let place = package.folder.join("Cargo.toml");
    let place = place.display();
    let fenced = package.uses.iter().filter_map(|name| fences.get(name).map(|wrappers| (name, wrappers)));
    let for_tests = |name: &str| FENCED_FOR_TESTS.contains(&(package.name.as_str(), name));
    let outside = fenced.filter(|(name, wrappers)| !wrappers.contains(&package.name) || for_tests(name));
    let outside = outside.map(|(name, wrappers)| format!("{place}: {name} is fenced to {} (deny.toml)", wrappers.join(", ")));
    let product = !PROOF.contains(&package.name.as_str());
    let oracles = package.uses.iter().filter(|name| product && TESTS_ONLY.contains(&name.as_str()));
    outside.chain(oracles.map(|name| format!("{place}: {name} is for tests only"))).collect()
}

/// `[bans] deny` of deny.toml: crate name to the crates that may use it directly.
fn fences(root: &Path) -> anyhow::Result<BTreeMap<String, Vec<String>>> {
    let settings = read_toml(&root.join("deny.toml"))?;
    let rows = settings.get("bans").and_then(|bans| bans.get("deny")).and_then(Value::as_array).context("deny.toml has [bans] deny")?;
    let mut fences = BTreeMap::new();
    for row in rows {
        let name = row.get("crate").and_then(Value::as_str).context("a row of [bans] deny names its crate")?;
        let wrappers = row.get("wrappers").and_then(Value::as_array).into_iter().flatten();
        fences.insert(name.to_owned(), wrappers.filter_map(Value::as_str).map(str::to_owned).collect());
    }
    Ok(fences)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, uses: &[&str]) -> Package {
        let uses = uses.iter().map(ToString::to_string).collect();
        Package { name: name.into(), folder: "x".into(), uses }
    }

    #[test]
    fn refuses_an_arrow_that_is_not_in_the_table() {
        assert_eq!(arrow_findings(&package("dstack-attest", &["dstack-protocol", "serde"])), Vec::<String>::new());
        assert_eq!(arrow_findings(&package("dstack-attest", &["dstack-policy"])).len(), 1);
        assert_eq!(arrow_findings(&package("dstack-protocol", &["dstack-secret"])).len(), 1);
        assert_eq!(arrow_findings(&package("dstack-node", &["dstack-testkit"])).len(), 1);
        assert_eq!(arrow_findings(&package("dstack-testkit", &["dstack-node"])), Vec::<String>::new());
        assert_eq!(arrow_findings(&package("dstack-newcomer", &[])).len(), 1);
        assert_eq!(arrow_findings(&package("newcomer", &[])).len(), 1);
    }

    #[test]
    fn refuses_a_fenced_crate_outside_its_fence() {
        let fences = BTreeMap::from([("sled".to_string(), vec!["dstack-storage".to_string()])]);
        assert!(fence_findings(&package("dstack-storage", &["sled"]), &fences).is_empty());
        assert_eq!(fence_findings(&package("dstack-node", &["sled"]), &fences).len(), 1);
        assert_eq!(fence_findings(&package("dstack-threshold", &["voprf"]), &fences).len(), 1);
        assert!(fence_findings(&package("dstack-benches", &["criterion"]), &fences).is_empty());
    }
}
