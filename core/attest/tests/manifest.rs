//! The runner of manifests has to notice what is wrong: each test is a small manifest with one fault.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::path::PathBuf;

use dstack_attest::manifest::{ManifestError, Report, check};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// A folder with a manifest in it.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn file(&self, name: &str, bytes: &[u8]) -> Value {
        std::fs::write(self.0.path().join(name), bytes).unwrap();
        json!({ "path": name, "size": bytes.len(), "sha256": hex::encode(Sha256::digest(bytes)) })
    }

    fn manifest(&self, vectors: &[Value]) -> PathBuf {
        let path = self.0.path().join("manifest.json");
        std::fs::write(&path, json!({ "format": 1, "roots": [], "vectors": vectors }).to_string()).unwrap();
        path
    }

    fn run(&self, vectors: &[Value]) -> Report {
        check(&self.manifest(vectors), None).unwrap()
    }

    /// A firmware log that is none: refused as `parse.malformed`.
    fn vector(&self, class: &str) -> Value {
        json!({ "id": "v", "platform": "ccel", "kind": "real", "files": { "ccel": self.file("log.bin", b"no log") },
            "valid_at": null, "expect": { "result": "reject", "class": class } })
    }
}

#[test]
fn an_expected_class_is_right_and_another_is_wrong() {
    let folder = Folder::new();
    let right = folder.run(&[folder.vector("parse.malformed")]);
    assert_eq!((right.right, right.wrong, right.passed()), (1, 0, true));
    let wrong = folder.run(&[folder.vector("sig.body")]);
    assert_eq!((wrong.right, wrong.wrong, wrong.passed()), (0, 1, false));
    assert!(wrong.failures[0].starts_with("v: refused as parse.malformed"), "{:?}", wrong.failures);
}

#[test]
fn a_refusal_where_acceptance_is_expected_is_wrong() {
    let folder = Folder::new();
    let mut vector = folder.vector("parse.malformed");
    vector["expect"] = json!({ "result": "ok", "class": null });
    assert_eq!(folder.run(&[vector]).wrong, 1);
}

#[test]
fn a_file_that_is_not_the_manifests_is_wrong() {
    let folder = Folder::new();
    let vector = folder.vector("parse.malformed");
    std::fs::write(folder.0.path().join("log.bin"), b"no lag").unwrap();
    let report = folder.run(std::slice::from_ref(&vector));
    assert_eq!((report.right, report.wrong), (0, 1), "{:?}", report.failures);

    let mut outside = vector;
    outside["files"]["ccel"]["path"] = json!("../log.bin");
    let report = folder.run(&[outside]);
    assert!(report.failures[0].contains("leads out of"), "{:?}", report.failures);
}

#[cfg(unix)]
#[test]
fn a_link_out_of_the_folder_is_not_followed() {
    let (folder, elsewhere) = (Folder::new(), Folder::new());
    let file = elsewhere.file("secret.bin", b"no log");
    let mut vector = folder.vector("parse.malformed");
    std::os::unix::fs::symlink(elsewhere.0.path().join("secret.bin"), folder.0.path().join("link.bin")).unwrap();
    vector["files"]["ccel"] = file;
    vector["files"]["ccel"]["path"] = json!("link.bin");
    assert!(folder.run(&[vector]).failures[0].contains("leads out of"));
}

#[test]
fn derived_vectors_take_files_from_their_base_and_skip_absent_ones() {
    let folder = Folder::new();
    let base = folder.vector("parse.malformed");
    let derived = |level: &str, class: &str| {
        json!({ "id": "d", "platform": "ccel", "kind": "derived", "base": "v", "files": {}, "valid_at": null,
            "expect": { "result": "reject", "class": class, "class_any": [class], "level": level } })
    };
    let report = folder.run(&[base.clone(), derived("required", "parse.malformed"), derived("recommended", "sig.body")]);
    assert_eq!((report.right, report.wrong, report.recommended_differ), (2, 0, 1), "{:?}", report.failures);

    let mut absent = derived("required", "parse.malformed");
    absent["files"] = json!({ "ccel": { "path": "absent.bin", "size": 1, "sha256": "" } });
    let report = folder.run(&[base.clone(), absent.clone()]);
    assert_eq!((report.right, report.skipped), (1, 1));

    absent["kind"] = json!("real");
    assert_eq!(folder.run(&[absent]).wrong, 1, "a real vector may not be absent");
    let mut orphan = derived("required", "parse.malformed");
    orphan["base"] = json!("nobody");
    assert_eq!(folder.run(&[orphan]).wrong, 1);
}

#[test]
fn nothing_judged_is_not_passed() {
    let folder = Folder::new();
    let path = folder.manifest(&[folder.vector("parse.malformed")]);
    let report = check(&path, Some(&["tdx"])).unwrap();
    assert!(!report.passed());
    assert_eq!(report.not_judged["tdx"], 0);
}

#[test]
fn a_manifest_of_another_shape_is_an_error() {
    let folder = Folder::new();
    let path = folder.0.path().join("manifest.json");
    assert!(matches!(check(&path, None), Err(ManifestError::Unreadable { .. })));
    std::fs::write(&path, b"{}").unwrap();
    assert!(matches!(check(&path, None), Err(ManifestError::Malformed { .. })));
    std::fs::write(&path, br#"{"format":2,"vectors":[]}"#).unwrap();
    assert_eq!(check(&path, None), Err(ManifestError::Format { got: 2 }));
}
