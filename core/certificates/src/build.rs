//! From a few typed fields to the bytes of a TBSCertificate, and from those and a signature to a certificate.
//!
//! Owns: the one place that calls the encoder. Never: decides a field. The bytes are a function of the fields alone; a golden vector of
//! each kind holds them still, since all signers must build the same.

use std::cell::RefCell;
use std::net::IpAddr;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose, GeneralSubtree,
    IsCa, Issuer, KeyUsagePurpose, NameConstraints, SanType, SerialNumber,
};

use crate::key::PublicKey;
use crate::{CertificateError, names};

/// 9999-12-31T23:59:59Z: the last instant that X.509 can name.
pub(crate) const NEVER_S: u64 = 253_402_300_799;

/// A certificate's subject.
#[derive(Debug, Clone)]
pub(crate) struct Name {
    pub(crate) common_name: String,
    pub(crate) organization: Option<String>,
}

impl Name {
    pub(crate) fn ca(common_name: impl Into<String>) -> Self {
        Self { common_name: common_name.into(), organization: Some(names::ORGANIZATION.to_owned()) }
    }

    fn distinguished(&self) -> DistinguishedName {
        let mut name = DistinguishedName::new();
        name.push(DnType::CommonName, self.common_name.as_str());
        if let Some(organization) = &self.organization {
            name.push(DnType::OrganizationName, organization.as_str());
        }
        name
    }
}

/// Everything that differs between kinds.
#[derive(Debug, Clone)]
pub(crate) struct Draft {
    pub(crate) subject: Name,
    pub(crate) key: PublicKey,
    pub(crate) serial: [u8; 16],
    pub(crate) not_before_s: u64,
    pub(crate) not_after_s: u64,
    /// Path length, of a CA.
    pub(crate) ca: Option<u8>,
    /// Hosts that the CA may name.
    pub(crate) permitted: Vec<String>,
    /// Subject alternative names.
    pub(crate) hosts: Vec<String>,
    pub(crate) server_auth: bool,
    pub(crate) client_auth: bool,
    /// dstack's extensions: last arc and content.
    pub(crate) extensions: Vec<(u64, Vec<u8>)>,
}

/// Who signs.
#[derive(Debug, Clone)]
pub(crate) struct IssuedBy {
    pub(crate) name: Name,
    pub(crate) key: PublicKey,
}

impl Draft {
    /// A draft without usages, hosts and extensions.
    pub(crate) fn new(subject: Name, key: PublicKey, serial: [u8; 16], not_before_s: u64, not_after_s: u64) -> Self {
        Self {
            subject,
            key,
            serial,
            not_before_s,
            not_after_s,
            ca: None,
            permitted: Vec::new(),
            hosts: Vec::new(),
            server_auth: false,
            client_auth: false,
            extensions: Vec::new(),
        }
    }

    /// TBSCertificate, DER. Self-signed where `issuer` is `None`.
    pub(crate) fn tbs(&self, issuer: Option<&IssuedBy>) -> Result<Vec<u8>, CertificateError> {
        let params = self.params(issuer.is_some())?;
        let by = issuer.map_or(&self.key, |issuer| &issuer.key);
        let capture = Capture { key: by, seen: RefCell::new(Vec::new()) };
        let built = match issuer {
            None => params.self_signed(&capture),
            Some(issuer) => {
                let mut issuer_params = CertificateParams::default();
                issuer_params.distinguished_name = issuer.name.distinguished();
                params.signed_by(&self.key, &Issuer::from_params(&issuer_params, &capture))
            }
        };
        built.map_err(|error| CertificateError::Build(error.to_string()))?;
        Ok(capture.seen.into_inner())
    }

    fn params(&self, with_issuer: bool) -> Result<CertificateParams, CertificateError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = self.subject.distinguished();
        params.serial_number = Some(SerialNumber::from_slice(&self.serial));
        let at = |seconds: u64| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds.min(NEVER_S));
        params.not_before = at(self.not_before_s);
        params.not_after = at(self.not_after_s);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        if let Some(path_length) = self.ca {
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
            params.key_usages.extend([KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign]);
        }
        // threshold.md §5.2: every certificate but the root carries an Authority Key Identifier.
        params.use_authority_key_identifier_extension = with_issuer;
        params.subject_alt_names = self.hosts.iter().map(|host| alternative(host)).collect::<Result<_, _>>()?;
        if self.server_auth {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        if self.client_auth {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        }
        if !self.permitted.is_empty() {
            params.name_constraints = Some(constraints(&self.permitted));
        }
        params.custom_extensions = self
            .extensions
            .iter()
            .map(|(last, value)| CustomExtension::from_oid_content(&names::oid(*last), octet_string(value)))
            .collect();
        Ok(params)
    }
}

fn alternative(host: &str) -> Result<SanType, CertificateError> {
    match host.parse::<IpAddr>() {
        Ok(address) => Ok(SanType::IpAddress(address)),
        Err(_) => host.try_into().map(SanType::DnsName).map_err(|error: rcgen::Error| CertificateError::Build(error.to_string())),
    }
}

/// These hosts and no others. A form of name that no permitted subtree has would be free (RFC 5280 §4.2.1.10), so it is excluded.
fn constraints(hosts: &[String]) -> NameConstraints {
    let mut permitted_subtrees = Vec::new();
    let (mut any_name, mut any_address) = (false, false);
    for host in hosts {
        match host.parse::<IpAddr>() {
            Ok(address) => {
                any_address = true;
                let bits = if address.is_ipv4() { 32 } else { 128 };
                permitted_subtrees.push(GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(address, bits)));
            }
            Err(_) => {
                any_name = true;
                permitted_subtrees.push(GeneralSubtree::DnsName(host.clone()));
            }
        }
    }
    let mut excluded_subtrees = Vec::new();
    if !any_name {
        excluded_subtrees.push(GeneralSubtree::DnsName(String::new()));
    }
    if !any_address {
        excluded_subtrees.push(GeneralSubtree::IpAddress(CidrSubnet::V4([0; 4], [0; 4])));
        excluded_subtrees.push(GeneralSubtree::IpAddress(CidrSubnet::V6([0; 16], [0; 16])));
    }
    NameConstraints { permitted_subtrees, excluded_subtrees }
}

/// A key that keeps what it should sign. What it answers is thrown away with the certificate.
struct Capture<'a> {
    key: &'a PublicKey,
    seen: RefCell<Vec<u8>>,
}

impl rcgen::PublicKeyData for Capture<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.key.der_bytes()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        self.key.algorithm()
    }
}

impl rcgen::SigningKey for Capture<'_> {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        *self.seen.borrow_mut() = message.to_vec();
        Ok(vec![0; 64])
    }
}

/// A certificate from its TBS and a signature as it stands in one.
pub(crate) fn assemble(tbs: &[u8], by: &PublicKey, signature: &[u8]) -> Vec<u8> {
    const ED25519: &[u8] = &[0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70];
    const ECDSA_SHA256: &[u8] = &[0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
    let algorithm = match by {
        PublicKey::Ed25519(_) => ED25519,
        PublicKey::P256(_) => ECDSA_SHA256,
    };
    let bits = tlv(0x03, &[&[0], signature].concat());
    tlv(0x30, &[tbs, algorithm, &bits].concat())
}

/// Signs a TBS with a key of this process.
pub(crate) fn signed(tbs: &[u8], by: &PublicKey, key: &impl rcgen::SigningKey) -> Result<Vec<u8>, CertificateError> {
    let signature = key.sign(tbs).map_err(|error| CertificateError::Build(error.to_string()))?;
    by.verify("own signature", tbs, &signature)?;
    Ok(assemble(tbs, by, &signature))
}

/// `value` as a DER OCTET STRING.
pub(crate) fn octet_string(value: &[u8]) -> Vec<u8> {
    tlv(0x04, value)
}

fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    let mut out = vec![tag];
    if content.len() < 0x80 {
        out.extend(length.last());
    } else {
        let digits: Vec<u8> = length.into_iter().skip_while(|byte| *byte == 0).collect();
        out.push(0x80 | u8::try_from(digits.len()).expect("a length has at most eight bytes"));
        out.extend(digits);
    }
    out.extend_from_slice(content);
    out
}
