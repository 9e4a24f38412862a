//! Our own certificates. Owns: self-signed P-256 certificates with evidence, in dstack's binding and in the session
//! binding. Never: judges evidence, keeps a certificate (that is [`crate::source`]).
//! Source: attestation reference §1, §3; threshold.md §2.2.

use std::sync::Arc;
use std::time::Duration;

use dstack_protocol::{ClusterId, UnixMillis, binding};
use rcgen::{CertificateParams, CustomExtension, DistinguishedName, DnType, DnValue, Issuer, KeyPair};
use rustls::sign::CertifiedKey;

use crate::error::RatlsError;
use crate::key::CertificateKey;
use crate::{CERTIFICATE_BYTES_MAX, EVIDENCE_OID, SESSION_COMMON_NAME};

/// Common name of certificates in dstack's own binding. Carries no meaning.
pub const NODE_COMMON_NAME: &str = "dstack-kms node";

/// Common name of a guest's certificate on dstack's listener.
pub const DSTACK_CLIENT_COMMON_NAME: &str = "RA-TLS TEMP Cert";

/// Certificates begin this long before they are made, so that a peer whose clock lags does not refuse them.
const BACKDATED: Duration = Duration::from_secs(600);

/// `2.5.4.5`, serialNumber of a distinguished name.
pub(crate) const SERIAL_NUMBER_OID: &[u64] = &[2, 5, 4, 5];

/// What a session commits to beside the key (threshold.md §2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionBinding {
    /// The cluster that shall accept it.
    pub cluster_id: ClusterId,
    /// Leaf number of the beacon.
    pub beacon_pos: u64,
    /// Its value.
    pub beacon: [u8; 32],
}

/// A key, its certificate and the evidence inside.
#[derive(Debug)]
pub struct CertifiedIdentity {
    key: CertificateKey,
    certified: Arc<CertifiedKey>,
    spki: Vec<u8>,
    evidence: Vec<u8>,
    not_after: UnixMillis,
}

impl CertifiedIdentity {
    /// A certificate in dstack's own binding: `report_data = SHA-512("ratls-cert:" ‖ SPKI)`.
    ///
    /// `evidence_of`: asks the device; blocks for as long as the device takes. `lifetime`: not longer than the evidence.
    ///
    /// # Errors
    /// [`RatlsError`]; the device's failure is [`RatlsError::Evidence`].
    pub fn for_node(
        now: UnixMillis,
        lifetime: Duration,
        evidence_of: impl FnOnce([u8; 64]) -> Result<Vec<u8>, String>,
    ) -> Result<Self, RatlsError> {
        let key = CertificateKey::generate()?;
        let spki = key.spki();
        let evidence = evidence_of(binding::ratls_certificate(&spki)).map_err(|reason| RatlsError::Evidence { reason })?;
        Self::assemble(key, spki, evidence, Subject { common_name: NODE_COMMON_NAME, serial_number: None }, now, lifetime)
    }

    /// A client's certificate in the session binding.
    ///
    /// # Errors
    /// As [`CertifiedIdentity::for_node`].
    pub fn for_session(
        now: UnixMillis,
        lifetime: Duration,
        session: &SessionBinding,
        evidence_of: impl FnOnce([u8; 64]) -> Result<Vec<u8>, String>,
    ) -> Result<Self, RatlsError> {
        let key = CertificateKey::generate()?;
        let spki = key.spki();
        let report_data = binding::session(&session.cluster_id, session.beacon_pos, &session.beacon, &spki);
        let evidence = evidence_of(report_data).map_err(|reason| RatlsError::Evidence { reason })?;
        let subject = Subject { common_name: SESSION_COMMON_NAME, serial_number: Some(session.beacon_pos) };
        Self::assemble(key, spki, evidence, subject, now, lifetime)
    }

    /// A guest's certificate for dstack's listener, in dstack's own binding. `temp_ca`: certificate and key, PEM, of the CA that a KMS
    /// hands to anybody; without it the certificate is self-signed. Neither proves anything, the evidence does.
    ///
    /// # Errors
    /// As [`CertifiedIdentity::for_node`].
    pub fn for_dstack_client(
        now: UnixMillis,
        lifetime: Duration,
        temp_ca: Option<(&str, &str)>,
        evidence_of: impl FnOnce([u8; 64]) -> Result<Vec<u8>, String>,
    ) -> Result<Self, RatlsError> {
        let issuer = temp_ca.map(|(certificate, key)| temp_issuer(certificate, key)).transpose()?;
        let key = CertificateKey::generate()?;
        let spki = key.spki();
        let evidence = evidence_of(binding::ratls_certificate(&spki)).map_err(|reason| RatlsError::Evidence { reason })?;
        let subject = Subject { common_name: DSTACK_CLIENT_COMMON_NAME, serial_number: None };
        Self::signed(key, spki, evidence, subject, now, lifetime, issuer.as_ref())
    }

    fn assemble(
        key: CertificateKey,
        spki: Vec<u8>,
        evidence: Vec<u8>,
        subject: Subject,
        now: UnixMillis,
        lifetime: Duration,
    ) -> Result<Self, RatlsError> {
        Self::signed(key, spki, evidence, subject, now, lifetime, None)
    }

    fn signed(
        key: CertificateKey,
        spki: Vec<u8>,
        evidence: Vec<u8>,
        subject: Subject,
        now: UnixMillis,
        lifetime: Duration,
        issuer: Option<&Issuer<'static, KeyPair>>,
    ) -> Result<Self, RatlsError> {
        let not_after = now.plus_ms(millis(lifetime));
        let mut params = CertificateParams::default();
        params.distinguished_name = subject.distinguished_name()?;
        params.not_before = rcgen::date_time_ymd(1970, 1, 1) + calendar(UnixMillis(now.0.saturating_sub(millis(BACKDATED))));
        params.not_after = rcgen::date_time_ymd(1970, 1, 1) + calendar(not_after);
        // The content is complete DER of its own: an OCTET STRING inside the extension's OCTET STRING.
        params.custom_extensions = vec![CustomExtension::from_oid_content(EVIDENCE_OID, octet_string(&evidence))];
        let certificate = match issuer {
            Some(issuer) => params.signed_by(&key, issuer),
            None => params.self_signed(&key),
        };
        let certificate = certificate.map_err(|error| RatlsError::Certificate { reason: error.to_string() })?;
        let der = certificate.der().clone();
        if der.len() > CERTIFICATE_BYTES_MAX {
            return Err(RatlsError::CertificateTooLarge { size_bytes: der.len(), limit_bytes: CERTIFICATE_BYTES_MAX });
        }
        let certified = Arc::new(CertifiedKey::new(vec![der], key.for_tls()));
        Ok(Self { key, certified, spki, evidence, not_after })
    }

    /// The key, to sign release requests with.
    pub fn key(&self) -> &CertificateKey {
        &self.key
    }

    /// SubjectPublicKeyInfo of the key, DER.
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }

    /// The versioned attestation inside the certificate.
    pub fn evidence(&self) -> &[u8] {
        &self.evidence
    }

    /// The certificate, DER.
    pub fn der(&self) -> &[u8] {
        self.certified.cert.first().map_or(&[], |certificate| certificate.as_ref())
    }

    /// Until when peers accept the certificate.
    pub fn not_after(&self) -> UnixMillis {
        self.not_after
    }

    pub(crate) fn certified_key(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.certified)
    }
}

/// The temp CA as an issuer. Its name is taken over attribute by attribute, in UTF-8 as dstack writes it.
fn temp_issuer(certificate: &str, key: &str) -> Result<Issuer<'static, KeyPair>, RatlsError> {
    let refused = |reason: String| RatlsError::Certificate { reason: format!("temp CA: {reason}") };
    let (_, pem) = x509_parser::pem::parse_x509_pem(certificate.as_bytes()).map_err(|error| refused(error.to_string()))?;
    let parsed = pem.parse_x509().map_err(|error| refused(error.to_string()))?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    for attribute in parsed.subject().iter_attributes() {
        let kind: Vec<u64> =
            attribute.attr_type().iter().map(Iterator::collect).ok_or_else(|| refused("a name of unknown type".to_owned()))?;
        let text = attribute.as_str().map_err(|error| refused(error.to_string()))?;
        params.distinguished_name.push(DnType::from_oid(&kind), text);
    }
    let key = KeyPair::from_pem(key).map_err(|error| refused(error.to_string()))?;
    Ok(Issuer::new(params, key))
}

struct Subject {
    common_name: &'static str,
    serial_number: Option<u64>,
}

impl Subject {
    fn distinguished_name(&self) -> Result<DistinguishedName, RatlsError> {
        let mut name = DistinguishedName::new();
        name.push(DnType::CommonName, self.common_name);
        if let Some(number) = self.serial_number {
            let digits =
                number.to_string().try_into().map_err(|error: rcgen::Error| RatlsError::Certificate { reason: error.to_string() })?;
            name.push(DnType::from_oid(SERIAL_NUMBER_OID), DnValue::PrintableString(digits));
        }
        Ok(name)
    }
}

/// DER OCTET STRING around `content`.
pub(crate) fn octet_string(content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    let digits: Vec<u8> = length.into_iter().skip_while(|byte| *byte == 0).collect();
    let mut der = Vec::with_capacity(content.len().saturating_add(10));
    der.push(0x04);
    match (u8::try_from(content.len()), digits.len()) {
        (Ok(short), _) if short < 0x80 => der.push(short),
        // A usize has at most eight digits of base 256.
        (_, count) => {
            der.push(0x80 | u8::try_from(count).unwrap_or(8));
            der.extend_from_slice(&digits);
        }
    }
    der.extend_from_slice(content);
    der
}

/// Time since 1970 as certificates can hold it: the calendar library refuses years past 9999.
fn calendar(at: UnixMillis) -> Duration {
    const YEAR_9999_MS: u64 = 253_370_764_800_000;
    Duration::from_millis(at.0.min(YEAR_9999_MS))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::{Binding, ParsedPeer};

    const NOW: UnixMillis = UnixMillis(1_790_000_000_000);
    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn node_certificate_parses_back() {
        let mut asked = None;
        let identity = CertifiedIdentity::for_node(NOW, HOUR, |report_data| {
            asked = Some(report_data);
            Ok(vec![7; 5000])
        })
        .unwrap();
        assert_eq!(asked, Some(binding::ratls_certificate(identity.spki())));
        let parsed = ParsedPeer::parse(identity.der()).unwrap();
        assert_eq!(parsed.evidence.as_deref(), Some(&[7u8; 5000][..]));
        assert_eq!(parsed.spki, identity.spki());
        assert_eq!(parsed.binding, Binding::Dstack);
        assert_eq!(parsed.not_after, NOW.plus_ms(3_600_000));
        assert!(parsed.not_before < NOW);
    }

    #[test]
    fn session_certificate_names_its_beacon() {
        let session = SessionBinding { cluster_id: ClusterId([1; 32]), beacon_pos: u64::MAX, beacon: [2; 32] };
        let identity = CertifiedIdentity::for_session(NOW, HOUR, &session, |report_data| Ok(report_data.to_vec())).unwrap();
        let parsed = ParsedPeer::parse(identity.der()).unwrap();
        assert_eq!(parsed.binding, Binding::Session { beacon_pos: u64::MAX });
        let expected = binding::session(&session.cluster_id, u64::MAX, &[2; 32], identity.spki());
        assert_eq!(parsed.evidence.as_deref(), Some(&expected[..]));
    }

    #[test]
    fn oversized_evidence_is_refused_at_home() {
        let error = CertifiedIdentity::for_node(NOW, HOUR, |_| Ok(vec![0; CERTIFICATE_BYTES_MAX])).unwrap_err();
        assert_eq!(error.code(), "ratls.certificate_too_large");
    }

    #[test]
    fn a_clock_beyond_the_calendar_does_not_panic() {
        CertifiedIdentity::for_node(UnixMillis(u64::MAX), HOUR, |_| Ok(vec![0; 10])).unwrap();
        CertifiedIdentity::for_node(UnixMillis(0), HOUR, |_| Ok(vec![0; 10])).unwrap();
    }

    #[test]
    fn octet_strings_have_shortest_lengths() {
        assert_eq!(octet_string(&[]), [4, 0]);
        assert_eq!(octet_string(&[9; 127])[..2], [4, 127]);
        assert_eq!(octet_string(&[9; 128])[..3], [4, 0x81, 128]);
        assert_eq!(octet_string(&[9; 300])[..4], [4, 0x82, 1, 44]);
    }
}
