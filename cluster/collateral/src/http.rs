//! One GET. Owns: timeouts, caps, what may be answered. Never: follows a redirect, uses a proxy, decompresses, keeps a cookie.

use std::net::IpAddr;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use ureq::tls::{RootCerts, TlsConfig, TlsProvider};
use ureq::unversioned::transport::DefaultConnector;

use crate::address::Guarded;
use crate::error::shown;
use crate::{Endpoint, FetchError};

/// Bounds of one request.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Until a connection stands.
    pub connect: Duration,
    /// Between two reads.
    pub read: Duration,
    /// The whole request.
    pub total: Duration,
    /// Largest body.
    pub body_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        let s = Duration::from_secs;
        Self { connect: s(5), read: s(10), total: s(30), body_bytes: 1024 * 1024 }
    }
}

/// The client. Blocking: for a thread of its own.
#[derive(Debug, Clone, Copy, Default)]
pub struct Http {
    limits: Limits,
    /// An address that links of certificates may lead to though it is not public.
    also: Option<IpAddr>,
}

/// An answer with status 200.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) url: String,
    pub(crate) body: Vec<u8>,
    headers: ureq::http::HeaderMap,
}

impl Fetched {
    /// The first of these headers that is there.
    pub(crate) fn header(&self, names: &[&'static str], expected: &'static str) -> Result<&str, FetchError> {
        let found = names.iter().find_map(|name| self.headers.get(*name)?.to_str().ok());
        found.ok_or_else(|| self.content("no such header", expected))
    }

    pub(crate) fn content(&self, part: &str, expected: &'static str) -> FetchError {
        FetchError::Content { url: self.url.clone(), part: shown(part), expected }
    }
}

impl Http {
    /// A client with these bounds.
    #[must_use]
    pub const fn new(limits: Limits) -> Self {
        Self { limits, also: None }
    }

    /// Lets the addresses in certificates lead to this one too: for tests on loopback.
    #[must_use]
    pub const fn dangerous_reaching(mut self, address: IpAddr) -> Self {
        self.also = Some(address);
        self
    }

    /// Gets what a certificate points at: a name that is public, whatever it resolves to.
    pub(crate) fn get_link(&self, url: &str, kinds: &[&str]) -> Result<Fetched, FetchError> {
        self.fetch(url.to_owned(), self.also, kinds)
    }

    /// Gets `endpoint` + `path`; the content type has to be one of `kinds`.
    pub(crate) fn get(&self, endpoint: &Endpoint, path: &str, kinds: &[&str]) -> Result<Fetched, FetchError> {
        self.fetch(endpoint.join(path), endpoint.named(), kinds)
    }

    fn fetch(&self, url: String, named: Option<IpAddr>, kinds: &[&str]) -> Result<Fetched, FetchError> {
        let (resolver, refused) = Guarded::new(named);
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .root_certs(RootCerts::WebPki)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .build();
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .accept_encoding("identity")
            .user_agent("dstack-kms")
            .max_response_header_size(64 * 1024)
            .timeout_resolve(Some(self.limits.connect))
            .timeout_connect(Some(self.limits.connect))
            .timeout_per_read(Some(self.limits.read))
            .timeout_global(Some(self.limits.total))
            .tls_config(tls)
            .build();
        let agent = ureq::Agent::with_parts(config, DefaultConnector::default(), resolver);
        let failed = |error: ureq::Error| {
            let forbidden = *refused.lock().unwrap_or_else(PoisonError::into_inner);
            match (error, forbidden) {
                (ureq::Error::HostNotFound, Some(address)) => FetchError::Forbidden { url: url.clone(), address: address.to_string() },
                (ureq::Error::Timeout(_), _) => FetchError::Timeout { url: url.clone() },
                (ureq::Error::BodyExceedsLimit(_), _) => FetchError::TooLarge { url: url.clone(), limit_bytes: self.limits.body_bytes },
                (error, _) => FetchError::Unreachable { url: url.clone(), why: shown(&error.to_string()) },
            }
        };
        let mut response = agent.get(&url).call().map_err(failed)?;
        let status = response.status().as_u16();
        if response.status().is_redirection() {
            let to = response.headers().get("location").and_then(|value| value.to_str().ok()).unwrap_or_default();
            return Err(FetchError::Redirect { to: shown(to), url });
        }
        if status != 200 {
            return Err(FetchError::Status { url, status });
        }
        let headers = response.headers().clone();
        let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or("not text").to_ascii_lowercase());
        if let Some(coding) = text("content-encoding").filter(|coding| coding != "identity") {
            return Err(FetchError::Content { url, part: format!("content encoding {}", shown(&coding)), expected: "none" });
        }
        let kind = text("content-type").unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim();
        if !kinds.contains(&kind) {
            return Err(FetchError::Content {
                url,
                part: format!("content type `{}`", shown(kind)),
                expected: "the type of what was asked for",
            });
        }
        let body = response.body_mut().with_config().limit(self.limits.body_bytes).read_to_vec().map_err(failed)?;
        Ok(Fetched { url, body, headers })
    }
}
