//! Certificate requests of `SignCert`: what a guest asks to have certified, with the evidence that speaks for the key.
//! Owns: the layouts V1 and V2, the signature by the request's own key, the confirm word. Never: judges the evidence or what is asked for.
//! Source: KMS API reference, section 7.

use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

use super::scale::{Reader, put_bytes, put_compact};
use super::{ATTESTATION_BYTES_MAX, Encoding};
use crate::AttestError;
use crate::x509::{Key, SignatureAlgorithm};
use crate::x509ext::CertificateEvidence;

/// What `confirm` has to say: it keeps a signature made for something else from being one over a request.
pub const CONFIRM: &str = "please sign cert:";
/// Most alternative names of one request.
pub const ALT_NAMES_MAX: usize = 128;
/// Largest request, bytes: its evidence, and room for the rest.
pub const CSR_BYTES_MAX: usize = ATTESTATION_BYTES_MAX + (64 << 10);

/// Why a request is none. All variants are the sender's fault: refuse.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Another version than 1 or 2.
    #[error("Unsupported API version: {got}")]
    Version {
        /// The version found.
        got: u32,
    },
    /// The bytes are no request.
    #[error("certificate request: {0}")]
    Wire(#[from] AttestError),
    /// Its public key is no P-256 key in SubjectPublicKeyInfo form.
    #[error("the request's public key is not a P-256 SubjectPublicKeyInfo")]
    PublicKey,
    /// The signature does not verify under that key.
    #[error("the request's signature does not verify under its public key")]
    Signature,
    /// The signed bytes were made for another purpose.
    #[error("Invalid confirm word")]
    Confirm,
}

/// What the certificate shall say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CertificateConfig {
    /// Organization.
    pub org_name: Option<String>,
    /// Common name.
    pub subject: String,
    /// Host names and addresses, in text.
    pub alt_names: Vec<String>,
    /// Extended key usage.
    pub usage_server_auth: bool,
    /// Extended key usage.
    pub usage_client_auth: bool,
    /// Extension `.8` with the stripped evidence.
    pub ext_quote: bool,
    /// Extension `.9`. V2 only.
    pub ext_app_info: bool,
    /// Unix seconds. V2 only.
    pub not_before: Option<u64>,
    /// Unix seconds. V2 only.
    pub not_after: Option<u64>,
}

/// A request, decoded. A V1 request has [`CertificateEvidence::Legacy`], a V2 request [`CertificateEvidence::Versioned`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateRequest {
    /// Should be [`CONFIRM`].
    pub confirm: String,
    /// SubjectPublicKeyInfo, DER.
    pub public_key: Vec<u8>,
    /// What is asked for.
    pub config: CertificateConfig,
    /// Not decoded yet.
    pub evidence: CertificateEvidence,
}

impl CertificateRequest {
    /// Decodes a request of that version.
    ///
    /// # Errors
    /// [`CsrError::Version`], [`CsrError::Wire`].
    pub fn decode(api_version: u32, bytes: &[u8]) -> Result<Self, CsrError> {
        if bytes.len() > CSR_BYTES_MAX {
            return Err(AttestError::Length { part: "csr", length_bytes: bytes.len(), limit_bytes: CSR_BYTES_MAX }.into());
        }
        let mut reader = Reader::new(bytes);
        match api_version {
            1 => {
                let (confirm, public_key, config) = head(&mut reader)?;
                let (quote, event_log) = (reader.bytes("quote")?.to_vec(), reader.bytes("event_log")?.to_vec());
                reader.end("csr")?;
                Ok(Self { confirm, public_key, config, evidence: CertificateEvidence::Legacy { quote, event_log } })
            }
            2 => {
                let (confirm, public_key, mut config) = head(&mut reader)?;
                config.ext_app_info = boolean(&mut reader, "ext_app_info")?;
                config.not_before = option(&mut reader, "not_before", seconds)?;
                config.not_after = option(&mut reader, "not_after", seconds)?;
                let attestation = reader.rest();
                Encoding::of(attestation)?;
                Ok(Self { confirm, public_key, config, evidence: CertificateEvidence::Versioned(attestation.to_vec()) })
            }
            got => Err(CsrError::Version { got }),
        }
    }

    /// Its version: 1 with legacy evidence, else 2.
    #[must_use]
    pub const fn api_version(&self) -> u32 {
        match self.evidence {
            CertificateEvidence::Legacy { .. } => 1,
            CertificateEvidence::Versioned(_) => 2,
        }
    }

    /// The bytes that are signed and sent. V1 has no place for app info and validity: they are left out.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(512);
        put_bytes(&mut out, self.confirm.as_bytes());
        put_bytes(&mut out, &self.public_key);
        let config = &self.config;
        match &config.org_name {
            None => out.push(0),
            Some(name) => {
                out.push(1);
                put_bytes(&mut out, name.as_bytes());
            }
        }
        put_bytes(&mut out, config.subject.as_bytes());
        put_compact(&mut out, config.alt_names.len());
        config.alt_names.iter().for_each(|name| put_bytes(&mut out, name.as_bytes()));
        out.extend([config.usage_server_auth, config.usage_client_auth, config.ext_quote].map(u8::from));
        match &self.evidence {
            CertificateEvidence::Legacy { quote, event_log } => {
                put_bytes(&mut out, quote);
                put_bytes(&mut out, event_log);
            }
            CertificateEvidence::Versioned(attestation) => {
                out.push(u8::from(config.ext_app_info));
                for time in [config.not_before, config.not_after] {
                    out.push(u8::from(time.is_some()));
                    out.extend(time.map(u64::to_le_bytes).iter().flatten());
                }
                out.extend_from_slice(attestation);
            }
        }
        out
    }

    /// Checks that `csr`, the bytes this was decoded from, is signed by the request's own key (ECDSA P-256 with SHA-256, DER) and means
    /// a certificate.
    ///
    /// # Errors
    /// [`CsrError::PublicKey`], [`CsrError::Signature`], [`CsrError::Confirm`], in this order (section 7, "Checks in order").
    pub fn check(&self, csr: &[u8], signature: &[u8]) -> Result<(), CsrError> {
        verify_csr_signature(&self.public_key, csr, signature)?;
        if self.confirm != CONFIRM {
            return Err(CsrError::Confirm);
        }
        Ok(())
    }
}

/// Whether `signature` (DER) over `csr` verifies under `public_key` (SubjectPublicKeyInfo of a P-256 key).
///
/// # Errors
/// [`CsrError::PublicKey`], [`CsrError::Signature`].
pub fn verify_csr_signature(public_key: &[u8], csr: &[u8], signature: &[u8]) -> Result<(), CsrError> {
    let (rest, info) = SubjectPublicKeyInfo::from_der(public_key).map_err(|_| CsrError::PublicKey)?;
    let algorithm = SignatureAlgorithm::EcdsaP256Sha256;
    let key = Key::of(&info).filter(|key| rest.is_empty() && key.kind() == algorithm.key()).ok_or(CsrError::PublicKey)?;
    if key.verifies(algorithm, csr, signature) { Ok(()) } else { Err(CsrError::Signature) }
}

/// What both versions begin with.
fn head(reader: &mut Reader<'_>) -> Result<(String, Vec<u8>, CertificateConfig), AttestError> {
    let confirm = reader.text("confirm")?;
    let public_key = reader.bytes("pubkey")?.to_vec();
    let config = CertificateConfig {
        org_name: option(reader, "org_name", Reader::text)?,
        subject: reader.text("subject")?,
        alt_names: reader.vec("subject_alt_names", ALT_NAMES_MAX, 1, |r| r.text("subject_alt_name"))?,
        usage_server_auth: boolean(reader, "usage_server_auth")?,
        usage_client_auth: boolean(reader, "usage_client_auth")?,
        ext_quote: boolean(reader, "ext_quote")?,
        ..CertificateConfig::default()
    };
    Ok((confirm, public_key, config))
}

fn boolean(reader: &mut Reader<'_>, part: &'static str) -> Result<bool, AttestError> {
    match reader.u8(part)? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(AttestError::Malformed { part, why: "a flag is 0 or 1" }),
    }
}

fn option<'a, T>(
    reader: &mut Reader<'a>,
    part: &'static str,
    read: impl FnOnce(&mut Reader<'a>, &'static str) -> Result<T, AttestError>,
) -> Result<Option<T>, AttestError> {
    if boolean(reader, part)? { read(reader, part).map(Some) } else { Ok(None) }
}

fn seconds(reader: &mut Reader<'_>, part: &'static str) -> Result<u64, AttestError> {
    reader.array(part).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::wire::Attestation;

    fn request(evidence: CertificateEvidence) -> CertificateRequest {
        let config = CertificateConfig { subject: "test.example.com".into(), usage_server_auth: true, ..CertificateConfig::default() };
        CertificateRequest { confirm: CONFIRM.into(), public_key: vec![1, 2, 3], config, evidence }
    }

    fn attestation(quote: &[u8]) -> Vec<u8> {
        [
            vec![0, 0],
            match quote {
                [] => vec![0],
                [one] => vec![4, *one],
                _ => panic!("at most one byte"),
            },
            vec![0, 0],
            vec![0; 64],
            vec![0],
        ]
        .concat()
    }

    /// The vectors of section 7.
    #[test]
    fn v2_is_the_references() {
        let head = "44706c65617365207369676e20636572743a0c0102030040746573742e6578616d706c652e636f6d";
        let plain = request(CertificateEvidence::Versioned(attestation(&[])));
        let bytes = hex::decode(format!("{head}00010000000000{}{}00", "0000000000", "00".repeat(64))).unwrap();
        assert_eq!(plain.encode(), bytes);
        assert_eq!(CertificateRequest::decode(2, &bytes).unwrap(), plain);
        let CertificateEvidence::Versioned(evidence) = &plain.evidence else { panic!("versioned") };
        assert_eq!(Attestation::decode(evidence).unwrap().encode(), *evidence);

        let mut quoted = request(CertificateEvidence::Versioned(attestation(&[9])));
        quoted.config.ext_quote = true;
        let bytes = hex::decode(format!("{head}000100010000000000040900{}{}00", "00", "00".repeat(64))).unwrap();
        assert_eq!(quoted.encode(), bytes);
        assert_eq!(CertificateRequest::decode(2, &bytes).unwrap(), quoted);
    }

    #[test]
    fn v1_ends_with_quote_and_log() {
        let legacy = request(CertificateEvidence::Legacy { quote: vec![9], event_log: b"[]".to_vec() });
        let bytes = legacy.encode();
        assert!(bytes.ends_with(&[1, 0, 0, 4, 9, 8, b'[', b']']));
        assert_eq!(legacy.api_version(), 1);
        assert_eq!(CertificateRequest::decode(1, &bytes).unwrap(), legacy);
        let more = [bytes, vec![0]].concat();
        assert_eq!(CertificateRequest::decode(1, &more), Err(CsrError::Wire(AttestError::TrailingBytes { part: "csr", count_bytes: 1 })));
    }

    #[test]
    fn refuses_what_is_no_request() {
        let bytes = request(CertificateEvidence::Versioned(attestation(&[]))).encode();
        for version in [0, 3, u32::MAX] {
            let error = CertificateRequest::decode(version, &bytes).unwrap_err();
            assert_eq!(error.to_string(), format!("Unsupported API version: {version}"));
        }
        for end in 0..bytes.len() - attestation(&[]).len() + 1 {
            assert!(matches!(CertificateRequest::decode(2, &bytes[..end]), Err(CsrError::Wire(_))), "{end}");
        }
        // The flag after the names, a version of the evidence that is none, names without end.
        let flag = bytes.len() - attestation(&[]).len() - 6;
        for (at, value) in [(flag, 2), (bytes.len() - attestation(&[]).len(), 7), (flag - 1, 0xfe)] {
            let mut bad = bytes.clone();
            bad[at] = value;
            assert!(matches!(CertificateRequest::decode(2, &bad), Err(CsrError::Wire(_))), "{at}");
        }
        let mut many = request(CertificateEvidence::Versioned(attestation(&[])));
        many.config.alt_names = vec![String::new(); ALT_NAMES_MAX + 1];
        assert!(matches!(CertificateRequest::decode(2, &many.encode()), Err(CsrError::Wire(AttestError::Length { .. }))));
    }

    #[test]
    fn the_requests_own_key_signs_it() {
        let random = SystemRandom::new();
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).unwrap();
        let spki_head = hex::decode("3059301306072a8648ce3d020106082a8648ce3d030107034200").unwrap();
        let mut asked = request(CertificateEvidence::Versioned(attestation(&[])));
        asked.public_key = [spki_head, pair.public_key().as_ref().to_vec()].concat();
        let csr = asked.encode();
        let signature = pair.sign(&random, &csr).unwrap();
        let decoded = CertificateRequest::decode(2, &csr).unwrap();
        assert_eq!(decoded.check(&csr, signature.as_ref()), Ok(()));
        let other = pair.sign(&random, b"another").unwrap();
        assert_eq!(decoded.check(&csr, other.as_ref()), Err(CsrError::Signature));
        assert_eq!(decoded.check(&csr, &[]), Err(CsrError::Signature));
        assert_eq!(verify_csr_signature(&[1, 2, 3], &csr, signature.as_ref()), Err(CsrError::PublicKey));
        let trailing = [asked.public_key.clone(), vec![0]].concat();
        assert_eq!(verify_csr_signature(&trailing, &csr, signature.as_ref()), Err(CsrError::PublicKey));

        asked.confirm = "please sign cert".into();
        let csr = asked.encode();
        let signature = pair.sign(&random, &csr).unwrap();
        let refused = CertificateRequest::decode(2, &csr).unwrap().check(&csr, signature.as_ref()).unwrap_err();
        assert_eq!(refused.to_string(), "Invalid confirm word");
    }

    proptest! {
        #[test]
        fn round_trips(
            org_name in any::<Option<String>>(), subject in ".*", alt_names in vec(".{0,20}", 0..5), flags in any::<[bool; 4]>(),
            not_before in any::<Option<u64>>(), not_after in any::<Option<u64>>(), public_key in vec(any::<u8>(), 0..100),
        ) {
            let [usage_server_auth, usage_client_auth, ext_quote, ext_app_info] = flags;
            let config =
                CertificateConfig { org_name, subject, alt_names, usage_server_auth, usage_client_auth, ext_quote, ext_app_info, not_before, not_after };
            let asked = CertificateRequest { public_key, config, ..request(CertificateEvidence::Versioned(attestation(&[7]))) };
            prop_assert_eq!(CertificateRequest::decode(2, &asked.encode()).unwrap(), asked);
        }

        #[test]
        fn any_bytes_are_answered(bytes in vec(any::<u8>(), 0..300), version in 0_u32..4) {
            let _ = CertificateRequest::decode(version, &bytes);
        }
    }
}
