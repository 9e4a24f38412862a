//! What a certificate of a path has to be. Owns: the rules of one vendor's paths and the checks of one certificate alone.
//! Never: verifies a signature, judges time.
//! Source: RFC 5280 sections 4.2 and 6.1.4 (k) to (o).

use x509_parser::{
    der_parser::Oid,
    extensions::{ExtendedKeyUsage, X509Extension},
    prelude::{FromDer, ParsedExtension, X509Certificate, X509Version},
};

use super::key::{Key, KeyKind, SignatureAlgorithm};
use crate::{AttestError, Vendor};

/// Largest certificate that is parsed.
pub const CERTIFICATE_BYTES_MAX: usize = 8 * 1024;

/// What the certificate paths of one vendor are like.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Names the path in errors.
    pub chain: &'static str,
    /// Whose roots may end it; software roots may end any.
    pub vendor: Vendor,
    /// Kinds of keys that may stand on it.
    pub keys: &'static [KeyKind],
    /// Signature algorithms that may stand on it.
    pub signatures: &'static [SignatureAlgorithm],
    /// What a certificate that names purposes has to name among them.
    pub purpose: Option<Purpose>,
    /// Whether a critical alternative name is understood: on paths whose names nobody compares, it may say what it likes.
    pub alternative_names: bool,
    /// Which certificates need a revocation list.
    pub revocation: Revocation,
    /// Most CA certificates between root and leaf.
    pub intermediates_max: usize,
}

/// A purpose of extended key usage.
#[derive(Debug, Clone, Copy)]
pub enum Purpose {
    /// TLS client authentication; a certificate for any purpose has it as well.
    ClientAuthentication,
    /// Another one, by its identifier and by no other.
    Other(&'static Oid<'static>),
}

impl Purpose {
    fn is_among(self, named: &ExtendedKeyUsage<'_>) -> bool {
        match self {
            Self::ClientAuthentication => named.client_auth || named.any,
            Self::Other(purpose) => named.other.iter().any(|named| named == purpose),
        }
    }
}

/// Which certificates of a path need a revocation list. A list that is there is always obeyed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revocation {
    /// None does: the vendor publishes no list, or vectors are judged that come without.
    WhereGiven,
    /// One that names where its issuer publishes its list.
    WhereNamed,
}

/// Parses one certificate that ends where its bytes end.
/// # Errors
/// [`AttestError::Length`] above [`CERTIFICATE_BYTES_MAX`], [`AttestError::Malformed`].
pub fn parse<'a>(der: &'a [u8], part: &'static str) -> Result<X509Certificate<'a>, AttestError> {
    let malformed = |why| AttestError::Malformed { part, why };
    if der.len() > CERTIFICATE_BYTES_MAX {
        return Err(AttestError::Length { part, length_bytes: der.len(), limit_bytes: CERTIFICATE_BYTES_MAX });
    }
    let (rest, certificate) = X509Certificate::from_der(der).map_err(|_| malformed("not an X.509 certificate"))?;
    if !rest.is_empty() {
        return Err(malformed("bytes after its end"));
    }
    if certificate.version() != X509Version::V3 {
        return Err(malformed("not version 3"));
    }
    Ok(certificate)
}

/// Where a certificate stands: what is asked of it depends on that.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place {
    Leaf,
    /// With that many CA certificates between it and the leaf.
    Issuer {
        below: usize,
    },
}

impl Rules {
    pub(super) const fn invalid(&self, why: &'static str) -> AttestError {
        AttestError::ChainInvalid { chain: self.chain, why }
    }

    /// All that a certificate tells without its issuer and without the time. `count` is the length of the path, for the error.
    pub(super) fn check(&self, certificate: &X509Certificate<'_>, place: Place, count: usize) -> Result<(), AttestError> {
        let key = Key::of(certificate.public_key());
        if !key.is_some_and(|key| self.keys.contains(&key.kind())) {
            return Err(self.invalid("a key is of a kind that is not allowed"));
        }
        self.signature_algorithm(certificate)?;
        self.check_extensions(certificate.extensions())?;
        let extended = certificate.extended_key_usage().map_err(|_| self.invalid("extended key usage unreadable or twice"))?;
        if let (Some(named), Some(purpose)) = (extended, self.purpose)
            && !purpose.is_among(named.value)
        {
            return Err(self.invalid("extended key usage without the purpose"));
        }
        self.check_place(certificate, place, count)
    }

    /// The algorithm a certificate is signed with, the same outside and inside.
    pub(super) fn signature_algorithm(&self, certificate: &X509Certificate<'_>) -> Result<SignatureAlgorithm, AttestError> {
        let identifier = &certificate.signature_algorithm;
        let algorithm = SignatureAlgorithm::of(identifier).filter(|algorithm| self.signatures.contains(algorithm));
        algorithm
            .filter(|_| *identifier == certificate.tbs_certificate.signature)
            .ok_or_else(|| AttestError::Algorithm { part: self.chain, got: identifier.algorithm.to_id_string() })
    }

    /// RFC 5280 4.2: no extension twice, and none that is critical and not understood.
    fn check_extensions(&self, extensions: &[X509Extension<'_>]) -> Result<(), AttestError> {
        let understood = |extension: &X509Extension<'_>| match extension.parsed_extension() {
            ParsedExtension::BasicConstraints(_) | ParsedExtension::KeyUsage(_) | ParsedExtension::ExtendedKeyUsage(_) => true,
            ParsedExtension::SubjectAlternativeName(_) => self.alternative_names,
            _ => false,
        };
        if extensions.iter().any(|extension| extension.critical && !understood(extension)) {
            return Err(self.invalid("a critical extension that is not understood"));
        }
        let earlier = |index: usize| extensions.get(..index).unwrap_or_default();
        let repeated = |(index, extension): (usize, &X509Extension<'_>)| earlier(index).iter().any(|other| other.oid == extension.oid);
        match extensions.iter().enumerate().any(repeated) {
            true => Err(self.invalid("an extension stands twice")),
            false => Ok(()),
        }
    }

    /// CA flag, path length and key usage for the place it stands at.
    fn check_place(&self, certificate: &X509Certificate<'_>, place: Place, count: usize) -> Result<(), AttestError> {
        let constraints = certificate.basic_constraints().map_err(|_| self.invalid("basic constraints unreadable or twice"))?;
        let usage = certificate.key_usage().map_err(|_| self.invalid("key usage unreadable or twice"))?;
        let Place::Issuer { below } = place else {
            if constraints.is_some_and(|constraints| constraints.value.ca) {
                return Err(self.invalid("the leaf is a CA"));
            }
            return match usage {
                Some(usage) if !usage.value.digital_signature() => Err(self.invalid("the leaf may not sign")),
                _ => Ok(()),
            };
        };
        let Some(constraints) = constraints.filter(|constraints| constraints.value.ca) else {
            return Err(AttestError::NotCa { chain: self.chain });
        };
        if !usage.is_some_and(|usage| usage.value.key_cert_sign()) {
            return Err(self.invalid("an issuer may not sign certificates"));
        }
        match constraints.value.path_len_constraint {
            Some(most) if usize::try_from(most).is_ok_and(|most| below > most) => Err(AttestError::PathLength { chain: self.chain, count }),
            _ => Ok(()),
        }
    }
}
