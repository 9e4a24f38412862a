//! The certificate path of an NSM document. Owns: the walk from a trusted root through the bundle to the leaf.
//! Never: fetches a revocation list (AWS's certificates live hours to days), reads the clock.
//! Source: dstack attestation reference, section 5.3 rule 4; RFC 5280 section 6.1 for a path without policies.

use crate::{AttestError, Root, TrustRoots};
use aws_lc_rs::signature::{ECDSA_P384_SHA384_ASN1, UnparsedPublicKey};
use dstack_protocol::UnixMillis;
use x509_parser::oid_registry::{OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_SIG_ECDSA_WITH_SHA384};
use x509_parser::prelude::{ASN1Time, FromDer, ParsedExtension, X509Certificate, X509Version};

const CHAIN: &str = "nsm certificate chain";

/// A path that was walked to its end.
#[derive(Debug)]
pub(super) struct Path<'r> {
    /// The leaf's P-384 key, uncompressed point.
    pub(super) leaf_key: Vec<u8>,
    /// The first moment at which a certificate of the path is no longer valid.
    pub(super) earliest_expiry: UnixMillis,
    /// Where it ends.
    pub(super) root: &'r Root,
}

/// Walks `bundle` (root first) and `leaf`.
///
/// The bundle's first certificate has to be one of `roots`, byte for byte: dstack ignores it and uses its own root, which
/// accepts the same paths, but a bundle that names another root is not what an NSM wrote.
///
/// # Errors
/// Classes `chain.*`, `time.cert_expired`, `time.not_yet_valid`, `sig.algorithm`, `parse.malformed`.
pub(super) fn walk<'r>(leaf: &[u8], bundle: &[&[u8]], roots: &'r TrustRoots, now: UnixMillis) -> Result<Path<'r>, AttestError> {
    let untrusted = AttestError::UntrustedRoot { chain: CHAIN };
    let (first, intermediates) = bundle.split_first().ok_or(untrusted.clone())?;
    let root = roots.iter().find(|root| root.der() == *first).ok_or(untrusted)?;

    let certificates = std::iter::once(root.der()).chain(intermediates.iter().copied()).chain(std::iter::once(leaf));
    let certificates = certificates.map(parse).collect::<Result<Vec<_>, _>>()?;
    let count = certificates.len();

    let mut earliest_expiry_ms = u64::MAX;
    let mut issuer: Option<&X509Certificate<'_>> = None;
    for (position, certificate) in certificates.iter().enumerate() {
        // CA certificates between this one and the leaf
        let below = count.saturating_sub(position).saturating_sub(2);
        let is_leaf = position.saturating_add(1) == count;
        check_key(certificate)?;
        check_usage(certificate, is_leaf, below, count)?;
        earliest_expiry_ms = earliest_expiry_ms.min(check_validity(certificate, now)?);
        // the root is trusted as it is; its own signature says nothing
        if let Some(issuer) = issuer {
            check_issued(certificate, issuer)?;
        }
        issuer = Some(certificate);
    }
    let leaf = issuer.ok_or(AttestError::ChainInvalid { chain: CHAIN, why: "empty" })?;
    Ok(Path { leaf_key: key_bits(leaf).to_vec(), earliest_expiry: UnixMillis(earliest_expiry_ms), root })
}

fn parse(der: &[u8]) -> Result<X509Certificate<'_>, AttestError> {
    let malformed = |why| AttestError::Malformed { part: "nsm certificate", why };
    let (rest, certificate) = X509Certificate::from_der(der).map_err(|_| malformed("not an X.509 certificate"))?;
    if !rest.is_empty() {
        return Err(malformed("bytes after its end"));
    }
    if certificate.version() != X509Version::V3 {
        return Err(malformed("not version 3"));
    }
    Ok(certificate)
}

fn key_bits<'c>(certificate: &'c X509Certificate<'_>) -> &'c [u8] {
    &certificate.public_key().subject_public_key.data
}

/// Every key of the path is on P-384, every signature ECDSA with SHA-384.
fn check_key(certificate: &X509Certificate<'_>) -> Result<(), AttestError> {
    let algorithm = &certificate.public_key().algorithm;
    let curve = algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
    if algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY || curve.as_ref() != Some(&OID_NIST_EC_P384) {
        return Err(AttestError::ChainInvalid { chain: CHAIN, why: "a key is not on P-384" });
    }
    let signature = &certificate.signature_algorithm.algorithm;
    if *signature != OID_SIG_ECDSA_WITH_SHA384 || *signature != certificate.tbs_certificate.signature.algorithm {
        return Err(AttestError::Algorithm { part: CHAIN, got: signature.to_id_string() });
    }
    Ok(())
}

/// CA flag, path length, key usage, extended key usage; no critical extension that is not understood.
fn check_usage(certificate: &X509Certificate<'_>, is_leaf: bool, below: usize, count: usize) -> Result<(), AttestError> {
    let invalid = |why| AttestError::ChainInvalid { chain: CHAIN, why };
    let understood = |extension: &ParsedExtension<'_>| {
        matches!(extension, ParsedExtension::BasicConstraints(_) | ParsedExtension::KeyUsage(_) | ParsedExtension::ExtendedKeyUsage(_))
    };
    if certificate.iter_extensions().any(|extension| extension.critical && !understood(extension.parsed_extension())) {
        return Err(invalid("a critical extension that is not understood"));
    }
    let constraints = certificate.basic_constraints().map_err(|_| invalid("basic constraints unreadable or twice"))?;
    let usage = certificate.key_usage().map_err(|_| invalid("key usage unreadable or twice"))?;
    let extended = certificate.extended_key_usage().map_err(|_| invalid("extended key usage unreadable or twice"))?;
    // dstack verifies for client authentication: where a purpose is named, that one has to be among them
    if extended.is_some_and(|extended| !extended.value.client_auth && !extended.value.any) {
        return Err(invalid("extended key usage without client authentication"));
    }
    if is_leaf {
        if constraints.is_some_and(|constraints| constraints.value.ca) {
            return Err(invalid("the leaf is a CA"));
        }
        if usage.is_some_and(|usage| !usage.value.digital_signature()) {
            return Err(invalid("the leaf may not sign"));
        }
        return Ok(());
    }
    let Some(constraints) = constraints.filter(|constraints| constraints.value.ca) else {
        return Err(AttestError::NotCa { chain: CHAIN });
    };
    if !usage.is_some_and(|usage| usage.value.key_cert_sign()) {
        return Err(invalid("an issuer may not sign certificates"));
    }
    match constraints.value.path_len_constraint {
        Some(most) if usize::try_from(most).is_ok_and(|most| below > most) => Err(AttestError::PathLength { chain: CHAIN, count }),
        _ => Ok(()),
    }
}

/// Inside its validity at `now`; answers its end.
fn check_validity(certificate: &X509Certificate<'_>, now: UnixMillis) -> Result<u64, AttestError> {
    let millis = |time: ASN1Time, add_ms: u64| u64::try_from(time.timestamp()).unwrap_or(0).saturating_mul(1000).saturating_add(add_ms);
    let validity = certificate.validity();
    // a certificate is valid through the whole second that it names as its last
    let (valid_from_ms, expired_at_ms) = (millis(validity.not_before, 0), millis(validity.not_after, 999));
    if now.0 < valid_from_ms {
        return Err(AttestError::NotYetValid { part: CHAIN, valid_from_ms, now_ms: now.0 });
    }
    if now.0 > expired_at_ms {
        return Err(AttestError::CertExpired { part: CHAIN, expired_at_ms, now_ms: now.0 });
    }
    Ok(expired_at_ms)
}

/// Names the issuer and carries its signature.
fn check_issued(certificate: &X509Certificate<'_>, issuer: &X509Certificate<'_>) -> Result<(), AttestError> {
    if certificate.issuer().as_raw() != issuer.subject().as_raw() {
        return Err(AttestError::ChainInvalid { chain: CHAIN, why: "a certificate names another issuer" });
    }
    let key = UnparsedPublicKey::new(&ECDSA_P384_SHA384_ASN1, key_bits(issuer));
    let signed = certificate.tbs_certificate.as_ref();
    key.verify(signed, &certificate.signature_value.data).map_err(|_| AttestError::ChainSignature { chain: CHAIN })
}
