//! Secrets of a pair made anew between its two ends, when one of them lost them: a damaged file, or one put back to an older state.
//!
//! Owns: the name of such a setup, who begins, how often, when each end takes it into use and seals it. Never: touches the pairs of
//! others; lets a node in again that was named as a cheat; needs a third node. Source: ADR 0029.
//!
//! ```text
//! i asks j by a `PairAsk`; the answer is nonce_j(32)
//! name = SHA-256("DKMS-V1-PAIRNAME" ‖ inst(32) ‖ i(2) ‖ j(2) ‖ nonce_i(32) ‖ nonce_j(32))
//! i says `PairDone`; j answers when it has sealed what came out
//! ```
//! `inst` names the root's key generation. Between the two runs the setup of [`super::pairwise`] under `name`, fresh by both nonces. The
//! node that asked takes the result into use when the other one has it for good: whoever stops in between has none, and asks anew.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dstack_protocol::codec::{Wire as _, sha256};
use dstack_protocol::genesis::CaAlgorithm;
use dstack_protocol::rpc::{PATH_PEER_SIGN_PAIR, PATH_PEER_SIGN_PAIR_DONE};
use dstack_protocol::state::State;
use dstack_protocol::{Generation, NodeIndex, Refusal, RefusalCode, RootTag, Seat};
use dstack_threshold::share::has_pairwise_setup;
use dstack_threshold::share_file::ShareName;
use tracing::{debug, info, warn};

use super::pairwise::{Members, Setups};
use super::signer::Parts;
use super::wire::{PairAsk, PairDone};
use crate::metrics;
use crate::ports::{random, read};

/// Setups of pairs that a node takes part in at once: one that it asked for, one that it was asked for.
pub(super) const AT_ONCE_MAX: usize = 2;
/// Setups with one peer in an hour: each costs about half a second of processor time and 300 kB.
const OF_ONE_PER_HOUR: usize = 6;
const HOUR: Duration = Duration::from_secs(3600);
/// From the name to the end of a setup. Far above what it takes, so that a busy machine finishes it.
const SETUP_TIMEOUT: Duration = Duration::from_secs(90);
const LOOK_EVERY: Duration = Duration::from_millis(500);
const POLL_EVERY: Duration = Duration::from_millis(50);
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two tries with a peer: from here, doubled up to the other.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Roots that may have pairs.
const ROOTS: [RootTag; 2] = [RootTag::Ca, RootTag::Id];

/// See the module text.
pub(super) struct Redo {
    parts: Parts,
    setups: Arc<Setups>,
    peers: Mutex<BTreeMap<(RootTag, NodeIndex), Peer>>,
}

/// What goes on with one peer.
#[derive(Default)]
struct Peer {
    /// When setups began, within the last hour.
    begun: VecDeque<Instant>,
    current: Option<Current>,
    /// The setup last finished for that peer.
    finished: Option<[u8; 32]>,
    /// Not before this, and how long to wait after the next failure.
    again: Option<(Instant, Duration)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Current {
    /// This node asks; the nonce tells one try from another.
    Asking([u8; 32]),
    /// The peer asked for the setup of that name.
    Answering([u8; 32]),
}

impl Peer {
    /// Counts one more setup, or says how long to wait.
    fn begin(&mut self, now: Instant) -> Result<(), Refusal> {
        while self.begun.front().is_some_and(|at| now.duration_since(*at) >= HOUR) {
            self.begun.pop_front();
        }
        if let Some(oldest) = self.begun.front().filter(|_| self.begun.len() >= OF_ONE_PER_HOUR) {
            let wait = HOUR.saturating_sub(now.duration_since(*oldest));
            let expected = format!("{OF_ONE_PER_HOUR} setups with one node in an hour");
            let wait_ms = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX);
            return Err(Refusal::new(RefusalCode::RateLimited, expected, "more").retry_after(wait_ms));
        }
        self.begun.push_back(now);
        Ok(())
    }
}

/// The pairs of a root in force, as this node's state has it.
struct Root {
    tag: RootTag,
    ca: CaAlgorithm,
    inst: [u8; 32],
    index: NodeIndex,
    seats: Members,
    file: ShareName,
}

impl Root {
    /// Where this node and `peer` are.
    fn pair(&self, peer: NodeIndex) -> Result<(Members, Seat), Refusal> {
        let seat = |index: NodeIndex| {
            let none = || Refusal::new(RefusalCode::SignRun, "a holder with a seat", index.to_string());
            self.seats.get(&index).copied().ok_or_else(none)
        };
        let (own, other) = (seat(self.index)?, seat(peer)?);
        if peer == self.index {
            return Err(Refusal::new(RefusalCode::SignRun, "another holder", "this node itself"));
        }
        Ok((BTreeMap::from([(self.index, own), (peer, other)]), other))
    }
}

impl Redo {
    pub(super) fn new(parts: Parts, setups: Arc<Setups>) -> Arc<Self> {
        Arc::new(Self { parts, setups, peers: Mutex::default() })
    }

    /// Makes anew what is missing and seals what changed, for the life of the node.
    pub(super) async fn keep(self: Arc<Self>) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            for tag in ROOTS {
                let Ok(root) = self.root(tag) else { continue };
                self.seal(&root).await;
                for peer in self.due(&root) {
                    let outcome = self.ask(&root, peer).await;
                    self.note(&root, peer, &outcome);
                }
            }
        }
    }

    /// Peers without secrets with whom it is time to try.
    fn due(&self, root: &Root) -> Vec<NodeIndex> {
        let missing = self.parts.shares.pairs_missing(root.tag).unwrap_or_default();
        let (peers, now) = (lock(&self.peers), Instant::now());
        let waits = |peer: &NodeIndex| {
            let known = peers.get(&(root.tag, *peer));
            known.is_some_and(|known| known.current.is_some() || known.again.is_some_and(|(at, _)| now < at))
        };
        missing.into_iter().filter(|peer| !waits(peer)).collect()
    }

    fn note(&self, root: &Root, peer: NodeIndex, outcome: &Result<(), Refusal>) {
        metrics::pair_redone(root.tag, metrics::outcome(outcome));
        let mut peers = lock(&self.peers);
        let known = peers.entry((root.tag, peer)).or_default();
        match outcome {
            Ok(()) => known.again = None,
            Err(refusal) => {
                let pause = known.again.map_or(PAUSE_MIN, |(_, pause)| pause);
                let wait = pause.max(Duration::from_millis(u64::from(refusal.retry_after_ms)));
                known.again = Some((Instant::now() + wait, (pause * 2).min(PAUSE_MAX)));
                debug!(root = root.tag.name(), peer_id = peer.0, code = %refusal.code, got = refusal.got, "secrets of a pair not made anew yet");
            }
        }
    }

    /// This node's side when it asks.
    async fn ask(&self, root: &Root, peer: NodeIndex) -> Result<(), Refusal> {
        let (members, seat) = root.pair(peer)?;
        let nonce = random::<32>()?;
        let mine = Current::Asking(nonce);
        let key = (root.tag, peer);
        {
            let mut peers = lock(&self.peers);
            let known = peers.entry(key).or_default();
            if known.current.is_some() {
                return Err(Refusal::new(RefusalCode::NotYet, "one setup of a pair at a time", "one under way"));
            }
            known.current = Some(mine);
        }
        let outcome = self.asked_for(root, peer, members, seat, nonce).await;
        let mut peers = lock(&self.peers);
        let known = peers.entry(key).or_default();
        // The peer may have begun one of its own in between, which goes on.
        if known.current == Some(mine) {
            known.current = None;
        }
        outcome
    }

    async fn asked_for(&self, root: &Root, peer: NodeIndex, members: Members, seat: Seat, nonce: [u8; 32]) -> Result<(), Refusal> {
        let ask = PairAsk { root: root.tag, inst: root.inst, nonce };
        let answer = self.parts.peers.post(seat, PATH_PEER_SIGN_PAIR, ask.encode(), CALL_TIMEOUT).await?;
        let theirs: [u8; 32] = answer
            .as_slice()
            .try_into()
            .map_err(|_| Refusal::new(RefusalCode::Malformed, "32 bytes of nonce", format!("{} bytes", answer.len())))?;
        let name = name(&root.inst, root.index, peer, &nonce, &theirs);
        {
            let mut peers = lock(&self.peers);
            let known = peers.entry((root.tag, peer)).or_default();
            if known.current != Some(Current::Asking(nonce)) {
                return Err(Refusal::new(RefusalCode::NotYet, "one setup of a pair at a time", "the peer's own goes first"));
            }
            known.begin(Instant::now())?;
        }
        self.setups.begin(root.tag, root.ca, name, root.index, members);
        let outcome = async {
            self.finished(&name).await?;
            self.told(root.tag, seat, &name).await
        };
        let outcome = outcome.await;
        let pairs = self.setups.take(&name).filter(|_| outcome.is_ok());
        self.setups.forget(&name);
        outcome?;
        let still_mine = lock(&self.peers).get(&(root.tag, peer)).is_some_and(|known| known.current == Some(Current::Asking(nonce)));
        let pairs = pairs.filter(|_| still_mine);
        let pairs = pairs.ok_or_else(|| Refusal::new(RefusalCode::NotYet, "the result of a setup", "the peer's own goes first"))?;
        self.parts.shares.adopt_pair(pairs)?;
        self.seal(root).await;
        info!(root = root.tag.name(), peer_id = peer.0, "secrets of a pair made anew");
        Ok(())
    }

    /// Waits until the other end has what came out, and has it for good.
    async fn told(&self, root: RootTag, seat: Seat, name: &[u8; 32]) -> Result<(), Refusal> {
        let done = PairDone { root, name: *name }.encode();
        let until = Instant::now() + SETUP_TIMEOUT;
        loop {
            match self.parts.peers.post(seat, PATH_PEER_SIGN_PAIR_DONE, done.clone(), CALL_TIMEOUT).await {
                Ok(_) => return Ok(()),
                Err(refusal) if refusal.code == RefusalCode::NotYet && Instant::now() < until => tokio::time::sleep(POLL_EVERY).await,
                // A lost answer is asked for again; what the peer has taken over this node has not, until it knows.
                Err(refusal) if refusal.code == RefusalCode::NotReady && Instant::now() < until => tokio::time::sleep(PAUSE_MIN).await,
                Err(refusal) => return Err(refusal),
            }
        }
    }

    /// The other side: a holder has no secrets with this node any more, or other ones.
    pub(super) fn answer(self: &Arc<Self>, from: NodeIndex, body: &[u8]) -> Result<Vec<u8>, Refusal> {
        let ask = PairAsk::decode(body)?;
        let root = self.root(ask.root)?;
        let (members, _) = root.pair(from)?;
        if ask.inst != root.inst {
            return Err(Refusal::new(RefusalCode::SignRun, "the key generation of the root in force", "another"));
        }
        if self.parts.shares.expelled(root.tag).contains(&from) {
            return Err(Refusal::new(RefusalCode::SignerExpelled, "a signer that did not cheat", from.to_string()));
        }
        let nonce = random::<32>()?;
        let name = name(&root.inst, from, root.index, &ask.nonce, &nonce);
        self.take_place(&root, from, name)?;
        self.setups.begin(root.tag, root.ca, name, root.index, members);
        let this = Arc::clone(self);
        self.parts.runtime.spawn(async move { this.finish(&root, from, name).await });
        Ok(nonce.to_vec())
    }

    /// One setup of a pair at a time, few in an hour, one that was asked for at a time.
    fn take_place(&self, root: &Root, from: NodeIndex, name: [u8; 32]) -> Result<(), Refusal> {
        let mut peers = lock(&self.peers);
        let other = |(peer, known): (&(RootTag, NodeIndex), &Peer)| {
            *peer != (root.tag, from) && matches!(known.current, Some(Current::Answering(_)))
        };
        if peers.iter().any(other) {
            return Err(Refusal::new(RefusalCode::Overloaded, "one setup of a pair at a time", "one under way").retry_after(1000));
        }
        let known = peers.entry((root.tag, from)).or_default();
        if matches!(known.current, Some(Current::Asking(_))) && root.index < from {
            let expected = format!("the setup that node {} asked for", root.index);
            return Err(Refusal::new(RefusalCode::NotYet, expected, "both ends asked: the lower index goes first").retry_after(1000));
        }
        known.begin(Instant::now())?;
        // A second ask of the same node means that it gave up the first one.
        if let Some(Current::Answering(before)) = known.current.replace(Current::Answering(name)) {
            self.setups.forget(&before);
        }
        Ok(())
    }

    async fn finish(&self, root: &Root, from: NodeIndex, name: [u8; 32]) {
        let outcome = match self.finished(&name).await {
            Ok(()) => self.taken_over(root, from, &name).await,
            Err(refusal) => Err(refusal),
        };
        self.setups.forget(&name);
        metrics::pair_redone(root.tag, metrics::outcome(&outcome));
        let mut peers = lock(&self.peers);
        let known = peers.entry((root.tag, from)).or_default();
        if known.current == Some(Current::Answering(name)) {
            known.current = None;
        }
        match outcome {
            Ok(()) => {
                known.finished = Some(name);
                info!(root = root.tag.name(), peer_id = from.0, "secrets of a pair made anew, as the peer asked");
            }
            Err(refusal) => {
                warn!(root = root.tag.name(), peer_id = from.0, code = %refusal.code, got = refusal.got, "setup of a pair ended")
            }
        }
    }

    async fn taken_over(&self, root: &Root, from: NodeIndex, name: &[u8; 32]) -> Result<(), Refusal> {
        let pairs = self.setups.take(name).ok_or_else(|| Refusal::new(RefusalCode::NotYet, "the result of a setup", "none"))?;
        let current = lock(&self.peers).get(&(root.tag, from)).is_some_and(|known| known.current == Some(Current::Answering(*name)));
        if !current {
            return Err(Refusal::new(RefusalCode::NotYet, "the latest setup of the pair", "one that was asked for before it"));
        }
        self.parts.shares.adopt_pair(pairs)?;
        self.seal(root).await;
        Ok(())
    }

    /// Whether what came out of a setup that `from` asked for is in use and sealed here.
    pub(super) fn is_done(&self, from: NodeIndex, body: &[u8]) -> Result<Vec<u8>, Refusal> {
        let done = PairDone::decode(body)?;
        let peers = lock(&self.peers);
        let known = peers.get(&(done.root, from));
        if known.is_some_and(|known| known.finished == Some(done.name)) {
            return Ok(Vec::new());
        }
        if known.is_some_and(|known| known.current == Some(Current::Answering(done.name))) {
            return Err(Refusal::new(RefusalCode::NotYet, "a setup that is done", "under way").retry_after(50));
        }
        Err(Refusal::new(RefusalCode::SignRun, "a setup that this node knows", "none of that name"))
    }

    async fn finished(&self, name: &[u8; 32]) -> Result<(), Refusal> {
        let until = Instant::now() + SETUP_TIMEOUT;
        loop {
            match self.setups.is_done(name) {
                Some(true) => return Ok(()),
                Some(false) if Instant::now() < until => tokio::time::sleep(POLL_EVERY).await,
                Some(false) => return Err(Refusal::new(RefusalCode::DeadlineExceeded, "a setup of a pair to its end", "no end")),
                None => return Err(Refusal::new(RefusalCode::SignRun, "a setup of a pair to its end", "it failed").retry_after(1000)),
            }
        }
    }

    /// Seals the pairs of a root, if they changed. Where nothing is sealed they end with the process, as the share does.
    async fn seal(&self, root: &Root) {
        let Some(secret) = self.parts.shares.pairs_to_seal(root.tag) else { return };
        let (files, file, name) = (Arc::clone(&self.parts.files), root.file, root.tag.name());
        let saved = self.parts.runtime.spawn_blocking(move || files.save_pairs(&file, &secret)).await;
        if let Ok(Err(reason)) = saved {
            warn!(reason, root = name, "secrets of pairs are in memory only: they are lost with this process");
        }
    }

    /// The pairs of `tag`, where this node holds a share of it in use and pairs.
    fn root(&self, tag: RootTag) -> Result<Root, Refusal> {
        let none = |what: &str| Refusal::new(RefusalCode::NotReady, "secrets of pairs of this root", what).retry_after(1000);
        if self.parts.shares.pairs_missing(tag).is_none() {
            return Err(none("none in use here"));
        }
        let share = self.parts.shares.in_use_of(tag).ok_or_else(|| none("no share"))?;
        let file = ShareName::share(self.parts.cluster_id, tag, share.generation, share.epoch, share.index);
        let found = read(&*self.parts.log, |state| seen(state, tag, share.generation))?;
        let (ca, inst, seats) = found.ok_or_else(|| none("the root is not in force"))?;
        Ok(Root { tag, ca, inst, index: share.index, seats, file })
    }
}

/// Algorithm of root `ca`, name of the key generation, holders with a seat.
fn seen(state: &State, tag: RootTag, generation: Generation) -> Option<(CaAlgorithm, [u8; 32], Members)> {
    let ca = state.genesis.ca_algorithm;
    let row = state.roots.get(&(generation, tag)).filter(|_| has_pairwise_setup(tag, ca))?;
    let seats = state.seats.iter().filter(|(_, seat)| row.vks.contains_key(&seat.index));
    Some((ca, row.inst, seats.map(|(seat, row)| (row.index, *seat)).collect()))
}

fn name(inst: &[u8; 32], asks: NodeIndex, answers: NodeIndex, nonce: &[u8; 32], answer: &[u8; 32]) -> [u8; 32] {
    sha256(&[b"DKMS-V1-PAIRNAME", inst, &asks.0.to_be_bytes(), &answers.0.to_be_bytes(), nonce, answer])
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_read_as_they_are_written_and_nothing_else_is() {
        let ask = PairAsk { root: RootTag::Id, inst: [1; 32], nonce: [2; 32] };
        let done = PairDone { root: RootTag::Ca, name: [3; 32] };
        assert_eq!((PairAsk::decode(&ask.encode()), PairDone::decode(&done.encode())), (Ok(ask.clone()), Ok(done.clone())));
        for bytes in [ask.encode(), done.encode()] {
            for cut in 0..bytes.len() {
                assert!(PairAsk::decode(&bytes[..cut]).is_err() && PairDone::decode(&bytes[..cut]).is_err(), "{cut}");
            }
            let long = [bytes.as_slice(), &[0]].concat();
            assert!(PairAsk::decode(&long).is_err() && PairDone::decode(&long).is_err());
        }
        let mut unknown = ask.encode();
        unknown[16] = 9;
        assert!(PairAsk::decode(&unknown).is_err(), "no such root");
    }

    #[test]
    fn every_part_changes_the_name() {
        let (i, j) = (NodeIndex(1), NodeIndex(2));
        let base = name(&[1; 32], i, j, &[2; 32], &[3; 32]);
        for other in [
            name(&[0; 32], i, j, &[2; 32], &[3; 32]),
            name(&[1; 32], j, i, &[2; 32], &[3; 32]),
            name(&[1; 32], i, j, &[0; 32], &[3; 32]),
            name(&[1; 32], i, j, &[2; 32], &[0; 32]),
        ] {
            assert_ne!(other, base);
        }
    }

    #[test]
    fn a_peer_gets_few_setups_an_hour() {
        let (mut peer, start) = (Peer::default(), Instant::now());
        for _ in 0..OF_ONE_PER_HOUR {
            peer.begin(start).unwrap();
        }
        let refusal = peer.begin(start + HOUR / 2).unwrap_err();
        assert_eq!((refusal.code, refusal.retry_after_ms), (RefusalCode::RateLimited, 1_800_000));
        peer.begin(start + HOUR).unwrap();
        assert_eq!(peer.begun.len(), 1);
    }
}
