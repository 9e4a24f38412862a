//! One judgement. Owns: trust material from arguments, which verifier a form goes to. Never: fetches collateral.

use std::path::{Path, PathBuf};

use clap::Args;
use dstack_attest::nitro::{self, VerifiedDocument};
use dstack_attest::tdx::{self, VerifiedTd};
use dstack_attest::x509ext::CertificateClaims;
use dstack_attest::{
    AttestError, BUNDLE_BYTES_MAX, CollateralBundle, TcbPolicy, Trace, TrustRoots, VerifiedIdentity, VerifyContext, verify_legacy_traced,
    verify_traced,
};
use dstack_protocol::limits::EVIDENCE_BYTES_MAX;
use dstack_protocol::{TcbStatus, UnixMillis, binding};
use dstack_runtime::clock::{Clock as _, SystemClock};

use super::report::Judged;
use super::source::{Evidence, Form};
use crate::args;
use crate::cluster::{ClusterFolder, with_root};
use crate::failure::Failure;
use crate::files;

/// What to judge, and against what.
#[derive(Args)]
pub(crate) struct Judge {
    /// File, hex, base64, or host:port of a TLS server.
    pub(super) evidence: String,
    /// Judge as of this time: 2026-01-31T12:00:00Z or seconds since 1970; without it now.
    #[arg(long, value_parser = args::time)]
    at: Option<UnixMillis>,
    /// Collateral: a bundle, or one platform's object.
    #[arg(long)]
    collateral: Option<PathBuf>,
    /// Folder of a cluster (`dstack cluster plan`): its collateral and the software roots it trusts.
    #[arg(long)]
    genesis: Option<PathBuf>,
    /// Also trust this software root, DER; repeat it.
    #[arg(long = "software-root")]
    software_roots: Vec<PathBuf>,
    /// TCB statuses accepted; without it UpToDate only.
    #[arg(long, value_delimiter = ',', value_parser = args::tcb_status)]
    tcb: Vec<TcbStatus>,
    /// Also take SEV-SNP reports that a cloud's key (VLEK) signed.
    #[arg(long)]
    accept_vlek: bool,
    /// Also take chains of AMD and Google without the revocation lists that they name.
    #[arg(long)]
    accept_missing_crl: bool,
}

/// What verified evidence is, by its form.
#[derive(Debug)]
pub(super) enum Proven {
    Identity(Box<VerifiedIdentity>),
    Td(Box<VerifiedTd>),
    Document(Box<VerifiedDocument>),
}

impl Judge {
    /// Judges; a refusal is a result, an error says why there is none.
    pub(super) fn run(&self) -> Result<Judged, Failure> {
        let evidence = Evidence::read(&self.evidence)?;
        let folder = self.genesis.as_deref().map(ClusterFolder::load).transpose()?;
        let (mut roots, pinned) = match folder {
            Some(folder) => (folder.roots, folder.collateral),
            None => (TrustRoots::production(), CollateralBundle::empty()),
        };
        let collateral = self.collateral.as_deref().map(collateral).transpose()?.unwrap_or(pinned);
        for path in &self.software_roots {
            roots = with_root(roots, path)?;
        }
        let tcb = if self.tcb.is_empty() { TcbPolicy::default() } else { TcbPolicy::allowing(&self.tcb) };
        let tcb = if self.accept_vlek { tcb.accepting_vlek() } else { tcb };
        let tcb = if self.accept_missing_crl { tcb.accepting_missing_crl() } else { tcb };
        let now = self.at.unwrap_or_else(|| SystemClock::new().now());
        let context = VerifyContext { now, roots: &roots, collateral: &collateral, tcb: &tcb };
        let trace = Trace::new();
        let outcome = proven(&evidence, &context, &trace);
        Ok(Judged { form: evidence.form, at: now, checks: trace.entered(), outcome })
    }
}

fn proven(evidence: &Evidence, context: &VerifyContext<'_>, trace: &Trace) -> Result<Proven, AttestError> {
    let bytes = &evidence.bytes;
    let identity = |identity| Proven::Identity(Box::new(identity));
    match evidence.form {
        Form::Versioned => verify_traced(bytes, context, trace).map(identity),
        Form::Certificate => certificate(bytes, context, trace).map(identity),
        Form::Legacy => {
            let (quote, event_log) = legacy(bytes)?;
            verify_legacy_traced(quote, event_log, context, trace).map(identity)
        }
        Form::Quote => {
            let collateral = context.collateral.tdx(&tdx::claimed_fmspc(bytes)?)?;
            let td = tdx::verify_quote(bytes, collateral, context.now.0, context.roots)?;
            context.tcb.check(td.tcb().overall.status)?;
            Ok(Proven::Td(Box::new(td)))
        }
        Form::Document => nitro::verify(bytes, context.roots, context.now).map(|document| Proven::Document(Box::new(document))),
    }
}

/// Evidence from a certificate, bound to the certificate's key (attestation reference §3).
fn certificate(der: &[u8], context: &VerifyContext<'_>, trace: &Trace) -> Result<VerifiedIdentity, AttestError> {
    let claims = CertificateClaims::read(der)?;
    let none = AttestError::Malformed { part: "certificate", why: "carries no evidence" };
    let identity = claims.evidence.ok_or(none)?.verify_traced(context, trace)?;
    identity.require_report_data(&binding::ratls_certificate(&claims.spki))?;
    Ok(identity)
}

/// Quote and log of the legacy form.
pub(super) fn legacy(bytes: &[u8]) -> Result<(&[u8], &[u8]), AttestError> {
    let malformed = |_: dstack_protocol::DecodeError| AttestError::Malformed { part: "legacy pair", why: "not a quote and an event log" };
    let mut reader = dstack_protocol::codec::Reader::new(bytes);
    reader.label("DKMS-V1-LEGACY").map_err(malformed)?;
    let quote = reader.lp4("quote", EVIDENCE_BYTES_MAX).map_err(malformed)?;
    let event_log = reader.lp4("event log", EVIDENCE_BYTES_MAX).map_err(malformed)?;
    reader.finish().map_err(malformed)?;
    Ok((quote, event_log))
}

/// A bundle, or one platform's object as publishers keep it, which becomes a bundle of one.
fn collateral(path: &Path) -> Result<CollateralBundle, Failure> {
    let bytes = files::read(path, BUNDLE_BYTES_MAX)?;
    let wrong = |error| Failure::wrong(format!("{}: {error}", path.display()), "give a collateral bundle, or one platform's collateral");
    CollateralBundle::parse_any(&bytes).map_err(wrong)
}
