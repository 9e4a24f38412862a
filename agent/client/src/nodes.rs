//! The nodes a client knows: addresses, health, the order to ask them in. Owns: no connection. Never: drops a node for good.
//! Order: those without recent failures first, of these the one that answered last, then by measured latency, then as configured.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Nodes in one list at most.
pub const NODES_MAX: usize = dstack_protocol::limits::NODES_MAX;

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

    /// Where it is now.
    ///
    /// # Errors
    /// The resolver's.
    pub(crate) async fn resolve(&self) -> std::io::Result<Vec<SocketAddr>> {
        let found: Vec<SocketAddr> = tokio::net::lookup_host((self.host.as_str(), self.port)).await?.take(ADDRESSES_MAX).collect();
        if found.is_empty() { Err(std::io::Error::other("no address")) } else { Ok(found) }
    }
}

/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 4;

/// The list, with what is known of each.
#[derive(Debug)]
pub struct Nodes {
    list: Vec<Node>,
    answers: AtomicU64,
}

#[derive(Debug)]
struct Node {
    url: NodeUrl,
    health: Mutex<Health>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Health {
    /// Failures since the last answer.
    failures: u32,
    /// Number of its last answer among all, 0 before the first.
    last_good: u64,
    latency: Option<Duration>,
    asked: u64,
    faults: u64,
}

/// What one node was asked so far, and how often it did not serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tally {
    /// The node.
    pub url: NodeUrl,
    /// Questions put to it, whatever became of them. One that is repeated over a new connection counts once.
    pub asked: u64,
    /// Questions that it did not serve. One that nobody waits for any more, since another node answered, is none.
    pub faults: u64,
}

impl Nodes {
    /// Nodes in the order of the configuration, at most [`NODES_MAX`]; repeated addresses count once.
    #[must_use]
    pub fn new(urls: Vec<NodeUrl>) -> Self {
        let mut list: Vec<Node> = Vec::new();
        for url in urls {
            if list.len() < NODES_MAX && list.iter().all(|node| node.url != url) {
                list.push(Node { url, health: Mutex::new(Health::default()) });
            }
        }
        Self { list, answers: AtomicU64::new(0) }
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub(crate) fn url(&self, place: usize) -> Option<&NodeUrl> {
        self.list.get(place).map(|node| &node.url)
    }

    pub(crate) fn name(&self, place: usize) -> String {
        self.url(place).map_or_else(String::new, ToString::to_string)
    }

    /// Places in the order to ask them.
    pub(crate) fn order(&self) -> Vec<usize> {
        let known: Vec<Health> = self.list.iter().map(|node| *node.health()).collect();
        let latest = known.iter().map(|health| health.last_good).max().unwrap_or(0);
        let mut places: Vec<(usize, Health)> = known.into_iter().enumerate().collect();
        places.sort_by_key(|(place, health)| {
            let is_last_good = health.last_good != 0 && health.last_good == latest;
            (health.failures, !is_last_good, health.latency.unwrap_or(Duration::MAX), *place)
        });
        places.into_iter().map(|(place, _)| place).collect()
    }

    /// What each was asked, in the order of the configuration.
    #[must_use]
    pub fn tallies(&self) -> Vec<Tally> {
        let tally = |node: &Node| {
            let Health { asked, faults, .. } = *node.health();
            Tally { url: node.url.clone(), asked, faults }
        };
        self.list.iter().map(tally).collect()
    }

    /// A question is put to it.
    pub(crate) fn asked(&self, place: usize) {
        if let Some(node) = self.list.get(place) {
            let mut health = node.health();
            health.asked = health.asked.saturating_add(1);
        }
    }

    /// It did not serve a question, whether that speaks against it or not.
    pub(crate) fn faulted(&self, place: usize) {
        if let Some(node) = self.list.get(place) {
            let mut health = node.health();
            health.faults = health.faults.saturating_add(1);
        }
    }

    /// It answered.
    pub(crate) fn answered(&self, place: usize, took: Duration) {
        if let Some(node) = self.list.get(place) {
            let number = self.answers.fetch_add(1, Ordering::Relaxed).saturating_add(1);
            let mut health = node.health();
            health.failures = 0;
            health.last_good = number;
            // Exponential mean over about four answers.
            health.latency = Some(health.latency.map_or(took, |before| (before.saturating_mul(3).saturating_add(took)) / 4));
        }
    }

    /// It failed.
    pub(crate) fn failed(&self, place: usize) {
        if let Some(node) = self.list.get(place) {
            let mut health = node.health();
            health.failures = health.failures.saturating_add(1);
        }
    }
}

impl Node {
    fn health(&self) -> MutexGuard<'_, Health> {
        // Plain data: a holder that panicked left it whole.
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(count: u16) -> Nodes {
        Nodes::new((0..count).map(|i| format!("https://10.0.0.1:{}", 1000 + i).parse().unwrap()).collect())
    }

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
    fn last_good_first_then_the_fastest_and_failing_ones_last() {
        let ms = Duration::from_millis;
        let nodes = nodes(4);
        assert_eq!(nodes.order(), [0, 1, 2, 3]);
        nodes.failed(0);
        assert_eq!(nodes.order(), [1, 2, 3, 0]);
        nodes.answered(3, ms(5));
        nodes.answered(2, ms(50));
        assert_eq!(nodes.order(), [2, 3, 1, 0]);
        nodes.failed(2);
        assert_eq!(nodes.order(), [3, 1, 2, 0].map(|place| place), "3 is the fastest that does not fail");
        nodes.failed(0);
        nodes.answered(2, ms(50));
        assert_eq!(nodes.order(), [2, 3, 1, 0]);
    }

    #[test]
    fn a_list_has_each_node_once_and_an_end() {
        assert_eq!(nodes(100).len(), NODES_MAX);
        let one: NodeUrl = "https://a:1".parse().unwrap();
        assert_eq!(Nodes::new(vec![one.clone(), one]).len(), 1);
    }
}
