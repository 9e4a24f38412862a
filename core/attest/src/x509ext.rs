//! Attestation in X.509 certificates: dstack's extensions. Owns: their OIDs, their wrapping, reading them off a
//! certificate. Never: verifies the certificate or its evidence; everything read here is a claim of whoever made it.
//! Source: dstack attestation reference, section 1.

use crate::wire::{ATTESTATION_BYTES_MAX, AppInfo};
use crate::{AttestError, Trace, VerifiedIdentity, VerifyContext, verify_legacy_traced, verify_traced};
use dstack_protocol::binding;
use x509_parser::oid_registry::Oid;
use x509_parser::prelude::{FromDer, X509Certificate};

/// TDX quote (legacy): raw DCAP quote.
pub const OID_TDX_QUOTE: [u64; 9] = oid(1);
/// Event log (legacy): JSON.
pub const OID_EVENT_LOG: [u64; 9] = oid(2);
/// App id, 20 bytes.
pub const OID_APP_ID: [u64; 9] = oid(3);
/// Certificate usage, text: `kms:rpc`, `app:ca`.
pub const OID_USAGE: [u64; 9] = oid(4);
/// Versioned attestation.
pub const OID_ATTESTATION: [u64; 9] = oid(8);
/// AppInfo.
pub const OID_APP_INFO: [u64; 9] = oid(9);

const fn oid(last: u64) -> [u64; 9] {
    [1, 3, 6, 1, 4, 1, 62397, 1, last]
}

const PART: &str = "certificate";
/// Largest certificate read, in bytes.
const CERTIFICATE_BYTES_MAX: usize = ATTESTATION_BYTES_MAX + (64 << 10);
/// Longest usage text, in bytes.
const USAGE_BYTES_MAX: usize = 64;

/// What the extensions of a certificate claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateClaims {
    /// DER of the SubjectPublicKeyInfo, which report data is bound to.
    pub spki: Vec<u8>,
    /// `.8`, else `.1` with `.2`.
    pub evidence: Option<CertificateEvidence>,
    /// `.4`.
    pub usage: Option<String>,
    /// `.3`.
    pub app_id: Option<[u8; 20]>,
    /// `.9`.
    pub app_info: Option<AppInfo>,
}

/// Evidence of a certificate, not decoded yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CertificateEvidence {
    /// Content of `.8`.
    Versioned(Vec<u8>),
    /// Contents of `.1` and `.2`, as 0.5.x writes them on TDX.
    Legacy {
        /// DCAP quote.
        quote: Vec<u8>,
        /// Event log, JSON.
        event_log: Vec<u8>,
    },
}

impl CertificateEvidence {
    /// Verifies it. That its report data is bound to the certificate's key is for the caller to require.
    ///
    /// # Errors
    /// As [`crate::verify`].
    pub fn verify(&self, context: &VerifyContext<'_>) -> Result<VerifiedIdentity, AttestError> {
        self.verify_traced(context, &Trace::new())
    }

    /// As [`Self::verify`], and notes in `trace` every check that was begun.
    ///
    /// # Errors
    /// As [`crate::verify`].
    pub fn verify_traced(&self, context: &VerifyContext<'_>, trace: &Trace) -> Result<VerifiedIdentity, AttestError> {
        match self {
            Self::Versioned(attestation) => verify_traced(attestation, context, trace),
            Self::Legacy { quote, event_log } => verify_legacy_traced(quote, event_log, context, trace),
        }
    }

    /// The bytes that the evidence hash covers.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Versioned(attestation) => attestation.clone(),
            Self::Legacy { quote, event_log } => binding::legacy_evidence(quote, event_log),
        }
    }
}

impl CertificateClaims {
    /// Reads a DER certificate.
    ///
    /// # Errors
    /// Classes `parse.*`: the certificate or one of our extensions is malformed, too large or there twice; `.1` without
    /// `.2`. A certificate without evidence is no error here.
    pub fn read(der: &[u8]) -> Result<Self, AttestError> {
        if der.len() > CERTIFICATE_BYTES_MAX {
            return Err(AttestError::Length { part: PART, length_bytes: der.len(), limit_bytes: CERTIFICATE_BYTES_MAX });
        }
        let malformed = |_| AttestError::Malformed { part: PART, why: "not an X.509 certificate" };
        let (rest, certificate) = X509Certificate::from_der(der).map_err(malformed)?;
        if !rest.is_empty() {
            return Err(AttestError::TrailingBytes { part: PART, count_bytes: rest.len() });
        }
        // section 1: `.8` if present; else `.1`, in which case `.2` must exist
        let evidence = match (content(&certificate, &OID_ATTESTATION)?, content(&certificate, &OID_TDX_QUOTE)?) {
            (Some(attestation), _) => Some(CertificateEvidence::Versioned(attestation.to_vec())),
            (None, Some(quote)) => {
                let log = content(&certificate, &OID_EVENT_LOG)?;
                let log = log.ok_or(AttestError::Field { field: "event log extension", why: "missing beside a quote" })?;
                Some(CertificateEvidence::Legacy { quote: quote.to_vec(), event_log: log.to_vec() })
            }
            (None, None) => None,
        };
        let usage = content(&certificate, &OID_USAGE)?.map(|bytes| {
            let text = std::str::from_utf8(bytes).ok().filter(|text| text.len() <= USAGE_BYTES_MAX);
            text.map(str::to_owned).ok_or(AttestError::Field { field: "usage extension", why: "not a short utf-8 text" })
        });
        let app_id = content(&certificate, &OID_APP_ID)?
            .map(|bytes| bytes.try_into().map_err(|_| AttestError::Field { field: "app id extension", why: "not 20 bytes" }));
        Ok(Self {
            spki: certificate.public_key().raw.to_vec(),
            evidence,
            usage: usage.transpose()?,
            app_id: app_id.transpose()?,
            app_info: content(&certificate, &OID_APP_INFO)?.map(AppInfo::decode).transpose()?,
        })
    }
}

/// What an extension's `extnValue` holds for `content`: a DER OCTET STRING. A certificate builder wraps it once more.
#[must_use]
pub fn wrap(content: &[u8]) -> Vec<u8> {
    let mut out = vec![0x04];
    let length = content.len().to_be_bytes();
    let significant: Vec<u8> = length.into_iter().skip_while(|byte| *byte == 0).collect();
    match (significant.as_slice(), content.len()) {
        ([], _) => out.push(0),
        ([short], 0..=0x7f) => out.push(*short),
        (long, _) => {
            // at most 8 length bytes
            out.push(0x80 | long.len() as u8);
            out.extend_from_slice(long);
        }
    }
    out.extend_from_slice(content);
    out
}

/// The content of the extension of that OID, out of its inner OCTET STRING.
fn content<'a>(certificate: &X509Certificate<'a>, oid: &[u64]) -> Result<Option<&'a [u8]>, AttestError> {
    let malformed = |why| AttestError::Malformed { part: "certificate extension", why };
    let oid = Oid::from(oid).map_err(|_| malformed("its oid has no encoding"))?;
    let mut found = certificate.iter_extensions().filter(|extension| extension.oid == oid);
    match (found.next(), found.next()) {
        (None, _) => Ok(None),
        (Some(_), Some(_)) => Err(malformed("there twice")),
        (Some(extension), None) => unwrap(extension.value).map(Some).ok_or(malformed("not a DER octet string")),
    }
}

/// The body of a DER OCTET STRING that fills `der`: definite length in its shortest form.
fn unwrap(der: &[u8]) -> Option<&[u8]> {
    let (&first, rest) = der.strip_prefix(&[0x04])?.split_first()?;
    let (length, body) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x84 => {
            let (length, body) = rest.split_at_checked(usize::from(first & 0x7f))?;
            let value = length.iter().fold(0_usize, |value, byte| (value << 8) | usize::from(*byte));
            let shortest = length.first() != Some(&0) && value > 0x7f;
            (shortest.then_some(value)?, body)
        }
        _ => return None,
    };
    (length == body.len()).then_some(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify_legacy;
    use crate::wire::{Attestation, PlatformEvidence, TdxEvent};
    use crate::{CollateralBundle, TcbPolicy, TrustRoots};
    use dstack_protocol::UnixMillis;
    use rcgen::{CertificateParams, CustomExtension, KeyPair};

    fn certificate(extensions: &[([u64; 9], Vec<u8>)]) -> Vec<u8> {
        let mut params = CertificateParams::new(vec!["node".to_owned()]).unwrap();
        params.custom_extensions = extensions.iter().map(|(oid, value)| CustomExtension::from_oid_content(oid, value.clone())).collect();
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    fn read(extensions: &[([u64; 9], Vec<u8>)]) -> Result<CertificateClaims, AttestError> {
        CertificateClaims::read(&certificate(extensions))
    }

    fn nitro() -> Attestation {
        let platform = PlatformEvidence::NitroEnclave { nsm_quote: vec![1; 300] };
        let config = "{}".to_owned();
        Attestation { platform, report_data: [3; 64], runtime_events: vec![], config, report_data_payload: None }
    }

    #[test]
    fn octet_strings_round_trip_in_their_one_form() {
        for length in [0, 1, 127, 128, 255, 256, 65_535, 65_536] {
            let body = vec![9; length];
            assert_eq!(unwrap(&wrap(&body)), Some(body.as_slice()), "{length}");
        }
        assert_eq!(wrap(&[7; 200])[..3], [0x04, 0x81, 200]);
        for bad in [
            &[][..],
            &[0x04],
            &[0x04, 1],
            &[0x04, 0, 0],
            &[0x05, 0],
            &[0x04, 0x81, 1, 0],
            &[0x04, 0x80, 0, 0],
            &[0x04, 0x85, 0, 0, 0, 0, 1, 1],
        ] {
            assert_eq!(unwrap(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn reads_evidence_usage_app_id_and_app_info() {
        let evidence = nitro().encode();
        let info = AppInfo { app_id: vec![1; 20], ..AppInfo::default() };
        let claims = read(&[
            (OID_ATTESTATION, wrap(&evidence)),
            (OID_USAGE, wrap(b"kms:rpc")),
            (OID_APP_ID, wrap(&[5; 20])),
            (OID_APP_INFO, wrap(&info.encode())),
        ])
        .unwrap();
        assert_eq!(claims.evidence, Some(CertificateEvidence::Versioned(evidence)));
        assert_eq!(claims.usage.as_deref(), Some("kms:rpc"));
        assert_eq!(claims.app_id, Some([5; 20]));
        assert_eq!(claims.app_info, Some(info));
        assert_eq!(claims.spki[0], 0x30);
        let bare = read(&[]).unwrap();
        assert_eq!((bare.evidence, bare.usage, bare.app_id, bare.app_info), (None, None, None, None));
    }

    #[test]
    fn reads_the_legacy_pair_unless_there_is_the_new_extension() {
        let mut quote = vec![4; 700];
        quote[568..632].fill(0x5a);
        let log = TdxEvent::log_to_json(&[TdxEvent { imr: 3, event: "app-id".into(), ..TdxEvent::default() }]);
        let pair = [(OID_TDX_QUOTE, wrap(&quote)), (OID_EVENT_LOG, wrap(log.as_bytes()))];
        let legacy = CertificateEvidence::Legacy { quote: quote.clone(), event_log: log.clone().into_bytes() };
        assert_eq!(read(&pair).unwrap().evidence, Some(legacy.clone()));
        let (roots, collateral, tcb) =
            (TrustRoots::production(), CollateralBundle::parse(b"{\"format\":1,\"tdx\":{}}").unwrap(), TcbPolicy::default());
        let context = VerifyContext { now: UnixMillis(0), roots: &roots, collateral: &collateral, tcb: &tcb };
        assert_eq!(legacy.verify(&context), verify_legacy(&quote, log.as_bytes(), &context), "zeros are no quote");
        assert!(legacy.verify(&context).is_err());
        let alone = read(&pair[..1]);
        assert_eq!(alone, Err(AttestError::Field { field: "event log extension", why: "missing beside a quote" }));
        let both = [pair.to_vec(), vec![(OID_ATTESTATION, wrap(&nitro().encode()))]].concat();
        assert_eq!(read(&both).unwrap().evidence, Some(CertificateEvidence::Versioned(nitro().encode())));
    }

    #[test]
    fn refuses_bad_extensions() {
        let refused = |extensions: &[_]| read(extensions).unwrap_err().to_string();
        assert_eq!(refused(&[(OID_ATTESTATION, vec![0, 2])]), "certificate extension malformed: not a DER octet string");
        assert_eq!(refused(&[(OID_APP_ID, wrap(&[1; 19]))]), "field app id extension: not 20 bytes");
        assert_eq!(refused(&[(OID_USAGE, wrap(&[0xff]))]), "field usage extension: not a short utf-8 text");
        let twice = refused(&[(OID_ATTESTATION, wrap(b"a")), (OID_ATTESTATION, wrap(b"b"))]);
        assert!(twice == "certificate extension malformed: there twice" || twice == "certificate malformed: not an X.509 certificate");
        let mut trailing = certificate(&[]);
        trailing.push(0);
        assert_eq!(CertificateClaims::read(&trailing), Err(AttestError::TrailingBytes { part: PART, count_bytes: 1 }));
        let whole = certificate(&[(OID_ATTESTATION, wrap(&nitro().encode()))]);
        for end in 0..whole.len() {
            assert!(CertificateClaims::read(&whole[..end]).is_err(), "cut to {end}");
        }
    }
}
