//! Every vector of platform `nitro`, real and derived: outcome, class, identity of the real ones; and the wrapped forms
//! in which dstack publishes them. Owns: nothing but the comparison. Source: the vectors' README.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use dstack_attest::nitro::{self, VerifiedDocument};
use dstack_attest::wire::{Attestation, PlatformEvidence};
use dstack_attest::{AttestError, TrustRoots};
use dstack_protocol::UnixMillis;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::PathBuf;

struct Vectors {
    dir: PathBuf,
    list: Vec<Value>,
}

/// The vectors, or none where they are not installed (in CI they have to be).
fn vectors() -> Option<Vectors> {
    let beside = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/vectors");
    let dir = std::env::var_os("DSTACK_VECTORS").map_or_else(|| PathBuf::from(beside), PathBuf::from);
    let Ok(manifest) = std::fs::read(dir.join("manifest.json")) else {
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "no vectors at {}", dir.display());
        println!("skipped: no vectors at {}", dir.display());
        return None;
    };
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let list = manifest["vectors"].as_array().unwrap().iter().filter(|v| v["platform"] == "nitro").cloned().collect();
    Some(Vectors { dir, list })
}

impl Vectors {
    fn real(&self, id: &str) -> &Value {
        self.list.iter().find(|v| v["id"] == id).unwrap()
    }

    /// The file of that role, the base's where the vector has none, checked against its listed hash.
    fn file(&self, vector: &Value, role: &str) -> Option<Vec<u8>> {
        let entry = match (&vector["files"][role], &vector["base"]) {
            (Value::Null, Value::String(base)) => &self.real(base)["files"][role],
            (entry, _) => entry,
        };
        let path = entry["path"].as_str()?;
        let bytes = std::fs::read(self.dir.join(path)).unwrap();
        assert_eq!(hex::encode(Sha256::digest(&bytes)), entry["sha256"].as_str().unwrap(), "{path}");
        Some(bytes)
    }

    fn judge(&self, vector: &Value) -> Result<VerifiedDocument, AttestError> {
        let document = self.file(vector, "document").unwrap();
        let roots = match self.file(vector, "trust_root") {
            Some(der) => TrustRoots::none().with_software_root(&der)?,
            None => TrustRoots::production(),
        };
        let verified = nitro::verify(&document, &roots, millis(vector["valid_at"].as_str().unwrap()))?;
        let expected = &vector["context"]["expected"];
        let wanted = |name: &str| expected[name].as_str().map(|text| hex::decode(text).unwrap());
        if wanted("nonce").is_some_and(|nonce| verified.nonce() != Some(&nonce)) {
            return Err(AttestError::Nonce);
        }
        if wanted("user_data").is_some_and(|data| verified.user_data() != Some(&data)) {
            return Err(AttestError::UserData);
        }
        Ok(verified)
    }
}

/// RFC 3339 in UTC, whole seconds.
fn millis(text: &str) -> UnixMillis {
    let field = |range: std::ops::Range<usize>| text[range].parse::<i64>().unwrap();
    assert!(text.len() == 20 && text.ends_with('Z'), "{text}");
    let (year, month, day) = (field(0..4), field(5..7), field(8..10));
    // days of the proleptic Gregorian calendar, years beginning in March
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1 - 719_468;
    let seconds = ((days * 24 + field(11..13)) * 60 + field(14..16)) * 60 + field(17..19);
    UnixMillis(u64::try_from(seconds).unwrap() * 1000)
}

#[test]
fn every_vector_has_its_outcome_and_class() {
    let Some(vectors) = vectors() else { return };
    let (mut right, mut wrong, mut differ) = (0, Vec::new(), Vec::new());
    for vector in &vectors.list {
        let id = vector["id"].as_str().unwrap();
        let expect = &vector["expect"];
        let (got, detail) = match vectors.judge(vector) {
            Ok(_) => ("ok", String::new()),
            Err(error) => (error.class().as_str(), error.to_string()),
        };
        let is_right = match expect["result"].as_str().unwrap() {
            "ok" => got == "ok",
            _ => {
                let classes: Vec<&str> = match (&expect["class_any"], &expect["class"]) {
                    (Value::Array(any), _) => any.iter().map(|class| class.as_str().unwrap()).collect(),
                    (_, class) => vec![class.as_str().unwrap()],
                };
                got != "ok" && (classes.contains(&got) || classes == ["any"])
            }
        };
        let line = format!("{id}: got {got} ({detail}), want {expect}");
        match (is_right, expect["level"].as_str().unwrap_or("required")) {
            (true, _) => right += 1,
            (false, "recommended") => differ.push(line),
            (false, _) => wrong.push(line),
        }
    }
    println!("{right} right, {} wrong, {} recommended differ", wrong.len(), differ.len());
    println!("{}", differ.join("\n"));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(differ.is_empty(), "none is known to differ: {}", differ.join("\n"));
    assert!(right > 150, "only {right} judged");
}

#[test]
fn real_documents_have_their_identity() {
    let Some(vectors) = vectors() else { return };
    let mut compared = 0;
    for vector in vectors.list.iter().filter(|v| v["kind"] == "real" && v["expect"]["result"] == "ok") {
        let id = &vector["id"];
        let verified = vectors.judge(vector).unwrap();
        let identity = &vector["identity"];
        let text = |bytes: Option<&[u8]>| bytes.map_or(Value::Null, |bytes| Value::String(hex::encode(bytes)));
        assert_eq!(identity["module_id"], verified.module_id(), "{id}");
        assert_eq!(identity["timestamp_ms"].as_u64(), Some(verified.timestamp().0), "{id}");
        assert_eq!(identity["user_data"], text(verified.user_data()), "{id}");
        assert_eq!(identity["nonce"], text(verified.nonce()), "{id}");
        assert_eq!(identity["public_key"], text(verified.public_key()), "{id}");
        let pcrs = identity["pcrs"].as_object().unwrap();
        assert_eq!(pcrs.len(), verified.pcrs().iter().count(), "{id}");
        for (index, value) in verified.pcrs().iter() {
            assert_eq!(pcrs[&index.to_string()], hex::encode(value), "{id} pcr{index}");
        }
        let leaf_end = millis(identity["leaf_not_after"].as_str().unwrap()).0;
        assert_eq!(verified.earliest_expiry().0, leaf_end.min(verified.timestamp().0 + 3_600_000), "{id}");
        assert!(!verified.software_root(), "{id}");
        compared += 1;
    }
    assert!(compared >= 5, "{compared}");
}

#[test]
fn dstacks_published_attestation_is_read_as_the_reference_says() {
    let Some(vectors) = vectors() else { return };
    let vector = vectors.real("nitro-dstack-b");
    let wrapped = vectors.file(vector, "wrapped").unwrap();
    let attestation = Attestation::decode(&wrapped).unwrap();
    assert_eq!(attestation.encode(), wrapped, "the bytes come back");
    assert_eq!(Attestation::decode(&attestation.encode_v1()).unwrap(), attestation);
    let PlatformEvidence::NitroEnclave { nsm_quote } = &attestation.platform else { panic!("{:?}", attestation.platform.platform()) };
    assert_eq!(Some(nsm_quote), vectors.file(vector, "document").as_ref());
    let verified = nitro::verify(nsm_quote, &TrustRoots::production(), UnixMillis(1_766_678_659_346)).unwrap();
    // reference, section 12
    assert_eq!(verified.module_id(), "i-0827e799ec9232d44-enc019b5640fdf630d6");
    assert_eq!(hex::encode(verified.image_hash()), "1894b0b29e94a9db16e88a2914f0923e52bb16c08bf3bb484df786a147e2eb79");
    assert_eq!(verified.report_data(), Ok(&attestation.report_data));
    assert_eq!(attestation.runtime_events[0].event, "app-id");
    assert_eq!(hex::encode(&attestation.runtime_events[0].payload), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4");
}

#[test]
fn a_software_root_is_told_apart() {
    let Some(vectors) = vectors() else { return };
    let good = vectors.list.iter().find(|v| v["id"].as_str().unwrap().ends_with("/own-root-good")).unwrap();
    assert!(vectors.judge(good).unwrap().software_root());
}

#[test]
fn every_cut_and_every_changed_byte_is_refused() {
    let Some(vectors) = vectors() else { return };
    let vector = vectors.real("nitro-dstack-a");
    let (document, now) = (vectors.file(vector, "document").unwrap(), millis(vector["valid_at"].as_str().unwrap()));
    let roots = TrustRoots::production();
    let untouched = nitro::verify(&document, &roots, now).unwrap();
    for end in 0..document.len() {
        assert!(nitro::verify(&document[..end], &roots, now).is_err(), "cut to {end}");
    }
    let mut changed = document.clone();
    // the unprotected header is the one part that is not signed; it is `a0` at offset 6
    for at in (0..document.len()).filter(|at| *at != 6) {
        for flip in [0x01, 0x80] {
            changed[at] ^= flip;
            assert!(nitro::verify(&changed, &roots, now).is_err(), "byte {at} ^ {flip:#x}");
            changed[at] ^= flip;
        }
    }
    assert_eq!(nitro::verify(&changed, &roots, now), Ok(untouched));
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_refused_without_a_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400), sign1: bool) {
        let mut bytes = bytes;
        if sign1 {
            bytes.splice(0..0, [0x84, 0x44, 0xa1, 0x01, 0x38, 0x22, 0xa0, 0x59, 0x01, 0x40, 0xbf]);
        }
        proptest::prop_assert!(nitro::verify(&bytes, &TrustRoots::production(), UnixMillis(1_766_678_659_346)).is_err());
    }
}
