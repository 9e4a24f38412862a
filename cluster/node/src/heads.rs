//! Heads: sign after applying, push, collect certificates, notice forks.
//!
//! Owns: tallies, certificates beside the log, what this node's own heads were. Never: un-applies; a contradiction stops the node
//! and keeps both sides. Source: threshold.md §2.6 "Heads"; architecture.md §2.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dstack_actors::ports::{Certificates, Log, Peers, read};
use dstack_audit::{CertifiedHead, Fork, HeadTally, HeadVote, SignerSet};
use dstack_protocol::log::{Head, HeadCert, SignedHead};
use dstack_protocol::rpc::{PATH_PEER_CERTIFICATE, PATH_PEER_HEAD};
use dstack_protocol::{ClusterId, NodeIndex, Refusal, RefusalCode, Seat, Wire};
use dstack_threshold::message::NodeKey;
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::files::write_durably;

/// Certificates and own heads kept in memory.
const KEPT_MAX: usize = 4096;
/// Certificates kept for sizes that this node has not applied yet; each bears a quorum's signatures.
const AHEAD_MAX: usize = 1024;
/// Signatures of one signer kept for sizes that this node has not applied yet.
const EARLY_EACH_MAX: usize = 64;
/// Members versions whose signers are kept.
const SIGNER_SETS_MAX: usize = 16;
/// Own heads that are compared with the certificates of others after a fork.
const ATTRIBUTED_MAX: usize = 64;
const PUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// See the module text.
pub(crate) struct Heads {
    cluster_id: ClusterId,
    seat: Seat,
    node_key: Arc<NodeKey>,
    log: Arc<dyn Log>,
    peers: Arc<dyn Peers>,
    others: Vec<Seat>,
    dir: PathBuf,
    book: Mutex<Book>,
    fork: watch::Sender<Option<String>>,
}

#[derive(Default)]
struct Book {
    own: BTreeMap<u64, Head>,
    tallies: BTreeMap<u64, HeadTally>,
    early: Early,
    certified: BTreeMap<u64, CertifiedHead>,
    /// Certificates that came before this node applied their size: compared on getting there.
    ahead: BTreeMap<u64, HeadCert>,
    /// Size of the snapshot whose certificate is awaited.
    awaited: Option<u64>,
    /// Signers by members version, for when the state is closed by a fork.
    signers: BTreeMap<u64, SignerSet>,
    /// Signers that deviated; an alarm each, once.
    deviated: BTreeSet<(u64, NodeIndex)>,
}

/// Signatures for sizes that this node has not applied yet, by signer: each has a room of its own, so that one who signs much displaces
/// nobody else's. Bounded by the signers that the log knows.
#[derive(Default)]
struct Early {
    by_signer: BTreeMap<NodeIndex, BTreeMap<u64, SignedHead>>,
}

impl Early {
    fn keep(&mut self, signed: SignedHead) {
        let own = self.by_signer.entry(signed.index).or_default();
        own.insert(signed.head.size, signed);
        while own.len() > EARLY_EACH_MAX {
            own.pop_first();
        }
    }

    /// Takes out what was signed for `size`.
    fn take(&mut self, size: u64) -> Vec<SignedHead> {
        let due = self.by_signer.values_mut().filter_map(|own| own.remove(&size)).collect();
        self.by_signer.retain(|_, own| !own.is_empty());
        due
    }
}

impl Book {
    /// Whether this is the first deviation of that signer at that size. Bounded: a liar costs no memory.
    fn first_deviation(&mut self, size: u64, index: NodeIndex) -> bool {
        let first = self.deviated.insert((size, index));
        while self.deviated.len() > KEPT_MAX {
            self.deviated.pop_first();
        }
        first
    }
}

impl Heads {
    /// Certificates live in `dir`.
    pub(crate) fn new(
        cluster_id: ClusterId,
        seat: Seat,
        node_key: Arc<NodeKey>,
        log: Arc<dyn Log>,
        peers: Arc<dyn Peers>,
        others: Vec<Seat>,
        dir: PathBuf,
    ) -> Arc<Self> {
        let (fork, _) = watch::channel(None);
        Arc::new(Self { cluster_id, seat, node_key, log, peers, others, dir, book: Mutex::default(), fork })
    }

    /// Set once, when this node saw two histories that cannot both be true.
    pub(crate) fn watch_fork(&self) -> watch::Receiver<Option<String>> {
        self.fork.subscribe()
    }

    /// This node applied up to a head that is due: signs, counts, pushes.
    pub(crate) async fn due(&self, head: Head) {
        let Some(own) = self.note_own(head) else { return };
        self.compare_with_earlier(&head);
        let signed = SignedHead { head, index: own, sig: self.node_key.sign(&head.signed_bytes(&self.cluster_id)) };
        self.take(signed);
        let early = self.book().early.take(head.size);
        early.into_iter().for_each(|signed| self.take(signed));
        // Taken out first: the certificate is compared under the same lock.
        let ahead = self.book().ahead.remove(&head.size);
        if let Some(ahead) = ahead {
            self.certificate(&ahead);
        }
        futures::future::join_all(self.others.iter().map(|seat| self.push(*seat, signed))).await;
    }

    async fn push(&self, seat: Seat, signed: SignedHead) {
        // A node that was away asks for the certificate itself.
        for pause_ms in [0u64, 200, 1000] {
            tokio::time::sleep(Duration::from_millis(pause_ms)).await;
            match self.peers.post(seat, PATH_PEER_HEAD, signed.encode(), PUSH_TIMEOUT).await {
                Ok(_) => return,
                Err(refusal) if refusal.code == RefusalCode::Fork => return self.note_fork_elsewhere(seat),
                Err(_) => {}
            }
        }
    }

    fn note_fork_elsewhere(&self, seat: Seat) {
        error!(peer_id = seat.0, "a peer has stopped on a fork");
    }

    /// This node's index, once it may sign; notes the head as its own.
    fn note_own(&self, head: Head) -> Option<NodeIndex> {
        let key = self.node_key.public();
        let seat = self.seat;
        let index = read(&*self.log, |state| state.seats.get(&seat).filter(|row| row.node_key == key).map(|row| row.index)).ok().flatten();
        let mut book = self.book();
        book.own.insert(head.size, head);
        while book.own.len() > KEPT_MAX {
            book.own.pop_first();
        }
        index
    }

    /// Signatures and certificates of this size may have come after it was applied and before this node noted its own head.
    fn compare_with_earlier(&self, head: &Head) {
        let (deviating, fork) = {
            let mut book = self.book();
            let votes = book.tallies.get(&head.size).map(|tally| tally.votes().filter(|vote| vote.head != *head).map(|vote| vote.index));
            let indices: Vec<NodeIndex> = votes.into_iter().flatten().collect();
            let deviating: Vec<NodeIndex> = indices.into_iter().filter(|index| book.first_deviation(head.size, *index)).collect();
            (deviating, book.certified.get(&head.size).and_then(|certified| contradiction(&book, head, certified)))
        };
        deviating.into_iter().for_each(|index| deviates(index, head.size));
        if let Some(fork) = fork {
            self.stop(&fork);
        }
    }

    /// Takes a pushed signature.
    ///
    /// # Errors
    /// A signature that does not verify is refused; one for a size not applied yet is kept.
    pub(crate) fn pushed(&self, signed: SignedHead) -> Result<(), Refusal> {
        if self.fork.borrow().is_some() {
            return Err(Refusal::new(RefusalCode::Fork, "one log", "this node has stopped on a fork"));
        }
        let signers = self.signers(signed.head.members_version)?;
        signers
            .verify_head(&self.cluster_id, &signed)
            .map_err(|error| Refusal::new(RefusalCode::BadMessageSignature, "a head signed by who it names", error.to_string()))?;
        let applied = read(&*self.log, |state| state.size)?;
        if signed.head.size > applied {
            self.book().early.keep(signed);
            return Ok(());
        }
        self.take(signed);
        Ok(())
    }

    fn take(&self, signed: SignedHead) {
        let Ok(signers) = self.signers(signed.head.members_version) else { return };
        let vote = {
            let mut book = self.book();
            let size = signed.head.size;
            let differs = book.own.get(&size).is_some_and(|own| *own != signed.head);
            if differs && book.first_deviation(size, signed.index) {
                deviates(signed.index, size);
            }
            let cluster_id = self.cluster_id;
            let tally = book.tallies.entry(size).or_insert_with(|| HeadTally::new(cluster_id, signers, size));
            let vote = tally.add(signed);
            while book.tallies.len() > KEPT_MAX {
                book.tallies.pop_first();
            }
            vote
        };
        match vote {
            Ok(HeadVote::Certified(certified)) => self.keep(certified, true),
            Ok(HeadVote::Equivocation { culprit, .. }) => {
                error!(index = culprit.0, "a signer signed two heads of one size");
                crate::status::deviation();
            }
            Ok(HeadVote::Counted) | Err(_) => {}
        }
    }

    /// Takes a certificate from a peer or from disk. False if it does not verify.
    pub(crate) fn certificate(&self, certificate: &HeadCert) -> bool {
        let Ok(signers) = self.signers(certificate.head.members_version) else { return false };
        let Ok(certified) = signers.certify(&self.cluster_id, certificate) else { return false };
        // After a fork the state is closed; what this node signed is not.
        let own = || self.book().own.keys().next_back().copied().unwrap_or(0);
        let applied = read(&*self.log, |state| state.size).unwrap_or_else(|_| own());
        if certificate.head.size > applied {
            let mut book = self.book();
            if book.ahead.len() < AHEAD_MAX {
                book.ahead.insert(certificate.head.size, certificate.clone());
            }
            return true;
        }
        self.keep(certified, true);
        true
    }

    /// Compares with the own log and what was certified before, then keeps.
    fn keep(&self, certified: CertifiedHead, store: bool) {
        let size = certified.head().size;
        let fork = {
            let book = self.book();
            let known = book.certified.get(&size).and_then(|known| Fork::between(known, &certified));
            known.or_else(|| contradiction(&book, book.own.get(&size)?, &certified))
        };
        if let Some(fork) = fork {
            return self.stop(&fork);
        }
        let bytes = certified.certificate().encode();
        {
            let mut book = self.book();
            if book.certified.insert(size, certified).is_some() {
                return;
            }
            while book.certified.len() > KEPT_MAX {
                book.certified.pop_first();
            }
        }
        if store && let Err(error) = write_durably(&self.path(size), &bytes) {
            warn!(reason = format!("{error:#}"), size, "certificate not kept on disk");
        }
    }

    /// `FORK`: keeps both sides, names who signed both, stops serving.
    fn stop(&self, fork: &Fork) {
        let culprits: Vec<u16> = fork.culprits().iter().map(|index| index.0).collect();
        error!(%fork, ?culprits, "FORK: this node stops");
        let evidence = format!("{fork}\n\n{fork:#?}\n");
        if let Err(error) = write_durably(&self.dir.with_file_name("FORK.txt"), evidence.as_bytes()) {
            error!(reason = format!("{error:#}"), "evidence of the fork could not be written");
        }
        self.fork.send_replace(Some(fork.to_string()));
    }

    /// A leader contradicted what this node applied. Who signed both is not known yet: see [`Heads::attribute`].
    pub(crate) fn contradicted(&self, why: &str) {
        error!(why, "FORK: this node stops");
        self.fork.send_if_modified(|fork| fork.is_none() && fork.replace(why.to_owned()).is_none());
    }

    /// Asks the others for certificates of this node's own heads, newest first: one that differs names who signed both. True once it did.
    pub(crate) async fn attribute(&self) -> bool {
        let sizes: Vec<u64> = self.book().own.keys().rev().copied().take(ATTRIBUTED_MAX).collect();
        for size in sizes {
            for seat in &self.others {
                let answer = self.peers.post(*seat, PATH_PEER_CERTIFICATE, size.to_be_bytes().to_vec(), PUSH_TIMEOUT).await;
                if let Ok(bytes) = answer
                    && let Ok(certificate) = HeadCert::decode(&bytes)
                    && certificate.head.size == size
                    && self.book().own.get(&size).is_some_and(|own| *own != certificate.head)
                    && self.certificate(&certificate)
                {
                    return true;
                }
            }
        }
        false
    }

    /// A certificate at hand, in memory or on disk.
    pub(crate) fn certificate_of(&self, size: u64) -> Option<HeadCert> {
        let kept = self.book().certified.get(&size).map(|certified| certified.certificate().clone());
        kept.or_else(|| HeadCert::decode(&std::fs::read(self.path(size)).ok()?).ok())
    }

    /// Whether a certificate confirms the head of the snapshot that this node's state came from. One that contradicts it stops the node.
    pub(crate) fn confirms(&self, snapshot: &Head) -> bool {
        let certified = self.book().certified.get(&snapshot.size).cloned();
        let Some(certified) = certified else { return false };
        match Fork::with_own_log(snapshot, &[], &certified) {
            None => true,
            Some(fork) => {
                self.stop(&fork);
                false
            }
        }
    }

    /// The head of this node's snapshot: compared with what peers certified, and asked for while it has no certificate.
    pub(crate) fn await_confirmation(&self, snapshot: Head) {
        self.book().own.insert(snapshot.size, snapshot);
        self.book().awaited = Some(snapshot.size);
        if let Some(certificate) = self.certificate_of(snapshot.size) {
            self.certificate(&certificate);
        }
    }

    /// Heads signed by others that this node has not come to.
    #[cfg(feature = "insecure-rogue")]
    pub(crate) fn early(&self) -> Vec<SignedHead> {
        self.book().early.by_signer.values().flat_map(BTreeMap::values).copied().collect()
    }

    /// Highest certified size.
    pub(crate) fn certified_size(&self) -> u64 {
        self.book().certified.keys().next_back().copied().unwrap_or(0)
    }

    /// Loads certificates of beacons that the state still keeps.
    pub(crate) fn load(&self) {
        let sizes = self.wanted();
        let mut loaded = 0usize;
        for size in sizes {
            let bytes = std::fs::read(self.path(size)).ok();
            if let Some(Ok(certificate)) = bytes.map(|bytes| HeadCert::decode(&bytes))
                && let Ok(signers) = self.signers(certificate.head.members_version)
                && let Ok(certified) = signers.certify(&self.cluster_id, &certificate)
            {
                self.keep(certified, false);
                loaded += 1;
            }
        }
        info!(loaded, "certificates loaded");
    }

    /// Beacons of the state without a certificate here: asks peers for them.
    pub(crate) async fn fetch_missing(&self) {
        let awaited = self.book().awaited;
        for size in awaited.into_iter().chain(self.wanted().into_iter().rev().take(16)) {
            if self.book().certified.contains_key(&size) {
                continue;
            }
            for seat in &self.others {
                let answer = self.peers.post(*seat, PATH_PEER_CERTIFICATE, size.to_be_bytes().to_vec(), PUSH_TIMEOUT).await;
                if let Ok(bytes) = answer
                    && let Ok(certificate) = HeadCert::decode(&bytes)
                    && certificate.head.size == size
                    && self.certificate(&certificate)
                {
                    break;
                }
            }
        }
    }

    fn wanted(&self) -> Vec<u64> {
        read(&*self.log, |state| state.beacons.keys().map(|pos| pos.saturating_add(1)).collect()).unwrap_or_default()
    }

    fn signers(&self, version: u64) -> Result<SignerSet, Refusal> {
        let found = read(&*self.log, |state| (state.members.get(&version).map(|members| members.signers.clone()), state.genesis.f));
        let (signers, f) = match found {
            Ok(found) => found,
            Err(refusal) => return self.book().signers.get(&version).cloned().ok_or(refusal),
        };
        let unknown = || Refusal::new(RefusalCode::NotReady, "a members version applied here", version.to_string()).retry_after(200);
        let signers = SignerSet::new(version, f, signers.ok_or_else(unknown)?)
            .map_err(|error| Refusal::new(RefusalCode::Internal, "signers", error.to_string()))?;
        let mut book = self.book();
        book.signers.insert(version, signers.clone());
        while book.signers.len() > SIGNER_SETS_MAX {
            book.signers.pop_first();
        }
        drop(book);
        Ok(signers)
    }

    fn path(&self, size: u64) -> PathBuf {
        self.dir.join(format!("{size}.cert"))
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A lone deviating signature stops nothing; it names its signer.
fn deviates(index: NodeIndex, size: u64) {
    error!(index = index.0, size, "a signer signed another head than this node applied");
    crate::status::deviation();
}

/// The fork between this node's own head and a certificate of its size, with those who are known to have signed both.
fn contradiction(book: &Book, own: &Head, certified: &CertifiedHead) -> Option<Fork> {
    let votes = book.tallies.get(&own.size).map(HeadTally::votes);
    let signed_ours: Vec<NodeIndex> = votes.into_iter().flatten().filter(|vote| vote.head == *own).map(|vote| vote.index).collect();
    Fork::with_own_log(own, &signed_ours, certified)
}

impl Certificates for Heads {
    fn certifies_beacon(&self, pos: u64) -> bool {
        self.book().certified.contains_key(&pos.saturating_add(1))
    }
}

#[cfg(test)]
mod tests;
