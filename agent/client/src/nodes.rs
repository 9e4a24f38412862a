//! The nodes a client knows: addresses, health, the order to ask them in. Owns: no connection. Never: drops a configured node.
//! Order: those without recent failures first, of these the one that answered last, then by measured latency, then as configured,
//! learnt ones behind.
//!
//! What is learnt comes out of the genesis document, which never changes: so neither do the places of learnt nodes once they are known.
//! Which of them are in use follows what nodes say.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use dstack_protocol::Seat;
use dstack_protocol::genesis::Genesis;

use crate::url::NodeUrl;

/// Configured nodes at most, and learnt ones.
pub const NODES_MAX: usize = dstack_protocol::limits::NODES_MAX;
/// Places at most.
pub(crate) const PLACES_MAX: usize = 2 * NODES_MAX;

/// The list, with what is known of each.
#[derive(Debug)]
pub struct Nodes {
    configured: Vec<Node>,
    learnt: OnceLock<Vec<Node>>,
    answers: AtomicU64,
    faults: AtomicU64,
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
    /// Of a learnt node by the genesis document, of a configured one by its own word.
    seat: Option<Seat>,
    /// Of a learnt node: whether nodes name its seat.
    is_named: bool,
}

/// What one node was asked so far, and how often it did not serve. Questions about the list of nodes are left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tally {
    /// The node.
    pub url: NodeUrl,
    /// Whether it was learnt from another node.
    pub is_learnt: bool,
    /// Questions put to it, whatever became of them. One that is repeated over a new connection counts once.
    pub asked: u64,
    /// Questions that it did not serve. One that nobody waits for any more, since another node answered, is none.
    pub faults: u64,
}

impl Nodes {
    /// Nodes in the order of the configuration, at most [`NODES_MAX`]; repeated addresses count once.
    #[must_use]
    pub fn new(urls: Vec<NodeUrl>) -> Self {
        let mut configured: Vec<Node> = Vec::new();
        for url in urls {
            if configured.len() < NODES_MAX && configured.iter().all(|node| node.url != url) {
                configured.push(Node { url, health: Mutex::default() });
            }
        }
        Self { configured, learnt: OnceLock::new(), answers: AtomicU64::new(0), faults: AtomicU64::new(0) }
    }

    /// How many are in use.
    #[must_use]
    pub fn len(&self) -> usize {
        self.in_use().len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.configured.is_empty()
    }

    fn node(&self, place: usize) -> Option<&Node> {
        match place.checked_sub(self.configured.len()) {
            None => self.configured.get(place),
            Some(beyond) => self.learnt.get()?.get(beyond),
        }
    }

    /// The configured ones, and the learnt ones that are named and are none of the configured under another address.
    fn in_use(&self) -> Vec<(usize, &Node, Health)> {
        let mut used: Vec<(usize, &Node, Health)> =
            self.configured.iter().enumerate().map(|(place, node)| (place, node, *node.health())).collect();
        let taken: BTreeSet<Seat> = used.iter().filter_map(|(_, _, health)| health.seat).collect();
        let learnt = self.learnt.get().into_iter().flatten().zip(self.configured.len()..);
        let learnt = learnt.map(|(node, place)| (place, node, *node.health()));
        used.extend(learnt.filter(|(_, _, health)| health.is_named && health.seat.is_none_or(|seat| !taken.contains(&seat))));
        used
    }

    pub(crate) fn url(&self, place: usize) -> Option<&NodeUrl> {
        self.node(place).map(|node| &node.url)
    }

    pub(crate) fn name(&self, place: usize) -> String {
        self.url(place).map_or_else(String::new, ToString::to_string)
    }

    /// Places in the order to ask them.
    pub(crate) fn order(&self) -> Vec<usize> {
        let mut known = self.in_use();
        let latest = known.iter().map(|(_, _, health)| health.last_good).max().unwrap_or(0);
        known.sort_by_key(|(place, _, health)| {
            let is_last_good = health.last_good != 0 && health.last_good == latest;
            (health.failures, !is_last_good, health.latency.unwrap_or(Duration::MAX), *place)
        });
        known.into_iter().map(|(place, ..)| place).collect()
    }

    /// What each in use was asked: in the order of the configuration, then of the seats.
    #[must_use]
    pub fn tallies(&self) -> Vec<Tally> {
        let tally = |(place, node, health): (usize, &Node, Health)| {
            let Health { asked, faults, .. } = health;
            Tally { url: node.url.clone(), is_learnt: place >= self.configured.len(), asked, faults }
        };
        self.in_use().into_iter().map(tally).collect()
    }

    /// Questions that any node did not serve.
    pub(crate) fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    /// A question is put to it.
    pub(crate) fn asked(&self, place: usize) {
        self.note(place, |health| health.asked = health.asked.saturating_add(1));
    }

    /// It did not serve a question, whether that speaks against it or not.
    pub(crate) fn faulted(&self, place: usize) {
        self.faults.fetch_add(1, Ordering::Relaxed);
        self.note(place, |health| health.faults = health.faults.saturating_add(1));
    }

    /// It answered.
    pub(crate) fn answered(&self, place: usize, took: Duration) {
        let number = self.answers.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        self.note(place, |health| {
            health.failures = 0;
            health.last_good = number;
            // Exponential mean over about four answers.
            health.latency = Some(health.latency.map_or(took, |before| (before.saturating_mul(3).saturating_add(took)) / 4));
        });
    }

    /// It failed.
    pub(crate) fn failed(&self, place: usize) {
        self.note(place, |health| health.failures = health.failures.saturating_add(1));
    }

    /// It serves, and says which seat it has. It is asked like others again; who is asked first stays.
    pub(crate) fn serves(&self, place: usize, seat: Seat) {
        self.note(place, |health| {
            health.failures = 0;
            health.seat.get_or_insert(seat);
        });
    }

    /// Uses the seats `named` of the document, which the pin proves, beside those in use.
    pub(crate) fn learn(&self, genesis: &Genesis, named: &BTreeSet<Seat>) {
        for node in self.learnt.get_or_init(|| self.of_document(genesis)) {
            let mut health = node.health();
            health.is_named |= health.seat.is_some_and(|seat| named.contains(&seat));
        }
    }

    /// Uses no other learnt node than those of `named` any more.
    pub(crate) fn keep(&self, named: &BTreeSet<Seat>) {
        for node in self.learnt.get().into_iter().flatten() {
            let mut health = node.health();
            health.is_named &= health.seat.is_some_and(|seat| named.contains(&seat));
        }
    }

    /// What the document names and the configuration does not. An address of this machine or its link means another machine elsewhere:
    /// it is left out unless the configuration has such addresses, too.
    fn of_document(&self, genesis: &Genesis) -> Vec<Node> {
        let local_too = self.configured.iter().any(|node| node.url.is_local());
        let mut learnt: Vec<Node> = Vec::new();
        for grant in genesis.seats.iter().take(NODES_MAX) {
            let Ok(url) = format!("https://{}", grant.address).parse::<NodeUrl>() else { continue };
            let is_known = self.configured.iter().chain(&learnt).any(|node| node.url == url);
            if !is_known && (local_too || !url.is_local()) {
                learnt.push(Node { url, health: Mutex::new(Health { seat: Some(grant.seat), ..Health::default() }) });
            }
        }
        learnt
    }

    fn note(&self, place: usize, note: impl FnOnce(&mut Health)) {
        if let Some(node) = self.node(place) {
            note(&mut node.health());
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
    use dstack_protocol::genesis::{Authority, CaAlgorithm, SeatGrant};
    use proptest::prelude::*;

    use super::*;

    fn nodes(count: u16) -> Nodes {
        Nodes::new((0..count).map(|i| format!("https://10.0.0.1:{}", 1000 + i).parse().unwrap()).collect())
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

    fn document(addresses: &[&str]) -> Genesis {
        let seats = (1..).map(Seat).zip(addresses).map(|(seat, address)| SeatGrant {
            seat,
            address: (*address).to_owned(),
            platform_identity: vec![u8::try_from(seat.0).unwrap(); 16],
        });
        Genesis {
            random: [0; 32],
            n: u16::try_from(addresses.len()).unwrap(),
            t: Genesis::threshold_for(u16::try_from(addresses.len()).unwrap()),
            f: 0,
            ca_algorithm: CaAlgorithm::Ed25519,
            authority: Authority::OperatorQuorum,
            chain_settings: Vec::new(),
            k: 1,
            r: 1,
            timelock_s: 0,
            operators: vec![[1; 32]],
            allowed_nodes: Vec::new(),
            software_roots: Vec::new(),
            seats: seats.collect(),
            collateral_id: [0; 32],
        }
    }

    fn seats(numbers: &[u16]) -> BTreeSet<Seat> {
        numbers.iter().copied().map(Seat).collect()
    }

    fn urls(nodes: &Nodes) -> Vec<String> {
        nodes.tallies().into_iter().map(|tally| tally.url.to_string()).collect()
    }

    #[test]
    fn learnt_nodes_stand_behind_the_configured_ones_and_leave_when_no_longer_named() {
        let nodes = Nodes::new(vec!["https://a:1".parse().unwrap(), "https://kms:1".parse().unwrap()]);
        let document = document(&["a:1", "b:1", "c:1", "d:1"]);
        nodes.learn(&document, &seats(&[1, 3]));
        assert_eq!(urls(&nodes), ["https://a:1", "https://kms:1", "https://c:1"]);
        nodes.learn(&document, &seats(&[2, 4]));
        assert_eq!(urls(&nodes), ["https://a:1", "https://kms:1", "https://b:1", "https://c:1", "https://d:1"]);
        assert_eq!(nodes.order().len(), 5);
        // What its own word makes out to be a configured one is not asked twice.
        nodes.serves(1, Seat(4));
        assert_eq!(urls(&nodes), ["https://a:1", "https://kms:1", "https://b:1", "https://c:1"]);
        // Places stay, whoever leaves.
        let place = *nodes.order().last().unwrap();
        assert_eq!(nodes.name(place), "https://c:1");
        nodes.keep(&seats(&[3]));
        assert_eq!((urls(&nodes).len(), nodes.name(place)), (3, "https://c:1".to_owned()));
        nodes.keep(&seats(&[]));
        assert_eq!(urls(&nodes), ["https://a:1", "https://kms:1"], "configured ones never leave");
        nodes.learn(&document, &seats(&[2]));
        assert_eq!(urls(&nodes).last().unwrap(), "https://b:1");
    }

    #[test]
    fn a_probe_heals_without_changing_who_is_asked_first() {
        let nodes = nodes(3);
        nodes.answered(2, Duration::from_millis(5));
        nodes.failed(0);
        assert_eq!(nodes.order(), [2, 1, 0]);
        nodes.serves(0, Seat(1));
        assert_eq!(nodes.order(), [2, 0, 1]);
    }

    #[test]
    fn addresses_of_this_machine_are_learnt_only_beside_configured_ones_of_this_machine() {
        let document = document(&["127.0.0.1:1", "10.0.0.2:1", "169.254.169.254:80", "localhost:7"]);
        let all = seats(&[1, 2, 3, 4]);
        for (configured, learnt) in [("https://10.0.0.1:1", 1), ("https://127.0.0.1:9", 4)] {
            let nodes = Nodes::new(vec![configured.parse().unwrap()]);
            nodes.learn(&document, &all);
            assert_eq!(nodes.len(), 1 + learnt, "{configured}");
        }
    }

    proptest! {
        #[test]
        fn no_document_takes_a_configured_node_away_or_breaks_the_bound(
            addresses in proptest::collection::vec("[a-z0-9.:\\[\\]/@ -]{0,20}", 3..=64),
            named in proptest::collection::btree_set(0_u16..70, 0..70),
            kept in proptest::collection::btree_set(0_u16..70, 0..70),
            own in 0_u16..70,
        ) {
            let nodes = nodes(3);
            let before = urls(&nodes);
            let document = document(&addresses.iter().map(String::as_str).collect::<Vec<_>>());
            nodes.learn(&document, &named.iter().copied().map(Seat).collect());
            nodes.serves(0, Seat(own));
            prop_assert!(nodes.len() <= 3 + named.len().min(NODES_MAX));
            nodes.keep(&kept.iter().copied().map(Seat).collect());
            prop_assert!(nodes.len() <= 3 + kept.len());
            prop_assert_eq!(&urls(&nodes)[..3], &before[..]);
            let order = nodes.order();
            prop_assert!(order.len() == nodes.len() && order.iter().all(|place| *place < PLACES_MAX && nodes.url(*place).is_some()));
            prop_assert_eq!(order.iter().collect::<BTreeSet<_>>().len(), order.len());
        }
    }

    #[test]
    fn a_list_has_each_node_once_and_an_end() {
        assert_eq!(nodes(100).len(), NODES_MAX);
        let one: NodeUrl = "https://a:1".parse().unwrap();
        assert_eq!(Nodes::new(vec![one.clone(), one]).len(), 1);
    }
}
