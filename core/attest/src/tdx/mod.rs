//! Verifies TDX quotes. Owns: the order of all checks from bytes to a verified TD, each with its own refusal class.
//! Never: fetches collateral, reads the clock, judges guest measurements or TCB status (the caller's policy does).
//! `dcap-qvl`, a second implementation, is held against this one by tests and `check-manifest`, not on each quote (ADR 0011).
//! Source: Intel TDX DCAP Quoting Library API and PCK/TCB/QE collateral specifications.

mod attributes;
mod chain;
mod checked;
mod checks;
mod clock;
mod enclave;
mod facts;
mod known;
mod pck;
mod quote;
mod second;
mod signed;
mod tcb;

use aws_lc_rs::{
    digest::{SHA256, digest},
    signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey},
};
use dstack_protocol::{
    TcbStatus,
    binding::{self, Statement},
};
use x509_parser::prelude::X509Certificate;

pub use checked::{CheckedCollateral, CollateralDates, check_collateral};
pub use checks::CHECKS;
pub(crate) use checks::{EVENT_LOG, IDENTITY, REPORT_DATA, RUNTIME_EVENTS, TCB_POLICY};
pub(crate) use clock::ms_of_rfc3339;
pub use enclave::{VerifiedEnclave, verify_enclave};
pub use facts::{CollateralFacts, collateral_facts, tcb_dates};
pub(crate) use known::PckChains;
pub use pck::PckPlatform;
pub use quote::{QUOTE_BYTES_MAX, QeReport, Quote, ServiceTdEx, SignatureData, TdBody, TdBody15};
pub use second::{second_opinion, verify_quote_remembered};
pub use tcb::{LevelVerdict, TcbVerdict};

use self::{
    chain::RevocationList,
    checked::Known,
    clock::{Recorded, Window},
    known::PckChain,
    signed::{QeIdentityText, TcbInfoText},
};
use crate::{AttestError, CollateralBundle, Root, TdxCollateral, Trace, TrustRoots, pem};

const PCK_CHAIN: &str = "pck certificate chain";
pub(crate) const ROOT_CRL: &str = "root crl";
const PCK_CRL: &str = "pck crl";
const PCK_CRL_CHAIN: &str = "pck crl issuer chain";

/// A TD whose quote was verified. Only [`verify_quote`] makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedTd {
    body: TdBody,
    version: u16,
    statement_id: [u8; 32],
    pck: PckPlatform,
    tcb: TcbVerdict,
    earliest_expiry_ms: u64,
    collateral_issued_ms: u64,
    software_root: bool,
    padding_bytes: usize,
}

impl VerifiedTd {
    /// The TD report.
    #[must_use]
    pub const fn body(&self) -> &TdBody {
        &self.body
    }
    /// Version of the quote, 4 or 5.
    #[must_use]
    pub const fn quote_version(&self) -> u16 {
        self.version
    }
    /// Names what the quoting enclave signed: [`dstack_protocol::binding::statement_id`].
    #[must_use]
    pub const fn statement_id(&self) -> [u8; 32] {
        self.statement_id
    }
    /// The platform of the PCK certificate.
    #[must_use]
    pub const fn pck(&self) -> &PckPlatform {
        &self.pck
    }
    /// TCB status and advisories; whether they are good enough is the caller's policy.
    #[must_use]
    pub const fn tcb(&self) -> &TcbVerdict {
        &self.tcb
    }
    /// The first moment at which a certificate, revocation list or collateral part is over, milliseconds since 1970.
    #[must_use]
    pub const fn earliest_expiry_ms(&self) -> u64 {
        self.earliest_expiry_ms
    }
    /// When the oldest of TCB info, QE identity and PCK CRL was issued, milliseconds since 1970.
    #[must_use]
    pub const fn collateral_issued_ms(&self) -> u64 {
        self.collateral_issued_ms
    }
    /// Whether the chain ends at a software root.
    #[must_use]
    pub const fn software_root(&self) -> bool {
        self.software_root
    }
    /// Zero bytes after the quote's end.
    #[must_use]
    pub const fn padding_bytes(&self) -> usize {
        self.padding_bytes
    }
}

/// What a quote's PCK certificate says, before any of it is verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimedCertificate {
    /// The platform.
    pub platform: PckPlatform,
    /// Common name of the issuer.
    pub issuer: String,
    /// Validity, milliseconds since 1970.
    pub validity_ms: (u64, u64),
}

/// The FMSPC a quote claims: selects its collateral. Unverified; collateral of another platform is refused later.
/// # Errors
/// Parse classes of the quote, its chain and the PCK certificate.
pub fn claimed_fmspc(quote: &[u8]) -> Result<[u8; 6], AttestError> {
    claimed_certificate(&Quote::parse(quote)?).map(|certificate| certificate.platform.fmspc)
}

/// Reads the PCK certificate of a quote without verifying it.
/// # Errors
/// Parse classes of the chain and the PCK certificate.
pub fn claimed_certificate(quote: &Quote<'_>) -> Result<ClaimedCertificate, AttestError> {
    let chain = pem::certificates(quote.parts.pck_chain_pem, PCK_CHAIN)?;
    let leaf = chain.first().ok_or(AttestError::ChainInvalid { chain: PCK_CHAIN, why: "holds no certificate" })?;
    let leaf = chain::certificate(leaf, PCK_CHAIN)?;
    let issuer = leaf.issuer().iter_common_name().next().and_then(|name| name.as_str().ok()).unwrap_or_default().to_owned();
    Ok(ClaimedCertificate { platform: PckPlatform::of(&leaf, PCK_CHAIN)?, issuer, validity_ms: chain::validity_ms(&leaf)? })
}

/// Milliseconds since 1970 of a date of the form `2025-01-31T00:00:00Z`, the only one Intel's collateral uses.
/// # Errors
/// [`AttestError::Field`] for anything else.
pub fn millis_of_rfc3339(text: &str) -> Result<u64, AttestError> {
    ms_of_rfc3339(text, "date")
}

/// Verifies a TDX quote against collateral at a given time.
///
/// # Errors
/// One [`AttestError`] per reason; never a TCB status (except revoked), which is left to [`crate::TcbPolicy`].
pub fn verify_quote(bytes: &[u8], collateral: &TdxCollateral, now_ms: u64, roots: &TrustRoots) -> Result<VerifiedTd, AttestError> {
    verify_quote_traced(bytes, collateral, now_ms, roots, &Trace::new())
}

/// As [`verify_quote`], and notes in `trace` every check that was begun.
/// # Errors
/// As [`verify_quote`].
pub fn verify_quote_traced(
    bytes: &[u8],
    collateral: &TdxCollateral,
    now_ms: u64,
    roots: &TrustRoots,
    trace: &Trace,
) -> Result<VerifiedTd, AttestError> {
    let (quote, ders) = open(bytes, trace)?;
    judge(quote, &parse_all(&ders, PCK_CHAIN)?, Given::Unchecked(collateral), now_ms, roots, trace)
}

/// As [`verify_quote`], with collateral whose own signatures were checked before: the same verdict, for a third of the work.
/// # Errors
/// As [`verify_quote`].
pub fn verify_quote_checked(
    bytes: &[u8],
    collateral: &CheckedCollateral,
    now_ms: u64,
    roots: &TrustRoots,
) -> Result<VerifiedTd, AttestError> {
    let trace = Trace::new();
    let (quote, ders) = open(bytes, &trace)?;
    judge(quote, &parse_all(&ders, PCK_CHAIN)?, Given::Checked(collateral), now_ms, roots, &trace)
}

/// As [`verify_quote`], with the collateral that `bundle` has for the platform named by the quote. Collateral is checked once, and so is
/// the chain of a platform whose quote was accepted before.
pub(crate) fn verify_bundled(
    bytes: &[u8],
    bundle: &CollateralBundle,
    now_ms: u64,
    roots: &TrustRoots,
    trace: &Trace,
) -> Result<VerifiedTd, AttestError> {
    trace.enter(&checks::QUOTE);
    let quote = Quote::parse(bytes)?;
    trace.enter(&checks::PCK_CHAIN_TEXT);
    let chains = bundle.pck_chains();
    if let Some(chain) = chains.find(quote.parts.pck_chain_pem)
        && let Some(root) = chain.root_among(roots)
        && let Ok(collateral) = bundle.checked_tdx(&chain.platform.fmspc, roots)
        && let Some(known) = collateral.under(root)
        && chain.is_below(known.pck_ca())
    {
        trace.enter(&checks::COLLATERAL);
        return judge_known(quote, &chain, known, now_ms, root, trace);
    }
    let ders = pem::certificates(quote.parts.pck_chain_pem, PCK_CHAIN)?;
    let pck_chain = parse_all(&ders, PCK_CHAIN)?;
    let leaf = pck_chain.first().ok_or(AttestError::ChainInvalid { chain: PCK_CHAIN, why: "holds no certificate" })?;
    trace.enter(&checks::COLLATERAL);
    let collateral = bundle.checked_tdx(&PckPlatform::of(leaf, PCK_CHAIN)?.fmspc, roots)?;
    judge(quote, &pck_chain, Given::Bundled(collateral, chains), now_ms, roots, trace)
}

/// Takes a quote apart, down to the DER of its certificates.
fn open<'q>(bytes: &'q [u8], trace: &Trace) -> Result<(Quote<'q>, Vec<Vec<u8>>), AttestError> {
    trace.enter(&checks::QUOTE);
    let quote = Quote::parse(bytes)?;
    trace.enter(&checks::PCK_CHAIN_TEXT);
    let ders = pem::certificates(quote.parts.pck_chain_pem, PCK_CHAIN)?;
    Ok((quote, ders))
}

/// Collateral as the caller has it.
#[derive(Clone, Copy)]
enum Given<'c> {
    Unchecked(&'c TdxCollateral),
    Checked(&'c CheckedCollateral),
    /// With the memory for the quote's chain, if all of it turns out right.
    Bundled(&'c CheckedCollateral, &'c PckChains),
}

fn judge(
    quote: Quote<'_>,
    pck_chain: &[X509Certificate<'_>],
    given: Given<'_>,
    now_ms: u64,
    roots: &TrustRoots,
    trace: &Trace,
) -> Result<VerifiedTd, AttestError> {
    let mut window = Window::at(now_ms);
    trace.enter(&checks::PCK_ROOT);
    let root = chain::root_of(pck_chain, roots, PCK_CHAIN)?;
    let (collateral, known) = match given {
        Given::Unchecked(collateral) => (collateral, None),
        Given::Checked(checked) | Given::Bundled(checked, _) => (checked.collateral(), checked.under(root)),
    };

    trace.enter(&checks::PCK_PATH);
    let anchor = chain::certificate(root.der(), chain::ROOT)?;
    let path = chain::verify_path(pck_chain, &anchor, known.map(Known::pck_ca), PCK_CHAIN, &mut window)?;
    let [leaf, intermediate] = path else {
        return Err(AttestError::PathLength { chain: PCK_CHAIN, count: path.len() });
    };
    if leaf.is_ca() {
        return Err(AttestError::ChainInvalid { chain: PCK_CHAIN, why: "the leaf is a CA" });
    }

    // Each part is either known, and judged for time alone, or checked here.
    let (mut fresh_root_crl, mut fresh_pck_crl, mut fresh_tcb_info, mut fresh_qe_identity) = (None, None, None, None);
    trace.enter(&checks::ROOT_CRL);
    let root_crl = part(known.map(|known| &known.root_crl), &mut fresh_root_crl, &mut window, |window| {
        RevocationList::verify(&collateral.root_ca_crl, &anchor, ROOT_CRL, window)
    })?;
    trace.enter(&checks::PCK_CRL);
    let same_ca = known.filter(|known| known.pck_ca().is(intermediate));
    let pck_crl = part(same_ca.map(|known| &known.pck_crl), &mut fresh_pck_crl, &mut window, |window| {
        RevocationList::verify(&collateral.pck_crl, intermediate, PCK_CRL, window)
    })?;
    trace.enter(&checks::REVOCATION);
    root_crl.check(&anchor, PCK_CHAIN)?;
    root_crl.check(intermediate, PCK_CHAIN)?;
    pck_crl.check(leaf, PCK_CHAIN)?;

    trace.enter(&checks::TCB_INFO);
    let tcb_info = part(known.map(|known| &known.tcb_info), &mut fresh_tcb_info, &mut window, |window| {
        TcbInfoText::verify(collateral, &anchor, root_crl, window)
    })?;
    trace.enter(&checks::QE_IDENTITY);
    let qe_identity = part(known.map(|known| &known.qe_identity), &mut fresh_qe_identity, &mut window, |window| {
        QeIdentityText::verify(collateral, &anchor, root_crl, window)
    })?;

    let memory = match (given, same_ca) {
        (Given::Bundled(_, chains), Some(_)) => Some((chains, quote.parts.pck_chain_pem)),
        _ => None,
    };
    let pck = Pck { key: pck_key(leaf), platform: PckPlatform::of(leaf, PCK_CHAIN) };
    let verified = judge_quote(quote, pck, tcb_info, qe_identity, &window, root, trace)?;
    if let Some((chains, text)) = memory {
        chains.keep(text, PckChain::of(leaf, intermediate, &anchor, root)?);
    }
    Ok(verified)
}

/// As [`judge`], of a chain that was verified before and collateral that was checked before: the same checks in the same order.
fn judge_known(
    quote: Quote<'_>,
    chain: &PckChain,
    known: &Known,
    now_ms: u64,
    root: &Root,
    trace: &Trace,
) -> Result<VerifiedTd, AttestError> {
    let mut window = Window::at(now_ms);
    trace.enter(&checks::PCK_ROOT);
    trace.enter(&checks::PCK_PATH);
    chain.at(&mut window)?;
    trace.enter(&checks::ROOT_CRL);
    let root_crl = known.root_crl.at(&mut window)?;
    trace.enter(&checks::PCK_CRL);
    let pck_crl = known.pck_crl.at(&mut window)?;
    trace.enter(&checks::REVOCATION);
    let [anchor, intermediate, leaf] = &chain.serials;
    root_crl.check_serial(anchor, PCK_CHAIN)?;
    root_crl.check_serial(intermediate, PCK_CHAIN)?;
    pck_crl.check_serial(leaf, PCK_CHAIN)?;
    trace.enter(&checks::TCB_INFO);
    let tcb_info = known.tcb_info.at(&mut window)?;
    trace.enter(&checks::QE_IDENTITY);
    let qe_identity = known.qe_identity.at(&mut window)?;
    let pck = Pck { key: Ok(&chain.key), platform: Ok(chain.platform.clone()) };
    judge_quote(quote, pck, tcb_info, qe_identity, &window, root, trace)
}

/// What a quote needs of its PCK certificate; what it lacks refuses where it is needed.
struct Pck<'p> {
    key: Result<&'p [u8], AttestError>,
    platform: Result<PckPlatform, AttestError>,
}

/// The quote itself, after its chain and the collateral.
fn judge_quote(
    quote: Quote<'_>,
    pck: Pck<'_>,
    tcb_info: &TcbInfoText,
    qe_identity: &QeIdentityText,
    window: &Window,
    root: &Root,
    trace: &Trace,
) -> Result<VerifiedTd, AttestError> {
    let statement_id = verify_signatures(&quote, pck.key, trace)?;

    trace.enter(&checks::PLATFORM);
    let pck = pck.platform?;
    tcb_info.check_platform(&pck)?;
    trace.enter(&checks::QUOTING_ENCLAVE);
    qe_identity.check_enclave(&quote.parts.qe_report)?;
    trace.enter(&checks::TCB_LEVEL);
    let tcb = TcbVerdict::select(tcb_info.parsed(), qe_identity.parsed(), &pck, &quote.body, &quote.parts.qe_report)?;
    trace.enter(&checks::TD_ATTRIBUTES);
    attributes::check(&quote.body)?;
    trace.enter(&checks::TDX_MODULE);
    attributes::check_module(&quote.body, tcb_info.parsed())?;
    trace.enter(&checks::REVOKED_TCB);
    if tcb.overall.status == TcbStatus::Revoked {
        return Err(AttestError::TcbStatus { status: TcbStatus::Revoked.name().to_owned() });
    }
    trace.enter(&checks::PADDING);
    quote.require_padding()?;

    Ok(VerifiedTd {
        version: quote.version,
        statement_id,
        pck,
        tcb,
        earliest_expiry_ms: window.earliest_expiry_ms(),
        collateral_issued_ms: window.renewed_issue_ms(),
        software_root: root.is_software(),
        padding_bytes: quote.trailing.len(),
        body: quote.body,
    })
}

/// The key of a PCK certificate.
fn pck_key<'l>(leaf: &'l X509Certificate<'_>) -> Result<&'l [u8], AttestError> {
    let other = || AttestError::Algorithm { part: PCK_CHAIN, got: leaf.public_key().algorithm.algorithm.to_id_string() };
    chain::p256_point(leaf.public_key()).ok_or_else(other)
}

/// A part of the collateral: the known one if its dates hold, else the one that `check` makes.
fn part<'p, T>(
    known: Option<&'p Recorded<T>>,
    fresh: &'p mut Option<T>,
    window: &mut Window,
    check: impl FnOnce(&mut Window) -> Result<T, AttestError>,
) -> Result<&'p T, AttestError> {
    match known {
        Some(known) => known.at(window),
        None => Ok(fresh.insert(check(window)?)),
    }
}

fn parse_all<'a>(ders: &'a [Vec<u8>], chain: &'static str) -> Result<Vec<X509Certificate<'a>>, AttestError> {
    ders.iter().map(|der| chain::certificate(der, chain)).collect()
}

/// PCK signs the QE report, the QE report binds the attestation key, the attestation key signs header and body: the statement.
fn verify_signatures(quote: &Quote<'_>, pck_key: Result<&[u8], AttestError>, trace: &Trace) -> Result<[u8; 32], AttestError> {
    trace.enter(&checks::QE_REPORT_SIGNATURE);
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, pck_key?)
        .verify(quote.parts.qe_report_bytes, &quote.parts.qe_report_signature)
        .map_err(|_| AttestError::QeReportSignature)?;

    trace.enter(&checks::ATTESTATION_KEY);
    let bound = digest(&SHA256, &[&quote.parts.attestation_key, quote.parts.qe_authentication].concat());
    let (hash, filler) = quote.parts.qe_report.report_data.split_at(32);
    if hash != bound.as_ref() || filler != [0; 32] {
        return Err(AttestError::QeReportBinding);
    }

    trace.enter(&checks::BODY_SIGNATURE);
    let attestation_key = [&[0x04], &quote.parts.attestation_key[..]].concat();
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &attestation_key)
        .verify(quote.signed, &quote.parts.signature)
        .map_err(|_| AttestError::BodySignature)?;
    let (r, _) = quote.parts.signature.split_first_chunk::<32>().ok_or(AttestError::BodySignature)?;
    Ok(binding::statement_id(Statement::TdxQuote(quote.signed, r)))
}
