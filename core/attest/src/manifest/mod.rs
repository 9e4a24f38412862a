//! Runs a manifest of attestation vectors through the verifiers. Owns: the manifest's format, which vectors run, the verdicts.
//! Never: reads a file outside the manifest's folder, or one whose size or hash is not the manifest's.
//! Source: the vectors' README ("A real vector", "A derived vector", the policy of `expect.result`).

mod facts;
mod files;
mod judge;
mod vtpm;

use std::{collections::BTreeMap, path::Path};

use serde::Deserialize;

use self::files::{FileError, FileRef, Folder};

/// Largest manifest read.
pub const MANIFEST_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Platforms this runner judges. `ccel` and `sgx` are not evidence that is served: the first is replayed, the second must be refused.
pub const PLATFORMS: [&str; 13] = [
    "tdx",
    "dstack-tdx",
    "gcp-tdx",
    "nitro",
    "ccel",
    "sgx",
    "gcp-tpm",
    "gce-tpm",
    "gce-ak-cert",
    "nitro-tpm",
    "tpm-log",
    "sev-snp",
    "azure-tdx",
];

/// Why a manifest could not be run at all. The caller's fault: the path or the manifest is wrong.
#[non_exhaustive]
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ManifestError {
    /// The manifest cannot be read.
    #[error("manifest {path} cannot be read: {why}")]
    Unreadable {
        /// Its path.
        path: String,
        /// The system's words.
        why: String,
    },
    /// The manifest is larger than it may be.
    #[error("manifest has {size_bytes} bytes, at most {limit_bytes} are read")]
    TooLarge {
        /// Its size.
        size_bytes: u64,
        /// The cap.
        limit_bytes: u64,
    },
    /// The manifest is not JSON of the expected shape.
    #[error("manifest is malformed: {why}")]
    Malformed {
        /// The parser's words.
        why: String,
    },
    /// The manifest has another format number.
    #[error("manifest has format {got}, this reads format 1")]
    Format {
        /// The number found.
        got: u64,
    },
}

/// What a run found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Vectors with the expected outcome.
    pub right: usize,
    /// Real vectors and derived ones of level `required` with another outcome.
    pub wrong: usize,
    /// Derived vectors of level `recommended` with another outcome.
    pub recommended_differ: usize,
    /// Derived vectors whose files are absent.
    pub skipped: usize,
    /// One line for each wrong vector.
    pub failures: Vec<String>,
    /// One line for each differing `recommended` vector.
    pub differing: Vec<String>,
    /// Chosen platforms that are not judged here, with their number of vectors (0: the manifest has none of that name).
    pub not_judged: BTreeMap<String, usize>,
}

impl Report {
    /// Whether something was judged and nothing was wrong.
    #[must_use]
    pub const fn passed(&self) -> bool {
        self.wrong == 0 && self.right > 0
    }
}

#[derive(Deserialize)]
struct Manifest {
    format: u64,
    /// Certificates of the vendors; untrusted here, the product has its own roots.
    #[serde(default)]
    roots: Vec<FileRef>,
    vectors: Vec<Vector>,
}

/// One vector. Members that are notes for people are not read.
#[derive(Deserialize)]
struct Vector {
    id: String,
    platform: String,
    kind: Kind,
    base: Option<String>,
    files: BTreeMap<String, FileRef>,
    valid_at: Option<String>,
    expect: Expect,
    expect_as_tdx: Option<Expect>,
    identity: Option<serde_json::Map<String, serde_json::Value>>,
    context: Option<Context>,
}

#[derive(Deserialize, PartialEq, Eq, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Real,
    Derived,
}

#[derive(Deserialize)]
struct Context {
    expected: Option<BTreeMap<String, String>>,
    trust_root: Option<String>,
}

#[derive(Deserialize)]
struct Expect {
    result: Outcome,
    class: Option<String>,
    class_any: Option<Vec<String>>,
    level: Option<Level>,
    tcb_status: Option<String>,
    advisory_ids: Option<Vec<String>>,
    platform_status: Option<StatusAndAdvisories>,
    qe_status: Option<StatusAndAdvisories>,
}

#[derive(Deserialize)]
struct StatusAndAdvisories {
    status: String,
    advisory_ids: Vec<String>,
}

#[derive(Deserialize, PartialEq, Eq, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Ok,
    Reject,
}

#[derive(Deserialize, PartialEq, Eq, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Level {
    Required,
    Recommended,
}

/// Runs the vectors of `platforms` (all platforms of the manifest when `None`) in `manifest_path`.
/// # Errors
/// [`ManifestError`] when there is nothing to run; a vector that goes wrong is counted, not an error.
pub fn check(manifest_path: &Path, platforms: Option<&[&str]>) -> Result<Report, ManifestError> {
    let manifest = load(manifest_path)?;
    let folder = Folder::of(manifest_path)?;
    let pool = pool(&manifest, &folder)?;
    let by_id: BTreeMap<&str, &Vector> = manifest.vectors.iter().map(|vector| (vector.id.as_str(), vector)).collect();
    let mut report = Report::default();
    for name in platforms.unwrap_or_default() {
        let known = PLATFORMS.contains(name) && manifest.vectors.iter().any(|vector| vector.platform == *name);
        if !known {
            report.not_judged.insert((*name).to_owned(), 0);
        }
    }
    for vector in &manifest.vectors {
        let platform = vector.platform.as_str();
        if platforms.is_some_and(|chosen| !chosen.contains(&platform)) {
            continue;
        }
        if !PLATFORMS.contains(&platform) {
            let count = report.not_judged.entry(platform.to_owned()).or_default();
            *count = count.saturating_add(1);
            continue;
        }
        report.count(vector, run(vector, &by_id, &folder, &pool));
    }
    Ok(report)
}

/// What became of one vector.
enum Verdict {
    Right,
    Skipped,
    Wrong(String),
}

impl Report {
    fn count(&mut self, vector: &Vector, verdict: Verdict) {
        let recommended = vector.kind == Kind::Derived && vector.expect.level == Some(Level::Recommended);
        let counter = match verdict {
            Verdict::Right => &mut self.right,
            Verdict::Skipped => &mut self.skipped,
            Verdict::Wrong(why) if recommended => {
                self.differing.push(format!("{}: {why}", vector.id));
                &mut self.recommended_differ
            }
            Verdict::Wrong(why) => {
                self.failures.push(format!("{}: {why}", vector.id));
                &mut self.wrong
            }
        };
        *counter = counter.saturating_add(1);
    }
}

/// The manifest's DER certificates, which vectors take their intermediates from.
fn pool(manifest: &Manifest, folder: &Folder) -> Result<Vec<Vec<u8>>, ManifestError> {
    let ders = manifest.roots.iter().filter(|file| file.is_der());
    ders.map(|file| folder.read(file).map_err(|error| ManifestError::Malformed { why: error.to_string() })).collect()
}

fn run(vector: &Vector, by_id: &BTreeMap<&str, &Vector>, folder: &Folder, pool: &[Vec<u8>]) -> Verdict {
    let base = match (&vector.base, vector.kind) {
        (Some(base), Kind::Derived) => match by_id.get(base.as_str()) {
            Some(base) => Some(*base),
            // `gcp-bound` is a name without an entry: its vectors list every file
            None if !vector.files.is_empty() => None,
            None => return Verdict::Wrong(format!("its base {base} is not in the manifest")),
        },
        _ => None,
    };
    // `files` lists only what changed; every other role is the base's.
    let mut roles: BTreeMap<&str, &FileRef> =
        base.into_iter().flat_map(|base| &base.files).map(|(role, file)| (role.as_str(), file)).collect();
    roles.extend(vector.files.iter().map(|(role, file)| (role.as_str(), file)));
    let mut contents = BTreeMap::new();
    for (role, file) in roles {
        match folder.read(file) {
            Ok(bytes) => contents.insert(role, bytes),
            Err(FileError::Absent) if vector.kind == Kind::Derived => return Verdict::Skipped,
            Err(error) => return Verdict::Wrong(format!("role {role}: {error}")),
        };
    }
    match judge::judge(vector, &contents, pool) {
        Ok(judged) => compare(vector, &judged),
        Err(why) => Verdict::Wrong(why),
    }
}

fn compare(vector: &Vector, judged: &judge::Judged) -> Verdict {
    let expect = vector.expect_as_tdx.as_ref().unwrap_or(&vector.expect);
    let wrong = match (&judged.result, expect.result) {
        (Ok(()), Outcome::Ok) => None,
        (Ok(()), Outcome::Reject) => Some(format!("accepted, expected {}", wanted(expect))),
        (Err(error), Outcome::Ok) => Some(format!("refused as {} ({error}), expected ok", error.class())),
        (Err(error), Outcome::Reject) => {
            let class = error.class().as_str();
            (!accepts(expect, class)).then(|| format!("refused as {class} ({error}), expected {}", wanted(expect)))
        }
    };
    let tcb = || judged.tcb.as_ref().and_then(|tcb| facts::tcb_difference(expect, tcb));
    let missing_tcb = || (judged.tcb.is_none() && expect.tcb_status.is_some()).then(|| "no tcb status was reported".to_owned());
    match wrong.or_else(|| judged.difference.clone()).or_else(tcb).or_else(missing_tcb) {
        None => Verdict::Right,
        Some(why) => Verdict::Wrong(why),
    }
}

fn accepts(expect: &Expect, class: &str) -> bool {
    match &expect.class_any {
        Some(any) => any.iter().any(|wanted| wanted == class || wanted == "any"),
        None => expect.class.as_deref() == Some(class),
    }
}

fn wanted(expect: &Expect) -> String {
    match (&expect.class_any, &expect.class) {
        (Some(any), _) => any.join(" or "),
        (None, Some(class)) => class.clone(),
        (None, None) => "a refusal".to_owned(),
    }
}

fn load(path: &Path) -> Result<Manifest, ManifestError> {
    let unreadable = |error: std::io::Error| ManifestError::Unreadable { path: path.display().to_string(), why: error.to_string() };
    let size_bytes = std::fs::metadata(path).map_err(unreadable)?.len();
    if size_bytes > MANIFEST_BYTES_MAX {
        return Err(ManifestError::TooLarge { size_bytes, limit_bytes: MANIFEST_BYTES_MAX });
    }
    let json = std::fs::read(path).map_err(unreadable)?;
    let manifest: Manifest = serde_json::from_slice(&json).map_err(|error| ManifestError::Malformed { why: error.to_string() })?;
    match manifest.format {
        1 => Ok(manifest),
        got => Err(ManifestError::Format { got }),
    }
}
