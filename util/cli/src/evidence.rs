//! `dstack evidence`: verifies evidence, runs vector manifests. Owns: which trust material is used and how a verdict is
//! printed. Never: fetches collateral. All rules are those of the attestation crate.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use clap::{Args, Subcommand};
use dstack_attest::manifest::{self, Report};
use dstack_attest::x509ext::CertificateClaims;
use dstack_attest::{BUNDLE_BYTES_MAX, CollateralBundle, TcbPolicy, TrustRoots, VerifiedIdentity, VerifyContext, verify, verify_legacy};
use dstack_protocol::limits::EVIDENCE_BYTES_MAX;
use dstack_protocol::{TcbStatus, UnixMillis, binding};
use dstack_runtime::clock::{Clock as _, SystemClock};
use serde_json::{Value, json};

use crate::args;
use crate::cluster::with_root;
use crate::failure::{Done, Failure};
use crate::files;

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Verify one piece of evidence and print what it proves.
    #[command(after_help = VERIFY_HELP)]
    Verify(Verify),
    /// Run a manifest of attestation vectors; exit code 1 if one is wrong or none was judged.
    #[command(
        after_help = "Example: dstack evidence check-manifest ../shared/vectors/manifest.json --platform tdx,dstack-tdx,gcp-tdx,nitro"
    )]
    CheckManifest {
        /// The manifest, JSON.
        path: PathBuf,
        /// Only vectors of these platforms.
        #[arg(long, value_delimiter = ',')]
        platform: Vec<String>,
    },
}

const VERIFY_HELP: &str = "EVIDENCE is a file or hex: a versioned attestation, a certificate that carries one (PEM or DER), or the
legacy pair. Of a certificate the binding to its key is checked too, in dstack's form.

Example: dstack evidence verify evidence.bin --collateral collateral.json --at 2026-01-31T12:00:00Z";

#[derive(Args)]
pub(crate) struct Verify {
    /// File, or hex.
    evidence: String,
    /// Judge as of this time: 2026-01-31T12:00:00Z or seconds since 1970; without it now.
    #[arg(long, value_parser = args::time)]
    at: Option<UnixMillis>,
    /// Collateral: a bundle, or one platform's object.
    #[arg(long)]
    collateral: Option<PathBuf>,
    /// Also trust this software root, DER; repeat it.
    #[arg(long = "software-root")]
    software_roots: Vec<PathBuf>,
    /// TCB statuses accepted; without it UpToDate only.
    #[arg(long, value_delimiter = ',', value_parser = args::tcb_status)]
    tcb: Vec<TcbStatus>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(command: Command) -> Done {
    match command {
        Command::Verify(arguments) => run_verify(&arguments),
        Command::CheckManifest { path, platform } => check_manifest(&path, &platform),
    }
}

fn run_verify(arguments: &Verify) -> Done {
    let bytes = evidence_bytes(&arguments.evidence)?;
    let collateral = match &arguments.collateral {
        Some(path) => collateral(path)?,
        None => CollateralBundle::empty(),
    };
    let mut roots = TrustRoots::production();
    for path in &arguments.software_roots {
        roots = with_root(roots, path)?;
    }
    let tcb = if arguments.tcb.is_empty() { TcbPolicy::default() } else { TcbPolicy::allowing(&arguments.tcb) };
    let now = arguments.at.unwrap_or_else(|| SystemClock::new().now());
    let context = VerifyContext { now, roots: &roots, collateral: &collateral, tcb: &tcb };
    let verified = if bytes.starts_with(b"DKMS-V1-LEGACY") {
        let (quote, event_log) = legacy(&bytes)?;
        verify_legacy(quote, event_log, &context)
    } else if bytes.first() == Some(&0x30) {
        certificate(&bytes, &context)
    } else {
        verify(&bytes, &context)
    };
    match verified {
        Ok(identity) => Ok(report(&identity, arguments.json)),
        Err(error) => {
            let class = error.class().as_str();
            let stdout = match arguments.json {
                true => format!("{}\n", json!({"result": "reject", "class": class, "detail": error.to_string()})),
                false => format!("result=reject\nclass={class}\n"),
            };
            Err(Failure::wrong(format!("{class}: {error}"), hint(class)).with_stdout(stdout))
        }
    }
}

fn hint(class: &str) -> &'static str {
    match class.split_once('.').map_or(class, |(family, _)| family) {
        "parse" | "type" => "is it the whole evidence, and of a platform of this build? see docs/attestation.md",
        "time" => "give the time to judge at with --at, or evidence and collateral that are fresh",
        "collateral" => "give the platform's collateral with --collateral",
        "chain" => "hardware chains end at the vendors' roots; of a test name its root with --software-root",
        "policy" => "genuine but not acceptable: update the platform, or accept the TCB status with --tcb if you mean it",
        _ => "do not trust it",
    }
}

/// Evidence from a certificate, bound to the certificate's key (attestation reference §3).
fn certificate(der: &[u8], context: &VerifyContext<'_>) -> Result<VerifiedIdentity, dstack_attest::AttestError> {
    let claims = CertificateClaims::read(der)?;
    let none = dstack_attest::AttestError::Malformed { part: "certificate", why: "carries no evidence" };
    let identity = claims.evidence.ok_or(none)?.verify(context)?;
    identity.require_report_data(&binding::ratls_certificate(&claims.spki))?;
    Ok(identity)
}

fn legacy(bytes: &[u8]) -> Result<(&[u8], &[u8]), Failure> {
    let mut reader = dstack_protocol::codec::Reader::new(bytes);
    let mut read = || {
        reader.label("DKMS-V1-LEGACY")?;
        Ok((reader.lp4("quote", EVIDENCE_BYTES_MAX)?, reader.lp4("event log", EVIDENCE_BYTES_MAX)?))
    };
    let pair = read().map_err(|error: dstack_protocol::DecodeError| Failure::wrong(error.to_string(), hint("parse")))?;
    reader.finish().map_err(|error| Failure::wrong(error.to_string(), hint("parse")))?;
    Ok(pair)
}

/// Largest file read: evidence or a certificate around it, in PEM or hex.
const FILE_BYTES_MAX: usize = 4 * EVIDENCE_BYTES_MAX;

/// A file's content (binary, hex or PEM), or hex.
fn evidence_bytes(text: &str) -> Result<Vec<u8>, Failure> {
    let path = Path::new(text);
    let content = if path.exists() { files::read(path, FILE_BYTES_MAX)? } else { text.as_bytes().to_vec() };
    if let Some(der) = pem(&content) {
        return Ok(der);
    }
    let digits = content.trim_ascii();
    let digits = digits.strip_prefix(b"0x").unwrap_or(digits);
    if !digits.is_empty() && digits.iter().all(u8::is_ascii_hexdigit) {
        return hex::decode(digits).map_err(|error| Failure::usage(format!("hex: {error}"), "give an even number of hex digits"));
    }
    if path.exists() {
        return Ok(content);
    }
    Err(Failure::unable(format!("{text} is neither a file nor hex"), "check the path"))
}

/// The first PEM block.
fn pem(content: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(content).ok()?;
    let (_, rest) = text.split_once("-----BEGIN CERTIFICATE-----")?;
    let (body, _) = rest.split_once("-----END CERTIFICATE-----")?;
    let body: String = body.split_ascii_whitespace().collect();
    base64::engine::general_purpose::STANDARD.decode(body).ok()
}

/// A bundle, or one platform's object as publishers keep it, which becomes a bundle of one.
fn collateral(path: &Path) -> Result<CollateralBundle, Failure> {
    let bytes = files::read(path, BUNDLE_BYTES_MAX)?;
    let wrong =
        |why: String| Failure::wrong(format!("{}: {why}", path.display()), "give a collateral bundle, or one platform's collateral");
    let object: Value = serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
    let Some(tcb_info) = object.get("tcb_info").and_then(Value::as_str) else {
        return CollateralBundle::parse(&bytes).map_err(|error| wrong(error.to_string()));
    };
    let tcb_info: Value = serde_json::from_str(tcb_info).map_err(|error| wrong(format!("tcb_info: {error}")))?;
    let fmspc = tcb_info.get("fmspc").and_then(Value::as_str).ok_or_else(|| wrong("tcb_info names no fmspc".to_owned()))?;
    let bundle = json!({"format": 1, "tdx": {fmspc.to_lowercase(): object}});
    CollateralBundle::parse(bundle.to_string().as_bytes()).map_err(|error| wrong(error.to_string()))
}

fn report(identity: &VerifiedIdentity, as_json: bool) -> String {
    let fields = [
        ("result", json!("ok")),
        ("platform", json!(identity.platform().name())),
        ("software_root", json!(identity.software_root())),
        ("tcb_status", json!(identity.tcb_status().name())),
        ("advisory_ids", json!(identity.advisory_ids())),
        ("app_id", json!(identity.app_id().map(|app| app.to_string()))),
        ("app_id_is_proven", json!(identity.platform().binds_events())),
        ("compose_hash", json!(identity.compose_hash().map(hex::encode))),
        ("instance_id", json!(hex::encode(identity.instance_id()))),
        ("os_image_hash", json!(identity.os_image_hash().map(hex::encode))),
        ("measurement", json!(hex::encode(identity.measurement()))),
        ("platform_identity", json!(hex::encode(identity.platform_identity()))),
        ("device_id", json!(hex::encode(identity.device_id()))),
        ("mr_aggregated", json!(hex::encode(identity.mr_aggregated()))),
        ("mr_system", json!(hex::encode(identity.mr_system()))),
        ("key_provider", json!(String::from_utf8_lossy(identity.key_provider()))),
        ("report_data", json!(hex::encode(identity.report_data()))),
        ("earliest_expiry_unix_ms", json!(identity.earliest_expiry().0)),
        ("evidence_hash", json!(hex::encode(identity.evidence_hash()))),
    ];
    if as_json {
        let object: serde_json::Map<String, Value> = fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        return format!("{}\n", Value::Object(object));
    }
    let plain = |value: Value| match value {
        Value::String(text) => text.escape_debug().to_string(),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    let mut out: String = fields.into_iter().map(|(name, value)| format!("{name}={}\n", plain(value))).collect();
    if identity.software_root() {
        out += "warning: the chain ends at a software root; no hardware stands behind this\n";
    }
    out
}

fn check_manifest(path: &Path, platforms: &[String]) -> Done {
    let names: Vec<&str> = platforms.iter().map(String::as_str).collect();
    let report = manifest::check(path, if names.is_empty() { None } else { Some(&names) })
        .map_err(|error| Failure::wrong(error.to_string(), "give the path of a vector manifest"))?;
    let text = manifest_text(&report);
    if report.passed() {
        return Ok(text);
    }
    let failure = match report.wrong {
        0 => Failure::wrong("nothing was judged", "check --platform, and that the manifest's files are there"),
        wrong => Failure::wrong(format!("{wrong} vectors came out wrong"), "the lines above name them"),
    };
    Err(failure.with_stdout(text))
}

/// A line a failure; what was not run; last the count.
fn manifest_text(report: &Report) -> String {
    let mut out: String = report.failures.iter().map(|line| format!("{line}\n")).collect();
    for (platform, count) in &report.not_judged {
        out += &match count {
            0 => format!("the manifest has no vector of platform {platform}\n"),
            count => format!("{count} vectors of platform {platform} not judged by this build\n"),
        };
    }
    out += &format!("{} derived vectors skipped: their files are absent\n", report.skipped);
    out += &format!("{} right, {} wrong, {} recommended differ\n", report.right, report.wrong, report.recommended_differ);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_the_last_line() {
        let report = Report {
            right: 3,
            wrong: 1,
            recommended_differ: 2,
            skipped: 4,
            failures: vec!["a: accepted".to_owned()],
            differing: vec!["b: not shown".to_owned()],
            not_judged: [("sev-snp".to_owned(), 5)].into(),
        };
        let text = manifest_text(&report);
        assert_eq!(
            text,
            "a: accepted\n5 vectors of platform sev-snp not judged by this build\n\
             4 derived vectors skipped: their files are absent\n3 right, 1 wrong, 2 recommended differ\n"
        );
    }

    #[test]
    fn evidence_is_a_file_hex_or_pem() {
        assert_eq!(evidence_bytes("0x0aFF"), Ok(vec![0x0a, 0xff]));
        assert!(evidence_bytes("abc").is_err() && evidence_bytes("no such file").is_err());
        let pem_text = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
        assert_eq!(pem(pem_text.as_bytes()), Some(vec![0x30, 0]));
        assert_eq!(pem(b"-----BEGIN CERTIFICATE-----\nMAA="), None);
    }
}
