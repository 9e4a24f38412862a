//! The proxy that the environment names, where no setting names one: `HTTPS_PROXY` and `NO_PROXY`, as dstack's `get-keys` reads them. Owns:
//! what they mean here. Never: shows an address, which may hold a password; leads nodes of this machine through a proxy.
//! Source: util and deploy reference §2 step 2, §10 (scripts in enclaves).

use dstack_client::{NodeUrl, Route};

/// Variables with a proxy for https, the first that is set wins.
pub const VARIABLES: [&str; 4] = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];
/// Variables with exempt hosts.
pub const EXEMPT: [&str; 2] = ["NO_PROXY", "no_proxy"];

/// Why the environment gives no way to the nodes. Whoever set it is at fault; `--proxy` says it anyhow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SystemProxyError {
    /// No CONNECT proxy by plain HTTP, or one that wants a password.
    #[error("http://host:port in HTTPS_PROXY, without user and password; or --proxy, which overrides it")]
    Address,
    /// There is one way to all nodes.
    #[error("NO_PROXY with all nodes or none of them; or --proxy, which overrides it")]
    SomeExempt,
}

/// The way to these nodes. `proxy` and `exempt`: texts of the variables, empty where there are none.
///
/// # Errors
/// [`SystemProxyError`].
pub fn route(proxy: &str, exempt: &str, nodes: &[NodeUrl]) -> Result<Route, SystemProxyError> {
    let is_direct = |node: &&NodeUrl| node.is_local() || is_exempt(exempt, node.host());
    match nodes.iter().filter(is_direct).count() {
        _ if proxy.is_empty() => Ok(Route::Direct),
        count if count == nodes.len() => Ok(Route::Direct),
        0 => {
            let authority = match proxy.split_once("://") {
                Some(("http", authority)) => authority.trim_end_matches('/'),
                None => proxy.trim_end_matches('/'),
                Some(_) => return Err(SystemProxyError::Address),
            };
            let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
            let port = if has_port { "" } else { ":80" };
            format!("http://{authority}{port}").parse().map_err(|_| SystemProxyError::Address)
        }
        _ => Err(SystemProxyError::SomeExempt),
    }
}

/// `*`, a host, or a domain with all below it, with or without a dot before it.
fn is_exempt(exempt: &str, host: &str) -> bool {
    let host = host.to_ascii_lowercase();
    exempt.split(',').map(|entry| entry.trim().trim_start_matches("*.").trim_start_matches('.').to_ascii_lowercase()).any(|entry| {
        let is_below = || host.strip_suffix(&entry).is_some_and(|rest| rest.ends_with('.'));
        entry == "*" || !entry.is_empty() && (host == entry || is_below())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environments_words() {
        let nodes = |urls: &[&str]| urls.iter().map(|url| url.parse().unwrap()).collect::<Vec<NodeUrl>>();
        let kms = nodes(&["https://kms-1.example:12001", "https://kms-2.example:12001"]);
        for (proxy, exempt, expected) in [
            ("", "", Ok("direct")),
            ("http://127.0.0.1:3128", "127.0.0.1,localhost", Ok("http://127.0.0.1:3128")),
            ("127.0.0.1:3128", "", Ok("http://127.0.0.1:3128")),
            ("http://proxy/", "", Ok("http://proxy:80")),
            ("http://[::1]", "", Ok("http://[::1]:80")),
            ("http://proxy:1", "other, .EXAMPLE", Ok("direct")),
            ("http://proxy:1", "xample", Ok("http://proxy:1")),
            ("http://proxy:1", "*", Ok("direct")),
            ("http://proxy:1", "kms-1.example", Err(SystemProxyError::SomeExempt)),
            ("socks5://proxy:1", "", Err(SystemProxyError::Address)),
            ("http://user:secret@proxy:1", "", Err(SystemProxyError::Address)),
        ] {
            assert_eq!(route(proxy, exempt, &kms).map(|route| route.to_string()), expected.map(str::to_owned), "{proxy} {exempt}");
        }
        assert_eq!(route("http://proxy:1", "", &nodes(&["https://127.0.0.1:1", "https://localhost:2"])), Ok(Route::Direct));
    }
}
