//! Which addresses a name may lead to. Owns: the rule, and a resolver that applies it to the very addresses that are connected to.
//! Never: follows a name into a private network, whatever DNS says.
//! Source: IANA special-purpose address registries (RFC 6890 and its successors).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

/// Whether packets to this address leave for the public internet.
pub(crate) fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_public_v4(v4),
        IpAddr::V6(v6) => is_public_v6(v6),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let special = matches!(
        (a, b, c),
        (0 | 10 | 127, ..) // this network, private, loopback
            | (100, 64..=127, _) // shared
            | (169, 254, _) // link-local, cloud metadata
            | (172, 16..=31, _) | (192, 168, _) // private
            | (192, 0, 0 | 2) | (198, 51, 100) | (203, 0, 113) // protocol assignments, documentation
            | (198, 18..=19, _) // benchmarks
            | (224..=255, ..) // multicast, reserved, broadcast
    );
    !special
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    if let Some(v4) = address.to_ipv4_mapped() {
        return is_public_v4(v4);
    }
    let [a, b, ..] = address.segments();
    // Only global unicast 2000::/3, without documentation, 6to4, Teredo and protocol assignments.
    (0x2000..0x4000).contains(&a) && a != 0x2002 && !(a == 0x2001 && (b == 0xdb8 || b < 0x200)) && a != 0x3fff
}

/// Resolves as the system does and keeps what may be reached; what it answers is what is connected to.
#[derive(Debug)]
pub(crate) struct Guarded {
    system: DefaultResolver,
    /// An address that the configuration names literally.
    named: Option<IpAddr>,
    refused: Arc<std::sync::Mutex<Option<IpAddr>>>,
}

impl Guarded {
    /// A resolver that also allows `named`. The second half tells which address was refused last.
    pub(crate) fn new(named: Option<IpAddr>) -> (Self, Arc<std::sync::Mutex<Option<IpAddr>>>) {
        let refused = Arc::default();
        (Self { system: DefaultResolver::default(), named, refused: Arc::clone(&refused) }, refused)
    }
}

impl Resolver for Guarded {
    fn resolve(&self, uri: &Uri, config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let found = self.system.resolve(uri, config, timeout)?;
        let mut kept = self.empty();
        for address in found.iter() {
            if is_public(address.ip()) || self.named == Some(address.ip()) {
                kept.push(*address);
            } else {
                *self.refused.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(address.ip());
            }
        }
        if kept.is_empty() { Err(ureq::Error::HostNotFound) } else { Ok(kept) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_unicast_is_public() {
        for inside in [
            "0.0.0.0",
            "10.1.2.3",
            "127.0.0.1",
            "127.8.8.8",
            "100.64.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "192.0.0.8",
            "192.0.2.1",
            "198.18.0.1",
            "198.51.100.7",
            "203.0.113.9",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "fe80::1",
            "fc00::1",
            "fd12::1",
            "ff02::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "2001::1",
            "64:ff9b::1",
            "3fff::1",
            "fec0::1",
        ] {
            assert!(!is_public(inside.parse().unwrap()), "{inside}");
        }
        for outside in ["1.1.1.1", "8.8.8.8", "100.63.0.1", "172.32.0.1", "192.0.1.1", "198.20.0.1", "2606:4700::1111", "2a00:1450::1"] {
            assert!(is_public(outside.parse().unwrap()), "{outside}");
        }
    }
}
