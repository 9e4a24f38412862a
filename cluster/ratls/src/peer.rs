//! What a peer's certificate says. Owns: strict parsing with bounds before it, the rule that the common name selects
//! the binding. Never: judges evidence (that is [`crate::judge`]) or the handshake signature (`crate::verifier`).
//! Source: threshold.md §2.2; attestation reference §1.
//!
//! The certificate's own signature is not trusted for anything: possession of the key is proven by the handshake, whose
//! transcript covers the whole certificate, and the key is bound by the evidence. Only its form is checked.

use dstack_protocol::limits::SPKI_BYTES_MAX;
use dstack_protocol::{UnixMillis, binding};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;
use x509_parser::x509::{X509Name, X509Version};

use crate::judge::JudgeError;
use crate::{CERTIFICATE_BYTES_MAX, SESSION_COMMON_NAME};

/// In which role the peer shows its certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PeerRole {
    /// The other node of a node connection, whichever side opened it.
    Node,
    /// A client of this node: agent, tool, or anyone.
    Client,
    /// The node that we are a client of.
    Server,
}

/// What the evidence must be bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binding {
    /// dstack's own: the key alone.
    Dstack,
    /// A session: cluster, beacon and key.
    Session {
        /// Leaf number of the beacon, from the subject's serialNumber.
        beacon_pos: u64,
    },
}

/// A peer's certificate, as a judge sees it.
#[derive(Debug, Clone, Copy)]
pub struct PeerCertificate<'a> {
    /// In which role it was shown.
    pub role: PeerRole,
    /// Content of the evidence extension, or of the legacy pair as [`binding::legacy_evidence`] joins it.
    pub evidence: &'a [u8],
    /// SubjectPublicKeyInfo, DER: what the handshake proves possession of.
    pub spki: &'a [u8],
    /// Which rule binds evidence and key.
    pub binding: Binding,
    /// End of the certificate's validity.
    pub not_after: UnixMillis,
    /// The moment of the handshake.
    pub now: UnixMillis,
}

/// The parts of a certificate, copied out.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ParsedPeer {
    pub(crate) evidence: Option<Vec<u8>>,
    pub(crate) spki: Vec<u8>,
    pub(crate) binding: Binding,
    pub(crate) not_before: UnixMillis,
    pub(crate) not_after: UnixMillis,
}

const EXTENSIONS_MAX: usize = 32;
const NAME_ATTRIBUTES_MAX: usize = 16;
const OID_EVIDENCE: &str = "1.3.6.1.4.1.62397.1.8";
const OID_LEGACY_QUOTE: &str = "1.3.6.1.4.1.62397.1.1";
const OID_LEGACY_EVENT_LOG: &str = "1.3.6.1.4.1.62397.1.2";
const OID_ECDSA_SHA256: &str = "1.2.840.10045.4.3.2";
const OID_EC_PUBLIC_KEY: &str = "1.2.840.10045.2.1";
const OID_P256: &str = "1.2.840.10045.3.1.7";
const OID_COMMON_NAME: &str = "2.5.4.3";
const OID_SERIAL_NUMBER: &str = "2.5.4.5";

impl ParsedPeer {
    /// Parses a certificate of any origin that claims to be self-signed, with a P-256 key.
    pub(crate) fn parse(der: &[u8]) -> Result<Self, JudgeError> {
        Self::parsed(der, |certificate| {
            check_algorithms(certificate)?;
            match certificate.subject().as_raw() == certificate.issuer().as_raw() {
                true => Ok(()),
                false => Err("not self-signed: issuer and subject differ"),
            }
        })
    }

    /// Parses a certificate of any issuer, with a key of any kind.
    pub(crate) fn parse_of_any_issuer(der: &[u8]) -> Result<Self, JudgeError> {
        Self::parsed(der, |_| Ok(()))
    }

    fn parsed(der: &[u8], check: impl FnOnce(&X509Certificate<'_>) -> Result<(), &'static str>) -> Result<Self, JudgeError> {
        let bad = |reason: &'static str| JudgeError::Certificate { reason };
        if der.len() > CERTIFICATE_BYTES_MAX {
            return Err(JudgeError::TooLarge { size_bytes: der.len(), limit_bytes: CERTIFICATE_BYTES_MAX });
        }
        let (rest, certificate) = X509Certificate::from_der(der).map_err(|_error| bad("not a DER certificate"))?;
        if !rest.is_empty() {
            return Err(bad("bytes after the certificate"));
        }
        if certificate.version() != X509Version::V3 {
            return Err(bad("not version 3"));
        }
        check(&certificate).map_err(bad)?;
        let spki = certificate.public_key().raw;
        if spki.len() > SPKI_BYTES_MAX {
            return Err(bad("public key too long"));
        }
        Ok(Self {
            evidence: evidence(&certificate).map_err(bad)?,
            spki: spki.to_vec(),
            binding: binding_of(certificate.subject()).map_err(bad)?,
            not_before: instant(certificate.validity().not_before.timestamp()),
            not_after: instant(certificate.validity().not_after.timestamp()),
        })
    }
}

fn check_algorithms(certificate: &X509Certificate<'_>) -> Result<(), &'static str> {
    let signed_with = certificate.signature_algorithm.algorithm.to_id_string();
    if signed_with != OID_ECDSA_SHA256 || certificate.tbs_certificate.signature.algorithm.to_id_string() != OID_ECDSA_SHA256 {
        return Err("not signed with ecdsa and sha-256");
    }
    let key = &certificate.public_key().algorithm;
    let curve = key.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok()).map(|oid| oid.to_id_string());
    if key.algorithm.to_id_string() != OID_EC_PUBLIC_KEY || curve.as_deref() != Some(OID_P256) {
        return Err("key is not on p-256");
    }
    Ok(())
}

/// `.8` where it is, else the legacy pair `.1` and `.2` as one byte string (attestation reference §1; threshold.md §2.2).
fn evidence(certificate: &X509Certificate<'_>) -> Result<Option<Vec<u8>>, &'static str> {
    if certificate.extensions().len() > EXTENSIONS_MAX {
        return Err("too many extensions");
    }
    let content = |oid: &str| -> Result<Option<&[u8]>, &'static str> {
        let mut matching = certificate.extensions().iter().filter(|extension| extension.oid.to_id_string() == oid);
        match (matching.next(), matching.next()) {
            (None, _) => Ok(None),
            (Some(_), Some(_)) => Err("evidence extension twice"),
            (Some(extension), None) => octet_string_content(extension.value).map(Some).ok_or("evidence is not one DER octet string"),
        }
    };
    if let Some(versioned) = content(OID_EVIDENCE)? {
        return Ok(Some(versioned.to_vec()));
    }
    match (content(OID_LEGACY_QUOTE)?, content(OID_LEGACY_EVENT_LOG)?) {
        (None, _) => Ok(None),
        (Some(_), None) => Err("legacy quote without its event log"),
        (Some(quote), Some(event_log)) => Ok(Some(binding::legacy_evidence(quote, event_log))),
    }
}

/// The content of exactly one DER OCTET STRING with the shortest length.
fn octet_string_content(der: &[u8]) -> Option<&[u8]> {
    let [0x04, first, rest @ ..] = der else { return None };
    let (length, content) = match *first {
        short @ 0..=0x7f => (usize::from(short), rest),
        long @ 0x81..=0x84 => {
            let (digits, content) = rest.split_at_checked(usize::from(long & 0x7f))?;
            let length = digits.iter().try_fold(0usize, |sum, digit| sum.checked_mul(256)?.checked_add(usize::from(*digit)))?;
            let shortest = length >= 0x80 && digits.first() != Some(&0);
            (shortest.then_some(length)?, content)
        }
        _ => return None,
    };
    (content.len() == length).then_some(content)
}

/// The CN selects the session rule; every other certificate falls under dstack's own binding (threshold.md §2.2).
fn binding_of(subject: &X509Name<'_>) -> Result<Binding, &'static str> {
    if subject.iter_attributes().count() > NAME_ATTRIBUTES_MAX {
        return Err("too many subject attributes");
    }
    let mut common_names = texts(subject, OID_COMMON_NAME);
    if !common_names.contains(&Some(SESSION_COMMON_NAME)) {
        return Ok(Binding::Dstack);
    }
    common_names.retain(|name| *name != Some(SESSION_COMMON_NAME));
    if !common_names.is_empty() {
        return Err("session certificate with two common names");
    }
    match texts(subject, OID_SERIAL_NUMBER).as_slice() {
        [Some(digits)] => {
            decimal(digits).map(|beacon_pos| Binding::Session { beacon_pos }).ok_or("session serial number is not a decimal position")
        }
        _ => Err("session certificate without exactly one serial number"),
    }
}

fn texts<'a>(subject: &'a X509Name<'_>, oid: &str) -> Vec<Option<&'a str>> {
    subject
        .iter_attributes()
        .filter(|attribute| attribute.attr_type().to_id_string() == oid)
        .map(|attribute| attribute.as_str().ok())
        .collect()
}

/// Decimal without sign or leading zeros, so that one position has one text.
fn decimal(digits: &str) -> Option<u64> {
    let number = digits.parse::<u64>().ok()?;
    (number.to_string() == digits).then_some(number)
}

fn instant(seconds: i64) -> UnixMillis {
    UnixMillis(u64::try_from(seconds).unwrap_or(0).saturating_mul(1000))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificate::octet_string;

    #[test]
    fn octet_strings_must_be_whole_and_shortest() {
        for length in [0usize, 1, 127, 128, 255, 256, 40_000] {
            let content = vec![5u8; length];
            let der = octet_string(&content);
            assert_eq!(octet_string_content(&der), Some(&content[..]));
            assert_eq!(octet_string_content(&der[..der.len() - 1]), None);
            assert_eq!(octet_string_content(&[&der[..], &[0]].concat()), None);
        }
        assert_eq!(octet_string_content(&[4, 0x81, 1, 7]), None);
        assert_eq!(octet_string_content(&[4, 0x82, 0, 1, 7]), None);
        assert_eq!(octet_string_content(&[4, 0x80]), None);
        assert_eq!(octet_string_content(&[4, 0x85, 0, 0, 0, 0, 1, 7]), None);
        assert_eq!(octet_string_content(&[3, 1, 7]), None);
    }

    #[test]
    fn positions_have_one_text() {
        assert_eq!(decimal("0"), Some(0));
        assert_eq!(decimal("18446744073709551615"), Some(u64::MAX));
        for wrong in ["", "00", "01", "+1", "-1", " 1", "1 ", "18446744073709551616", "1e3"] {
            assert_eq!(decimal(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn no_bytes_make_the_parser_panic() {
        let identity =
            crate::CertifiedIdentity::for_node(UnixMillis(1_790_000_000_000), std::time::Duration::from_secs(60), |_| Ok(vec![7; 300]))
                .unwrap();
        let der = identity.der();
        for cut in 0..der.len() {
            assert!(ParsedPeer::parse(&der[..cut]).is_err());
        }
        let mut accepted = 0;
        for at in 0..der.len() {
            for flip in [0x01u8, 0x80, 0xff] {
                let mut changed = der.to_vec();
                changed[at] ^= flip;
                accepted += usize::from(ParsedPeer::parse(&changed).is_ok());
            }
        }
        // Flips inside signature, key and evidence leave the form whole; others must not.
        assert!(accepted < der.len() * 3);
    }
}
