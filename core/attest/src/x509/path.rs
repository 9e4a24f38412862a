//! Certificate paths: from a root down to a leaf, given in order or to be found in a pool. Owns: the order of the checks of a path.
//! Never: trusts a certificate of the pool before the path to it was walked; reads the clock.
//! Source: RFC 5280 section 6.1 for paths without policies; RFC 4158 for building.

use dstack_protocol::UnixMillis;
use x509_parser::prelude::X509Certificate;

use super::{
    crl::{self, Lists},
    key::Key,
    names,
    rules::{Place, Rules, parse},
};
use crate::{AttestError, Root, TrustRoots, window::Window};

/// Signatures that are verified at most while a path is looked for: candidates of one name are few.
const ATTEMPTS_MAX: usize = 16;

/// Untrusted certificates and revocation lists to build a path from.
#[derive(Debug, Clone, Copy, Default)]
pub struct Untrusted<'a> {
    /// Certificates that came with the evidence, DER.
    pub presented: &'a [Vec<u8>],
    /// Certificates of the pinned collateral, DER.
    pub pinned: &'a [Vec<u8>],
    /// Revocation lists of the pinned collateral, DER.
    pub crls: &'a [Vec<u8>],
}

/// A path that was walked from its root to its leaf. Made by [`walk`] and [`build`] only.
#[derive(Debug)]
pub struct Path<'a, 'r> {
    leaf: X509Certificate<'a>,
    intermediates: usize,
    root: &'r Root,
    earliest_expiry: UnixMillis,
}

impl<'a, 'r> Path<'a, 'r> {
    /// The leaf.
    #[must_use]
    pub const fn leaf(&self) -> &X509Certificate<'a> {
        &self.leaf
    }

    /// The leaf's key.
    /// # Errors
    /// Never for a path that was walked: its keys are of the kinds that the rules allow.
    pub fn key(&self) -> Result<Key<'_>, AttestError> {
        Key::of(self.leaf.public_key()).ok_or(AttestError::Malformed { part: "leaf key", why: "of a kind that is not served" })
    }

    /// CA certificates between root and leaf.
    #[must_use]
    pub const fn intermediates(&self) -> usize {
        self.intermediates
    }

    /// Where it ends.
    #[must_use]
    pub const fn root(&self) -> &'r Root {
        self.root
    }

    /// The first second at which a certificate or revocation list of the path is to be renewed.
    #[must_use]
    pub const fn earliest_expiry(&self) -> UnixMillis {
        self.earliest_expiry
    }
}

/// Walks a path that is given in order: `root`, then `intermediates` downwards, then `leaf`.
/// # Errors
/// Classes `chain.*`, `time.*`, `sig.algorithm`, `parse.*`.
pub fn walk<'a, 'r>(
    root: &'r Root,
    intermediates: &[&'a [u8]],
    leaf: &'a [u8],
    crls: &[Vec<u8>],
    now: UnixMillis,
    rules: &Rules,
) -> Result<Path<'a, 'r>, AttestError> {
    if intermediates.len() > rules.intermediates_max {
        return Err(AttestError::PathLength { chain: rules.chain, count: intermediates.len().saturating_add(2) });
    }
    let anchor = parse(root.der(), rules.chain)?;
    let issuers = intermediates.iter().map(|der| parse(der, rules.chain)).collect::<Result<Vec<_>, _>>()?;
    let leaf = parse(leaf, rules.chain)?;
    let downwards: Vec<_> = std::iter::once(&anchor).chain(&issuers).chain(std::iter::once(&leaf)).collect();
    let earliest_expiry = check(&downwards, Signatures::Unverified, &Lists::of(crls), now, rules)?;
    Ok(Path { leaf, intermediates: issuers.len(), root, earliest_expiry })
}

/// Finds the path from `leaf` to a root of the rules' vendor, or to a software root, and walks it. Of several, the first that is good.
/// # Errors
/// Classes `chain.*`, `time.*`, `sig.algorithm`, `parse.*`: of the last path tried, or why none could be built.
pub fn build<'a, 'r>(
    leaf: &'a [u8],
    untrusted: &Untrusted<'a>,
    roots: &'r TrustRoots,
    now: UnixMillis,
    rules: &Rules,
) -> Result<Path<'a, 'r>, AttestError> {
    let lists = Lists::of(untrusted.crls);
    let mut search = Search { untrusted, roots, now, rules, lists: &lists, attempts: 0, refusal: None };
    let mut upwards = vec![parse(leaf, rules.chain)?];
    match search.climb(&mut upwards) {
        Some((root, earliest_expiry)) => {
            let intermediates = upwards.len().saturating_sub(1);
            Ok(Path { leaf: upwards.swap_remove(0), intermediates, root, earliest_expiry })
        }
        None => Err(search.refusal.unwrap_or(AttestError::UntrustedRoot { chain: rules.chain })),
    }
}

/// The search for a path. Its depth is bounded by the rules, its work by [`ATTEMPTS_MAX`].
struct Search<'s, 'a, 'r> {
    untrusted: &'s Untrusted<'a>,
    roots: &'r TrustRoots,
    now: UnixMillis,
    rules: &'s Rules,
    lists: &'s Lists<'a>,
    attempts: usize,
    /// Why the most promising path so far is none.
    refusal: Option<AttestError>,
}

impl<'a, 'r> Search<'_, 'a, 'r> {
    /// Continues `upwards` (leaf first) to a root. On success it holds the path without the root.
    fn climb(&mut self, upwards: &mut Vec<X509Certificate<'a>>) -> Option<(&'r Root, UnixMillis)> {
        let rules = self.rules;
        let roots = self.roots;
        let top = upwards.last()?;
        let issuer_name = top.issuer().as_raw().to_vec();
        for root in roots.serving(rules.vendor).filter(|root| root.subject() == issuer_name) {
            let Ok(anchor) = parse(root.der(), rules.chain) else { continue };
            if !self.attempt(upwards.last()?, &anchor) {
                continue;
            }
            let downwards: Vec<_> = std::iter::once(&anchor).chain(upwards.iter().rev()).collect();
            match check(&downwards, Signatures::Verified, self.lists, self.now, rules) {
                Ok(earliest_expiry) => return Some((root, earliest_expiry)),
                Err(error) => self.refusal = Some(error),
            }
        }
        if upwards.len() > rules.intermediates_max {
            self.refuse(AttestError::PathLength { chain: rules.chain, count: upwards.len().saturating_add(2) });
            return None;
        }
        let mut candidates = 0_usize;
        for der in self.untrusted.presented.iter().chain(self.untrusted.pinned) {
            if names::of_certificate(der).is_none_or(|(_, subject)| subject != issuer_name) {
                continue;
            }
            let Ok(candidate) = parse(der, rules.chain) else { continue };
            let known = upwards.iter().any(|above| above.as_ref() == candidate.as_ref());
            let top = upwards.last()?;
            let (wanted, has) = (crl::authority_key(top), crl::subject_key(&candidate));
            if known || (wanted.is_some() && has.is_some() && wanted != has) {
                continue;
            }
            candidates = candidates.saturating_add(1);
            if !self.attempt(upwards.last()?, &candidate) {
                continue;
            }
            upwards.push(candidate);
            if let Some(found) = self.climb(upwards) {
                return Some(found);
            }
            upwards.pop();
        }
        if candidates == 0 {
            let issuer = upwards.last().map(|top| super::name_of(top.issuer())).unwrap_or_default();
            let from = upwards.last().and_then(super::links::issuer);
            self.refuse(AttestError::IssuerUnknown { chain: rules.chain, issuer, from });
        }
        None
    }

    /// Whether `issuer` signed `subject`.
    fn attempt(&mut self, subject: &X509Certificate<'_>, issuer: &X509Certificate<'_>) -> bool {
        if self.attempts >= ATTEMPTS_MAX {
            self.refuse(self.rules.invalid("too many certificates of one name"));
            return false;
        }
        self.attempts = self.attempts.saturating_add(1);
        match verify_issued(subject, issuer, self.rules) {
            Ok(()) => true,
            Err(error) => {
                self.refuse(error);
                false
            }
        }
    }

    /// Keeps the first reason: what a whole path was refused for overwrites it, what a later candidate lacks does not.
    fn refuse(&mut self, error: AttestError) {
        self.refusal.get_or_insert(error);
    }
}

/// Whether the signatures of a path were verified while it was found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Signatures {
    Verified,
    Unverified,
}

/// Checks a path from the root downwards; answers when it is to be renewed.
fn check(
    downwards: &[&X509Certificate<'_>],
    signatures: Signatures,
    lists: &Lists<'_>,
    now: UnixMillis,
    rules: &Rules,
) -> Result<UnixMillis, AttestError> {
    let mut window = Window::at(now.0);
    let count = downwards.len();
    let mut issuer: Option<&X509Certificate<'_>> = None;
    for (position, certificate) in downwards.iter().copied().enumerate() {
        let place = match count.saturating_sub(position) {
            1 => Place::Leaf,
            left => Place::Issuer { below: left.saturating_sub(2) },
        };
        rules.check(certificate, place, count)?;
        window.certificate(certificate, rules.chain)?;
        // the root is trusted as it is; its own signature says nothing
        if let Some(issuer) = issuer {
            if signatures == Signatures::Unverified {
                verify_issued(certificate, issuer, rules)?;
            }
            lists.check(certificate, issuer, rules, &mut window)?;
        }
        issuer = Some(certificate);
    }
    Ok(UnixMillis(window.earliest_expiry_ms()))
}

/// Names the issuer and carries its signature.
pub(super) fn verify_issued(certificate: &X509Certificate<'_>, issuer: &X509Certificate<'_>, rules: &Rules) -> Result<(), AttestError> {
    if certificate.issuer().as_raw() != issuer.subject().as_raw() {
        return Err(rules.invalid("a certificate names another issuer"));
    }
    let algorithm = rules.signature_algorithm(certificate)?;
    let key = Key::of(issuer.public_key()).ok_or(rules.invalid("a key is of a kind that is not allowed"))?;
    match key.verifies(algorithm, certificate.tbs_certificate.as_ref(), certificate.signature_value.data.as_ref()) {
        true => Ok(()),
        false => Err(AttestError::ChainSignature { chain: rules.chain }),
    }
}
