//! What certificates say about where their issuer and their revocation list are. Owns: reading those addresses, and how far they are
//! followed. Never: believes what they lead to, follows them into a private network.
//! Source: RFC 5280 sections 4.2.1.13 (CRL distribution points) and 4.2.2.1 (authority information access).

use std::collections::BTreeSet;

use dstack_attest::X509Pool;
use x509_parser::extensions::{DistributionPointName, GeneralName, ParsedExtension};
use x509_parser::oid_registry::OID_PKIX_ACCESS_DESCRIPTOR_CA_ISSUERS;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::folder::pem_blocks;
use crate::{FetchError, Http};

/// Requests of one walk at most.
const REQUESTS_MAX: usize = 64;
/// Addresses read from one certificate.
const LINKS_MAX: usize = 8;
/// Longest address followed.
const URL_BYTES_MAX: usize = 1024;
const ANY: &[&str] = &[
    "application/pkix-cert",
    "application/pkix-crl",
    "application/pkcs7-mime",
    "application/x-x509-ca-cert",
    "application/x-pkcs7-crl",
    "application/octet-stream",
    "application/x-pem-file",
    "text/plain",
    "",
];

/// One address of a certificate.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Link {
    /// Its issuer's certificate.
    Issuer(String),
    /// Its issuer's revocation list.
    List(String),
}

/// Addresses that a certificate names; none of what cannot be read.
#[must_use]
pub fn links(der: &[u8]) -> Vec<Link> {
    let Ok((_, certificate)) = X509Certificate::from_der(der) else { return Vec::new() };
    let mut found = Vec::new();
    for extension in certificate.extensions() {
        match extension.parsed_extension() {
            ParsedExtension::AuthorityInfoAccess(access) => {
                let issuers = access.accessdescs.iter().filter(|one| one.access_method == OID_PKIX_ACCESS_DESCRIPTOR_CA_ISSUERS);
                found.extend(issuers.filter_map(|one| url(&one.access_location)).map(Link::Issuer));
            }
            ParsedExtension::CRLDistributionPoints(points) => {
                let names = points.iter().filter_map(|point| match &point.distribution_point {
                    Some(DistributionPointName::FullName(names)) => Some(names),
                    _ => None,
                });
                found.extend(names.flatten().filter_map(url).map(Link::List));
            }
            _ => {}
        }
    }
    found.truncate(LINKS_MAX);
    found
}

fn url(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::URI(uri) if uri.len() <= URL_BYTES_MAX && (uri.starts_with("http://") || uri.starts_with("https://")) => {
            Some((*uri).to_owned())
        }
        _ => None,
    }
}

/// Follows the addresses of `certificates` and of what they lead to. Plain `http` is taken: what comes carries its own signature.
#[must_use]
pub fn follow(http: &Http, certificates: &[Vec<u8>]) -> (X509Pool, Vec<FetchError>) {
    let (mut pool, mut failures, mut asked) = (X509Pool::default(), Vec::new(), BTreeSet::new());
    let mut waiting: Vec<Link> = certificates.iter().flat_map(|der| links(der)).collect();
    while let Some(link) = waiting.pop() {
        if asked.len() >= REQUESTS_MAX || !asked.insert(link.clone()) {
            continue;
        }
        let (address, label) = match &link {
            Link::Issuer(url) => (url, "CERTIFICATE"),
            Link::List(url) => (url, "X509 CRL"),
        };
        let grown = http.get_link(address, ANY).and_then(|fetched| {
            let ders = match std::str::from_utf8(&fetched.body).ok().filter(|text| text.contains("-----BEGIN ")) {
                Some(text) => pem_blocks(text).map_err(|why| fetched.content(&why, "DER or PEM"))?,
                None => vec![(label.to_owned(), fetched.body.clone())],
            };
            let ders: Vec<Vec<u8>> = ders.into_iter().filter(|(found, _)| found == label).map(|(_, der)| der).collect();
            let (certificates, crls) = if label == "CERTIFICATE" { (ders, Vec::new()) } else { (Vec::new(), ders) };
            let both = |old: &[Vec<u8>], new: &[Vec<u8>]| old.iter().chain(new).cloned().collect();
            let grown = X509Pool::new(both(&pool.certificates, &certificates), both(&pool.crls, &crls));
            Ok((grown.map_err(|error| fetched.content(&error.to_string(), "DER or PEM"))?, certificates))
        });
        match grown {
            Ok((grown, new)) => {
                pool = grown;
                waiting.extend(new.iter().flat_map(|der| links(der)));
            }
            Err(error) => failures.push(error),
        }
    }
    (pool, failures)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_give_links_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(links(&bytes).len() <= LINKS_MAX);
        }
    }
}
