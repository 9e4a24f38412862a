//! `dstack evidence`: verifies, shows and explains evidence, runs vector manifests. Owns: which trust material is used. Never: fetches
//! collateral, decides a rule; all rules are those of the attestation crate.

mod explain;
mod judge;
mod manifest;
mod report;
mod show;
mod source;

use std::path::PathBuf;

use clap::Subcommand;

use self::judge::Judge;
use crate::failure::Done;

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Verify one piece of evidence; print the chain of checks and what it proves.
    #[command(after_help = VERIFY_HELP)]
    Verify {
        #[command(flatten)]
        judge: Judge,
        /// Print JSON, as docs/evidence.schema.json describes it.
        #[arg(long)]
        json: bool,
    },
    /// Print what evidence claims, without verifying any of it.
    #[command(after_help = SHOW_HELP)]
    Show {
        /// File, hex, base64, or host:port of a TLS server.
        evidence: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Explain a refusal class, a check, or the judgement on one piece of evidence.
    #[command(after_help = EXPLAIN_HELP)]
    Explain {
        #[command(flatten)]
        judge: Judge,
    },
    /// Run a manifest of attestation vectors; exit code 1 if one is wrong or none was judged.
    #[command(after_help = "Example: dstack evidence check-manifest ../shared/vectors/manifest.json --platform tdx,nitro")]
    CheckManifest {
        /// The manifest, JSON.
        path: PathBuf,
        /// Only vectors of these platforms.
        #[arg(long, value_delimiter = ',')]
        platform: Vec<String>,
    },
}

const VERIFY_HELP: &str =
    "EVIDENCE is a file, hex, base64 or the host:port of a TLS server that shows it in its certificate. Forms: a versioned
attestation, a certificate that carries one (PEM or DER), the legacy pair, a bare TDX quote, a bare NSM document. Of a certificate the
binding to its key is checked too, in dstack's form; of a server also that it holds that key. A bare quote proves nothing of an app.

Examples: dstack evidence verify evidence.bin --collateral collateral.json --at 2026-01-31T12:00:00Z
          dstack evidence verify kms.example.com:8000 --collateral collateral.json --json";
const SHOW_HELP: &str = "Example: dstack evidence show quote.bin";
const EXPLAIN_HELP: &str = "EVIDENCE may also be a class (sig.body) or the name of a check (nitro.signature).

Examples: dstack evidence explain policy.tcb_status
          dstack evidence explain evidence.bin --collateral collateral.json";

pub(crate) fn run(command: Command) -> Done {
    match command {
        Command::Verify { judge, json } => judge.run()?.done(json),
        Command::Show { evidence, json } => show::run(&evidence, json),
        Command::Explain { judge } => explain::run(&judge),
        Command::CheckManifest { path, platform } => manifest::check(&path, &platform),
    }
}
