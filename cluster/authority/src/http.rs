//! One question over HTTP. Owns: timeouts and caps. Never: follows a redirect, uses a proxy, keeps a cookie, shows the token.

use std::sync::Arc;
use std::time::Duration;

use dstack_secret::SecretBytes;
use ureq::http::Uri;
use ureq::http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};

use crate::error::{AuthorityError, shown};

/// Largest answer, bytes. An answer holds a flag, a name and a reason.
const ANSWER_BYTES_MAX: u64 = 64 * 1024;
/// Longest part of a foreign text in an error.
const SHOWN_CHARS: usize = 200;

/// See the module text. Blocking: for a thread of its own.
pub(crate) struct Http {
    agent: ureq::Agent,
    /// As configured: what `GET` asks.
    url: String,
    /// The same with one slash at its end.
    base: String,
    token: Option<SecretBytes>,
    total: Duration,
}

impl Http {
    pub(crate) fn new(
        url: &str,
        total: Duration,
        token: Option<SecretBytes>,
        roots: &[Vec<u8>],
        plain: bool,
    ) -> Result<Self, AuthorityError> {
        let wrong = |why| AuthorityError::Address { url: shown(url, SHOWN_CHARS), why };
        let uri: Uri = url.parse().map_err(|_| wrong("not a url"))?;
        let authority = uri.authority().ok_or_else(|| wrong("no host"))?;
        if authority.as_str().contains('@') {
            return Err(wrong("names a user; give a token instead"));
        }
        match uri.scheme_str() {
            Some("https") => {}
            // Upstream's authorities listen beside the KMS without TLS: their answer decides who gets keys, so only on a link that
            // nobody else can reach.
            Some("http") if plain || uri.host().is_some_and(is_beside_us) => {}
            Some("http") => {
                return Err(wrong(
                    "http only to this machine's own addresses, else anybody on the way could say yes; use https, or allow plain_http",
                ));
            }
            _ => return Err(wrong("not https")),
        }
        if uri.query().is_some() {
            return Err(wrong("has a query"));
        }
        let certificates = || roots.iter().map(|der| Certificate::from_der(der).to_owned());
        let root_certs = if roots.is_empty() { RootCerts::WebPki } else { RootCerts::new_with_certs(&certificates().collect::<Vec<_>>()) };
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .root_certs(root_certs)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .build();
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .accept_encoding("identity")
            .user_agent(concat!("dstack-kms/", env!("CARGO_PKG_VERSION")))
            .max_response_header_size(64 * 1024)
            .timeout_connect(Some(total))
            .timeout_global(Some(total))
            .tls_config(tls)
            .build();
        Ok(Self { agent: config.into(), url: url.to_owned(), base: format!("{}/", url.trim_end_matches('/')), token, total })
    }

    /// `POST base + path` with a JSON body.
    pub(crate) fn post(&self, path: &str, body: &[u8]) -> Result<Vec<u8>, AuthorityError> {
        let mut request = self.agent.post(format!("{}{path}", self.base)).header(CONTENT_TYPE, "application/json");
        if let Some(value) = self.authorization()? {
            request = request.header(AUTHORIZATION, value);
        }
        self.read(request.send(body))
    }

    /// `GET` of the very address that is configured, its last slash included.
    pub(crate) fn get(&self) -> Result<Vec<u8>, AuthorityError> {
        let mut request = self.agent.get(&self.url);
        if let Some(value) = self.authorization()? {
            request = request.header(AUTHORIZATION, value);
        }
        self.read(request.call())
    }

    fn authorization(&self) -> Result<Option<HeaderValue>, AuthorityError> {
        let Some(token) = &self.token else { return Ok(None) };
        let value = token.expose(|token| HeaderValue::from_bytes(&[b"Bearer ", token].concat()));
        let mut value = value.map_err(|_| AuthorityError::Address { url: self.base.clone(), why: "the token is no header value" })?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    fn read(&self, answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Vec<u8>, AuthorityError> {
        let failed = |error: ureq::Error| match error {
            ureq::Error::Timeout(_) => AuthorityError::Timeout { limit_ms: u64::try_from(self.total.as_millis()).unwrap_or(u64::MAX) },
            ureq::Error::BodyExceedsLimit(_) => AuthorityError::Answer { expected: "at most 64 KiB" },
            error => AuthorityError::Unreachable { why: shown(&error.to_string(), SHOWN_CHARS) },
        };
        let mut answer = answer.map_err(failed)?;
        match answer.status().as_u16() {
            200..=299 => answer.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_vec().map_err(failed),
            status => Err(AuthorityError::Status { status }),
        }
    }
}

/// Whether a host of an address is this machine.
fn is_beside_us(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_only_to_this_machine() {
        let new = |url: &str| Http::new(url, Duration::from_secs(1), None, &[], false).map(|http| http.base);
        assert_eq!(new("http://127.0.0.1:8000").unwrap(), "http://127.0.0.1:8000/");
        assert_eq!(new("http://[::1]:8000/auth/").unwrap(), "http://[::1]:8000/auth/");
        assert_eq!(new("https://auth.example/api").unwrap(), "https://auth.example/api/");
        for bad in [
            "",
            "auth",
            "http://auth-api:8000",
            "http://10.0.0.1",
            "ftp://localhost",
            "https://user@auth.example",
            "https://a.example/?x=1",
        ] {
            assert!(matches!(new(bad), Err(AuthorityError::Address { .. })), "{bad}");
        }
        assert!(Http::new("http://auth-api:8000", Duration::from_secs(1), None, &[], true).is_ok());
    }
}
