//! Whether a whole pool may be pinned: every certificate ends at a root of a vendor, every revocation list is its issuer's, all in
//! their time. Owns: what is found wrong, item by item. Never: judges evidence (that walks its own path, with its vendor's full rules and
//! revocation), reads the clock.
//! Source: RFC 5280 sections 4.1.2.5, 4.2.1.9 and 5; ADR 0010, "What a pool must be".
//!
//! Certificates are vouched for from the roots downwards, one generation a round, so the work is bounded by certificates times rounds
//! however the pool is made.

use std::fmt;

use dstack_protocol::UnixMillis;
use sha2::{Digest, Sha256};
use x509_parser::prelude::X509Certificate;

use super::{
    KeyKind, Purpose, Revocation, Rules, SignatureAlgorithm,
    crl::{self, authority_key, subject_key},
    name_of,
    path::verify_issued,
    rules::{Place, parse},
};
use crate::{AttestError, TrustRoots, Vendor, window::Window, window::ms_of};

const CERTIFICATE: &str = "certificate of the x509 pool";
const LIST: &str = "crl of the x509 pool";
/// Certificates between a root and what is furthest from it, that included.
const GENERATIONS_MAX: usize = 4;

/// What a finding is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolPart {
    /// A certificate.
    Certificate,
    /// A revocation list.
    List,
}

/// One item of a pool that may not be pinned, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolFinding {
    /// Certificate or list.
    pub part: PoolPart,
    /// Its subject, or a list's issuer; empty where it cannot be read. A stranger's text, at most 200 characters.
    pub name: String,
    /// SHA-256 of its DER.
    pub sha256: [u8; 32],
    /// Why.
    pub error: AttestError,
}

impl fmt::Display for PoolFinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.part {
            PoolPart::Certificate => "certificate",
            PoolPart::List => "revocation list of",
        };
        let digest = self.sha256.get(..8).map(hex::encode).unwrap_or_default();
        write!(f, "{kind} `{}` (SHA-256 {digest}…): {}: {}", self.name, self.error.class().as_str(), self.error)
    }
}

/// A certificate that ends at a root, and whose root that is; `None` is a software root's.
struct Vouched<'p> {
    certificate: &'p X509Certificate<'p>,
    vendor: Option<Vendor>,
}

/// All that is wrong with a pool at `now`, certificates first, in the pool's order.
pub(crate) fn findings(certificates: &[Vec<u8>], crls: &[Vec<u8>], roots: &TrustRoots, now: UnixMillis) -> Vec<PoolFinding> {
    let (mut found, mut parsed) = (Vec::new(), Vec::new());
    for der in certificates {
        match parse(der, CERTIFICATE) {
            Ok(certificate) => parsed.push((der.as_slice(), certificate)),
            Err(error) => found.push(finding(PoolPart::Certificate, String::new(), der, error)),
        }
    }
    let anchors: Vec<_> = roots
        .iter()
        // Intel's certificates travel with the collateral of their platform.
        .filter(|root| root.vendor() != Some(Vendor::Intel))
        .filter_map(|root| Some((parse(root.der(), CERTIFICATE).ok()?, root.vendor())))
        .collect();
    let mut vouched: Vec<Vouched<'_>> = anchors.iter().map(|(certificate, vendor)| Vouched { certificate, vendor: *vendor }).collect();
    let mut waiting: Vec<(&[u8], &X509Certificate<'_>, Option<AttestError>)> =
        parsed.iter().map(|(der, certificate)| (*der, certificate, None)).collect();
    for _ in 0..GENERATIONS_MAX {
        let (mut next, mut left) = (Vec::new(), Vec::new());
        for (der, certificate, _) in waiting {
            match issued_by(certificate, &vouched) {
                Ok(vendor) => next.push(Vouched { certificate, vendor }),
                Err(error) => left.push((der, certificate, Some(error))),
            }
        }
        waiting = left;
        if next.is_empty() {
            break;
        }
        vouched.extend(next);
    }
    for (der, certificate, error) in waiting {
        let error = error.unwrap_or(AttestError::UntrustedRoot { chain: CERTIFICATE });
        found.push(finding(PoolPart::Certificate, name_of(certificate.subject()), der, error));
    }
    for (der, certificate) in &parsed {
        if let Err(error) = Window::at(now.0).certificate(certificate, CERTIFICATE) {
            found.push(finding(PoolPart::Certificate, name_of(certificate.subject()), der, error));
        }
    }
    for der in crls {
        if let Err((name, error)) = check_list(der, &vouched, now) {
            found.push(finding(PoolPart::List, name, der, error));
        }
    }
    found
}

fn finding(part: PoolPart, name: String, der: &[u8], error: AttestError) -> PoolFinding {
    PoolFinding { part, name, sha256: Sha256::digest(der).into(), error }
}

/// Whose root a certificate ends at: it is that root, or one of `vouched` issued it.
fn issued_by(certificate: &X509Certificate<'_>, vouched: &[Vouched<'_>]) -> Result<Option<Vendor>, AttestError> {
    let is_anchor = |one: &&Vouched<'_>| {
        one.certificate.subject().as_raw() == certificate.subject().as_raw()
            && one.certificate.public_key().raw == certificate.public_key().raw
            && certificate.issuer().as_raw() == certificate.subject().as_raw()
    };
    if let Some(root) = vouched.iter().find(is_anchor) {
        return Ok(root.vendor);
    }
    let wanted = authority_key(certificate);
    let mut refusal =
        AttestError::IssuerUnknown { chain: CERTIFICATE, issuer: name_of(certificate.issuer()), from: super::links::issuer(certificate) };
    for issuer in vouched.iter().filter(|issuer| issuer.certificate.subject().as_raw() == certificate.issuer().as_raw()) {
        let has = subject_key(issuer.certificate);
        if wanted.is_some() && has.is_some() && wanted != has {
            continue;
        }
        let rules = rules(issuer.vendor, CERTIFICATE);
        let good = rules.check_issuer(issuer.certificate).and_then(|()| verify_issued(certificate, issuer.certificate, &rules));
        match good {
            Ok(()) => return Ok(issuer.vendor),
            Err(error) => refusal = error,
        }
    }
    Err(refusal)
}

fn check_list(der: &[u8], vouched: &[Vouched<'_>], now: UnixMillis) -> Result<(), (String, AttestError)> {
    let unread = |error| (String::new(), error);
    let list = crl::parse(der, &rules(None, LIST)).map_err(unread)?;
    let name = name_of(list.issuer());
    let named = |error| (name.clone(), error);
    let mut refusal = AttestError::IssuerUnknown { chain: LIST, issuer: name.clone(), from: None };
    let mut is_signed = false;
    for issuer in vouched.iter().filter(|issuer| issuer.certificate.subject().as_raw() == list.issuer().as_raw()) {
        match crl::is_of(&list, issuer.certificate, &rules(issuer.vendor, LIST)) {
            Ok(true) => {
                is_signed = true;
                break;
            }
            Ok(false) => refusal = AttestError::ChainSignature { chain: LIST },
            Err(error) => refusal = error,
        }
    }
    if !is_signed {
        return Err(named(refusal));
    }
    let next_update = list.next_update().ok_or(AttestError::Malformed { part: LIST, why: "no next update" }).map_err(named)?;
    let dates = ms_of(list.last_update()).and_then(|issued| Ok((issued, ms_of(next_update)?)));
    let (issued, next_update) = dates.map_err(named)?;
    Window::at(now.0).collateral(issued, next_update, LIST).map_err(named)
}

/// What one vendor signs with. A software root may stand for any vendor.
fn rules(vendor: Option<Vendor>, chain: &'static str) -> Rules {
    use SignatureAlgorithm as S;
    let signatures: &'static [S] = match vendor {
        Some(Vendor::Amd) => &[S::RsaPssSha384],
        Some(Vendor::Aws) => &[S::EcdsaP384Sha384],
        _ => &[S::RsaPkcs1Sha256, S::RsaPkcs1Sha384, S::RsaPkcs1Sha512, S::RsaPssSha384, S::EcdsaP256Sha256, S::EcdsaP384Sha384],
    };
    Rules {
        chain,
        vendor: vendor.unwrap_or(Vendor::Google),
        keys: &[KeyKind::Rsa, KeyKind::P256, KeyKind::P384],
        signatures,
        purpose: None::<Purpose>,
        alternative_names: true,
        revocation: Revocation::WhereGiven,
        intermediates_max: GENERATIONS_MAX,
    }
}

impl Rules {
    /// Whether a certificate may issue others, whatever comes below it.
    fn check_issuer(&self, issuer: &X509Certificate<'_>) -> Result<(), AttestError> {
        self.check(issuer, Place::Issuer { below: 0 }, 2)
    }
}
