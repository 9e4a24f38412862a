//! Who may hold a connection. Owns: bounded tables of connections by stage, and who gives way when one is full.
//! Never: reads a byte.
//!
//! Connections that have proven nothing give way oldest first, so a flood of half-open ones only displaces itself: a
//! peer that completes each stage promptly passes. A stage is left for the next only by proof: a ClientHello, then
//! evidence. Addresses of known peers have their own first stage, which strangers cannot fill.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::limits::Limits;
use crate::metrics;

/// How far a connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// Accepted, from the address of a known peer.
    GreetingKnown,
    /// Accepted.
    Greeting,
    /// Its ClientHello asked for the node protocol, from the address of a known peer.
    NodeHandshakeKnown,
    /// Its ClientHello asked for the node protocol.
    NodeHandshake,
    /// Its ClientHello asked for HTTP.
    ClientHandshake,
    /// A node with verified evidence and HELLO.
    Node,
    /// A client with verified evidence.
    Attested,
    /// A client without.
    Anonymous,
}

impl Stage {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::GreetingKnown => "greeting_known",
            Self::Greeting => "greeting",
            Self::NodeHandshakeKnown => "node_handshake_known",
            Self::NodeHandshake => "node_handshake",
            Self::ClientHandshake => "client_handshake",
            Self::Node => "node",
            Self::Attested => "attested",
            Self::Anonymous => "anonymous",
        }
    }

    /// True where the newest is refused instead of the oldest dropped: those inside have proven themselves.
    fn refuses_when_full(self) -> bool {
        matches!(self, Self::Node | Self::Attested)
    }

    fn capacity(self, limits: &Limits) -> usize {
        match self {
            Self::GreetingKnown => limits.greetings_known_max,
            Self::Greeting => limits.greetings_max,
            Self::NodeHandshakeKnown => limits.node_handshakes_known_max,
            Self::NodeHandshake => limits.node_handshakes_max,
            Self::ClientHandshake => limits.client_handshakes_max,
            Self::Node => limits.nodes_max,
            Self::Attested => limits.attested_max,
            Self::Anonymous => limits.anonymous_max,
        }
    }

    /// A node proved a key; what bounds it is its group, and its address may be shared with strangers.
    fn counts_for_source(self) -> bool {
        !matches!(self, Self::GreetingKnown | Self::NodeHandshakeKnown | Self::Node)
    }
}

/// Why a connection is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Full {
    Stage(Stage),
    Source,
    Rate,
}

impl Full {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stage(stage) => stage.name(),
            Self::Source => "source",
            Self::Rate => "rate",
        }
    }
}

/// A node by its key and the seat it claims.
pub(crate) type NodeGroup = (u16, [u8; 32]);

/// See the module text.
pub(crate) struct Admission {
    limits: Limits,
    tables: Mutex<Tables>,
}

#[derive(Default)]
struct Tables {
    next_id: u64,
    stages: BTreeMap<Stage, BTreeMap<u64, CancellationToken>>,
    per_source: HashMap<IpAddr, usize>,
    per_node: HashMap<NodeGroup, Vec<u64>>,
    known: HashSet<IpAddr>,
    rate: Rate,
}

/// Handshakes of strangers cost processor time that peers need: they are counted out per second.
#[derive(Default)]
struct Rate {
    window_began: Option<Instant>,
    begun: u32,
}

impl Rate {
    fn take(&mut self, now: Instant, per_second_max: u32) -> bool {
        if self.window_began.is_none_or(|began| now.saturating_duration_since(began) >= Duration::from_secs(1)) {
            *self = Self { window_began: Some(now), begun: 0 };
        }
        self.begun = self.begun.saturating_add(1);
        self.begun <= per_second_max
    }
}

impl Admission {
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, tables: Mutex::new(Tables::default()) })
    }

    /// Replaces the addresses of known peers.
    pub(crate) fn set_known(&self, addresses: impl IntoIterator<Item = IpAddr>) {
        self.tables().known = addresses.into_iter().map(|address| address.to_canonical()).collect();
    }

    /// Takes in a new connection, at the expense of the oldest of its stage if need be.
    pub(crate) fn admit(self: &Arc<Self>, source: IpAddr) -> Result<Slot, Full> {
        let source = source.to_canonical();
        let mut tables = self.tables();
        let stage = if tables.known.contains(&source) { Stage::GreetingKnown } else { Stage::Greeting };
        tables.make_room(stage, source, &self.limits)?;
        let id = tables.next_id;
        tables.next_id = tables.next_id.wrapping_add(1);
        let evicted = CancellationToken::new();
        tables.enter(stage, id, source, evicted.clone());
        Ok(Slot { admission: Arc::clone(self), id, source, stage, group: None, evicted })
    }

    /// Connections in all stages.
    pub(crate) fn total(&self) -> usize {
        self.tables().stages.values().map(BTreeMap::len).sum()
    }

    /// Connections in a stage.
    #[cfg(test)]
    pub(crate) fn count(&self, stage: Stage) -> usize {
        self.tables().stages.get(&stage).map_or(0, BTreeMap::len)
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tables {
    fn make_room(&mut self, stage: Stage, source: IpAddr, limits: &Limits) -> Result<(), Full> {
        // Known peers keep their privilege in later stages: an address is not proof, but a stranger's flood from
        // elsewhere must not count against them.
        let counted = stage.counts_for_source() && !self.known.contains(&source);
        if counted && self.per_source.get(&source).copied().unwrap_or(0) >= limits.per_source_max {
            return Err(Full::Source);
        }
        let table = self.stages.entry(stage).or_default();
        if table.len() < stage.capacity(limits) {
            return Ok(());
        }
        if stage.refuses_when_full() {
            return Err(Full::Stage(stage));
        }
        match table.first_key_value() {
            Some((_, oldest)) => {
                // Its task leaves the table when it notices; until then the table is one over, bounded by the
                // capacity again as entries are removed here already.
                oldest.cancel();
                table.pop_first();
                metrics::evicted(stage);
                Ok(())
            }
            None => Err(Full::Stage(stage)),
        }
    }

    fn enter(&mut self, stage: Stage, id: u64, source: IpAddr, evicted: CancellationToken) {
        let table = self.stages.entry(stage).or_default();
        table.insert(id, evicted);
        metrics::connections(stage, table.len());
        if stage.counts_for_source() {
            let count = self.per_source.entry(source).or_insert(0);
            *count = count.saturating_add(1);
        }
    }

    fn leave(&mut self, stage: Stage, id: u64, source: IpAddr) {
        if let Some(table) = self.stages.get_mut(&stage) {
            table.remove(&id);
            metrics::connections(stage, table.len());
        }
        if stage.counts_for_source()
            && let Some(count) = self.per_source.get_mut(&source)
        {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.per_source.remove(&source);
            }
        }
    }
}

/// One connection's place; leaving is dropping it.
pub(crate) struct Slot {
    admission: Arc<Admission>,
    id: u64,
    source: IpAddr,
    stage: Stage,
    group: Option<NodeGroup>,
    evicted: CancellationToken,
}

impl Slot {
    /// Ends when this connection must give way.
    pub(crate) fn evicted(&self) -> CancellationToken {
        self.evicted.clone()
    }

    /// Moves on to the handshake that the ClientHello asked for.
    pub(crate) fn advance_handshake(&mut self, is_node: bool, now: Instant) -> Result<(), Full> {
        let known = {
            let mut tables = self.admission.tables();
            let known = tables.known.contains(&self.source);
            if !known && !tables.rate.take(now, self.admission.limits.handshakes_per_second_max) {
                return Err(Full::Rate);
            }
            known
        };
        self.advance(match (is_node, known) {
            (true, true) => Stage::NodeHandshakeKnown,
            (true, false) => Stage::NodeHandshake,
            (false, _) => Stage::ClientHandshake,
        })
    }

    /// Moves on to the next stage.
    pub(crate) fn advance(&mut self, to: Stage) -> Result<(), Full> {
        let mut tables = self.admission.tables();
        // Left first, so that a connection never counts twice against its own source.
        tables.leave(self.stage, self.id, self.source);
        let room = tables.make_room(to, self.source, &self.admission.limits);
        // Entered in any case: `drop` leaves exactly once.
        self.stage = to;
        tables.enter(to, self.id, self.source, self.evicted.clone());
        room
    }

    /// As [`Slot::advance`] to [`Stage::Node`], displacing the oldest connection of the same node if it has too many.
    pub(crate) fn advance_node(&mut self, group: NodeGroup) -> Result<(), Full> {
        {
            let mut tables = self.admission.tables();
            let ids = tables.per_node.entry(group).or_default();
            let surplus = (ids.len() >= self.admission.limits.connections_per_node_max).then(|| ids.remove(0));
            ids.push(self.id);
            self.group = Some(group);
            if let Some(token) = surplus.and_then(|oldest| tables.stages.get_mut(&Stage::Node)?.remove(&oldest)) {
                token.cancel();
                metrics::evicted(Stage::Node);
            }
        }
        self.advance(Stage::Node)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut tables = self.admission.tables();
        tables.leave(self.stage, self.id, self.source);
        if let Some(group) = self.group
            && let Some(ids) = tables.per_node.get_mut(&group)
        {
            ids.retain(|id| *id != self.id);
            if ids.is_empty() {
                tables.per_node.remove(&group);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn ip(last: u8) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(10, 0, 0, last))
    }

    fn small() -> Limits {
        Limits {
            greetings_max: 3,
            greetings_known_max: 2,
            attested_max: 1,
            anonymous_max: 1,
            nodes_max: 2,
            connections_per_node_max: 1,
            per_source_max: 4,
            ..Limits::default()
        }
    }

    #[test]
    fn a_flood_displaces_itself_and_never_a_known_peer() {
        let admission = Admission::new(Limits { per_source_max: 1000, ..small() });
        admission.set_known([ip(1)]);
        let peer = admission.admit(ip(1)).unwrap_or_else(|_| panic!());
        let flood: Vec<_> = (0..100).map(|_| admission.admit(ip(2)).unwrap_or_else(|_| panic!())).collect();
        assert!(!peer.evicted().is_cancelled());
        assert_eq!(flood.iter().filter(|slot| !slot.evicted().is_cancelled()).count(), 3);
        assert_eq!(admission.count(Stage::Greeting), 3);
        drop(flood);
        assert_eq!(admission.count(Stage::Greeting), 0);
        assert!(admission.tables().per_source.is_empty());
    }

    #[test]
    fn one_source_is_capped_and_counted_right_through_stages() {
        let admission = Admission::new(Limits { greetings_max: 100, ..small() });
        let mut held: Vec<_> = (0..4).map(|_| admission.admit(ip(3)).unwrap_or_else(|_| panic!())).collect();
        assert!(matches!(admission.admit(ip(3)), Err(Full::Source)));
        assert!(admission.admit(ip(4)).is_ok());
        assert!(held[0].advance(Stage::ClientHandshake).is_ok(), "moving on is no new connection");
        assert!(matches!(admission.admit(ip(3)), Err(Full::Source)));
        held.truncate(1);
        assert_eq!(admission.tables().per_source.get(&ip(3)), Some(&1));
        drop(held);
        assert!(admission.tables().per_source.is_empty());
    }

    #[test]
    fn handshakes_of_strangers_are_counted_out_and_those_of_peers_are_not() {
        let admission = Admission::new(Limits { handshakes_per_second_max: 2, node_handshakes_max: 1, ..Limits::default() });
        admission.set_known([ip(1)]);
        let began = Instant::now();
        let begin = |source: u8, at: Instant| {
            let mut slot = admission.admit(ip(source)).unwrap_or_else(|_| panic!());
            let outcome = slot.advance_handshake(true, at);
            (slot, outcome)
        };
        let peer = begin(1, began);
        let strangers: Vec<_> = (0..3).map(|_| begin(2, began)).collect();
        assert_eq!(strangers.iter().map(|(_, outcome)| *outcome).collect::<Vec<_>>(), [Ok(()), Ok(()), Err(Full::Rate)]);
        assert!(!peer.0.evicted().is_cancelled(), "strangers displace each other alone");
        assert_eq!(begin(1, began).1, Ok(()));
        assert_eq!(begin(2, began + Duration::from_millis(999)).1, Err(Full::Rate));
        assert_eq!(begin(2, began + Duration::from_millis(1000)).1, Ok(()));
    }

    #[test]
    fn the_proven_stay_and_the_anonymous_give_way() {
        let admission = Admission::new(small());
        let mut slots: Vec<_> = (0..4).map(|i| admission.admit(ip(10 + i))).filter_map(Result::ok).collect();
        assert!(slots[1].advance(Stage::Attested).is_ok());
        assert_eq!(slots[2].advance(Stage::Attested), Err(Full::Stage(Stage::Attested)));
        assert!(!slots[1].evicted().is_cancelled());
        let mut last = slots.pop().unwrap();
        let mut newest = admission.admit(ip(20)).unwrap_or_else(|_| panic!());
        assert!(last.advance(Stage::Anonymous).is_ok());
        assert!(newest.advance(Stage::Anonymous).is_ok());
        assert!(last.evicted().is_cancelled());
        assert!(!newest.evicted().is_cancelled());
    }

    #[test]
    fn a_node_that_reconnects_displaces_only_itself() {
        let admission = Admission::new(small());
        let node = |key: u8| {
            let mut slot = admission.admit(ip(key)).unwrap_or_else(|_| panic!());
            let outcome = slot.advance_node((u16::from(key), [key; 32]));
            (slot, outcome)
        };
        let (first, _) = node(1);
        let (other, _) = node(2);
        let (again, outcome) = node(1);
        assert_eq!(outcome, Ok(()));
        assert!(first.evicted().is_cancelled());
        assert!(!other.evicted().is_cancelled() && !again.evicted().is_cancelled());
        assert_eq!(node(3).1, Err(Full::Stage(Stage::Node)));
        drop((first, other, again));
        assert!(admission.tables().per_node.is_empty());
        assert_eq!(admission.count(Stage::Node), 0);
    }
}
