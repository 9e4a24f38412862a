//! Collateral of one platform, its chains and signatures checked once. Owns: what of it holds whatever the time is, and the dates by
//! which it is judged each time a quote is. Never: a verdict about a quote, a date that is judged once and then believed.
//! Source: `docs/adr/0011-collateral-checked-once.md`.

use std::sync::Arc;

use dstack_protocol::UnixMillis;
use x509_parser::prelude::X509Certificate;

use super::{
    PCK_CRL, PCK_CRL_CHAIN, ROOT_CRL,
    chain::{self, Issued, RevocationList},
    clock::{Recorded, Window},
    parse_all,
    signed::{QeIdentityText, TcbInfoText},
};
use crate::{AttestError, Root, TdxCollateral, TrustRoots, pem};

/// Collateral and, where all of it is signed under one trusted root, what was found in it. Verdicts are those of the collateral
/// alone, bit for bit, at any time and under any roots; only the work is saved.
#[derive(Debug, Clone)]
pub struct CheckedCollateral {
    collateral: Arc<TdxCollateral>,
    known: Option<Arc<Known>>,
}

/// What holds under one root.
#[derive(Debug)]
pub(super) struct Known {
    root_der: Vec<u8>,
    pck_ca: Issued,
    pub(super) root_crl: Recorded<RevocationList>,
    pub(super) pck_crl: Recorded<RevocationList>,
    pub(super) tcb_info: Recorded<TcbInfoText>,
    pub(super) qe_identity: Recorded<QeIdentityText>,
}

impl CheckedCollateral {
    /// Checks all that does not depend on the time. Collateral that does not hold is kept as well: quotes are then refused as they
    /// are with it, at the cost of checking it each time.
    #[must_use]
    pub fn new(collateral: Arc<TdxCollateral>, roots: &TrustRoots) -> Self {
        let known = Known::find(&collateral, roots).ok().map(Arc::new);
        Self { collateral, known }
    }

    pub(super) fn collateral(&self) -> &TdxCollateral {
        &self.collateral
    }

    /// What is known under `root`.
    pub(super) fn under(&self, root: &Root) -> Option<&Known> {
        self.known.as_deref().filter(|known| known.root_der == root.der())
    }
}

impl Known {
    fn find(collateral: &TdxCollateral, roots: &TrustRoots) -> Result<Self, AttestError> {
        let ders = pem::certificates(collateral.pck_crl_issuer_chain.as_bytes(), PCK_CRL_CHAIN)?;
        let issuers = parse_all(&ders, PCK_CRL_CHAIN)?;
        let root = chain::root_of(&issuers, roots, PCK_CRL_CHAIN)?;
        let anchor = chain::certificate(root.der(), chain::ROOT)?;
        // Its dates are those of the quote's own path, which is judged each time.
        let pck_ca = Recorded::of(|window| Ok(pck_ca(&issuers, &anchor, window)?.clone()))?;
        let pck_ca = pck_ca.found();
        let root_crl = Recorded::of(|window| RevocationList::verify(&collateral.root_ca_crl, &anchor, ROOT_CRL, window))?;
        let pck_crl = Recorded::of(|window| RevocationList::verify(&collateral.pck_crl, pck_ca, PCK_CRL, window))?;
        let tcb_info = Recorded::of(|window| TcbInfoText::verify(collateral, &anchor, root_crl.found(), window))?;
        let qe_identity = Recorded::of(|window| QeIdentityText::verify(collateral, &anchor, root_crl.found(), window))?;
        Ok(Self { root_der: root.der().to_vec(), pck_ca: Issued::of(pck_ca), root_crl, pck_crl, tcb_info, qe_identity })
    }

    /// The PCK CA, to be found in the path of a quote.
    pub(super) const fn pck_ca(&self) -> &Issued {
        &self.pck_ca
    }
}

fn pck_ca<'c, 'a>(
    issuers: &'c [X509Certificate<'a>],
    anchor: &X509Certificate<'_>,
    window: &mut Window,
) -> Result<&'c X509Certificate<'a>, AttestError> {
    match chain::verify_path(issuers, anchor, None, PCK_CRL_CHAIN, window)? {
        [pck_ca] => Ok(pck_ca),
        path => Err(AttestError::PathLength { chain: PCK_CRL_CHAIN, count: path.len() }),
    }
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
    let anchor = chain::certificate(root.der(), chain::ROOT)?;
    let pck_ca = pck_ca(&issuers, &anchor, &mut window)?;
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
