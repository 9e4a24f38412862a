//! Published evidence of real machines. Owns: finding the files, which lie outside the repository. Never: needed; without them
//! the benchmarks of real evidence are left out, and that is said.

use std::path::{Path, PathBuf};

use base64::{Engine, engine::general_purpose::STANDARD};
use dstack_attest::{CollateralBundle, TdxCollateral};
use dstack_protocol::UnixMillis;

/// Evidence of a real TD, with the collateral and time at which it holds.
pub struct RealTd {
    /// The quote.
    pub quote: Vec<u8>,
    /// dstack's event log, JSON.
    pub event_log: Vec<u8>,
    /// Its platform's collateral.
    pub collateral: TdxCollateral,
    /// The same as a bundle.
    pub bundle: CollateralBundle,
    /// When it is judged.
    pub now: UnixMillis,
}

/// A real NSM document and the time at which it holds.
pub struct RealDocument {
    /// The document.
    pub document: Vec<u8>,
    /// When it is judged.
    pub now: UnixMillis,
}

/// A real SEV-SNP report with its certificates and the time at which they hold.
pub struct RealReport {
    /// The report.
    pub report: Vec<u8>,
    /// Certificate of the key that signed it.
    pub vek: Vec<u8>,
    /// Its issuer and the root.
    pub issuers: Vec<Vec<u8>>,
    /// When it is judged.
    pub now: UnixMillis,
}

/// A TD of dstack with its event log.
#[must_use]
pub fn real_td() -> Option<RealTd> {
    let folder = folder()?;
    let entry = entry(&folder, "dstack-tdx-mpc-06")?;
    let quote = file(&folder, &entry, "quote")?;
    let json = file(&folder, &entry, "collateral")?;
    let fmspc = hex::encode(dstack_attest::tdx::claimed_fmspc(&quote).ok()?);
    let text = String::from_utf8(json.clone()).ok()?;
    let bundle = CollateralBundle::parse(format!("{{\"format\":1,\"tdx\":{{\"{fmspc}\":{text}}}}}").as_bytes()).ok()?;
    let event_log = file(&folder, &entry, "event_log")?;
    Some(RealTd { quote, event_log, collateral: TdxCollateral::parse(&json).ok()?, bundle, now: valid_at(&entry)? })
}

/// A document of an enclave that runs dstack.
#[must_use]
pub fn real_document() -> Option<RealDocument> {
    let folder = folder()?;
    let entry = entry(&folder, "nitro-dstack-a")?;
    Some(RealDocument { document: file(&folder, &entry, "document")?, now: valid_at(&entry)? })
}

/// A report of a guest of dstack.
#[must_use]
pub fn real_report() -> Option<RealReport> {
    let folder = folder()?;
    let entry = entry(&folder, "snp-milan-dstack")?;
    let pem = String::from_utf8(file(&folder, &entry, "ca_chain")?).ok()?;
    let body = |text: &str| STANDARD.decode(text.split_once("-----END")?.0.split_ascii_whitespace().collect::<String>()).ok();
    let issuers = pem.split("-----BEGIN CERTIFICATE-----").skip(1).map(body).collect::<Option<_>>()?;
    Some(RealReport { report: file(&folder, &entry, "report")?, vek: file(&folder, &entry, "vek")?, issuers, now: valid_at(&entry)? })
}

#[allow(clippy::disallowed_methods, reason = "a benchmark finds its files through the environment")]
fn folder() -> Option<PathBuf> {
    let beside = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/vectors");
    let folder = std::env::var("DSTACK_VECTORS").map_or_else(|_| beside(), PathBuf::from);
    if folder.join("manifest.json").exists() {
        return Some(folder);
    }
    println!("left out: no vectors at {}", folder.display());
    None
}

fn entry(folder: &Path, id: &str) -> Option<serde_json::Value> {
    let manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("manifest.json")).ok()?).ok()?;
    manifest.get("vectors")?.as_array()?.iter().find(|vector| vector["id"] == id).cloned()
}

fn file(folder: &Path, entry: &serde_json::Value, role: &str) -> Option<Vec<u8>> {
    std::fs::read(folder.join(entry["files"][role]["path"].as_str()?)).ok()
}

fn valid_at(entry: &serde_json::Value) -> Option<UnixMillis> {
    dstack_attest::tdx::millis_of_rfc3339(entry["valid_at"].as_str()?).ok().map(UnixMillis)
}
