//! The KMS that `Onboard` names as its source. Owns: reading its address, asking it whether it is a node of this node's own cluster.
//! Never: takes a key from it, believes it: what it says is compared with what this node knows.
//! Source: KMS API reference §11 (`source_url` is trimmed of `/` and ends in `/prpc`); ADR 0026.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use axum::http::Uri;
use dstack_certificates::temp::TempCa;
use dstack_prpc::Empty;
use dstack_prpc::kms::{GetMetaResponse, GetTempCaCertResponse, Kms};
use dstack_ratls::Now;
use dstack_ratls::prpc_client::{RpcCallError, RpcClient, RpcTarget, ServerTrust};

/// Longest address, bytes.
const URL_BYTES_MAX: usize = 512;
/// For each question.
const TIMEOUT: Duration = Duration::from_secs(8);

/// Why the source is none.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum SourceError {
    /// The operator's to mend.
    #[error("source_url: expected https://host[:port][/prpc] of a node of this cluster, got {got:?}")]
    Url {
        /// Start of what was given.
        got: String,
    },
    /// No address for the name.
    #[error("source KMS: no address for {host}: {reason}")]
    Name {
        /// The name.
        host: String,
        /// The resolver's answer.
        reason: String,
    },
    /// It does not answer as a KMS does.
    #[error("source KMS: {0}. While the cluster forms no node serves: call Bootstrap on each of its nodes instead")]
    Call(RpcCallError),
    /// It is a node of another cluster, or no cluster.
    #[error("source KMS {host} is not a node of the cluster that this node's genesis document makes: {what} differs")]
    Foreign {
        /// The server.
        host: String,
        /// What does not agree.
        what: &'static str,
    },
}

/// Where the source is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Source {
    host: String,
    port: u16,
    path: String,
}

impl Source {
    /// Reads an address as upstream does.
    pub(super) fn parse(text: &str) -> Result<Self, SourceError> {
        let wrong = || SourceError::Url { got: text.chars().take(120).collect() };
        if text.len() > URL_BYTES_MAX {
            return Err(wrong());
        }
        let trimmed = text.trim().trim_end_matches('/');
        let uri: Uri = trimmed.parse().map_err(|_| wrong())?;
        let authority = uri.authority().ok_or_else(wrong)?;
        if uri.scheme_str() != Some("https") || uri.query().is_some() || authority.as_str().contains('@') {
            return Err(wrong());
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let is_host = host.parse::<IpAddr>().is_ok() || dstack_protocol::sign::host_is_well_formed(&host.to_ascii_lowercase());
        // A port that is written must be one.
        let port = match authority.as_str().strip_prefix(authority.host()) {
            Some("") => 443,
            _ => authority.port_u16().filter(|port| *port != 0).ok_or_else(wrong)?,
        };
        let path = match uri.path().trim_end_matches('/') {
            path if path.ends_with("/prpc") => path.to_owned(),
            path => format!("{path}/prpc"),
        };
        if is_host { Ok(Self { host: host.to_owned(), port, path }) } else { Err(wrong()) }
    }

    /// Whether it says to be a node of the cluster with this temp CA, which is made of the cluster's id. That is no proof: it keeps a
    /// mistaken operator from letting the node take part.
    pub(super) async fn names_cluster(&self, temp_ca: &TempCa, now: &Now) -> Result<(), SourceError> {
        let answer: GetTempCaCertResponse = self.ask(ServerTrust::Nobody, Kms::GetTempCaCert, now).await?;
        match answer.temp_ca_cert.trim() == temp_ca.certificate_pem().trim() {
            true => Ok(()),
            false => Err(self.foreign("the temp CA, which is made of the cluster's id,")),
        }
    }

    /// Whether it proves to be one: its chain ends at the root that this node knows from the log, and it names the same identity.
    pub(super) async fn proves_cluster(&self, root_pem: &str, k256: &[u8], now: &Now) -> Result<(), SourceError> {
        let meta: GetMetaResponse = self.ask(ServerTrust::Root(root_pem), Kms::GetMeta, now).await?;
        if meta.k256_pubkey == k256 { Ok(()) } else { Err(self.foreign("the identity")) }
    }

    fn foreign(&self, what: &'static str) -> SourceError {
        SourceError::Foreign { host: self.host.clone(), what }
    }

    async fn ask<A: dstack_prpc::Rpc>(&self, trust: ServerTrust<'_>, method: Kms, now: &Now) -> Result<A, SourceError> {
        let setup = |reason: String| SourceError::Call(RpcCallError::Setup { host: self.host.clone(), reason });
        let client = RpcClient::new(trust, None, now).map_err(|error| setup(error.to_string()))?;
        let target = RpcTarget { host: &self.host, port: self.port, path: &self.path, method: method.name(), timeout: TIMEOUT };
        client.call(self.address().await?, target, &Empty {}).await.map_err(SourceError::Call)
    }

    async fn address(&self) -> Result<SocketAddr, SourceError> {
        let failed = |reason: String| SourceError::Name { host: self.host.clone(), reason };
        let found = tokio::time::timeout(TIMEOUT, tokio::net::lookup_host((self.host.as_str(), self.port))).await;
        let mut found = found.map_err(|_| failed("the resolver is silent".to_owned()))?.map_err(|error| failed(error.to_string()))?;
        found.next().ok_or_else(|| failed("none".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_addresses_as_upstream_does() {
        let read = |text: &str| Source::parse(text).map(|source| format!("{} {} {}", source.host, source.port, source.path)).unwrap();
        assert_eq!(read("https://kms.example"), "kms.example 443 /prpc");
        assert_eq!(read("https://kms.example:8000//"), "kms.example 8000 /prpc");
        assert_eq!(read(" https://Kms.example:8000/prpc/ "), "Kms.example 8000 /prpc");
        assert_eq!(read("https://[::1]:8000/a/prpc"), "::1 8000 /a/prpc");
        assert_eq!(read("https://10.0.0.1/a"), "10.0.0.1 443 /a/prpc");
    }

    #[test]
    fn refuses_what_is_no_address_of_a_node() {
        let bad = [
            "",
            "/",
            "kms.example",
            "http://kms.example",
            "https://",
            "https://u@kms.example",
            "https://kms.example:0",
            "https://kms.example:x",
            "https://kms.example:70000",
            "https://a b",
            "https://kms.example?x=1",
            "ftp://kms.example",
            "https://-a",
            "https://[::1",
            "file:///etc/passwd",
            "https://kms.example:",
            &"h".repeat(URL_BYTES_MAX + 1),
        ];
        for text in bad {
            let refused = Source::parse(text).unwrap_err();
            assert!(matches!(refused, SourceError::Url { .. }) && refused.to_string().len() < 400, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in ".{0,80}", rest in "[ -~]{0,60}") {
            let _ = Source::parse(&text);
            let _ = Source::parse(&format!("https://{rest}"));
        }
    }
}
