//! What other platforms than TDX need, out of AMD's service and out of what certificates point at. Owns: what to ask for, and that
//! nothing is given on that may not be pinned. Never: asks hosts that the configuration does not name; proposes.

use std::collections::BTreeSet;

use dstack_attest::snp::{Product, Tcb, claimed_chip};
use dstack_attest::{TrustRoots, X509Pool};
use dstack_protocol::UnixMillis;
use dstack_protocol::collateral::{Want, Wants};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::amd::{Kds, KeyOf};
use crate::links::{LinkHosts, follow};
use crate::{FetchError, Http};

/// Certificates of one chip that are asked for at most, one for each firmware version. AMD signs them for whatever versions are named, so
/// that strangers could fill the pool; the owner of a chip that needs another has it in its evidence, or an operator brings it.
const VCEKS_OF_CHIP_MAX: usize = 4;

/// Whom to ask.
#[derive(Debug, Clone)]
pub struct PoolSources {
    /// AMD's key distribution service and mirrors of it, in order.
    pub kds: Vec<Kds>,
    /// For what certificates point at.
    pub http: Http,
    /// Where that may be.
    pub hosts: LinkHosts,
}

/// What asking gave.
#[derive(Debug, Default)]
pub struct Gathered {
    /// Certificates and lists that `current` lacks; each may be pinned beside it.
    pub pool: X509Pool,
    /// What went wrong on the way.
    pub failures: Vec<FetchError>,
    /// Wants that nobody had.
    pub unanswered: usize,
}

/// Asks for `wants`; with `renew` also for the present lists and issuers of everything in `current`. Blocking.
#[must_use]
pub fn gather(current: &X509Pool, wants: &Wants, renew: bool, sources: &PoolSources, roots: &TrustRoots, now: UnixMillis) -> Gathered {
    let mut all = Gathered::default();
    let mut products: BTreeSet<(&str, KeyOf)> = BTreeSet::new();
    let (mut certificates, mut crls, mut links) = (Vec::new(), Vec::new(), Vec::new());
    for want in &wants.0 {
        match want {
            Want::Tdx(_) => {}
            Want::Chip { id, .. } if of_chip(&current.certificates, id).saturating_add(of_chip(&certificates, id)) >= VCEKS_OF_CHIP_MAX => {
                let chip = hex::encode(id.get(..8).unwrap_or_default());
                all.failures.push(FetchError::Item(format!("none: chip {chip}… has {VCEKS_OF_CHIP_MAX} certificates in the pool already")));
            }
            Want::Chip { id, tcb } => match sources.chip(id, *tcb, &mut all.failures) {
                Some((product, der)) => {
                    certificates.push(der);
                    products.insert((product.name(), KeyOf::Chip));
                }
                None => all.unanswered = all.unanswered.saturating_add(1),
            },
            Want::Product { name, vlek } => {
                let known = Product::ALL.into_iter().find(|product| product.name() == name);
                let keys = if *vlek { KeyOf::Cloud } else { KeyOf::Chip };
                products.extend(known.map(|product| (product.name(), keys)));
            }
            Want::Link(url) => links.push(url.clone()),
        }
    }
    if renew {
        products.extend(current.certificates.iter().filter_map(|der| product_of(der)));
    }
    for (product, keys) in products {
        match sources.product(product, keys, roots, now, &mut all.failures) {
            Some(pool) => {
                certificates.extend(pool.certificates);
                crls.extend(pool.crls);
            }
            None => all.unanswered = all.unanswered.saturating_add(1),
        }
    }
    let followed: &[Vec<u8>] = if renew { &current.certificates } else { &[] };
    let others: Vec<Vec<u8>> = followed.iter().filter(|der| product_of(der).is_none() && !is_amd(der)).cloned().collect();
    let (found, failed) = follow(&sources.http, &sources.hosts, &others, &links);
    if found.is_empty() {
        all.unanswered = all.unanswered.saturating_add(links.len());
    }
    all.failures.extend(failed);
    certificates.extend(found.certificates);
    crls.extend(found.crls);
    all.pool = usable(current, certificates, crls, roots, now, &mut all.failures);
    all
}

impl PoolSources {
    fn chip(&self, id: &[u8; 64], tcb: [u8; 8], failures: &mut Vec<FetchError>) -> Option<(Product, Vec<u8>)> {
        // Only Turin's ids are short; the report of a chip of the others has a byte behind the eighth, or it would name nobody.
        let is_short = id.get(8..).is_some_and(|rest| rest.iter().all(|byte| *byte == 0));
        let products = Product::ALL.into_iter().filter(|product| (*product == Product::Turin) == is_short);
        for (product, tcb) in products.filter_map(|product| Some((product, Tcb::of(tcb, product)?))) {
            for kds in &self.kds {
                match kds.vcek(product, id, tcb) {
                    Ok(der) => return Some((product, der)),
                    Err(error) => failures.push(error),
                }
            }
        }
        None
    }

    /// The first endpoint's answer that holds as a whole.
    fn product(&self, name: &str, keys: KeyOf, roots: &TrustRoots, now: UnixMillis, failures: &mut Vec<FetchError>) -> Option<X509Pool> {
        for kds in &self.kds {
            match kds.product(name, keys) {
                Ok(pool) => match pool.check(now, roots).first() {
                    None => return Some(pool),
                    Some(finding) => failures.push(FetchError::Item(finding.to_string())),
                },
                Err(error) => failures.push(error),
            }
        }
        None
    }
}

fn of_chip(certificates: &[Vec<u8>], id: &[u8; 64]) -> usize {
    certificates.iter().filter(|der| claimed_chip(der).as_ref() == Some(id)).count()
}

/// What of these is new and may be pinned beside `current`.
fn usable(
    current: &X509Pool,
    certificates: Vec<Vec<u8>>,
    crls: Vec<Vec<u8>>,
    roots: &TrustRoots,
    now: UnixMillis,
    failures: &mut Vec<FetchError>,
) -> X509Pool {
    let both = |old: &[Vec<u8>], new: &[Vec<u8>]| old.iter().chain(new).cloned().collect::<Vec<_>>();
    let whole = match X509Pool::new(both(&current.certificates, &certificates), both(&current.crls, &crls)) {
        Ok(whole) => whole.pruned(now),
        Err(error) => {
            failures.push(FetchError::Bundle(error.to_string()));
            return X509Pool::default();
        }
    };
    let findings = whole.check(now, roots);
    failures.extend(findings.iter().map(|finding| FetchError::Item(finding.to_string())));
    let good = |der: &Vec<u8>| {
        let digest = dstack_protocol::codec::sha256(&[der]);
        !findings.iter().any(|finding| finding.sha256 == digest)
    };
    let new = |of: &[Vec<u8>], old: &[Vec<u8>]| of.iter().filter(|der| !old.contains(der) && good(der)).cloned().collect();
    X509Pool { certificates: new(&whole.certificates, &current.certificates), crls: new(&whole.crls, &current.crls) }
}

/// The product whose issuers and list a certificate of AMD's hangs from: its own for an issuer, its issuer's for a key.
fn product_of(der: &[u8]) -> Option<(&'static str, KeyOf)> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let mut names = certificate.subject().iter_common_name().chain(certificate.issuer().iter_common_name());
    names.find_map(|name| {
        let name = name.as_str().ok()?;
        let of = |prefix: &str| Product::ALL.into_iter().find(|product| name.strip_prefix(prefix) == Some(product.name()));
        of("SEV-VLEK-").map(|product| (product.name(), KeyOf::Cloud)).or_else(|| of("SEV-").map(|product| (product.name(), KeyOf::Chip)))
    })
}

/// Whether it is one of AMD's roots, which point at nothing.
fn is_amd(der: &[u8]) -> bool {
    let Ok((_, certificate)) = X509Certificate::from_der(der) else { return false };
    certificate.subject().iter_common_name().any(|name| name.as_str().is_ok_and(|name| name.starts_with("ARK-")))
}
