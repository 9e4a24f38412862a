//! Networks, as the kernel describes them. Owns: reading /proc/net and /sys/class/net for `NetworkInfo`. Never: fails; what cannot be
//! read is left out. Not told: the state of WireGuard, which needs a program of its own.
//! Source: guest API reference §6; proc(5) on /proc/net.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};

use dstack_prpc::host::{Gateway, Interface, IpAddress, NetworkInformation};

use crate::machine::read;

/// What is known now.
#[must_use]
pub fn information() -> NetworkInformation {
    let routes = routes(&read("/proc/net/route"));
    let (v4, v6) = (local_v4(&read("/proc/net/fib_trie")), local_v6(&read("/proc/net/if_inet6")));
    let mut names: Vec<String> =
        fs::read_dir("/sys/class/net").into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    let interface = |name: String| {
        let count = |what: &str| read(format!("/sys/class/net/{name}/statistics/{what}")).trim().parse().unwrap_or(0);
        let (rx_bytes, tx_bytes, rx_errors, tx_errors) = (count("rx_bytes"), count("tx_bytes"), count("rx_errors"), count("tx_errors"));
        let mut addresses: Vec<_> = v4.iter().filter_map(|address| Some((address, owner(*address, &routes)?))).collect();
        addresses.retain(|(_, (of, _))| *of == name);
        let mut addresses: Vec<_> =
            addresses.into_iter().map(|(address, (_, prefix))| IpAddress { address: address.to_string(), prefix }).collect();
        let own = v6.iter().filter(|(of, ..)| *of == name);
        addresses.extend(own.map(|(_, address, prefix)| IpAddress { address: address.to_string(), prefix: *prefix }));
        Interface { name, addresses, rx_bytes, tx_bytes, rx_errors, tx_errors }
    };
    let resolvers = read("/etc/resolv.conf");
    let resolvers = resolvers.lines().filter_map(|line| line.trim().strip_prefix("nameserver")).map(|text| text.trim().to_owned());
    let gateways = routes.iter().filter(|route| route.mask == 0 && !route.gateway.is_unspecified());
    NetworkInformation {
        dns_servers: resolvers.collect(),
        gateways: gateways.map(|route| Gateway { address: route.gateway.to_string() }).collect(),
        interfaces: names.into_iter().map(interface).collect(),
        wg_info: String::new(),
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Route {
    interface: String,
    network: u32,
    gateway: Ipv4Addr,
    mask: u32,
}

/// `Iface Destination Gateway Flags RefCnt Use Metric Mask …`, numbers in hex and in the machine's order.
fn routes(text: &str) -> Vec<Route> {
    let number = |text: &str| u32::from_str_radix(text, 16).ok().map(|value| u32::from_be_bytes(value.to_le_bytes()));
    let route = |line: &str| {
        let mut columns = line.split_whitespace();
        let interface = columns.next()?.to_owned();
        let (network, gateway) = (number(columns.next()?)?, number(columns.next()?)?);
        let mask = number(columns.nth(4)?)?;
        Some(Route { interface, network, gateway: Ipv4Addr::from(gateway), mask })
    };
    text.lines().skip(1).filter_map(route).collect()
}

/// The interface whose network an address lies in, and how long that network's prefix is.
fn owner(address: Ipv4Addr, routes: &[Route]) -> Option<(String, u32)> {
    if address.is_loopback() {
        return Some(("lo".to_owned(), 8));
    }
    let direct =
        routes.iter().filter(|route| route.mask != 0 && route.gateway.is_unspecified() && u32::from(address) & route.mask == route.network);
    direct.max_by_key(|route| route.mask).map(|route| (route.interface.clone(), route.mask.count_ones()))
}

/// Addresses that the table of local routes marks `/32 host LOCAL`.
fn local_v4(text: &str) -> Vec<Ipv4Addr> {
    let mut last = None;
    let mut found = Vec::new();
    for line in text.lines() {
        if let Some(address) = line.trim().strip_prefix("|-- ") {
            last = address.parse::<Ipv4Addr>().ok();
        } else if line.trim() == "/32 host LOCAL"
            && let Some(address) = last
            && !found.contains(&address)
        {
            found.push(address);
        }
    }
    found
}

/// `address(32 hex) index prefix(hex) scope flags name`.
fn local_v6(text: &str) -> Vec<(String, Ipv6Addr, u32)> {
    let address = |line: &str| {
        let mut columns = line.split_whitespace();
        let address = u128::from_str_radix(columns.next()?, 16).ok()?;
        let prefix = u32::from_str_radix(columns.nth(1)?, 16).ok()?;
        Some((columns.nth(2)?.to_owned(), Ipv6Addr::from(address), prefix))
    };
    text.lines().filter_map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_tables() {
        let text = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                    eth0\t00000000\t0102A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                    eth0\t0002A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\nbroken\n";
        let routes = routes(text);
        let [default, direct] = routes.as_slice() else { panic!("{routes:?}") };
        assert_eq!(default.gateway, Ipv4Addr::new(192, 168, 2, 1));
        assert_eq!((direct.network, direct.mask), (0xc0a8_0200, 0xffff_ff00));
        let trie =
            "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 192.168.2.7\n        /32 host LOCAL\n     |-- 192.168.2.0\n        /24 link UNICAST\n";
        let own = local_v4(&trie.repeat(2));
        assert_eq!(own, [Ipv4Addr::new(192, 168, 2, 7)]);
        assert_eq!(owner(own[0], &routes), Some(("eth0".to_owned(), 24)));
        assert_eq!(owner(Ipv4Addr::new(10, 0, 0, 1), &routes), None);
        let v6 = local_v6("fe800000000000000000000000000001 02 40 20 80     eth0\nbad\n");
        assert_eq!(v6, [("eth0".to_owned(), "fe80::1".parse().unwrap(), 64)]);
    }

    #[test]
    fn loopback_is_everywhere() {
        let told = information();
        let lo = told.interfaces.iter().find(|interface| interface.name == "lo").unwrap();
        assert!(lo.addresses.iter().any(|own| own.address == "127.0.0.1" && own.prefix == 8), "{lo:?}");
    }
}
