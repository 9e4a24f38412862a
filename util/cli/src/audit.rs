//! `dstack audit verify`: the whole log of a node, offline. Owns: reading the node's files. Never: changes one of them.
//! All rules are those of the audit crate and of the segment reader. Layout: `<data>/audit/` holds one folder for each run of
//! segments, named by its first position (a node that took a snapshot begins a new run); entries are `version(1)=1 ‖ record_len(2) ‖
//! record ‖ body`. `<data>/certificates/` holds one file `<size>.cert` for each head certificate.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use dstack_audit::{AuditError, LogReport, LogVerifier};
use dstack_protocol::codec::Reader;
use dstack_protocol::log::{HeadCert, RECORD_BYTES};
use dstack_protocol::{DecodeError, Wire};
use dstack_storage::segments::SegmentReader;
use serde_json::json;

use crate::cluster::ClusterFolder;
use crate::failure::{Done, Failure};
use crate::files;

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Verify the whole log of a node: records, bodies, log time, admissions, certificates.
    #[command(
        after_help = "Reads only; the node may run (then its last batch may look torn).\n\nExample: dstack audit verify --data /var/lib/dstack-kms --genesis cluster"
    )]
    Verify(Verify),
}

#[derive(Args)]
pub(crate) struct Verify {
    /// The node's data folder.
    #[arg(long)]
    data: PathBuf,
    /// Folder that `cluster plan` made.
    #[arg(long)]
    genesis: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(command: Command) -> Done {
    let Command::Verify(arguments) = command;
    let folder = ClusterFolder::load(&arguments.genesis)?;
    let certificates = certificates(&arguments.data.join("certificates"))?;
    let found = certificates.len();
    let segments = arguments.data.join("audit");
    let unreadable = |error: dstack_storage::SegmentError| {
        Failure::wrong(format!("{}: {error}", segments.display()), "compare with the log of another node; keep this one as evidence")
    };
    if !segments.is_dir() {
        return Err(Failure::unable(format!("{} is no folder", segments.display()), "give the data folder of a node"));
    }
    let mut verifier = LogVerifier::new(folder.cluster_id, certificates);
    let (mut torn_bytes, mut next) = (0, 0u64);
    for (first, run) in runs(&segments)? {
        if first == next {
            let mut reader = SegmentReader::open(&run, None).map_err(unreadable)?;
            for entry in reader.by_ref() {
                let (position, bytes) = entry.map_err(unreadable)?;
                let (record, body) = split(&bytes).map_err(|error| {
                    Failure::wrong(format!("entry {position}: {error}"), "the file was not written by a node; compare with another node")
                })?;
                verifier.push(record, Some(body)).map_err(|error| broken(&error))?;
                next = position.saturating_add(1);
            }
            torn_bytes = reader.torn_tail_bytes();
        } else {
            // Nothing is wrong with it, but a log without its beginning cannot be judged.
            return Err(Failure::unable(
                format!("the log has a gap from {next} to {first}: this node took a snapshot there"),
                "verify the log of a node that has every record",
            ));
        }
    }
    let report = verifier.finish().map_err(|error| broken(&error))?;
    Ok(print(&report, found, torn_bytes, arguments.json))
}

/// Folders of runs by their first position.
fn runs(audit: &Path) -> Result<BTreeMap<u64, PathBuf>, Failure> {
    let unreadable =
        |error: std::io::Error| Failure::unable(format!("cannot list {}: {error}", audit.display()), "give the data folder of a node");
    let mut found = BTreeMap::new();
    for item in std::fs::read_dir(audit).map_err(unreadable)? {
        let path = item.map_err(unreadable)?.path();
        let first = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
        if let Some(first) = first.filter(|_| path.is_dir()) {
            found.insert(first, path);
        }
    }
    Ok(found)
}

/// `version(1)=1 ‖ record_len(2) ‖ record ‖ body`.
fn split(bytes: &[u8]) -> Result<(&[u8], &[u8]), DecodeError> {
    let mut r = Reader::new(bytes);
    match r.u8("version")? {
        1 => Ok((r.lp("record", RECORD_BYTES)?, r.rest())),
        got => Err(DecodeError::Version { format: "audit entry", got }),
    }
}

fn broken(error: &AuditError) -> Failure {
    let culprits = error.culprits();
    let named = match culprits {
        [] => String::new(),
        _ => format!("; signed by nodes {}", culprits.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")),
    };
    Failure::wrong(format!("the log breaks a rule: {error}{named}"), "keep these files as evidence and verify the logs of the other nodes")
}

fn certificates(dir: &Path) -> Result<Vec<HeadCert>, Failure> {
    let unreadable =
        |error: std::io::Error| Failure::unable(format!("cannot list {}: {error}", dir.display()), "give the data folder of a node");
    let mut found = Vec::new();
    for item in std::fs::read_dir(dir).map_err(unreadable)? {
        let path = item.map_err(unreadable)?.path();
        let Some(size) = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".cert")) else {
            continue;
        };
        let wrong = |why: String| Failure::wrong(format!("{}: {why}", path.display()), "compare with the certificates of another node");
        let certificate = HeadCert::decode(&files::read(&path, HeadCert::BYTES_MAX)?).map_err(|error| wrong(error.to_string()))?;
        if size.parse() != Ok(certificate.head.size) {
            return Err(wrong(format!("certifies size {}", certificate.head.size)));
        }
        found.push(certificate);
    }
    Ok(found)
}

fn print(report: &LogReport, certificates: usize, torn_bytes: u64, as_json: bool) -> String {
    let root = hex::encode(report.log_root);
    if as_json {
        let table = |rows: &BTreeMap<&'static str, (u64, u64)>| -> serde_json::Map<String, serde_json::Value> {
            rows.iter().map(|(name, (applied, rejected))| ((*name).to_owned(), json!({"applied": applied, "rejected": rejected}))).collect()
        };
        let object = json!({
            "result": "ok", "size": report.size, "log_root": root, "log_time_unix_ms": report.log_time.0, "epoch": report.epoch.0,
            "members_version": report.members_version, "certificates": report.certificates, "certified_size": report.certified_size,
            "bodies_missing": report.bodies_missing, "torn_tail_bytes": torn_bytes, "kinds": table(&report.kinds),
            "intents": table(&report.intents),
            "combined": report.combined.iter().map(|(node, count)| (node.to_string(), json!(count))).collect::<serde_json::Map<_, _>>(),
        });
        return format!("{object}\n");
    }
    let mut out = format!("log of {} records holds\n  root            {root}\n", report.size);
    out += &format!("  certified       up to {} by {} of {certificates} certificates\n", report.certified_size, report.certificates);
    out += &format!("  log time        unix ms {}\n  epoch           {}\n", report.log_time, report.epoch);
    for (kind, (applied, rejected)) in &report.kinds {
        out += &format!("  {kind:<15} {applied} applied, {rejected} rejected\n");
    }
    for (mode, (applied, rejected)) in &report.intents {
        out += &format!("    mode {mode:<8} {applied} applied, {rejected} rejected\n");
    }
    for (node, count) in &report.combined {
        out += &format!("    node {node:<8} combined {count} itself, under its signature\n");
    }
    let alone = report.size.saturating_sub(report.certified_size);
    if alone > 0 {
        out += &format!("note: the last {alone} records rest on this node alone\n");
    }
    if torn_bytes > 0 {
        out += &format!("note: an unfinished batch of {torn_bytes} bytes at the end was not read\n");
    }
    out
}
