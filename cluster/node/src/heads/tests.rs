//! Heads of a real log, signed by the cluster's own keys: certificates, early ones, deviations, forks, restarts.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Weak;

use dstack_actors::ports::Later;

use super::*;
use crate::support::cluster::Cluster;
use crate::support::log::SharedLog;

/// The other nodes' heads, in the same process.
#[derive(Default)]
struct Others {
    nodes: Mutex<BTreeMap<Seat, Weak<Heads>>>,
    /// What these seats answer whatever they are asked.
    lies: Mutex<BTreeMap<Seat, Vec<u8>>>,
    asked: Mutex<Vec<Seat>>,
}

impl Peers for Others {
    fn post(&self, seat: Seat, path: &'static str, body: Vec<u8>, _timeout: Duration) -> Later<Result<Vec<u8>, Refusal>> {
        self.asked.lock().unwrap().push(seat);
        let node = self.nodes.lock().unwrap().get(&seat).and_then(Weak::upgrade);
        let lie = self.lies.lock().unwrap().get(&seat).cloned();
        Box::pin(async move {
            let gone = || Refusal::new(RefusalCode::NotReady, "a running node", "none");
            if let Some(lie) = lie {
                return Ok(lie);
            }
            let node = node.ok_or_else(gone)?;
            match path {
                PATH_PEER_HEAD => node.pushed(SignedHead::decode(&body)?).map(|()| Vec::new()),
                PATH_PEER_CERTIFICATE => {
                    let size = u64::from_be_bytes(body.try_into().map_err(|_| gone())?);
                    node.certificate_of(size).map(|certificate| certificate.encode()).ok_or_else(gone)
                }
                _ => Err(gone()),
            }
        })
    }
    fn latency(&self, _seat: Seat) -> Option<Duration> {
        None
    }
}

struct World {
    cluster: Cluster,
    wire: Arc<Others>,
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self { cluster: Cluster::new(3, 0), wire: Arc::default(), dir: tempfile::tempdir().unwrap() }
    }

    fn dir(&self, seat: u16) -> PathBuf {
        self.dir.path().join(format!("node-{seat}")).join("certificates")
    }

    fn node(&self, seat: u16) -> Arc<Heads> {
        self.node_over(seat, &self.cluster.log)
    }

    fn node_over(&self, seat: u16, log: &Arc<SharedLog>) -> Arc<Heads> {
        let key = Arc::clone(&self.cluster.keys[usize::from(seat) - 1]);
        let others = (1..=3).filter(|other| *other != seat).map(Seat).collect();
        let heads = Heads::new(self.cluster.id, Seat(seat), key, log.node(false), self.wire.clone(), others, self.dir(seat));
        self.wire.nodes.lock().unwrap().insert(Seat(seat), Arc::downgrade(&heads));
        heads
    }

    /// Another beacon; the head that is due with it.
    fn next_head(&self) -> Head {
        assert_eq!(self.cluster.beacon(self.cluster.log_time().plus_ms(1000)), None);
        *self.cluster.log.heads().last().unwrap()
    }

    fn head(&self) -> Head {
        *self.cluster.log.heads().last().unwrap()
    }

    fn signed(&self, index: u16, head: Head) -> SignedHead {
        let key = &self.cluster.keys[usize::from(index) - 1];
        SignedHead { head, index: NodeIndex(index), sig: key.sign(&head.signed_bytes(&self.cluster.id)) }
    }

    fn certificate(&self, head: Head, indices: &[u16]) -> HeadCert {
        HeadCert { head, signatures: indices.iter().map(|index| (NodeIndex(*index), self.signed(*index, head).sig)).collect() }
    }

    fn fork_text(&self, seat: u16) -> String {
        std::fs::read_to_string(self.dir(seat).with_file_name("FORK.txt")).unwrap()
    }
}

fn other(head: Head) -> Head {
    let mut other = head;
    other.log_root[0] ^= 1;
    other
}

fn stopped(heads: &Heads) -> Option<String> {
    heads.watch_fork().borrow().clone()
}

fn has_file(dir: &Path, size: u64) -> bool {
    dir.join(format!("{size}.cert")).exists()
}

#[tokio::test]
async fn a_certificate_needs_a_quorum_of_signatures() {
    let w = World::new();
    let nodes: Vec<_> = (1..=3).map(|seat| w.node(seat)).collect();
    let head = w.head();
    nodes[0].due(head).await;
    assert!(nodes.iter().all(|node| node.certificate_of(head.size).is_none() && !node.certifies_beacon(head.size - 1)));
    nodes[1].due(head).await;
    for node in &nodes {
        assert!(node.certifies_beacon(head.size - 1));
        assert_eq!(node.certified_size(), head.size);
        assert_eq!(node.certificate_of(head.size).unwrap(), w.certificate(head, &[1, 2]));
        assert_eq!(stopped(node), None);
    }
    assert!((1..=3).all(|seat| has_file(&w.dir(seat), head.size)));
}

#[tokio::test]
async fn signatures_that_do_not_verify_are_refused() {
    let w = World::new();
    let node = w.node(1);
    let good = w.signed(2, w.head());
    let mut forged = good;
    forged.sig[0] ^= 1;
    let mut renamed = good;
    renamed.index = NodeIndex(3);
    let mut stranger = good;
    stranger.index = NodeIndex(9);
    for bad in [forged, renamed, stranger] {
        assert_eq!(node.pushed(bad).unwrap_err().code, RefusalCode::BadMessageSignature);
    }
    let mut unknown = w.head();
    unknown.members_version = 7;
    let refusal = node.pushed(w.signed(2, unknown)).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::NotReady);
    assert!(refusal.retry_after_ms > 0);
    node.pushed(good).unwrap();
    node.pushed(good).unwrap();
    assert!(!node.certifies_beacon(w.head().size - 1), "one signer twice is one signer");
}

#[tokio::test]
async fn an_early_signature_is_kept_and_counted_after_applying() {
    let w = World::new();
    let head = w.next_head();
    let behind = w.cluster.log.behind(1);
    let node = w.node_over(1, &behind);
    node.pushed(w.signed(2, head)).unwrap();
    node.pushed(w.signed(3, head)).unwrap();
    assert!(node.certificate_of(head.size).is_none(), "nothing counts before it is applied");
    behind.catch_up(&w.cluster.log);
    assert_eq!(behind.heads().last(), Some(&head));
    node.due(head).await;
    assert_eq!(node.certificate_of(head.size).map(|certificate| certificate.head), Some(head));
    assert!(node.book().early.by_signer.is_empty());
}

#[tokio::test]
async fn a_signer_that_signs_sizes_without_end_displaces_nobodys_early_signature() {
    let w = World::new();
    let head = w.next_head();
    let behind = w.cluster.log.behind(1);
    let node = w.node_over(1, &behind);
    node.pushed(w.signed(2, head)).unwrap();
    // Signer 3 is faulty: every size after that one, more than all signers together have room for.
    for size in 1..=u64::try_from(EARLY_EACH_MAX).unwrap() * 4 {
        node.pushed(w.signed(3, Head { size: head.size + size, ..head })).unwrap();
    }
    let held: Vec<(u16, usize)> = node.book().early.by_signer.iter().map(|(index, own)| (index.0, own.len())).collect();
    assert_eq!(held, vec![(2, 1), (3, EARLY_EACH_MAX)]);
    behind.catch_up(&w.cluster.log);
    node.due(head).await;
    assert_eq!(node.certificate_of(head.size), Some(w.certificate(head, &[1, 2])));
}

#[tokio::test]
async fn an_early_certificate_is_compared_after_applying() {
    let w = World::new();
    let head = w.next_head();
    for (certified, forked) in [(head, false), (other(head), true)] {
        let behind = w.cluster.log.behind(1);
        let node = w.node_over(1, &behind);
        assert!(node.certificate(&w.certificate(certified, &[2, 3])));
        assert!(!node.certifies_beacon(head.size - 1));
        behind.catch_up(&w.cluster.log);
        node.due(head).await;
        assert_eq!(stopped(&node).is_some(), forked);
        assert_eq!(node.certifies_beacon(head.size - 1), !forked);
    }
}

#[tokio::test]
async fn a_lone_deviating_signature_raises_an_alarm_and_stops_nothing() {
    let w = World::new();
    let node = w.node(1);
    let head = w.head();
    node.due(head).await;
    node.pushed(w.signed(2, other(head))).unwrap();
    assert_eq!(node.book().deviated.iter().copied().collect::<Vec<_>>(), vec![(head.size, NodeIndex(2))]);
    assert_eq!(stopped(&node), None);
    // It signs the right head too: that is two heads of one size, and counts for nothing.
    node.pushed(w.signed(2, head)).unwrap();
    assert!(!node.certifies_beacon(head.size - 1));
    node.pushed(w.signed(3, head)).unwrap();
    assert_eq!(node.certificate_of(head.size), Some(w.certificate(head, &[1, 3])));
    assert_eq!(stopped(&node), None);
}

#[tokio::test]
async fn a_deviation_that_came_before_the_own_head_is_noticed() {
    let w = World::new();
    let node = w.node(1);
    let head = w.head();
    node.pushed(w.signed(3, other(head))).unwrap();
    assert!(node.book().deviated.is_empty(), "nothing to compare with yet");
    node.due(head).await;
    assert_eq!(node.book().deviated.iter().copied().collect::<Vec<_>>(), vec![(head.size, NodeIndex(3))]);
    assert_eq!(stopped(&node), None);
}

#[tokio::test]
async fn a_certificate_that_contradicts_the_own_log_stops_the_node_and_names_who_signed_both() {
    let w = World::new();
    let node = w.node(1);
    let head = w.head();
    node.due(head).await;
    node.pushed(w.signed(2, head)).unwrap();
    assert!(node.certifies_beacon(head.size - 1));
    assert!(node.certificate(&w.certificate(other(head), &[2, 3])), "it verifies");
    let why = stopped(&node).expect("a fork stops the node");
    assert!(why.contains(&format!("size {}", head.size)) && why.ends_with(": 2"), "{why}");
    let evidence = w.fork_text(1);
    assert!(evidence.starts_with(&why) && evidence.contains("signatures"));
    assert_eq!(node.pushed(w.signed(3, head)).unwrap_err().code, RefusalCode::Fork);
    assert_eq!(node.certificate_of(head.size), Some(w.certificate(head, &[1, 2])), "what was certified stays");
}

#[tokio::test]
async fn a_fork_without_an_own_certificate_names_those_whose_signature_on_ours_is_at_hand() {
    let w = World::new();
    let node = w.node(1);
    let head = w.head();
    node.due(head).await;
    assert!(node.certificate(&w.certificate(other(head), &[2, 3])));
    let why = stopped(&node).unwrap();
    assert!(why.ends_with("nobody"), "no signature of 2 or 3 on ours is known: {why}");
    assert!(!node.certifies_beacon(head.size - 1));
}

#[tokio::test]
async fn a_contradicting_certificate_that_came_before_the_own_head_stops_the_node() {
    let w = World::new();
    let node = w.node(1);
    let head = w.head();
    assert!(node.certificate(&w.certificate(other(head), &[2, 3])));
    assert_eq!(stopped(&node), None, "this node has not noted its own head yet");
    node.due(head).await;
    assert!(stopped(&node).is_some());
    assert!(w.fork_text(1).contains("fork at size"));
}

#[tokio::test]
async fn two_certificates_of_one_size_stop_the_node() {
    let w = World::new();
    let node = w.node(1);
    let head = w.head();
    assert!(node.certificate(&w.certificate(head, &[1, 2])));
    assert!(node.certificate(&w.certificate(other(head), &[2, 3])));
    let why = stopped(&node).unwrap();
    assert!(why.contains("two certified heads differ") && why.ends_with(": 2"), "{why}");
}

#[tokio::test]
async fn a_certificate_below_the_quorum_is_nothing() {
    let w = World::new();
    let node = w.node(1);
    let head = w.head();
    node.due(head).await;
    let mut forged = w.certificate(other(head), &[2, 3]);
    forged.signatures[1].1[0] ^= 1;
    let mut twice = w.certificate(other(head), &[2, 2]);
    twice.head = other(head);
    for bad in [w.certificate(other(head), &[2]), forged, twice] {
        assert!(!node.certificate(&bad));
    }
    assert_eq!(stopped(&node), None);
}

#[tokio::test]
async fn certificates_survive_a_restart_and_broken_files_do_not_count() {
    let w = World::new();
    let first = w.head();
    let second = w.next_head();
    let before = w.node(1);
    for head in [first, second] {
        assert!(before.certificate(&w.certificate(head, &[1, 2])));
    }
    drop(before);
    // The second file is cut, as a disk may leave it.
    let path = w.dir(1).join(format!("{}.cert", second.size));
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let after = w.node(1);
    assert!(!after.certifies_beacon(first.size - 1));
    after.load();
    assert!(after.certifies_beacon(first.size - 1));
    assert!(!after.certifies_beacon(second.size - 1));
    assert_eq!(after.certificate_of(first.size), Some(w.certificate(first, &[1, 2])));
    assert_eq!(after.certificate_of(second.size), None);
    // A file that somebody changed: whole, but without a quorum.
    std::fs::write(&path, w.certificate(second, &[2]).encode()).unwrap();
    after.load();
    assert!(!after.certifies_beacon(second.size - 1));
}

#[tokio::test]
async fn a_node_that_was_away_asks_for_what_it_lacks() {
    let w = World::new();
    let head = w.head();
    let (away, third) = (w.node(1), w.node(3));
    assert!(third.certificate(&w.certificate(head, &[2, 3])));
    w.wire.lies.lock().unwrap().insert(Seat(2), w.certificate(other(head), &[2]).encode());
    away.fetch_missing().await;
    assert!(away.certifies_beacon(head.size - 1), "the first answer is no certificate, the second is");
    assert_eq!(*w.wire.asked.lock().unwrap(), vec![Seat(2), Seat(3)]);
    away.fetch_missing().await;
    assert_eq!(w.wire.asked.lock().unwrap().len(), 2, "nothing is missing");
}

#[tokio::test]
async fn a_snapshot_is_confirmed_by_its_certificate_or_stops_the_node() {
    let w = World::new();
    let head = w.head();
    let node = w.node(1);
    node.await_confirmation(head);
    assert!(!node.confirms(&head), "no certificate yet");
    assert!(node.certificate(&w.certificate(head, &[2, 3])));
    assert!(node.confirms(&head));
    assert_eq!(stopped(&node), None);

    let misled = w.node(2);
    misled.await_confirmation(other(head));
    assert!(misled.certificate(&w.certificate(head, &[1, 3])));
    assert!(!misled.confirms(&other(head)));
    assert!(stopped(&misled).is_some());
}
