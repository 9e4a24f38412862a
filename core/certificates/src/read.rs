//! Certificates read back into typed fields, and the kinds among them.
//!
//! Owns: which fields each kind must have. Never: trust; a kind that reads well may be signed by anyone ([`crate::path`] judges that).
//! Source: KMS API reference §8, RFC 5280.

use std::net::IpAddr;

use dstack_protocol::AppId;
use x509_parser::extensions::{GeneralName, GeneralSubtree, ParsedExtension};
use x509_parser::oid_registry::Oid;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::key::PublicKey;
use crate::{CertificateError, names};

/// Largest certificate read, bytes: a leaf may carry evidence.
pub const CERTIFICATE_BYTES_MAX: usize = 11 * 1024 * 1024;

const ED25519: &str = "1.3.101.112";
const P256_SPKI: &str = "1.2.840.10045.2.1";
const ECDSA_SHA256: &str = "1.2.840.10045.4.3.2";

/// What a CA may name, or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Subtree {
    /// This name and those below it; empty is every name.
    Dns(String),
    /// Address and mask.
    Ip(Vec<u8>),
}

/// A certificate's fields. Everything is a claim until a path leads to it.
#[derive(Debug, Clone)]
pub struct Certificate {
    der: Vec<u8>,
    tbs: Vec<u8>,
    algorithm: String,
    signature: Vec<u8>,
    serial: Vec<u8>,
    issuer: Vec<u8>,
    subject: Vec<u8>,
    common_name: String,
    organization: Option<String>,
    key: PublicKey,
    not_before_s: u64,
    not_after_s: u64,
    is_ca: bool,
    path_length: Option<u32>,
    signs_certificates: bool,
    server_auth: bool,
    client_auth: bool,
    names: Vec<String>,
    addresses: Vec<IpAddr>,
    pub(crate) permitted: Vec<Subtree>,
    pub(crate) excluded: Vec<Subtree>,
    subject_key_id: Option<Vec<u8>>,
    authority_key_id: Option<Vec<u8>>,
    extensions: Vec<(u64, Vec<u8>)>,
}

fn broken(reason: impl Into<String>) -> CertificateError {
    CertificateError::NotACertificate(reason.into())
}

impl Certificate {
    /// Reads one certificate, DER, without anything after it.
    ///
    /// # Errors
    /// [`CertificateError::NotACertificate`]: not X.509 v3, an extension twice, a critical one that is unknown, more than one common
    /// name; [`CertificateError::BadKey`] for another key than Ed25519 or P-256.
    pub fn read(der: &[u8]) -> Result<Self, CertificateError> {
        if der.len() > CERTIFICATE_BYTES_MAX {
            return Err(broken(format!("{} bytes, at most {CERTIFICATE_BYTES_MAX}", der.len())));
        }
        let (rest, x509) = X509Certificate::from_der(der).map_err(|error| broken(error.to_string()))?;
        if !rest.is_empty() {
            return Err(broken(format!("{} bytes after its end", rest.len())));
        }
        if x509.signature_algorithm != x509.tbs_certificate.signature {
            return Err(broken("two signature algorithms"));
        }
        let seconds = |at: i64| u64::try_from(at).unwrap_or(0);
        let key = key_of(&x509)?;
        let mut common_names = x509.subject().iter_common_name();
        let common_name = common_names.next().and_then(|name| name.as_str().ok()).unwrap_or_default().to_owned();
        if common_names.next().is_some() {
            return Err(broken("two common names"));
        }
        let mut read = Self {
            der: der.to_vec(),
            tbs: x509.tbs_certificate.as_ref().to_vec(),
            algorithm: x509.signature_algorithm.algorithm.to_id_string(),
            signature: x509.signature_value.data.to_vec(),
            serial: x509.tbs_certificate.raw_serial().to_vec(),
            issuer: x509.issuer().as_raw().to_vec(),
            subject: x509.subject().as_raw().to_vec(),
            common_name,
            organization: x509.subject().iter_organization().next().and_then(|name| name.as_str().ok()).map(str::to_owned),
            key,
            not_before_s: seconds(x509.validity().not_before.timestamp()),
            not_after_s: seconds(x509.validity().not_after.timestamp()),
            is_ca: false,
            path_length: None,
            signs_certificates: false,
            server_auth: false,
            client_auth: false,
            names: Vec::new(),
            addresses: Vec::new(),
            permitted: Vec::new(),
            excluded: Vec::new(),
            subject_key_id: None,
            authority_key_id: None,
            extensions: Vec::new(),
        };
        x509.extensions_map().map_err(|error| broken(error.to_string()))?;
        for extension in x509.extensions() {
            if let Some(last) = ours(&extension.oid) {
                read.extensions.push((last, unwrapped(extension.value)?.to_vec()));
            } else {
                read.take(extension.parsed_extension(), extension.critical, &extension.oid)?;
            }
        }
        Ok(read)
    }

    fn take(&mut self, parsed: &ParsedExtension<'_>, critical: bool, oid: &Oid<'_>) -> Result<(), CertificateError> {
        match parsed {
            ParsedExtension::BasicConstraints(basic) => (self.is_ca, self.path_length) = (basic.ca, basic.path_len_constraint),
            ParsedExtension::KeyUsage(usage) => self.signs_certificates = usage.key_cert_sign(),
            ParsedExtension::ExtendedKeyUsage(usage) => (self.server_auth, self.client_auth) = (usage.server_auth, usage.client_auth),
            ParsedExtension::SubjectKeyIdentifier(id) => self.subject_key_id = Some(id.0.to_vec()),
            ParsedExtension::AuthorityKeyIdentifier(id) => {
                self.authority_key_id = id.key_identifier.as_ref().map(|id| id.0.to_vec());
            }
            ParsedExtension::SubjectAlternativeName(alternative) => {
                for name in &alternative.general_names {
                    match name {
                        GeneralName::DNSName(name) => self.names.push((*name).to_owned()),
                        GeneralName::IPAddress(bytes) => self.addresses.push(address(bytes)?),
                        _ => return Err(broken("an alternative name of another form than DNS and IP")),
                    }
                }
            }
            ParsedExtension::NameConstraints(constraints) => {
                self.permitted = subtrees(constraints.permitted_subtrees.as_deref())?;
                self.excluded = subtrees(constraints.excluded_subtrees.as_deref())?;
            }
            ParsedExtension::ParseError { error } => return Err(broken(format!("extension {oid}: {error}"))),
            _ if critical => return Err(broken(format!("critical extension {oid} is unknown"))),
            _ => {}
        }
        Ok(())
    }

    /// The bytes it was read from.
    #[must_use]
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// What its signature is over.
    #[must_use]
    pub fn tbs(&self) -> &[u8] {
        &self.tbs
    }

    /// The subject's key.
    #[must_use]
    pub fn key(&self) -> &PublicKey {
        &self.key
    }

    /// Serial number, big-endian.
    #[must_use]
    pub fn serial(&self) -> &[u8] {
        &self.serial
    }

    /// Common name of the subject.
    #[must_use]
    pub fn common_name(&self) -> &str {
        &self.common_name
    }

    /// Organization of the subject.
    #[must_use]
    pub fn organization(&self) -> Option<&str> {
        self.organization.as_deref()
    }

    /// First and last second, Unix.
    #[must_use]
    pub fn validity_s(&self) -> (u64, u64) {
        (self.not_before_s, self.not_after_s)
    }

    /// Subject alternative names that are DNS names.
    #[must_use]
    pub fn dns_names(&self) -> &[String] {
        &self.names
    }

    /// Subject alternative names that are addresses.
    #[must_use]
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Extended key usages serverAuth and clientAuth.
    #[must_use]
    pub fn usages(&self) -> (bool, bool) {
        (self.server_auth, self.client_auth)
    }

    /// Whether it is a CA, with its path length.
    #[must_use]
    pub fn ca(&self) -> Option<Option<u32>> {
        (self.is_ca && self.signs_certificates).then_some(self.path_length)
    }

    /// Subject and authority key identifiers.
    #[must_use]
    pub fn key_ids(&self) -> (Option<&[u8]>, Option<&[u8]>) {
        (self.subject_key_id.as_deref(), self.authority_key_id.as_deref())
    }

    /// Content of dstack's extension with this last arc.
    #[must_use]
    pub fn extension(&self, last: u64) -> Option<&[u8]> {
        self.extensions.iter().find(|(arc, _)| *arc == last).map(|(_, value)| value.as_slice())
    }

    /// Usage text (extension `.4`).
    #[must_use]
    pub fn usage(&self) -> Option<&str> {
        self.extension(names::USAGE).and_then(|value| std::str::from_utf8(value).ok())
    }

    /// App id (extension `.3`), if it is one.
    #[must_use]
    pub fn app_id(&self) -> Option<AppId> {
        self.extension(names::APP_ID)?.try_into().ok().map(AppId)
    }

    /// Whether `key` made its signature.
    ///
    /// # Errors
    /// [`CertificateError::BadSignature`]; [`CertificateError::NotACertificate`] when the encoding around what is signed is not DER.
    pub fn signed_by(&self, key: &PublicKey) -> Result<(), CertificateError> {
        let algorithm = match key {
            PublicKey::Ed25519(_) => ED25519,
            PublicKey::P256(_) => ECDSA_SHA256,
        };
        if self.algorithm != algorithm {
            return Err(CertificateError::field("signature algorithm", algorithm, self.algorithm.clone()));
        }
        key.verify("certificate", &self.tbs, &self.signature)?;
        // The parser is lenient outside the signed part: one certificate, one encoding.
        if crate::build::assemble(&self.tbs, key, &self.signature) != self.der {
            return Err(broken("not DER around what is signed"));
        }
        Ok(())
    }

    pub(crate) fn is_issued_by(&self, issuer: &Self) -> bool {
        self.issuer == issuer.subject
    }

    pub(crate) fn expect_name(&self, common_name: &str, organization: Option<&str>) -> Result<(), CertificateError> {
        if self.common_name == common_name && self.organization.as_deref() == organization {
            return Ok(());
        }
        let shown = |cn: &str, o: Option<&str>| format!("CN {cn}, O {}", o.unwrap_or("-"));
        Err(CertificateError::field(
            "subject",
            shown(common_name, organization),
            shown(&self.common_name.chars().take(80).collect::<String>(), self.organization.as_deref().map(|o| o.get(..80).unwrap_or(o))),
        ))
    }

    pub(crate) fn expect_ca(&self, path_length: u32) -> Result<(), CertificateError> {
        if self.ca() == Some(Some(path_length)) {
            return Ok(());
        }
        Err(CertificateError::field("basic constraints", format!("a CA, path length {path_length}"), format!("{:?}", self.ca())))
    }

    fn expect_usage(&self, usage: &str) -> Result<(), CertificateError> {
        if self.usage() == Some(usage) {
            return Ok(());
        }
        let got = self.usage().unwrap_or("none").chars().take(80).collect::<String>();
        Err(CertificateError::field("usage", usage, got))
    }

    fn expect_leaf(&self) -> Result<(), CertificateError> {
        if self.is_ca { Err(CertificateError::field("basic constraints", "no CA", "a CA")) } else { Ok(()) }
    }
}

fn key_of(x509: &X509Certificate<'_>) -> Result<PublicKey, CertificateError> {
    let spki = x509.public_key();
    match spki.algorithm.algorithm.to_id_string().as_str() {
        ED25519 => PublicKey::root(dstack_protocol::genesis::CaAlgorithm::Ed25519, &spki.subject_public_key.data),
        P256_SPKI => PublicKey::p256_from_spki("certificate", spki.raw),
        _ => Err(CertificateError::BadKey { what: "certificate", algorithm: "Ed25519 or P-256" }),
    }
}

/// The last arc, if the extension is dstack's.
fn ours(oid: &Oid<'_>) -> Option<u64> {
    let arcs: Vec<u64> = oid.iter()?.take(10).collect();
    let last = *arcs.last()?;
    (arcs == names::oid(last)).then_some(last)
}

/// The content of the OCTET STRING that an extension of dstack wraps.
fn unwrapped(value: &[u8]) -> Result<&[u8], CertificateError> {
    let wrong = || broken("an extension of dstack is no OCTET STRING");
    let (rest, string) = x509_parser::der_parser::der::parse_der_octetstring(value).map_err(|_| wrong())?;
    if rest.is_empty() { string.content.as_slice().map_err(|_| wrong()) } else { Err(wrong()) }
}

fn address(bytes: &[u8]) -> Result<IpAddr, CertificateError> {
    let four = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    four.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).map_err(|_| broken("an address of neither 4 nor 16 bytes"))
}

fn subtrees(list: Option<&[GeneralSubtree<'_>]>) -> Result<Vec<Subtree>, CertificateError> {
    let one = |subtree: &GeneralSubtree<'_>| match &subtree.base {
        GeneralName::DNSName(name) => Ok(Subtree::Dns((*name).to_owned())),
        GeneralName::IPAddress(bytes) if matches!(bytes.len(), 8 | 32) => Ok(Subtree::Ip(bytes.to_vec())),
        _ => Err(broken("a name constraint of another form than DNS and IP")),
    };
    list.unwrap_or_default().iter().map(one).collect()
}

macro_rules! kind {
    ($(#[$doc:meta])* $name:ident { $($field:ident : $t:ty),* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone)]
        pub struct $name { certificate: Certificate, $($field: $t),* }

        impl $name {
            /// All its fields.
            #[must_use]
            pub fn certificate(&self) -> &Certificate {
                &self.certificate
            }
        }
    };
}

kind!(
    /// The root: self-signed, path length 1.
    RootCa {}
);
kind!(
    /// An app's CA.
    AppCa { app_id: AppId }
);
kind!(
    /// A node's issuing CA.
    IssuingCa { index: u16, hosts: Vec<String> }
);
kind!(
    /// A KMS server's certificate.
    KmsServer { hosts: Vec<String> }
);
kind!(
    /// An app's leaf.
    AppLeafCertificate { app_id: AppId }
);

impl RootCa {
    /// Reads a root and checks its own signature.
    ///
    /// # Errors
    /// What is not as it should be.
    pub fn read(der: &[u8]) -> Result<Self, CertificateError> {
        let certificate = Certificate::read(der)?;
        certificate.expect_name(names::ROOT_CA, Some(names::ORGANIZATION))?;
        certificate.expect_ca(1)?;
        certificate.signed_by(certificate.key())?;
        Ok(Self { certificate })
    }
}

impl AppCa {
    /// Reads an app's CA.
    ///
    /// # Errors
    /// What is not as it should be.
    pub fn read(der: &[u8]) -> Result<Self, CertificateError> {
        let certificate = Certificate::read(der)?;
        certificate.expect_name(names::APP_CA, Some(names::ORGANIZATION))?;
        certificate.expect_ca(0)?;
        certificate.expect_usage(names::USAGE_APP_CA)?;
        let app_id = certificate.app_id().ok_or_else(|| CertificateError::field("app id", "20 bytes", "none"))?;
        Ok(Self { certificate, app_id })
    }

    /// The app.
    #[must_use]
    pub fn app_id(&self) -> &AppId {
        &self.app_id
    }
}

impl IssuingCa {
    /// Reads a node's issuing CA.
    ///
    /// # Errors
    /// What is not as it should be.
    pub fn read(der: &[u8]) -> Result<Self, CertificateError> {
        let certificate = Certificate::read(der)?;
        let number = certificate.common_name.strip_prefix(names::NODE_CA).and_then(|rest| rest.strip_prefix(' '));
        let index = number.and_then(|digits| digits.parse().ok());
        let index: u16 = index
            .ok_or_else(|| CertificateError::field("subject", format!("CN {} <index>", names::NODE_CA), certificate.common_name.clone()))?;
        certificate.expect_name(&format!("{} {index}", names::NODE_CA), Some(names::ORGANIZATION))?;
        certificate.expect_ca(0)?;
        if certificate.app_id().is_some() || certificate.permitted.is_empty() {
            return Err(CertificateError::field("extensions", "name constraints and no app id", "others"));
        }
        let hosts = certificate
            .permitted
            .iter()
            .map(|subtree| match subtree {
                Subtree::Dns(name) => Ok(name.clone()),
                Subtree::Ip(bytes) => {
                    let (host, mask) = bytes.split_at(bytes.len() / 2);
                    if mask.iter().all(|byte| *byte == 0xff) { address(host).map(|host| host.to_string()) } else { Err(broken("a net")) }
                }
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { certificate, index, hosts })
    }

    /// Index of the node.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Hosts that it may name.
    #[must_use]
    pub fn hosts(&self) -> &[String] {
        &self.hosts
    }
}

impl KmsServer {
    /// Reads a KMS server's certificate; guests insist on its usage `kms:rpc`.
    ///
    /// # Errors
    /// What is not as it should be.
    pub fn read(der: &[u8]) -> Result<Self, CertificateError> {
        let certificate = Certificate::read(der)?;
        certificate.expect_leaf()?;
        certificate.expect_usage(names::USAGE_KMS_RPC)?;
        let hosts = certificate.names.iter().cloned().chain(certificate.addresses.iter().map(ToString::to_string)).collect();
        Ok(Self { certificate, hosts })
    }

    /// Hosts that it names.
    #[must_use]
    pub fn hosts(&self) -> &[String] {
        &self.hosts
    }
}

impl AppLeafCertificate {
    /// Reads an app's leaf.
    ///
    /// # Errors
    /// What is not as it should be.
    pub fn read(der: &[u8]) -> Result<Self, CertificateError> {
        let certificate = Certificate::read(der)?;
        certificate.expect_leaf()?;
        certificate.expect_usage(names::USAGE_APP_LEAF)?;
        let app_id = certificate.app_id().ok_or_else(|| CertificateError::field("app id", "20 bytes", "none"))?;
        Ok(Self { certificate, app_id })
    }

    /// The app.
    #[must_use]
    pub fn app_id(&self) -> &AppId {
        &self.app_id
    }
}
