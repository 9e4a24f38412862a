//! A new bundle out of the one in force. Owns: whom to ask for which platform, in which order; what is kept when nobody has better.
//! Never: gives anything on that does not verify now, or that is older than what is in force.

use std::collections::{BTreeMap, BTreeSet};

use dstack_attest::{CollateralBundle, TdxCollateral, TrustRoots, X509Pool, tdx};
use dstack_protocol::UnixMillis;

use crate::{FetchError, Intel};

/// What asking around gave.
#[derive(Debug)]
pub struct Refreshed {
    /// The new bundle; `None` where nothing is newer.
    pub bundle: Option<CollateralBundle>,
    /// Platforms that are newer, or new.
    pub renewed: Vec<[u8; 6]>,
    /// What went wrong on the way; an endpoint's failure matters only if no other endpoint answered.
    pub failures: Vec<FetchError>,
    /// Platforms that no endpoint answered for.
    pub unanswered: Vec<[u8; 6]>,
    /// What of other platforms nobody answered for; [`crate::gather`] counts it.
    pub unanswered_others: usize,
}

/// Asks the endpoints in order for every platform of `current` and for `more`. Blocking.
/// # Errors
/// [`FetchError::Bundle`] where the whole does not fit into a bundle.
pub fn refresh(
    current: &CollateralBundle,
    more: &BTreeSet<[u8; 6]>,
    endpoints: &[Intel],
    roots: &TrustRoots,
    now: UnixMillis,
) -> Result<Refreshed, FetchError> {
    let platforms: BTreeSet<[u8; 6]> = current.fmspcs().chain(more).copied().collect();
    let (mut parts, mut failures, mut unanswered) = (BTreeMap::new(), Vec::new(), Vec::new());
    for fmspc in platforms {
        let known = current.tdx_platforms().get(&fmspc);
        let mut answered = false;
        for endpoint in endpoints {
            match endpoint.collateral(&fmspc, known).and_then(|one| verified(&fmspc, one, known, roots, now)) {
                Ok(Some(newer)) => {
                    parts.insert(fmspc, newer);
                    answered = true;
                }
                Ok(None) => answered = true,
                Err(error) => failures.push(error),
            }
            if answered {
                break;
            }
        }
        if !answered {
            unanswered.push(fmspc);
        }
    }
    let renewed: Vec<[u8; 6]> = parts.keys().copied().collect();
    let bundle = if parts.is_empty() { None } else { Some(merge(current, parts, &X509Pool::default(), now)?) };
    Ok(Refreshed { bundle, renewed, failures, unanswered, unanswered_others: 0 })
}

/// `one`, if it verifies and is newer than `known`; `None` if it is as new.
fn verified(
    fmspc: &[u8; 6],
    one: TdxCollateral,
    known: Option<&TdxCollateral>,
    roots: &TrustRoots,
    now: UnixMillis,
) -> Result<Option<TdxCollateral>, FetchError> {
    let invalid = |error: dstack_attest::AttestError| FetchError::Invalid {
        fmspc: hex::encode(fmspc),
        class: error.class().as_str(),
        detail: error.to_string(),
    };
    tdx::check_collateral(fmspc, &one, now.0, roots).map_err(invalid)?;
    let facts = tdx::collateral_facts(&one).map_err(invalid)?;
    let Some(old) = known.and_then(|known| tdx::collateral_facts(known).ok()) else { return Ok(Some(one)) };
    match facts.older_part(&old) {
        Some(part) => {
            let detail = format!("older {part} than in force");
            Err(FetchError::Invalid { fmspc: hex::encode(fmspc), class: "collateral.older", detail })
        }
        None => Ok((facts != old).then_some(one)),
    }
}

/// `current` with these platforms replaced or added, and these certificates and lists added; what of the pool is over at `now`, or a
/// later list stands for, is left out.
/// # Errors
/// [`FetchError::Bundle`] above a cap.
pub fn merge(
    current: &CollateralBundle,
    parts: BTreeMap<[u8; 6], TdxCollateral>,
    more: &X509Pool,
    now: UnixMillis,
) -> Result<CollateralBundle, FetchError> {
    let bundle = |error: dstack_attest::AttestError| FetchError::Bundle(error.to_string());
    let mut tdx = current.tdx_platforms().clone();
    tdx.extend(parts);
    let together = |old: &[Vec<u8>], new: &[Vec<u8>]| old.iter().chain(new).cloned().collect();
    let x509 = current.x509();
    let pool = X509Pool::new(together(&x509.certificates, &more.certificates), together(&x509.crls, &more.crls)).map_err(bundle)?;
    let merged = CollateralBundle::compose(&tdx, &pool.pruned(now)).map_err(bundle)?;
    match merged.bytes().len() > dstack_protocol::limits::COLLATERAL_BYTES_MAX {
        true => Err(FetchError::Bundle(format!(
            "{} bytes, a pin takes {}",
            merged.bytes().len(),
            dstack_protocol::limits::COLLATERAL_BYTES_MAX
        ))),
        false => Ok(merged),
    }
}
