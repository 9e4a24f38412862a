//! A configured address. Owns: which forms are taken. Never: resolves a name.

use std::net::IpAddr;

use ureq::http::Uri;

use crate::FetchError;

/// `https://host[:port][/path]`, or `http://` where the host is an address written out or `localhost`.
///
/// An address that is not public is reached only if it stands here literally: then the configuration wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    base: String,
    named: Option<IpAddr>,
}

impl Endpoint {
    /// Checks a configured address.
    /// # Errors
    /// [`FetchError::Endpoint`].
    pub fn parse(url: &str) -> Result<Self, FetchError> {
        let wrong = |why| FetchError::Endpoint { url: crate::error::shown(url), why };
        let uri: Uri = url.parse().map_err(|_| wrong("not a url"))?;
        let authority = uri.authority().ok_or_else(|| wrong("no host"))?;
        if authority.as_str().contains('@') {
            return Err(wrong("names a user"));
        }
        if uri.query().is_some() {
            return Err(wrong("has a query"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let named = match host {
            "localhost" => Some(IpAddr::from([127, 0, 0, 1])),
            literal => literal.parse().ok(),
        };
        match uri.scheme_str() {
            Some("https") => {}
            Some("http") if named.is_some() => {}
            Some("http") => return Err(wrong("http is taken only with an address written out, or localhost")),
            _ => return Err(wrong("neither https nor http")),
        }
        Ok(Self { base: url.trim_end_matches('/').to_owned(), named })
    }

    /// The address with `path` behind it.
    #[must_use]
    pub fn join(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    pub(crate) fn named(&self) -> Option<IpAddr> {
        self.named
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_needs_an_address_and_nothing_hides_in_a_url() {
        for good in [
            "https://api.trustedservices.intel.com",
            "https://pccs.example:8081/",
            "http://127.0.0.1:9",
            "http://localhost:8080/a",
            "http://[::1]:7",
        ] {
            assert!(Endpoint::parse(good).is_ok(), "{good}");
        }
        for bad in
            ["", "api.intel.com", "http://pccs.example", "ftp://127.0.0.1", "https://a@127.0.0.1", "https://x/?q=1", "file:///etc/passwd"]
        {
            assert!(matches!(Endpoint::parse(bad), Err(FetchError::Endpoint { .. })), "{bad}");
        }
        assert_eq!(Endpoint::parse("http://127.0.0.1:9/").unwrap().join("/x"), "http://127.0.0.1:9/x");
    }
}
