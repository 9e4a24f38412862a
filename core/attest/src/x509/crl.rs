//! Revocation lists of a path's issuers. Owns: which list of a pool is an issuer's, its signature, its time, whom it names.
//! Never: fetches, or takes a list that covers only some certificates.
//! Source: RFC 5280 sections 5 and 6.3.3, for complete lists signed by the issuer itself.

use std::cell::OnceCell;

use x509_parser::{
    extensions::X509Extension,
    prelude::{CertificateRevocationList, FromDer, ParsedExtension, X509Certificate},
};

use super::{
    key::{Key, SignatureAlgorithm},
    names,
    rules::{Revocation, Rules},
};
use crate::{
    AttestError,
    window::{Window, ms_of},
};

/// Largest revocation list that is parsed.
pub const CRL_BYTES_MAX: usize = 1024 * 1024;

/// The lists of a pool.
pub(super) struct Lists<'a> {
    ders: &'a [Vec<u8>],
    parsed: Vec<OnceCell<CertificateRevocationList<'a>>>,
}

impl<'a> Lists<'a> {
    pub(super) fn of(ders: &'a [Vec<u8>]) -> Self {
        Self { ders, parsed: ders.iter().map(|_| OnceCell::new()).collect() }
    }

    /// Judges `subject` by the lists of `issuer` and narrows `window` by the newest of them.
    pub(super) fn check(
        &self,
        subject: &X509Certificate<'_>,
        issuer: &X509Certificate<'_>,
        rules: &Rules,
        window: &mut Window,
    ) -> Result<(), AttestError> {
        let mut newest: Option<&CertificateRevocationList<'a>> = None;
        for (der, parsed) in self.ders.iter().zip(&self.parsed) {
            if names::of_list(der) != Some(issuer.subject().as_raw()) {
                continue;
            }
            let list = match parsed.get() {
                Some(list) => list,
                None => {
                    let list = parse(der, rules)?;
                    parsed.get_or_init(|| list)
                }
            };
            if !is_of(list, issuer, rules)? {
                continue;
            }
            let serial = &subject.tbs_certificate.serial;
            if list.iter_revoked_certificates().any(|revoked| revoked.serial() == serial) {
                return Err(AttestError::Revoked { chain: rules.chain, serial: hex::encode(subject.raw_serial()) });
            }
            if newest.is_none_or(|newest| newest.last_update() < list.last_update()) {
                newest = Some(list);
            }
        }
        match newest {
            Some(list) => {
                let next_update =
                    list.next_update().ok_or(AttestError::Malformed { part: rules.chain, why: "a crl without next update" })?;
                window.collateral(ms_of(list.last_update())?, ms_of(next_update)?, rules.chain)
            }
            None if rules.revocation == Revocation::WhereNamed && names_a_list(subject) => {
                let from = super::links::list(subject);
                Err(AttestError::CrlMissing { chain: rules.chain, issuer: super::name_of(issuer.subject()), from })
            }
            None => Ok(()),
        }
    }
}

fn names_a_list(certificate: &X509Certificate<'_>) -> bool {
    certificate.iter_extensions().any(|extension| matches!(extension.parsed_extension(), ParsedExtension::CRLDistributionPoints(_)))
}

pub(super) fn parse<'a>(der: &'a [u8], rules: &Rules) -> Result<CertificateRevocationList<'a>, AttestError> {
    let part = rules.chain;
    if der.len() > CRL_BYTES_MAX {
        return Err(AttestError::Length { part, length_bytes: der.len(), limit_bytes: CRL_BYTES_MAX });
    }
    let malformed = |why| AttestError::Malformed { part, why };
    let (rest, list) = CertificateRevocationList::from_der(der).map_err(|_| malformed("not a revocation list"))?;
    if !rest.is_empty() {
        return Err(malformed("bytes after a revocation list"));
    }
    Ok(list)
}

/// Whether `list`, which names `issuer`, was signed by it. Two CAs may bear one name: then the key identifiers tell, and where they do
/// not, the signature.
pub(super) fn is_of(list: &CertificateRevocationList<'_>, issuer: &X509Certificate<'_>, rules: &Rules) -> Result<bool, AttestError> {
    let theirs = authority(list.extensions());
    let ours = subject_key(issuer);
    if theirs.is_some() && ours.is_some() && theirs != ours {
        return Ok(false);
    }
    let algorithm = SignatureAlgorithm::of(&list.signature_algorithm)
        .filter(|algorithm| rules.signatures.contains(algorithm) && list.signature_algorithm == list.tbs_cert_list.signature)
        .ok_or_else(|| AttestError::Algorithm { part: rules.chain, got: list.signature_algorithm.algorithm.to_id_string() })?;
    let key = Key::of(issuer.public_key()).ok_or(rules.invalid("a key is of a kind that is not allowed"))?;
    if !key.verifies(algorithm, list.tbs_cert_list.as_ref(), list.signature_value.data.as_ref()) {
        return match theirs.is_some() && theirs == ours {
            true => Err(AttestError::ChainSignature { chain: rules.chain }),
            false => Ok(false),
        };
    }
    // a list of only some certificates, or of another CA's, says so in a critical extension (5.2.5, 5.3.3)
    let critical = |extensions: &[X509Extension<'_>]| extensions.iter().any(|extension| extension.critical);
    let of_entries = list.iter_revoked_certificates().any(|revoked| critical(revoked.extensions()));
    if critical(list.extensions()) || of_entries {
        return Err(rules.invalid("a crl with a critical extension"));
    }
    match issuer.key_usage() {
        Ok(Some(usage)) if !usage.value.crl_sign() => Err(rules.invalid("an issuer may not sign a crl")),
        _ => Ok(true),
    }
}

fn authority<'e>(extensions: &'e [X509Extension<'_>]) -> Option<&'e [u8]> {
    extensions.iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(authority) => authority.key_identifier.as_ref().map(|key| key.0),
        _ => None,
    })
}

/// The key identifier a certificate gives itself.
pub(super) fn subject_key<'c>(certificate: &'c X509Certificate<'_>) -> Option<&'c [u8]> {
    certificate.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(key) => Some(key.0),
        _ => None,
    })
}

/// The key identifier of a certificate's issuer.
pub(super) fn authority_key<'c>(certificate: &'c X509Certificate<'_>) -> Option<&'c [u8]> {
    authority(certificate.extensions())
}
