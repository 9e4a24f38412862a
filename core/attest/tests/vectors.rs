//! Runs the published vectors through the verifiers: every expectation of the manifest, class included, and the identity of the
//! real ones. The vectors lie outside the repository; without them the tests say so and pass, except where `CI` is set.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use dstack_attest::{TdxCollateral, Trace, TrustRoots, manifest, tdx};
use serde_json::Value;

fn run(platforms: &[&str]) -> Option<manifest::Report> {
    let report = manifest::check(&common::manifest_path()?, Some(platforms)).unwrap();
    for line in report.failures.iter().chain(&report.differing) {
        println!("{line}");
    }
    println!(
        "{} right, {} wrong, {} recommended differ, {} skipped",
        report.right, report.wrong, report.recommended_differ, report.skipped
    );
    Some(report)
}

#[test]
fn all_td_vectors_are_judged_as_expected() {
    let Some(report) = run(&["tdx", "dstack-tdx", "gcp-tdx"]) else { return };
    assert_eq!((report.wrong, report.skipped), (0, 0));
    assert_eq!(report.right + report.recommended_differ, 489);
}

#[test]
fn all_enclave_vectors_are_judged_as_expected() {
    let Some(report) = run(&["nitro"]) else { return };
    assert_eq!((report.wrong, report.skipped), (0, 0));
    assert_eq!(report.right + report.recommended_differ, 164);
}

#[test]
fn all_tpm_vectors_are_judged_as_expected() {
    for (platform, count) in [("gcp-tpm", 58), ("nitro-tpm", 78), ("gce-tpm", 1), ("gce-ak-cert", 4), ("tpm-log", 2)] {
        let Some(report) = run(&[platform]) else { return };
        assert_eq!((report.right, report.wrong, report.recommended_differ, report.skipped), (count, 0, 0, 0), "{platform}");
    }
}

#[test]
fn firmware_logs_replay_and_sgx_is_refused() {
    let Some(report) = run(&["ccel", "sgx"]) else { return };
    assert_eq!((report.right, report.wrong), (5, 0));
}

#[test]
fn all_snp_vectors_are_judged_as_expected() {
    let Some(report) = run(&["sev-snp"]) else { return };
    assert_eq!((report.right, report.wrong, report.recommended_differ, report.skipped), (146, 0, 0, 0));
}

#[test]
fn the_azure_vector_is_judged_as_expected() {
    let Some(report) = run(&["azure-tdx"]) else { return };
    assert_eq!((report.right, report.wrong), (1, 0));
}

#[test]
fn other_platforms_are_named_and_not_judged() {
    let Some(report) = run(&["no-such-platform"]) else { return };
    assert!(!report.passed());
    assert_eq!(report.not_judged["no-such-platform"], 0);
}

/// The id of the check that refuses a TD's vector.
fn refusing_check(vectors: &common::Vectors, vector: &Value) -> &'static str {
    let base = vectors.of("tdx").find(|base| base["id"] == vector["base"]).unwrap();
    let file = |role: &str| {
        let holder = if vector["files"].get(role).is_some() { vector } else { base };
        holder["files"].get(role).map(|_| vectors.file(holder, role))
    };
    let roots = match file("trust_root") {
        Some(root) => TrustRoots::none().with_software_root(&root).unwrap(),
        None => TrustRoots::production(),
    };
    let collateral = TdxCollateral::parse(&file("collateral").unwrap()).unwrap();
    let (now_ms, trace) = (common::millis(vector["valid_at"].as_str().unwrap()), Trace::new());
    tdx::verify_quote_traced(&file("quote").unwrap(), &collateral, now_ms, &roots, &trace).unwrap_err();
    trace.entered().last().unwrap().id
}

#[test]
fn each_check_refuses_the_vector_it_names() {
    let Some(vectors) = common::vectors() else { return };
    let mut named = 0;
    for check in tdx::CHECKS {
        let Some(id) = check.test.strip_prefix("vector:") else { continue };
        let vector = vectors.of("tdx").find(|vector| vector["id"] == id).unwrap_or_else(|| panic!("no vector {id}"));
        assert_eq!(refusing_check(&vectors, vector), check.id, "{id}");
        named += 1;
    }
    assert_eq!(named, 12);
}
