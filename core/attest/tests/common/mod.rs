//! Finds the published vectors for the tests. They lie outside the repository; without them a test says so and passes, except
//! where `CI` is set.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, dead_code, reason = "tests; each uses a part of this")]

use std::path::PathBuf;

use dstack_attest::{CollateralBundle, TdxCollateral};
use serde_json::{Value, json};
use x509_parser::prelude::{CertificateRevocationList, FromDer as _};

/// The manifest, or `None` where there is none.
#[allow(clippy::disallowed_methods, reason = "a test finds its files through the environment")]
pub(crate) fn manifest_path() -> Option<PathBuf> {
    let beside = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/vectors");
    let folder = std::env::var("DSTACK_VECTORS").map_or_else(|_| beside(), PathBuf::from);
    let path = folder.join("manifest.json");
    if path.exists() {
        return Some(path);
    }
    assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "the vectors have to be there in CI: set DSTACK_VECTORS");
    println!("skipped: no vectors at {}", path.display());
    None
}

/// All vectors, as the manifest lists them.
pub(crate) struct Vectors {
    folder: PathBuf,
    list: Vec<Value>,
}

pub(crate) fn vectors() -> Option<Vectors> {
    let path = manifest_path()?;
    let mut manifest: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let Value::Array(list) = manifest["vectors"].take() else { unreachable!("a manifest has vectors") };
    Some(Vectors { folder: path.parent().unwrap().to_path_buf(), list })
}

impl Vectors {
    pub(crate) fn of<'v>(&'v self, platform: &'v str) -> impl Iterator<Item = &'v Value> {
        self.list.iter().filter(move |vector| vector["platform"] == platform)
    }

    pub(crate) fn file(&self, vector: &Value, role: &str) -> Vec<u8> {
        std::fs::read(self.folder.join(vector["files"][role]["path"].as_str().unwrap())).unwrap()
    }
}

/// A bundle of one platform.
pub(crate) fn bundle(fmspc: &str, collateral: &[u8]) -> CollateralBundle {
    let collateral: Value = serde_json::from_slice(collateral).unwrap();
    let json = json!({ "format": 1, "tdx": { fmspc.to_lowercase(): collateral } });
    CollateralBundle::parse(json.to_string().as_bytes()).unwrap()
}

/// Milliseconds of `2025-07-01T00:00:00Z`.
pub(crate) fn millis(text: &str) -> u64 {
    dstack_attest::tdx::millis_of_rfc3339(text).unwrap()
}

/// The first and the last moment of a TD's collateral: all of its parts were issued, none is over.
pub(crate) fn moments_ms(collateral: &[u8]) -> (u64, u64) {
    let collateral = TdxCollateral::parse(collateral).unwrap();
    let of_text = |text: &str| {
        let text: Value = serde_json::from_str(text).unwrap();
        ["issueDate", "nextUpdate"].map(|name| millis(text[name].as_str().unwrap()))
    };
    let of_list = |der: &[u8]| {
        let (_, list) = CertificateRevocationList::from_der(der).unwrap();
        [list.last_update(), list.next_update().unwrap()].map(|date| u64::try_from(date.timestamp()).unwrap() * 1000)
    };
    let dates =
        [of_text(&collateral.tcb_info), of_text(&collateral.qe_identity), of_list(&collateral.root_ca_crl), of_list(&collateral.pck_crl)];
    let (first, last) = (dates.map(|[issued, _]| issued), dates.map(|[_, over]| over));
    (first.into_iter().max().unwrap(), last.into_iter().min().unwrap() + 999)
}
