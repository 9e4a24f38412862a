//! Certificates and CRLs of the software PKIs, by role. Owns: names, key usages and path lengths as the real platforms set
//! them, chains in PEM. Never: decides which role signs which (the platform modules do).

use std::time::Duration;

use base64::Engine as _;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CrlDistributionPoint, CustomExtension, DistinguishedName, DnType,
    IsCa, Issuer, KeyIdMethod, KeyUsagePurpose, RevocationReason, RevokedCertParams, SerialNumber,
};
use sha2::{Digest as _, Sha256};

use crate::error::TestkitError;
use crate::key::Key;
use crate::validity::Validity;

/// What a certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// CA with at most this many CAs below it.
    Ca { path_len: Option<u8> },
    /// Signs documents or reports.
    Signer,
}

/// The description of one certificate.
#[derive(Debug, Clone)]
pub(crate) struct Template {
    /// Attribute order of the platform, common name first for Intel, last for AWS.
    pub(crate) subject: Vec<(DnType, String)>,
    pub(crate) role: Role,
    pub(crate) crl_url: Option<String>,
    pub(crate) extension: Option<(Vec<u64>, Vec<u8>)>,
    pub(crate) validity: Validity,
}

/// A certificate with its private key: an authority, or a signer's own.
pub(crate) struct Certified<K> {
    pub(crate) der: Vec<u8>,
    pub(crate) key: K,
    template: Template,
}

impl<K: Key> Certified<K> {
    /// A root: signed by itself.
    pub(crate) fn root(template: Template, key: K) -> Result<Self, TestkitError> {
        let params = template.params(&key);
        let der = params.self_signed(&key).map_err(|error| template.failed(error))?.der().to_vec();
        Ok(Self { der, key, template })
    }

    /// A certificate for `key`, signed by `self`.
    pub(crate) fn issue<L: Key>(&self, template: Template, key: L) -> Result<Certified<L>, TestkitError> {
        let params = template.params(&key);
        let certificate = params.signed_by(&key, &self.issuer()).map_err(|error| template.failed(error))?;
        Ok(Certified { der: certificate.der().to_vec(), key, template })
    }

    /// A CRL naming `revoked` serial numbers.
    pub(crate) fn crl(&self, validity: Validity, number: u64, revoked: &[Vec<u8>]) -> Result<Vec<u8>, TestkitError> {
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        let this_update = epoch + Duration::from_secs(validity.from_s);
        let params = CertificateRevocationListParams {
            this_update,
            next_update: epoch + Duration::from_secs(validity.until_s),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: revoked
                .iter()
                .map(|serial| RevokedCertParams {
                    serial_number: SerialNumber::from_slice(serial),
                    revocation_time: this_update,
                    reason_code: Some(RevocationReason::KeyCompromise),
                    invalidity_date: None,
                })
                .collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let crl = params.signed_by(&self.issuer()).map_err(|error| self.template.failed(error))?;
        Ok(crl.der().to_vec())
    }

    /// The serial number the certificate was issued with.
    pub(crate) fn serial(&self) -> Vec<u8> {
        self.template.serial(&self.key)
    }

    /// SubjectPublicKeyInfo, DER.
    pub(crate) fn spki(&self) -> Vec<u8> {
        self.key.subject_public_key_info()
    }

    fn issuer(&self) -> Issuer<'_, &K> {
        Issuer::new(self.template.params(&self.key), &self.key)
    }
}

impl Template {
    fn params(&self, key: &impl Key) -> CertificateParams {
        let mut params = CertificateParams::default();
        let mut name = DistinguishedName::new();
        for (kind, value) in &self.subject {
            name.push(kind.clone(), value.as_str());
        }
        params.distinguished_name = name;
        params.serial_number = Some(SerialNumber::from_slice(&self.serial(key)));
        params.use_authority_key_identifier_extension = true;
        params.key_identifier_method = KeyIdMethod::Sha256;
        match self.role {
            Role::Ca { path_len } => {
                params.is_ca = IsCa::Ca(path_len.map_or(BasicConstraints::Unconstrained, BasicConstraints::Constrained));
                params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            }
            Role::Signer => {
                params.is_ca = IsCa::ExplicitNoCa;
                params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::ContentCommitment];
            }
        }
        params.crl_distribution_points = self.crl_url.iter().map(|url| CrlDistributionPoint { uris: vec![url.clone()] }).collect();
        params.custom_extensions =
            self.extension.iter().map(|(oid, value)| CustomExtension::from_oid_content(oid, value.clone())).collect();
        self.validity.apply(&mut params);
        params
    }

    /// 20 bytes, positive, that differ whenever key, subject or dates do: issuing the same twice gives the same certificate name.
    fn serial(&self, key: &impl Key) -> Vec<u8> {
        let mut hash = Sha256::new();
        hash.update(key.subject_public_key_info());
        for (_, value) in &self.subject {
            hash.update((value.len() as u64).to_be_bytes());
            hash.update(value);
        }
        hash.update(self.validity.from_s.to_be_bytes());
        hash.update(self.validity.until_s.to_be_bytes());
        let mut serial = hash.finalize().iter().copied().take(20).collect::<Vec<u8>>();
        if let Some(first) = serial.first_mut() {
            *first = *first & 0x7f | 0x40;
        }
        serial
    }

    fn failed(&self, error: rcgen::Error) -> TestkitError {
        let subject = self.subject.iter().map(|(_, value)| value.as_str()).collect::<Vec<_>>().join(", ");
        TestkitError::Certificate { subject, reason: error.to_string() }
    }
}

/// The certificates in PEM, in the order given.
pub(crate) fn pem_chain(certificates: &[&[u8]]) -> String {
    let mut out = String::new();
    for der in certificates {
        out.push_str("-----BEGIN CERTIFICATE-----\n");
        let text = base64::engine::general_purpose::STANDARD.encode(der);
        let mut rest = text.as_str();
        while !rest.is_empty() {
            let (line, tail) = rest.split_at(rest.len().min(64));
            out.push_str(line);
            out.push('\n');
            rest = tail;
        }
        out.push_str("-----END CERTIFICATE-----\n");
    }
    out
}
