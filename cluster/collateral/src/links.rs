//! What certificates say about where their issuer and their revocation list are. Owns: reading those addresses, and how far they are
//! followed. Never: believes what they lead to, follows them into a private network.
//! Source: RFC 5280 sections 4.2.1.13 (CRL distribution points) and 4.2.2.1 (authority information access).

use std::collections::BTreeSet;
use std::net::IpAddr;

use dstack_attest::X509Pool;
use x509_parser::extensions::{DistributionPointName, GeneralName, ParsedExtension};
use x509_parser::oid_registry::OID_PKIX_ACCESS_DESCRIPTOR_CA_ISSUERS;
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};

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

/// Addresses of a certificate's issuer and of its issuer's revocation list; none of what cannot be read.
#[must_use]
pub fn links(der: &[u8]) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(der) else { return Vec::new() };
    let mut found = Vec::new();
    for extension in certificate.extensions() {
        match extension.parsed_extension() {
            ParsedExtension::AuthorityInfoAccess(access) => {
                let issuers = access.accessdescs.iter().filter(|one| one.access_method == OID_PKIX_ACCESS_DESCRIPTOR_CA_ISSUERS);
                found.extend(issuers.filter_map(|one| url(&one.access_location)));
            }
            ParsedExtension::CRLDistributionPoints(points) => {
                let names = points.iter().filter_map(|point| match &point.distribution_point {
                    Some(DistributionPointName::FullName(names)) => Some(names),
                    _ => None,
                });
                found.extend(names.flatten().filter_map(url));
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

/// Hosts that addresses inside certificates may lead to: evidence of strangers names them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkHosts(Option<Vec<String>>);

impl LinkHosts {
    /// Any that is public: for a person who names the certificates.
    #[must_use]
    pub const fn any() -> Self {
        Self(None)
    }

    /// None.
    #[must_use]
    pub const fn none() -> Self {
        Self(Some(Vec::new()))
    }

    /// These and names below them. An address that is written out is reached although it is not public.
    /// # Errors
    /// [`FetchError::Endpoint`] for what is no host.
    pub fn new(hosts: &[String]) -> Result<Self, FetchError> {
        let is_host = |host: &String| {
            !host.is_empty()
                && host.len() <= 253
                && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b':'))
        };
        match hosts.iter().find(|host| !is_host(host)) {
            Some(host) => Err(FetchError::Endpoint { url: crate::error::shown(host), why: "not a host" }),
            None => Ok(Self(Some(hosts.iter().map(|host| host.to_ascii_lowercase()).collect()))),
        }
    }

    /// Whether `url` leads to one of them; and where the configuration wrote an address out, which.
    fn allow(&self, url: &str) -> Result<Option<IpAddr>, FetchError> {
        let Some(hosts) = &self.0 else { return Ok(None) };
        let refused = || FetchError::Endpoint { url: crate::error::shown(url), why: "a host that the configuration does not name" };
        let uri: ureq::http::Uri = url.parse().map_err(|_| refused())?;
        let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        let below = |named: &String| host == *named || host.strip_suffix(named.as_str()).is_some_and(|head| head.ends_with('.'));
        match hosts.iter().find(|named| below(named)) {
            Some(named) => Ok(named.parse().ok()),
            None => Err(refused()),
        }
    }
}

/// Follows the addresses of `certificates`, those of `more`, and those of what they lead to. What an answer is, it says itself. Plain
/// `http` is taken: what comes carries its own signature.
#[must_use]
pub fn follow(http: &Http, hosts: &LinkHosts, certificates: &[Vec<u8>], more: &[String]) -> (X509Pool, Vec<FetchError>) {
    let (mut pool, mut failures, mut asked) = (X509Pool::default(), Vec::new(), BTreeSet::new());
    let mut waiting: Vec<String> = certificates.iter().flat_map(|der| links(der)).chain(more.iter().cloned()).collect();
    while let Some(url) = waiting.pop() {
        if asked.len() >= REQUESTS_MAX || !asked.insert(url.clone()) {
            continue;
        }
        let http = match hosts.allow(&url) {
            Ok(Some(named)) => http.dangerous_reaching(named),
            Ok(None) => *http,
            Err(error) => {
                failures.push(error);
                continue;
            }
        };
        let grown = http.get_link(&url, ANY).and_then(|fetched| {
            let ders = match std::str::from_utf8(&fetched.body).ok().filter(|text| text.contains("-----BEGIN ")) {
                Some(text) => {
                    pem_blocks(text).map_err(|why| fetched.content(&why, "DER or PEM"))?.into_iter().map(|(_, der)| der).collect()
                }
                None => vec![fetched.body.clone()],
            };
            let (certificates, rest): (Vec<_>, Vec<_>) = ders.into_iter().partition(|der| X509Certificate::from_der(der).is_ok());
            let crls: Vec<_> = rest.into_iter().filter(|der| CertificateRevocationList::from_der(der).is_ok()).collect();
            if certificates.is_empty() && crls.is_empty() {
                return Err(fetched.content("neither", "a certificate or a revocation list"));
            }
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
