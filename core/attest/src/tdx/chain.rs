//! Certificate paths and revocation lists of Intel's PKI: P-256 with SHA-256 throughout, leaf → [intermediate] → root.
//! Owns: path rules, validity, revocation, with one refusal class each. Never: reads the clock, picks a root nobody named.
//! Source: RFC 5280 section 6 restricted to this PKI; Intel SGX PCK Certificate and CRL specification.

use std::collections::HashSet;

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use x509_parser::{
    oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_SIG_ECDSA_WITH_SHA256, Oid},
    prelude::{AlgorithmIdentifier, CertificateRevocationList, FromDer, ParsedExtension, X509Certificate, X509Extension},
    x509::SubjectPublicKeyInfo,
};

pub(crate) use super::clock::validity_ms;
use super::clock::{Window, ms_of};
use crate::{AttestError, Root, TrustRoots, Vendor};

/// Names a root certificate in refusals.
pub(crate) const ROOT: &str = "root certificate";

/// Parses one certificate that ends where its bytes end.
pub(crate) fn certificate<'a>(der: &'a [u8], chain: &'static str) -> Result<X509Certificate<'a>, AttestError> {
    let (rest, certificate) =
        X509Certificate::from_der(der).map_err(|_| AttestError::Malformed { part: chain, why: "a certificate is not DER" })?;
    if !rest.is_empty() {
        return Err(AttestError::TrailingBytes { part: chain, count_bytes: rest.len() });
    }
    Ok(certificate)
}

/// Finds the root the path `certificates` (leaf first) ends at, by key.
/// A self-issued last certificate has to be that root itself; without one, the last certificate has to be issued by it.
pub(crate) fn root_of<'r>(
    certificates: &[X509Certificate<'_>],
    roots: &'r TrustRoots,
    chain: &'static str,
) -> Result<&'r Root, AttestError> {
    let untrusted = AttestError::UntrustedRoot { chain };
    let Some(last) = certificates.last() else {
        return Err(AttestError::ChainInvalid { chain, why: "holds no certificate" });
    };
    for root in roots.serving(Vendor::Intel) {
        if is_self_issued(last) {
            if last.public_key().raw == root.spki() && last.subject().as_raw() == root.subject() {
                return Ok(root);
            }
        } else if last.issuer().as_raw() == root.subject() && signed_by(last, certificate(root.der(), ROOT)?.public_key()) {
            return Ok(root);
        }
    }
    Err(untrusted)
}

/// A certificate whose signature by a given root was seen to be right. Kept with the root it is right under.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Issued {
    signed: Vec<u8>,
    signature: Vec<u8>,
}

impl Issued {
    /// Notes `certificate`, whose path was verified.
    pub(crate) fn of(certificate: &X509Certificate<'_>) -> Self {
        let (signed, signature) = signed_parts(certificate);
        Self { signed: signed.to_vec(), signature: signature.to_vec() }
    }

    /// Whether `certificate` is this one, bit for bit in all that its signature covers, and in the signature.
    pub(crate) fn is(&self, certificate: &X509Certificate<'_>) -> bool {
        signed_parts(certificate) == (&self.signed[..], &self.signature[..])
    }
}

fn signed_parts<'c>(certificate: &'c X509Certificate<'_>) -> (&'c [u8], &'c [u8]) {
    (certificate.tbs_certificate.as_ref(), certificate.signature_value.data.as_ref())
}

/// Verifies the path `certificates` (leaf first, the root may stand last) up to `anchor` and narrows `window` by every
/// certificate on it. Returns the path without the root. `issued`, if it was noted under the same anchor, saves one verification.
pub(crate) fn verify_path<'c, 'a>(
    certificates: &'c [X509Certificate<'a>],
    anchor: &X509Certificate<'_>,
    issued: Option<&Issued>,
    chain: &'static str,
    window: &mut Window,
) -> Result<&'c [X509Certificate<'a>], AttestError> {
    let path = match certificates.split_last() {
        Some((last, before)) if is_self_issued(last) => {
            if last.public_key().raw != anchor.public_key().raw {
                return Err(AttestError::UntrustedRoot { chain });
            }
            before
        }
        _ => certificates,
    };
    if path.is_empty() {
        return Err(AttestError::ChainInvalid { chain, why: "holds no certificate below the root" });
    }
    let issuers = path.iter().skip(1).chain(std::iter::once(anchor));
    for (below_count, (subject, issuer)) in path.iter().zip(issuers).enumerate() {
        if subject.issuer().as_raw() != issuer.subject().as_raw() {
            return Err(match below_count.checked_add(1) == Some(path.len()) {
                true => AttestError::UntrustedRoot { chain },
                false => AttestError::ChainInvalid { chain, why: "a certificate is not issued by the next one" },
            });
        }
        check_algorithm(&subject.signature_algorithm, chain)?;
        if subject.signature_algorithm != subject.tbs_certificate.signature {
            return Err(AttestError::ChainInvalid { chain, why: "two signature algorithms in one certificate" });
        }
        let known = std::ptr::eq(issuer, anchor) && issued.is_some_and(|issued| issued.is(subject));
        if !known && !signed_by(subject, issuer.public_key()) {
            return Err(AttestError::ChainSignature { chain });
        }
        check_issuer(issuer, below_count, chain)?;
        check_extensions(subject.extensions(), chain)?;
    }
    for subject in path.iter().chain(std::iter::once(anchor)) {
        window.certificate(subject, chain)?;
    }
    Ok(path)
}

/// Whether `subject`'s signature verifies under the P-256 key of `issuer`.
fn signed_by(subject: &X509Certificate<'_>, issuer: &SubjectPublicKeyInfo<'_>) -> bool {
    verifies(issuer, subject.tbs_certificate.as_ref(), subject.signature_value.data.as_ref())
}

fn verifies(key: &SubjectPublicKeyInfo<'_>, message: &[u8], signature: &[u8]) -> bool {
    p256_point(key).is_some_and(|point| UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point).verify(message, signature).is_ok())
}

/// The uncompressed point of a P-256 key, or `None` for any other kind of key.
pub(crate) fn p256_point<'k>(key: &'k SubjectPublicKeyInfo<'_>) -> Option<&'k [u8]> {
    let curve = key.algorithm.parameters.as_ref()?.as_oid().ok()?;
    let point: &[u8] = key.subject_public_key.data.as_ref();
    (key.algorithm.algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY && curve == OID_EC_P256 && point.len() == 65).then_some(point)
}

fn check_algorithm(algorithm: &AlgorithmIdentifier<'_>, part: &'static str) -> Result<(), AttestError> {
    if algorithm.algorithm != OID_SIG_ECDSA_WITH_SHA256 || algorithm.parameters.is_some() {
        return Err(AttestError::Algorithm { part, got: algorithm.algorithm.to_id_string() });
    }
    Ok(())
}

/// RFC 5280 6.1.4 (k) to (n): an issuer is a CA, may sign certificates, and allows as many CAs below it as there are.
fn check_issuer(issuer: &X509Certificate<'_>, cas_below: usize, chain: &'static str) -> Result<(), AttestError> {
    let invalid = |_| AttestError::ChainInvalid { chain, why: "an extension stands twice" };
    let constraints = issuer.basic_constraints().map_err(invalid)?.ok_or(AttestError::NotCa { chain })?;
    if !constraints.value.ca {
        return Err(AttestError::NotCa { chain });
    }
    if constraints.value.path_len_constraint.is_some_and(|limit| cas_below > limit as usize) {
        return Err(AttestError::PathLength { chain, count: cas_below });
    }
    match issuer.key_usage().map_err(invalid)? {
        Some(usage) if !usage.value.key_cert_sign() => Err(AttestError::NotCa { chain }),
        _ => Ok(()),
    }
}

/// RFC 5280 4.2: a critical extension that is not understood refuses the certificate.
fn check_extensions(extensions: &[X509Extension<'_>], chain: &'static str) -> Result<(), AttestError> {
    let understood = |extension: &X509Extension<'_>| {
        matches!(extension.parsed_extension(), ParsedExtension::BasicConstraints(_) | ParsedExtension::KeyUsage(_))
    };
    if extensions.iter().any(|extension| extension.critical && !understood(extension)) {
        return Err(AttestError::ChainInvalid { chain, why: "a critical extension is not understood" });
    }
    let repeated = |oid: &Oid<'_>| extensions.iter().filter(|extension| extension.oid == *oid).count() > 1;
    if extensions.iter().any(|extension| repeated(&extension.oid)) {
        return Err(AttestError::ChainInvalid { chain, why: "an extension stands twice" });
    }
    Ok(())
}

fn is_self_issued(certificate: &X509Certificate<'_>) -> bool {
    certificate.issuer().as_raw() == certificate.subject().as_raw()
}

/// The serial number of a certificate, as lists are asked for it and as it is shown.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Serial {
    number: Vec<u8>,
    raw: Vec<u8>,
}

impl Serial {
    pub(crate) fn of(certificate: &X509Certificate<'_>) -> Self {
        Self { number: certificate.tbs_certificate.serial.to_bytes_be(), raw: certificate.raw_serial().to_vec() }
    }
}

/// The serial numbers of a revocation list whose signature and time were checked, without leading zeros.
#[derive(Debug, Clone)]
pub(crate) struct RevocationList(HashSet<Vec<u8>>);

impl RevocationList {
    /// Verifies `der` as the list of `issuer` and narrows `window` by it.
    pub(crate) fn verify(der: &[u8], issuer: &X509Certificate<'_>, crl: &'static str, window: &mut Window) -> Result<Self, AttestError> {
        let (rest, list) =
            CertificateRevocationList::from_der(der).map_err(|_| AttestError::Malformed { part: crl, why: "not a DER revocation list" })?;
        if !rest.is_empty() {
            return Err(AttestError::TrailingBytes { part: crl, count_bytes: rest.len() });
        }
        if list.issuer().as_raw() != issuer.subject().as_raw() {
            return Err(AttestError::CrlMismatch { crl });
        }
        check_algorithm(&list.signature_algorithm, crl)?;
        if !verifies(issuer.public_key(), list.tbs_cert_list.as_ref(), list.signature_value.data.as_ref()) {
            return Err(AttestError::ChainSignature { chain: crl });
        }
        // A list limited to some certificates says so in a critical extension (RFC 5280 5.2.5); such a one is not taken.
        if list.extensions().iter().any(|extension| extension.critical) {
            return Err(AttestError::ChainInvalid { chain: crl, why: "a critical extension is not understood" });
        }
        let next_update = list.next_update().ok_or(AttestError::Malformed { part: crl, why: "no next update" })?;
        window.collateral(ms_of(list.last_update())?, ms_of(next_update)?, crl)?;
        Ok(Self(list.iter_revoked_certificates().map(|revoked| revoked.serial().to_bytes_be()).collect()))
    }

    /// Refuses `certificate` when the list names it.
    pub(crate) fn check(&self, certificate: &X509Certificate<'_>, chain: &'static str) -> Result<(), AttestError> {
        self.check_serial(&Serial::of(certificate), chain)
    }

    /// Refuses the certificate of this number when the list names it.
    pub(crate) fn check_serial(&self, serial: &Serial, chain: &'static str) -> Result<(), AttestError> {
        match self.0.contains(&serial.number) {
            true => Err(AttestError::Revoked { chain, serial: hex::encode(&serial.raw) }),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
