//! Nodes that make roots and sign with them: the real ceremony actor, share holder and signing service over one log of a test.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use actix::{Actor as _, Arbiter};
use dstack_actors::ceremony::{self, Ceremony, Look, NodeJudge, ShareFiles};
use dstack_actors::ports::{Later, Now, Peers};
use dstack_actors::share_holder::{Pairs, ShareHolderPool};
use dstack_actors::signing::pairwise::Setups;
use dstack_actors::signing::{Signing, claim, signer};
use dstack_actors::verifier::VerifierPool;
use dstack_protocol::{Epoch, Generation, NodeIndex, Refusal, RefusalCode, RootTag, Seat};
use dstack_secret::{Locked, Secret, SecretBytes};
use dstack_tee::Device as _;
use dstack_testkit::Machine;
use dstack_threshold::share::ShareId;
use dstack_threshold::share_file::{SealingKey, ShareName, open, open_pairs, seal, seal_pairs};
use tokio::runtime::Handle;

use super::cluster::{Cluster, DeviceEvidence};
use super::until;

/// Sealed shares of one machine, in memory.
pub struct Sealed {
    key: SealingKey,
    files: Mutex<BTreeMap<String, Vec<u8>>>,
}

impl Sealed {
    pub fn on(cluster: &Cluster, machine: &Machine) -> Arc<Self> {
        let platform_key = machine.platform_key(b"seal").unwrap().unwrap();
        let key = SealingKey::derive(&cluster.id, &machine.measurement(), None, Some(&platform_key)).unwrap();
        Arc::new(Self { key, files: Mutex::default() })
    }

    pub fn count(&self) -> usize {
        self.files.lock().unwrap().len()
    }

    /// Takes over another's files.
    pub fn copy(&self, other: &Self) {
        self.files.lock().unwrap().clone_from(&other.files.lock().unwrap());
    }

    /// Turns a bit of every file with secrets of pairs; how many there were.
    pub fn damage_pairs(&self) -> usize {
        let mut files = self.files.lock().unwrap();
        let pairs = files.iter_mut().filter(|(name, _)| name.starts_with("pairs of"));
        pairs.map(|(_, file)| file[100] ^= 1).count()
    }

    /// With how many others the sealed secrets of pairs of root `id` are, for the node at `index`.
    pub fn pairs_sealed(&self, cluster: &Cluster, index: u16) -> usize {
        let name = ShareName::share(cluster.id, RootTag::Id, Generation(0), Epoch(1), NodeIndex(index));
        let pairs = self.load_pairs(&name).and_then(|bytes| Pairs::from_secret(RootTag::Id, &bytes).unwrap());
        pairs.map_or(0, |pairs| pairs.members().len() - 1 - pairs.missing().len())
    }

    /// Loses every file.
    pub fn wipe(&self) {
        self.files.lock().unwrap().clear();
    }
}

fn nonce() -> [u8; 24] {
    let mut nonce = [0; 24];
    getrandom::fill(&mut nonce).unwrap();
    nonce
}

impl ShareFiles for Sealed {
    fn load(&self, name: &ShareName) -> Option<Secret<32>> {
        open(&self.key, name, self.files.lock().unwrap().get(&format!("{name:?}"))?).ok()
    }
    fn save(&self, name: &ShareName, share: &Locked<32>) -> Result<(), String> {
        self.files.lock().unwrap().insert(format!("{name:?}"), seal(&self.key, name, share, nonce()));
        Ok(())
    }
    fn load_pairs(&self, name: &ShareName) -> Option<SecretBytes> {
        open_pairs(&self.key, name, self.files.lock().unwrap().get(&format!("pairs of {name:?}"))?).ok()
    }
    fn save_pairs(&self, name: &ShareName, pairs: &SecretBytes) -> Result<(), String> {
        self.files.lock().unwrap().insert(format!("pairs of {name:?}"), seal_pairs(&self.key, name, pairs, nonce()));
        Ok(())
    }
}

/// What a node does with another's evidence: verified, of that seat's machine, of an allowed measurement, over that report data.
pub fn judge(cluster: &Cluster) -> NodeJudge {
    let (verify, birth, now) = (cluster.judge(), Arc::clone(&cluster.birth), cluster.born);
    Arc::new(move |seat, evidence, report_data| {
        let identity = verify(evidence, &birth.genesis().collateral_id, now)?;
        let refuse = |code, what: &str| Err(Refusal::new(code, what, "another"));
        if identity.report_data() != report_data {
            return refuse(RefusalCode::EvidenceInvalid, "the report data of a Join");
        }
        if !birth.genesis().allowed_nodes.iter().any(|allowed| allowed.measurement == identity.measurement()) {
            return refuse(RefusalCode::MeasurementNotAllowed, "an allowed measurement");
        }
        let grant = birth.genesis().seats.iter().find(|grant| grant.seat == seat);
        if grant.is_none_or(|grant| grant.platform_identity != identity.platform_identity()) {
            return refuse(RefusalCode::PlatformIdentity, "the seat's machine");
        }
        Ok(())
    })
}

/// A message on its way: from, to, path, bytes.
pub type Letter = (Seat, Seat, &'static str, Vec<u8>);
/// What a wire does to a message; false swallows it.
pub type Wire = Box<dyn FnMut(&mut Letter) -> bool + Send>;

/// What happens to an answer on its way back.
pub type Back = Box<dyn FnMut(Seat, &'static str, &mut Vec<u8>) + Send>;

/// The wires between the nodes of a test.
#[derive(Default)]
pub struct Net {
    nodes: Mutex<BTreeMap<Seat, Signing>>,
    dead: Mutex<BTreeSet<Seat>>,
    wire: Mutex<Option<Wire>>,
    back: Mutex<Option<Back>>,
    sent: Mutex<Vec<Letter>>,
}

impl Net {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// From now on nobody reaches this node, nor does it reach anybody.
    pub fn cut(&self, seat: u16) {
        self.dead.lock().unwrap().insert(Seat(seat));
    }
    pub fn heal(&self, seat: u16) {
        self.dead.lock().unwrap().remove(&Seat(seat));
    }
    /// What happens to each message.
    pub fn wire(&self, wire: impl FnMut(&mut Letter) -> bool + Send + 'static) {
        *self.wire.lock().unwrap() = Some(Box::new(wire));
    }
    /// What happens to the answers of a node.
    pub fn answers(&self, back: impl FnMut(Seat, &'static str, &mut Vec<u8>) + Send + 'static) {
        *self.back.lock().unwrap() = Some(Box::new(back));
    }
    pub fn straight(&self) {
        *self.wire.lock().unwrap() = None;
        *self.back.lock().unwrap() = None;
    }
    /// Everything that was sent to a path.
    pub fn sent(&self, path: &str) -> Vec<Letter> {
        self.sent.lock().unwrap().iter().filter(|letter| letter.2 == path).cloned().collect()
    }
    pub fn forget(&self) {
        self.sent.lock().unwrap().clear();
    }
}

/// One node's end of the wires. Who sends is known to whom it reaches, as over RA-TLS.
pub struct Post {
    net: Arc<Net>,
    own: Seat,
}

impl Peers for Post {
    fn post(&self, seat: Seat, path: &'static str, body: Vec<u8>, timeout: Duration) -> Later<Result<Vec<u8>, Refusal>> {
        let gone = move || Refusal::new(RefusalCode::NotReady, format!("an answer from seat {seat}"), "none").retry_after(50);
        let mut letter = (self.own, seat, path, body);
        let delivered = self.net.wire.lock().unwrap().as_mut().is_none_or(|wire| wire(&mut letter));
        let dead = self.net.dead.lock().unwrap();
        let cut = dead.contains(&self.own) || dead.contains(&seat);
        drop(dead);
        let net = Arc::clone(&self.net);
        let target = self.net.nodes.lock().unwrap().get(&seat).cloned();
        self.net.sent.lock().unwrap().push(letter.clone());
        Box::pin(async move {
            if cut {
                return Err(gone());
            }
            let Some(target) = target.filter(|_| delivered) else {
                tokio::time::sleep(timeout.min(Duration::from_secs(2))).await;
                return Err(gone());
            };
            let (from, _, path, body) = letter;
            let mut answer =
                tokio::time::timeout(timeout, target.answer(NodeIndex(from.0), path, &body)).await.unwrap_or_else(|_| Err(gone()))?;
            if let Some(back) = net.back.lock().unwrap().as_mut() {
                back(seat, path, &mut answer);
            }
            Ok(answer)
        })
    }

    fn latency(&self, seat: Seat) -> Option<Duration> {
        (!self.net.dead.lock().unwrap().contains(&seat)).then_some(Duration::from_millis(u64::from(seat.0)))
    }
}

/// One node on a thread of its own, so that it can end like a process.
pub struct Member {
    arbiter: Arbiter,
    seat: Seat,
    net: Arc<Net>,
    pub shares: ShareHolderPool,
    pub signing: Signing,
    pub files: Arc<Sealed>,
    pairs: tokio::task::JoinHandle<()>,
}

impl Member {
    pub fn start(cluster: &Cluster, net: &Arc<Net>, seat: u16, device: Arc<Machine>, files: Arc<Sealed>) -> Self {
        let shares = ShareHolderPool::start(1, 16, cluster.id);
        let log = cluster.log.node(seat == 1);
        let node_key = Arc::clone(&cluster.keys[usize::from(seat) - 1]);
        let peers: Arc<dyn Peers> = Arc::new(Post { net: Arc::clone(net), own: Seat(seat) });
        let setups = Setups::new(Arc::clone(&peers), Handle::current());
        // Log time, so that a test that moves it moves every clock.
        let shared = Arc::clone(&cluster.log);
        let now: Now = Arc::new(move || shared.read(|state| state.log_time));
        let signer = signer::Parts {
            cluster_id: cluster.id,
            seat: Seat(seat),
            node_key: Arc::clone(&node_key),
            log: log.clone(),
            peers,
            shares: shares.clone(),
            files: Arc::clone(&files) as Arc<dyn ShareFiles>,
            claims: claim::judge(cluster.id, log.clone(), VerifierPool::start(1, 64, cluster.judge(), Arc::clone(&now)), None),
            now,
            runtime: Handle::current(),
        };
        let signing = Signing::new(signer, Arc::clone(&setups));
        let pairs = tokio::spawn(signing.clone().keep_pairs());
        net.nodes.lock().unwrap().insert(Seat(seat), signing.clone());
        let parts = ceremony::Parts {
            cluster_id: cluster.id,
            seat: Seat(seat),
            node_key,
            log,
            evidence: Arc::new(DeviceEvidence(device)),
            judge: judge(cluster),
            shares: shares.clone(),
            files: Arc::clone(&files) as Arc<dyn ShareFiles>,
            setups,
            #[cfg(feature = "insecure-test-export")]
            export: Arc::new(|_, _| {}),
        };
        let arbiter = Arbiter::new();
        let address = Ceremony::start_in_arbiter(&arbiter.handle(), move |_| Ceremony::new(parts));
        address.try_send(Look).unwrap();
        Self { arbiter, seat: Seat(seat), net: Arc::clone(net), shares, signing, files, pairs }
    }

    pub fn honest(cluster: &Cluster, net: &Arc<Net>, seat: u16) -> Self {
        let machine = Arc::clone(&cluster.machines[usize::from(seat) - 1]);
        let files = Sealed::on(cluster, &machine);
        Self::start(cluster, net, seat, machine, files)
    }

    /// Three nodes with all roots.
    pub async fn formed(cluster: &Cluster, net: &Arc<Net>) -> Vec<Self> {
        let members: Vec<Self> = (1..=3).map(|seat| Self::honest(cluster, net, seat)).collect();
        roots_in_force(cluster).await;
        for (index, member) in (1..).zip(&members) {
            holds(member, index).await;
        }
        members
    }

    /// Ends like a process that is killed: nothing of its memory is left.
    pub fn kill(self) -> Arc<Sealed> {
        self.net.nodes.lock().unwrap().remove(&self.seat);
        self.pairs.abort();
        self.arbiter.stop();
        self.arbiter.join().unwrap();
        self.files
    }
}

pub async fn roots_in_force(cluster: &Cluster) -> u32 {
    let attempts = until("the roots", || {
        cluster.log.read(|state| {
            let row = |root| state.roots.get(&(Generation(0), root)).map(|row| row.attempt);
            RootTag::ALL.into_iter().map(row).collect::<Option<Vec<u32>>>()
        })
    })
    .await;
    assert!(attempts.windows(2).all(|pair| pair[0] == pair[1]), "one attempt made all roots: {attempts:?}");
    attempts[0]
}

pub async fn holds(member: &Member, index: u16) {
    for root in RootTag::ALL {
        let share = until("a share in use", || member.shares.in_use_of(root)).await;
        assert_eq!(share, ShareId { index: NodeIndex(index), generation: Generation(0), epoch: Epoch(1) });
    }
}

pub fn holds_nothing(member: &Member) -> bool {
    RootTag::ALL.into_iter().all(|root| member.shares.in_use_of(root).is_none())
}
