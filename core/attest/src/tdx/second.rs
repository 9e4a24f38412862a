//! Other ways to the same verdict: `dcap-qvl` judges the same bytes under the same root, time and collateral; our own verifier judges them
//! as if it had seen their chain before. Owns: the comparison. Never: runs when a quote is judged (ADR 0011, 0022); tests and
//! `check-manifest` ask for it.

use std::collections::BTreeMap;

use dcap_qvl::{QuoteCollateralV3, TcbStatus as Status, verify::QuoteVerifier};

use super::{LevelVerdict, PCK_CHAIN, Quote, VerifiedTd, chain, clock::Recorded, known::PckChain, parse_all, tcb::ours, verify_bundled};
use crate::{AttestError, CollateralBundle, TdxCollateral, Trace, TrustRoots, X509Pool, pem};

/// Refuses unless `dcap-qvl` accepts the quote as well, of which [`super::verify_quote`] said `first`, and reports the same TCB,
/// advisories, platform and TD.
/// # Errors
/// [`AttestError::SecondVerifier`].
pub fn second_opinion(
    bytes: &[u8],
    collateral: &TdxCollateral,
    now_ms: u64,
    roots: &TrustRoots,
    first: &VerifiedTd,
) -> Result<(), AttestError> {
    let quote = Quote::parse(bytes)?;
    let ders = pem::certificates(quote.parts.pck_chain_pem, PCK_CHAIN)?;
    let root = chain::root_of(&parse_all(&ders, PCK_CHAIN)?, roots, PCK_CHAIN)?;
    let report = QuoteVerifier::new(root.der().to_vec())
        .verify(quote.meaningful, &collateral_of(collateral), now_ms / 1000)
        .map_err(|error| AttestError::SecondVerifier { detail: format!("{error:#}") })?;
    let differs = |what: &str| AttestError::SecondVerifier { detail: format!("reports another {what}") };
    let tcb = first.tcb();
    if status_of(&report.status).map(ours) != Some(tcb.overall.status) || report.advisory_ids != tcb.overall.advisory_ids {
        return Err(differs("tcb status"));
    }
    let level =
        |level: &dcap_qvl::TcbStatusWithAdvisory| LevelVerdict { status: ours(level.status), advisory_ids: level.advisory_ids.clone() };
    if level(&report.platform_status) != tcb.platform || level(&report.qe_status) != tcb.qe {
        return Err(differs("platform or qe status"));
    }
    if report.ppid != first.pck().ppid {
        return Err(differs("ppid"));
    }
    let td = report.report.as_td10().ok_or_else(|| differs("kind of report"))?;
    let body = first.body();
    let same = td.mr_td == body.mr_td
        && [td.rt_mr0, td.rt_mr1, td.rt_mr2, td.rt_mr3] == body.rtmr
        && td.report_data == body.report_data
        && td.td_attributes == body.td_attributes;
    match same {
        true => Ok(()),
        false => Err(differs("td report")),
    }
}

/// Judges a quote whose chain is already remembered, whatever the rest of it is; the verdict has to be that of [`super::verify_quote`].
/// `None` where the chain is none that could have been remembered: it does not hold at any time, or is not of a leaf and a CA.
#[must_use]
pub fn verify_quote_remembered(
    bytes: &[u8],
    collateral: &TdxCollateral,
    now_ms: u64,
    roots: &TrustRoots,
) -> Option<Result<VerifiedTd, AttestError>> {
    let quote = Quote::parse(bytes).ok()?;
    let ders = pem::certificates(quote.parts.pck_chain_pem, PCK_CHAIN).ok()?;
    let certificates = parse_all(&ders, PCK_CHAIN).ok()?;
    let root = chain::root_of(&certificates, roots, PCK_CHAIN).ok()?;
    let anchor = chain::certificate(root.der(), chain::ROOT).ok()?;
    let path = Recorded::of(|window| chain::verify_path(&certificates, &anchor, None, PCK_CHAIN, window)).ok()?;
    let [leaf, intermediate] = path.found() else { return None };
    let remembered = PckChain::of(leaf, intermediate, &anchor, root).ok().filter(|_| !leaf.is_ca())?;
    let tdx = BTreeMap::from([(remembered.platform.fmspc, collateral.clone())]);
    let bundle = CollateralBundle::compose(&tdx, &X509Pool::default()).ok()?;
    bundle.pck_chains().keep(quote.parts.pck_chain_pem, remembered);
    Some(verify_bundled(bytes, &bundle, now_ms, roots, &Trace::new()))
}

pub(super) fn collateral_of(collateral: &TdxCollateral) -> QuoteCollateralV3 {
    QuoteCollateralV3 {
        pck_crl_issuer_chain: collateral.pck_crl_issuer_chain.clone(),
        root_ca_crl: collateral.root_ca_crl.clone(),
        pck_crl: collateral.pck_crl.clone(),
        tcb_info_issuer_chain: collateral.tcb_info_issuer_chain.clone(),
        tcb_info: collateral.tcb_info.clone(),
        tcb_info_signature: collateral.tcb_info_signature.clone(),
        qe_identity_issuer_chain: collateral.qe_identity_issuer_chain.clone(),
        qe_identity: collateral.qe_identity.clone(),
        qe_identity_signature: collateral.qe_identity_signature.clone(),
        // `None`: the chain inside the quote is the one that is judged.
        pck_certificate_chain: None,
    }
}

/// The overall status comes as text.
pub(super) fn status_of(text: &str) -> Option<Status> {
    serde_json::from_value(serde_json::Value::from(text)).ok()
}
