//! Where a certificate says that its issuer and its issuer's revocation list are. Owns: reading the first such address.
//! Never: follows it, believes it.
//! Source: RFC 5280 sections 4.2.1.13 (CRL distribution points) and 4.2.2.1 (authority information access).

use x509_parser::{
    extensions::{DistributionPointName, GeneralName, ParsedExtension},
    oid_registry::OID_PKIX_ACCESS_DESCRIPTOR_CA_ISSUERS,
    prelude::X509Certificate,
};

/// Longest address read.
const URL_BYTES_MAX: usize = dstack_protocol::collateral::WANT_URL_BYTES_MAX;

/// Address of the issuer's certificate.
pub(super) fn issuer(certificate: &X509Certificate<'_>) -> Option<String> {
    certificate.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityInfoAccess(access) => access
            .accessdescs
            .iter()
            .filter(|one| one.access_method == OID_PKIX_ACCESS_DESCRIPTOR_CA_ISSUERS)
            .find_map(|one| url(&one.access_location)),
        _ => None,
    })
}

/// Address of the issuer's revocation list.
pub(super) fn list(certificate: &X509Certificate<'_>) -> Option<String> {
    certificate.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::CRLDistributionPoints(points) => points.iter().find_map(|point| match &point.distribution_point {
            Some(DistributionPointName::FullName(names)) => names.iter().find_map(url),
            _ => None,
        }),
        _ => None,
    })
}

fn url(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::URI(uri) if uri.len() <= URL_BYTES_MAX && (uri.starts_with("http://") || uri.starts_with("https://")) => {
            Some((*uri).chars().filter(|character| !character.is_control()).collect())
        }
        _ => None,
    }
}
