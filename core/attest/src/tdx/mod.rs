//! Verifies TDX quotes. Owns: the order of all checks from bytes to a verified TD, each with its own refusal class.
//! Never: fetches collateral, reads the clock, judges guest measurements or TCB status (the caller's policy does).
//! Every step is taken here first, for the class; then `dcap-qvl`, a second implementation, has to agree.
//! Source: Intel TDX DCAP Quoting Library API and PCK/TCB/QE collateral specifications; step numbers are ours.

mod attributes;
mod chain;
mod clock;
mod facts;
mod pck;
mod quote;
mod second;
mod signed;
mod tcb;

use aws_lc_rs::{
    digest::{SHA256, digest},
    signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey},
};
use dstack_protocol::{TcbStatus, UnixMillis};
use x509_parser::prelude::X509Certificate;

pub(crate) use clock::ms_of_rfc3339;
pub use facts::{CollateralFacts, collateral_facts};
pub use pck::PckPlatform;
pub use quote::{QUOTE_BYTES_MAX, QeReport, Quote, ServiceTdEx, SignatureData, TdBody, TdBody15};
pub use tcb::{LevelVerdict, TcbVerdict};

use self::{
    chain::RevocationList,
    clock::Window,
    signed::{QeIdentityText, TcbInfoText},
};
use crate::{AttestError, TdxCollateral, TrustRoots, pem};

const PCK_CHAIN: &str = "pck certificate chain";
pub(crate) const ROOT_CRL: &str = "root crl";
const PCK_CRL: &str = "pck crl";
const PCK_CRL_CHAIN: &str = "pck crl issuer chain";

/// A TD whose quote was verified. Only [`verify_quote`] makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedTd {
    body: TdBody,
    version: u16,
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

/// Verifies collateral on its own: before it is pinned, and to tell how long it lasts.
/// # Errors
/// Chain, time and collateral classes; ours to fix by fetching again.
pub fn check_collateral(
    fmspc: &[u8; 6],
    collateral: &TdxCollateral,
    now_ms: u64,
    roots: &TrustRoots,
) -> Result<CollateralDates, AttestError> {
    let mut window = Window::at(now_ms);
    let ders = pem::certificates(collateral.pck_crl_issuer_chain.as_bytes(), PCK_CRL_CHAIN)?;
    let issuers = parse_all(&ders, PCK_CRL_CHAIN)?;
    let root = chain::root_of(&issuers, roots, PCK_CRL_CHAIN)?;
    let anchor = chain::certificate(root.der(), "root certificate")?;
    let path = chain::verify_path(&issuers, &anchor, PCK_CRL_CHAIN, &mut window)?;
    let [pck_ca] = path else {
        return Err(AttestError::PathLength { chain: PCK_CRL_CHAIN, count: path.len() });
    };
    let root_crl = RevocationList::verify(&collateral.root_ca_crl, &anchor, ROOT_CRL, &mut window)?;
    root_crl.check(&anchor, PCK_CRL_CHAIN)?;
    root_crl.check(pck_ca, PCK_CRL_CHAIN)?;
    RevocationList::verify(&collateral.pck_crl, pck_ca, PCK_CRL, &mut window)?;
    TcbInfoText::verify(collateral, &anchor, &root_crl, &mut window)?.check_fmspc(fmspc)?;
    QeIdentityText::verify(collateral, &anchor, &root_crl, &mut window)?.check_kind()?;
    Ok(CollateralDates {
        oldest_issue: UnixMillis(window.oldest_issue_ms()),
        renewed_issue: UnixMillis(window.renewed_issue_ms()),
        earliest_expiry: UnixMillis(window.earliest_expiry_ms()),
        software_root: root.is_software(),
    })
}

/// How old collateral is and how long it lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CollateralDates {
    /// When the oldest of its signed parts was issued.
    pub oldest_issue: UnixMillis,
    /// The same without the root's revocation list, which is renewed about once a year.
    pub renewed_issue: UnixMillis,
    /// The first moment at which one of its parts is over.
    pub earliest_expiry: UnixMillis,
    /// Whether it was signed under a software root.
    pub software_root: bool,
}

/// Verifies a TDX quote against collateral at a given time.
///
/// Steps: 1 parse · 2 root · 3 revocation lists and PCK path · 4 TCB info and QE identity signatures · 5 quote signatures ·
/// 6 collateral is this platform's · 7 TCB levels · 8 TD attributes · 9 padding · 10 second verifier.
/// # Errors
/// One [`AttestError`] per reason; never a TCB status (except revoked), which is left to [`crate::TcbPolicy`].
pub fn verify_quote(bytes: &[u8], collateral: &TdxCollateral, now_ms: u64, roots: &TrustRoots) -> Result<VerifiedTd, AttestError> {
    let quote = Quote::parse(bytes)?;
    let mut window = Window::at(now_ms);

    let pck_ders = pem::certificates(quote.parts.pck_chain_pem, PCK_CHAIN)?;
    let pck_chain = parse_all(&pck_ders, PCK_CHAIN)?;
    let root = chain::root_of(&pck_chain, roots, PCK_CHAIN)?;
    let anchor = chain::certificate(root.der(), "root certificate")?;

    let path = chain::verify_path(&pck_chain, &anchor, PCK_CHAIN, &mut window)?;
    let [leaf, intermediate] = path else {
        return Err(AttestError::PathLength { chain: PCK_CHAIN, count: path.len() });
    };
    if leaf.is_ca() {
        return Err(AttestError::ChainInvalid { chain: PCK_CHAIN, why: "the leaf is a CA" });
    }
    let root_crl = RevocationList::verify(&collateral.root_ca_crl, &anchor, ROOT_CRL, &mut window)?;
    let pck_crl = RevocationList::verify(&collateral.pck_crl, intermediate, PCK_CRL, &mut window)?;
    root_crl.check(&anchor, PCK_CHAIN)?;
    root_crl.check(intermediate, PCK_CHAIN)?;
    pck_crl.check(leaf, PCK_CHAIN)?;

    let tcb_info = TcbInfoText::verify(collateral, &anchor, &root_crl, &mut window)?;
    let qe_identity = QeIdentityText::verify(collateral, &anchor, &root_crl, &mut window)?;

    verify_signatures(&quote, leaf)?;

    let pck = PckPlatform::of(leaf, PCK_CHAIN)?;
    tcb_info.check_platform(&pck)?;
    qe_identity.check_enclave(&quote.parts.qe_report)?;
    let tcb = TcbVerdict::select(tcb_info.parsed(), qe_identity.parsed(), &pck, &quote.body, &quote.parts.qe_report)?;
    attributes::check(&quote.body, tcb_info.parsed())?;
    if tcb.overall.status == TcbStatus::Revoked {
        return Err(AttestError::TcbStatus { status: TcbStatus::Revoked.name().to_owned() });
    }

    quote.require_padding()?;

    let verdict = VerifiedTd {
        version: quote.version,
        pck,
        tcb,
        earliest_expiry_ms: window.earliest_expiry_ms(),
        collateral_issued_ms: window.renewed_issue_ms(),
        software_root: root.is_software(),
        padding_bytes: quote.trailing.len(),
        body: quote.body,
    };
    second::require_same(quote.meaningful, collateral, now_ms, root, &verdict)?;
    Ok(verdict)
}

fn parse_all<'a>(ders: &'a [Vec<u8>], chain: &'static str) -> Result<Vec<X509Certificate<'a>>, AttestError> {
    ders.iter().map(|der| chain::certificate(der, chain)).collect()
}

/// PCK signs the QE report, the QE report binds the attestation key, the attestation key signs header and body.
fn verify_signatures(quote: &Quote<'_>, leaf: &X509Certificate<'_>) -> Result<(), AttestError> {
    let pck_key = chain::p256_point(leaf.public_key())
        .ok_or_else(|| AttestError::Algorithm { part: PCK_CHAIN, got: leaf.public_key().algorithm.algorithm.to_id_string() })?;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, pck_key)
        .verify(quote.parts.qe_report_bytes, &quote.parts.qe_report_signature)
        .map_err(|_| AttestError::QeReportSignature)?;

    let bound = digest(&SHA256, &[&quote.parts.attestation_key, quote.parts.qe_authentication].concat());
    let (hash, filler) = quote.parts.qe_report.report_data.split_at(32);
    if hash != bound.as_ref() || filler != [0; 32] {
        return Err(AttestError::QeReportBinding);
    }

    let attestation_key = [&[0x04], &quote.parts.attestation_key[..]].concat();
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &attestation_key)
        .verify(quote.signed, &quote.parts.signature)
        .map_err(|_| AttestError::BodySignature)
}
