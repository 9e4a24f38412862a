//! Address of a node. Owns: the form `https://host:port`, resolving, which addresses lead nowhere but to this machine and its link.
//! Never: connects.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 4;

/// Address of a node: `https://host:port`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeUrl {
    host: String,
    port: u16,
}

/// Why a text is no node's address. The configuration is at fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a node's address: {text:?}; expected https://host:port")]
pub struct UrlError {
    /// The text.
    pub text: String,
}

impl FromStr for NodeUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let wrong = || UrlError { text: text.chars().take(200).collect() };
        let rest = text.strip_prefix("https://").ok_or_else(wrong)?;
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port.parse::<u16>().map_err(|_| wrong())?),
            _ => (authority, 443),
        };
        let bare = host.strip_prefix('[').and_then(|inner| inner.strip_suffix(']'));
        let well_formed = match bare {
            Some(inner) => inner.parse::<std::net::Ipv6Addr>().is_ok(),
            None => !host.is_empty() && host.len() <= 253 && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)),
        };
        if !well_formed || port == 0 {
            return Err(wrong());
        }
        Ok(Self { host: bare.unwrap_or(host).to_owned(), port })
    }
}

impl fmt::Display for NodeUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "https://{}", self.authority())
    }
}

impl NodeUrl {
    /// Name or address, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Its port.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// `host:port`, as a proxy is asked for it.
    #[must_use]
    pub fn authority(&self) -> String {
        if self.host.contains(':') { format!("[{}]:{}", self.host, self.port) } else { format!("{}:{}", self.host, self.port) }
    }

    /// Whether it means this machine or its link and no node elsewhere: loopback, link-local, unspecified, multicast, or a number in a
    /// form that only resolvers read (`127.1`). Names are not resolved for this.
    #[must_use]
    pub fn is_local(&self) -> bool {
        if let Ok(address) = self.host.parse::<IpAddr>() {
            return match address.to_canonical() {
                IpAddr::V4(v4) => v4.is_loopback() || v4.is_link_local() || v4.is_unspecified() || v4.is_multicast() || v4.is_broadcast(),
                IpAddr::V6(v6) => v6.is_loopback() || v6.is_unicast_link_local() || v6.is_unspecified() || v6.is_multicast(),
            };
        }
        let last = self.host.trim_end_matches('.').rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
        last == "localhost" || last.starts_with("0x") || last.bytes().all(|byte| byte.is_ascii_digit())
    }

    /// Where it is now.
    ///
    /// # Errors
    /// The resolver's.
    pub(crate) async fn resolve(&self) -> std::io::Result<Vec<SocketAddr>> {
        let found: Vec<SocketAddr> = tokio::net::lookup_host((self.host.as_str(), self.port)).await?.take(ADDRESSES_MAX).collect();
        if found.is_empty() { Err(std::io::Error::other("no address")) } else { Ok(found) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_addresses() {
        for (text, shown) in [
            ("https://kms.example:12001", "https://kms.example:12001"),
            ("https://kms.example:12001/", "https://kms.example:12001"),
            ("https://kms.example", "https://kms.example:443"),
            ("https://[::1]:8443", "https://[::1]:8443"),
            ("https://[::1]", "https://[::1]:443"),
        ] {
            assert_eq!(text.parse::<NodeUrl>().unwrap().to_string(), shown);
        }
        for text in [
            "",
            "http://a:1",
            "https://",
            "https://:1",
            "https://a:0",
            "https://a:70000",
            "https://a:1/prpc",
            "https://u@a:1",
            "https://[x]:1",
            "https://a b:1",
        ] {
            assert_eq!(text.parse::<NodeUrl>(), Err(UrlError { text: text.to_owned() }));
        }
    }

    #[test]
    fn addresses_of_this_machine_and_its_link_are_known_as_such() {
        let is_local = |host: &str| format!("https://{host}:1").parse::<NodeUrl>().unwrap().is_local();
        for host in [
            "127.0.0.1",
            "127.9.9.9",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "169.254.169.254",
            "[fe80::1]",
            "0.0.0.0",
            "[::]",
            "224.0.0.1",
            "255.255.255.255",
            "localhost",
            "LocalHost.",
            "kms.localhost",
            "127.1",
            "2130706433",
            "0x7f000001",
            "127.0.0.0x1",
        ] {
            assert!(is_local(host), "{host}");
        }
        for host in ["10.0.0.1", "192.168.1.1", "203.0.113.9", "[2001:db8::1]", "[fd00::1]", "kms-1", "kms-1.example", "0x7f.example"] {
            assert!(!is_local(host), "{host}");
        }
    }
}
