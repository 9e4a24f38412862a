//! `dstack evidence` over real vectors and live sockets: chains of checks, JSON that fits its schema, servers.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn dstack(arguments: &[&str]) -> (Output, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_dstack")).args(arguments).output().unwrap();
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    (output, text)
}

/// The vectors' folder, or nothing where it is absent (then CI fails).
fn vectors() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/vectors");
    let folder = std::env::var_os("DSTACK_VECTORS").map_or(beside, PathBuf::from);
    if folder.join("manifest.json").exists() {
        return Some(folder);
    }
    assert!(std::env::var_os("CI").is_none(), "CI has the vectors: {}", folder.display());
    eprintln!("skipped: no vectors in {}", folder.display());
    None
}

/// Path of a role's file of the first real vector of a platform that is judged good, and its time.
fn real(folder: &Path, platform: &str, roles: &[&str]) -> (Vec<String>, String) {
    let manifest: Value = serde_json::from_slice(&std::fs::read(folder.join("manifest.json")).unwrap()).unwrap();
    let good = |vector: &&Value| vector["platform"] == platform && vector["kind"] == "real" && vector["expect"]["result"] == "ok";
    let vector = manifest["vectors"].as_array().unwrap().iter().find(good).unwrap();
    let path = |role: &&str| folder.join(vector["files"][*role]["path"].as_str().unwrap()).to_str().unwrap().to_owned();
    (roles.iter().map(path).collect(), vector["valid_at"].as_str().unwrap().to_owned())
}

/// Holds `value` against the part of JSON Schema that docs/evidence.schema.json uses; answers what does not fit.
fn misfits(schema: &Value, value: &Value, at: &str) -> Vec<String> {
    let mut found = Vec::new();
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let types: Vec<&str> = match &schema["type"] {
        Value::String(one) => vec![one],
        Value::Array(several) => several.iter().map(|one| one.as_str().unwrap()).collect(),
        _ => vec![kind],
    };
    if !types.contains(&kind) {
        found.push(format!("{at}: {kind}, not {types:?}"));
    }
    if schema.get("const").is_some_and(|only| only != value) || schema["enum"].as_array().is_some_and(|all| !all.contains(value)) {
        found.push(format!("{at}: {value}"));
    }
    if let Value::Object(members) = value {
        for name in schema["required"].as_array().into_iter().flatten() {
            if !members.contains_key(name.as_str().unwrap()) {
                found.push(format!("{at}: lacks {name}"));
            }
        }
        for (name, member) in members {
            match schema["properties"].get(name) {
                Some(inner) => found.extend(misfits(inner, member, &format!("{at}.{name}"))),
                None if schema["additionalProperties"] == false => found.push(format!("{at}: has {name}")),
                None => {}
            }
        }
    }
    for item in value.as_array().into_iter().flatten().filter(|_| schema.get("items").is_some()) {
        found.extend(misfits(&schema["items"], item, &format!("{at}[]")));
    }
    found
}

fn fits_the_schema(text: &str) -> Value {
    let schema = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/evidence.schema.json")).unwrap();
    let (schema, value): (Value, Value) = (serde_json::from_slice(&schema).unwrap(), serde_json::from_str(text).unwrap());
    assert_eq!(misfits(&schema, &value, "$"), Vec::<String>::new(), "{text}");
    value
}

#[test]
fn the_schema_check_notices_what_does_not_fit() {
    let schema =
        serde_json::json!({"type": "object", "required": ["a"], "additionalProperties": false, "properties": {"a": {"type": "string"}}});
    assert_eq!(misfits(&schema, &serde_json::json!({"a": "x"}), "$").len(), 0);
    assert_eq!(misfits(&schema, &serde_json::json!({"a": 1, "b": 2}), "$").len(), 2);
    assert_eq!(misfits(&schema, &serde_json::json!({}), "$").len(), 1);
}

#[test]
fn a_real_quote_and_its_tampered_copy_are_told_apart() {
    let Some(folder) = vectors() else { return };
    let (paths, at) = real(&folder, "tdx", &["quote", "collateral"]);
    let good = ["evidence", "verify", &paths[0], "--collateral", &paths[1], "--at", &at, "--json"];
    let (output, text) = dstack(&good);
    let value = fits_the_schema(&text);
    assert!(output.status.success() && value["result"] == "ok" && value["refusal"].is_null(), "{text}");
    assert_eq!(value["form"], "bare TDX quote");
    assert_eq!(value["proven"]["tcb_status"], "UpToDate");

    let dir = tempfile::tempdir().unwrap();
    let mut bytes = std::fs::read(&paths[0]).unwrap();
    // Inside the TD report: what the attestation key signed.
    bytes[200] ^= 1;
    let tampered = dir.path().join("quote");
    std::fs::write(&tampered, bytes).unwrap();
    let (output, text) = dstack(&["evidence", "verify", tampered.to_str().unwrap(), "--collateral", &paths[1], "--at", &at, "--json"]);
    let value = fits_the_schema(&text);
    assert_eq!((output.status.code(), value["refusal"]["class"].as_str()), (Some(1), Some("sig.body")), "{text}");

    // As text: the same forms that people paste.
    let hex = dir.path().join("hex");
    std::fs::write(&hex, hex::encode(std::fs::read(&paths[0]).unwrap())).unwrap();
    let (output, text) = dstack(&["evidence", "verify", hex.to_str().unwrap(), "--collateral", &paths[1], "--at", &at]);
    assert!(output.status.success() && text.starts_with("result=ok\n"), "{text}");
}

#[test]
fn a_real_document_is_verified_shown_and_explained() {
    let Some(folder) = vectors() else { return };
    let (paths, at) = real(&folder, "nitro", &["document"]);
    let (output, text) = dstack(&["evidence", "verify", &paths[0], "--at", &at, "--json"]);
    let value = fits_the_schema(&text);
    assert!(output.status.success() && value["proven"]["pcrs"]["0"].is_string(), "{text}");
    // Years later the document is too old; the text names both sides.
    let (output, text) = dstack(&["evidence", "explain", &paths[0], "--at", "2035-01-01T00:00:00Z"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("expected:") && text.contains("got:") && text.contains("time."), "{text}");
    let (output, text) = dstack(&["evidence", "show", &paths[0], "--json"]);
    let shown: Value = serde_json::from_str(&text).unwrap();
    assert!(output.status.success() && shown["verified"] == false, "{text}");
    assert_eq!(shown["claims"]["module_id"], value["proven"]["module_id"]);
}
