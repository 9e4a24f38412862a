//! Leaves that a node signs: its server's certificate under its issuing CA, an app's under the app's CA.
//!
//! Owns: their fields. Never: checks a request's evidence (who calls has done so), makes a serial. Source: KMS API reference §7, §8.

use std::net::IpAddr;

use dstack_protocol::AppId;

use crate::build::{Draft, IssuedBy, Name, signed};
use crate::key::PublicKey;
use crate::read::{AppCa, IssuingCa};
use crate::{CertificateError, names};

/// Life of a leaf where the request names no end: 3650 days.
pub const LEAF_S: u64 = 3650 * 86_400;

/// A random serial made positive: the first byte between 0x40 and 0x7f.
#[must_use]
pub fn positive(mut serial: [u8; 16]) -> [u8; 16] {
    if let Some(first) = serial.first_mut() {
        *first = 0x40 | (*first & 0x3f);
    }
    serial
}

/// A node's server certificate, usage `kms:rpc`.
#[derive(Debug, Clone)]
pub struct ServerLeaf<'a> {
    /// The server's TLS key.
    pub key: &'a PublicKey,
    /// Its hosts, all permitted by the issuing CA; the first is the common name.
    pub hosts: &'a [String],
    /// Evidence, where the server shows it.
    pub attestation: Option<&'a [u8]>,
    /// Random.
    pub serial: [u8; 16],
}

impl ServerLeaf<'_> {
    /// Signs it with the issuing CA's key. It lives exactly as long as its CA.
    ///
    /// # Errors
    /// [`CertificateError::Field`] for a host that the CA may not name, [`CertificateError::BadSignature`] when the key is not the CA's.
    pub fn issue(&self, ca: &IssuingCa, key: &impl rcgen::SigningKey) -> Result<Vec<u8>, CertificateError> {
        let Some(first) = self.hosts.first() else {
            return Err(CertificateError::field("hosts", "at least one", "none"));
        };
        if let Some(other) = self.hosts.iter().find(|host| !ca.hosts().contains(host)) {
            return Err(CertificateError::field("hosts", ca.hosts().join(" "), other.clone()));
        }
        let mut extensions = vec![(names::USAGE, names::USAGE_KMS_RPC.as_bytes().to_vec())];
        extensions.extend(self.attestation.map(|attestation| (names::ATTESTATION, attestation.to_vec())));
        let name = Name { common_name: first.clone(), organization: None };
        let (not_before_s, not_after_s) = ca.certificate().validity_s();
        let draft = Draft {
            hosts: self.hosts.to_vec(),
            server_auth: true,
            extensions,
            ..Draft::new(name, *self.key, positive(self.serial), not_before_s, not_after_s)
        };
        let issuer = IssuedBy { name: crate::issue::node_ca_name(ca.index()), key: *ca.certificate().key() };
        signed(&draft.tbs(Some(&issuer))?, ca.certificate().key(), key)
    }
}

/// Whether some client takes a certificate for `name` as one for `host`: addresses by value, however they are spelled; a star for any part
/// of one label.
fn is_for(name: &str, host: &str) -> bool {
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    if let Ok(host) = host.parse::<IpAddr>() {
        return name.parse::<IpAddr>().is_ok_and(|name| name.to_canonical() == host.to_canonical());
    }
    match name.split_once('*') {
        None => name == host,
        Some((before, after)) => {
            let star = host.strip_prefix(before).and_then(|rest| rest.strip_suffix(after));
            star.is_some_and(|star| !star.contains('.'))
        }
    }
}

/// An app's leaf, as its CSR asks for it.
#[derive(Debug, Clone)]
pub struct AppLeaf<'a> {
    /// The app that the request's evidence proves.
    pub app_id: &'a AppId,
    /// The key of the CSR.
    pub key: &'a PublicKey,
    /// Common name.
    pub subject: &'a str,
    /// Organization.
    pub organization: Option<&'a str>,
    /// Subject alternative names; text that reads as an address becomes one.
    pub alt_names: &'a [String],
    /// Extended key usage serverAuth.
    pub server_auth: bool,
    /// Extended key usage clientAuth.
    pub client_auth: bool,
    /// Extension `.8`, where asked for.
    pub attestation: Option<&'a [u8]>,
    /// Extension `.9`, where asked for.
    pub app_info: Option<&'a [u8]>,
    /// Begin, Unix seconds; an hour before `now_s` where not asked for.
    pub not_before_s: Option<u64>,
    /// End; 3650 days from `now_s` where not asked for.
    pub not_after_s: Option<u64>,
    /// The node's clock.
    pub now_s: u64,
    /// Random.
    pub serial: [u8; 16],
    /// Hosts of the cluster's nodes: no app gets a certificate for one (threshold.md §5.2).
    pub reserved_hosts: &'a [String],
}

impl AppLeaf<'_> {
    /// Signs it with the app CA's key. Dates are cut to those of the CA.
    ///
    /// # Errors
    /// [`CertificateError::ReservedHost`]; [`CertificateError::Field`] for a CA of another app, a name or organization with control characters, or an end
    /// before the beginning;
    /// [`CertificateError::BadSignature`] when the key is not the CA's; [`CertificateError::Build`] for names that cannot be encoded.
    pub fn issue(&self, ca: &AppCa, key: &impl rcgen::SigningKey) -> Result<Vec<u8>, CertificateError> {
        if ca.app_id() != self.app_id {
            return Err(CertificateError::field("app id", self.app_id.to_string(), ca.app_id().to_string()));
        }
        // The common name too: where a certificate has no alternative names, some clients still read it.
        let names = self.alt_names.iter().map(String::as_str).chain([self.subject]);
        if let Some(text) = names.clone().chain(self.organization).find(|text| text.bytes().any(|byte| byte.is_ascii_control())) {
            let start: String = text.chars().take(80).collect();
            return Err(CertificateError::field("names", "no control characters", format!("{start:?}")));
        }
        for name in names {
            if self.reserved_hosts.iter().any(|host| is_for(name, host)) {
                return Err(CertificateError::ReservedHost(name.to_owned()));
            }
        }
        let (ca_begin_s, ca_end_s) = ca.certificate().validity_s();
        let not_before_s = self.not_before_s.unwrap_or(self.now_s.saturating_sub(crate::issue::BACKDATED_S)).max(ca_begin_s);
        let not_after_s = self.not_after_s.unwrap_or(self.now_s.saturating_add(LEAF_S)).min(ca_end_s);
        if not_after_s <= not_before_s {
            return Err(CertificateError::field("not_after", format!("later than {not_before_s}"), not_after_s.to_string()));
        }
        let mut extensions = vec![(names::APP_ID, self.app_id.0.to_vec()), (names::USAGE, names::USAGE_APP_LEAF.as_bytes().to_vec())];
        extensions.extend(self.attestation.map(|bytes| (names::ATTESTATION, bytes.to_vec())));
        extensions.extend(self.app_info.map(|bytes| (names::APP_INFO, bytes.to_vec())));
        let name = Name { common_name: self.subject.to_owned(), organization: self.organization.map(str::to_owned) };
        let draft = Draft {
            hosts: self.alt_names.to_vec(),
            server_auth: self.server_auth,
            client_auth: self.client_auth,
            extensions,
            ..Draft::new(name, *self.key, positive(self.serial), not_before_s, not_after_s)
        };
        let issuer = IssuedBy { name: Name::ca(names::APP_CA), key: *ca.certificate().key() };
        signed(&draft.tbs(Some(&issuer))?, ca.certificate().key(), key)
    }
}
