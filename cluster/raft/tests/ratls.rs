//! Three nodes whose Raft runs over attested TLS connections on the loopback, on disk, with audit segments.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use dstack_attest::{CollateralBundle, TcbPolicy, TrustRoots};
use dstack_protocol::{ClusterId, Seat, UnixMillis};
use dstack_raft::{
    Applied, Leaf, Machine, NoObserver, Parts, RaftConfig, RaftHandle, RpcKind, Transport, TransportError,
    audit_log::AuditLog,
    peers::{self, Peers},
};
use dstack_ratls::{
    AttestJudge, CertificateSource, CertifiedIdentity, HelloIdentity, HelloSigner as _, Limits, Now, Server,
    attest_judge::TrustMaterial,
    hello::ExpectedPeer,
    peer_client::{PeerDialer, PeerLimits},
    server::Setup,
};
use dstack_secret::Secret;
use dstack_storage::{EngineKind, LogStore, LogWriter, RecordKey, StoreConfig};
use dstack_testkit::{Host, Measured, SoftwareRoots, Validity};
use ed25519_dalek::SigningKey;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const NOW: UnixMillis = UnixMillis(1_790_000_000_000);
const CLUSTER: ClusterId = ClusterId([0xc1; 32]);
const PATIENCE: Duration = Duration::from_secs(30);

/// Keeps every command; its answer is their number.
#[derive(Default)]
struct Journal {
    commands: Vec<Vec<u8>>,
}

impl Machine for Journal {
    type Effect = ();

    fn apply(&mut self, command: &[u8]) -> Applied<()> {
        let leaf = Leaf { pos: self.size(), record: b"record".to_vec(), body: command.to_vec() };
        self.commands.push(command.to_vec());
        Applied { response: self.size().to_be_bytes().to_vec(), leaves: vec![leaf], effects: vec![] }
    }

    fn snapshot(&self) -> Vec<u8> {
        self.commands.iter().flat_map(|command| [&[command.len() as u8][..], command].concat()).collect()
    }

    fn restored(&self, mut snapshot: &[u8]) -> Result<Self, String> {
        let mut commands = Vec::new();
        while let Some((length, rest)) = snapshot.split_first() {
            let (command, rest) = rest.split_at_checked(usize::from(*length)).ok_or("truncated")?;
            commands.push(command.to_vec());
            snapshot = rest;
        }
        Ok(Self { commands })
    }

    fn at_checkpoint(&self) -> bool {
        self.commands.last().is_some_and(|command| command == b"checkpoint")
    }

    fn size(&self) -> u64 {
        self.commands.len() as u64
    }

    fn seats(&self) -> Option<BTreeSet<Seat>> {
        None
    }
}

type Handle = RaftHandle<Journal, NoObserver, Peers>;

struct World {
    roots: SoftwareRoots,
}

struct Node {
    seat: u16,
    raft: Handle,
    peers: Arc<Peers>,
    audit: AuditLog,
    address: SocketAddr,
    server: JoinHandle<()>,
    shutdown: CancellationToken,
    _dir: TempDir,
}

fn now() -> Now {
    Arc::new(|| NOW)
}

fn node_key(seat: u16) -> SigningKey {
    SigningKey::from_bytes(&[seat as u8; 32])
}

fn hello(seat: u16) -> HelloIdentity {
    HelloIdentity { cluster_id: CLUSTER, seat: Seat(seat), signer: Arc::new(node_key(seat)) }
}

impl World {
    fn new() -> Self {
        let seed = Secret::from_fn(|bytes: &mut [u8; 32]| bytes.fill(1));
        Self { roots: SoftwareRoots::from_seed(&seed, Validity::around(NOW.0 / 1000)).unwrap() }
    }

    fn judge(&self) -> Arc<AttestJudge> {
        let roots = TrustRoots::production().with_software_root(self.roots.tdx_root_der()).unwrap();
        let collateral = CollateralBundle::parse(self.roots.bundle()).unwrap();
        Arc::new(AttestJudge::new(TrustMaterial { roots, collateral, tcb: TcbPolicy::default() }))
    }

    fn source(&self, seat: u16) -> Arc<CertificateSource> {
        let host = Host::tdx(&format!("machine {seat}"), &self.roots).unwrap();
        let measured = Measured::executable(b"node binary");
        let certificate = CertifiedIdentity::for_node(NOW, Duration::from_secs(3600), |report_data| {
            host.evidence(&measured, &report_data, NOW).map_err(|error| error.to_string())
        });
        CertificateSource::new(certificate.unwrap())
    }

    async fn node(&self, seat: u16, engine: EngineKind) -> Node {
        let dir = tempfile::tempdir().unwrap();
        let key = RecordKey::new(Secret::from_fn(|bytes: &mut [u8; 32]| bytes.fill(seat as u8)));
        let store = LogStore::open(&StoreConfig::new(engine, dir.path().join("store")), &key).unwrap();
        let writer = Arc::new(LogWriter::start(Arc::new(store), 1024).unwrap());
        let audit = AuditLog::open(dir.path().join("audit"), None).unwrap();
        let peers = Arc::new(Peers::new());
        let raft = Handle::start(Parts {
            seat: Seat(seat),
            config: RaftConfig { log_kept_entries: 0, ..RaftConfig::default() },
            writer,
            machine: Journal::default(),
            sink: Box::new(audit.clone()),
            observer: Arc::new(NoObserver),
            transport: Arc::clone(&peers),
            votes: true,
        })
        .await
        .unwrap();
        let setup = Setup {
            source: self.source(seat),
            node_judge: self.judge(),
            client_judge: self.judge(),
            now: now(),
            limits: Limits::default(),
            judge_threads: 1,
            hello: hello(seat),
            node_router: peers::router(raft.clone(), Arc::new(|peer| peer.hello.node_key == node_key(peer.hello.seat.0).node_key())),
            client_router: axum::Router::new(),
        };
        let server = Server::bind("127.0.0.1:0".parse().unwrap(), setup).await.unwrap();
        let (address, shutdown) = (server.local_address().unwrap(), CancellationToken::new());
        let server = tokio::spawn(server.run(shutdown.clone()));
        Node { seat, raft, peers, audit, address, server, shutdown, _dir: dir }
    }

    /// Tells every node of `nodes` how to reach the others.
    fn connect(&self, nodes: &[Node]) {
        for node in nodes {
            let limits = PeerLimits { backoff_max: Duration::from_millis(200), ..PeerLimits::default() };
            let dialer = PeerDialer::new(self.source(node.seat), self.judge(), now(), hello(node.seat), limits).unwrap();
            for other in nodes.iter().filter(|other| other.seat != node.seat) {
                let expected = ExpectedPeer { seat: Some(Seat(other.seat)), node_key: None };
                node.peers.set(Seat(other.seat), dialer.peer(other.address, expected));
            }
        }
    }
}

async fn eventually(what: &str, mut probe: impl FnMut() -> bool) {
    let started = Instant::now();
    while !probe() {
        assert!(started.elapsed() < PATIENCE, "no {what} within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_agree_over_attested_connections() {
    let world = World::new();
    let mut nodes =
        vec![world.node(1, EngineKind::Sled).await, world.node(2, EngineKind::Redb).await, world.node(3, EngineKind::Memory).await];
    world.connect(&nodes);
    nodes[0].raft.initialize(&(1..=3).map(Seat).collect()).await.unwrap();
    for number in 0..30u64 {
        let done = nodes[number as usize % 3].raft.propose(format!("command {number}").into_bytes(), PATIENCE).await.unwrap();
        assert_eq!(done.response, (number + 1).to_be_bytes());
    }
    for node in &nodes {
        node.raft.linearizable_read(PATIENCE).await.unwrap();
        assert_eq!(node.raft.with_state(|journal| journal.commands.len()).unwrap(), 30);
    }
    // Leaves are in the segment files of every node, in order.
    for node in &nodes {
        let leaves = node.audit.read_range(0, 100, 1 << 20).unwrap();
        assert_eq!(leaves.len(), 30);
        assert_eq!(leaves[29].body, b"command 29");
    }

    // One member asks another with an RPC that names a third: refused over the wire, with its code.
    let leader = nodes[0].raft.leader().unwrap();
    let liar = nodes.iter().find(|node| Seat(node.seat) != leader).unwrap();
    let victim = nodes.iter().find(|node| Seat(node.seat) != leader && node.seat != liar.seat).unwrap();
    // version, vote {term 1, leader's seat, committed}, no previous entry, no commit position, no entries.
    let forged = vec![1, 1, leader.0 as u8, 1, 0, 0, 0];
    let refused = liar.peers.call(Seat(victim.seat), RpcKind::Append, forged, PATIENCE).await;
    let Err(TransportError::Refused { to, code, .. }) = refused else { panic!("{refused:?}") };
    assert_eq!((to, code.as_str()), (victim.seat, "raft.not-the-peer"));

    // Attested code that claims a member's seat with a key that was not admitted for it: it may propose and nothing else.
    let claim = HelloIdentity { signer: Arc::new(node_key(99)), ..hello(liar.seat) };
    let dialer = PeerDialer::new(world.source(99), world.judge(), now(), claim, PeerLimits::default()).unwrap();
    let stranger = Peers::new();
    stranger.set(Seat(victim.seat), dialer.peer(victim.address, ExpectedPeer::default()));
    for kind in RpcKind::ALL {
        let answer = stranger.call(Seat(victim.seat), kind, vec![], PATIENCE).await;
        let expected = if kind == RpcKind::Propose { "raft.malformed" } else { "raft.not-admitted" };
        assert!(matches!(&answer, Err(TransportError::Refused { code, .. }) if code == expected), "{kind}: {answer:?}");
    }

    // The leader dies with its connections; the others go on.
    let at = nodes.iter().position(|node| Seat(node.seat) == leader).unwrap();
    let dead = nodes.remove(at);
    dead.shutdown.cancel();
    dead.raft.stop().await;
    tokio::time::timeout(PATIENCE, dead.server).await.unwrap().unwrap();
    nodes[0].raft.propose(b"after".to_vec(), PATIENCE).await.unwrap();
    eventually("the same journal", || nodes.iter().all(|node| node.raft.with_state(|journal| journal.commands.len()).unwrap() == 31)).await;
    for node in nodes {
        node.raft.shutdown(Duration::from_secs(1)).await;
        node.shutdown.cancel();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_seat_is_told_from_one_that_may_have_acted() {
    let world = World::new();
    let nodes = vec![world.node(1, EngineKind::Memory).await, world.node(2, EngineKind::Memory).await];
    world.connect(&nodes);
    let unknown = nodes[0].peers.call(Seat(9), RpcKind::Vote, vec![], PATIENCE).await;
    assert!(matches!(unknown, Err(TransportError::Unreachable { to: 9, .. })), "{unknown:?}");
    let malformed = nodes[0].peers.call(Seat(2), RpcKind::Vote, vec![7], PATIENCE).await;
    assert!(matches!(&malformed, Err(TransportError::Refused { code, .. }) if code == "raft.malformed"), "{malformed:?}");
    nodes[1].shutdown.cancel();
    let started = Instant::now();
    loop {
        match nodes[0].peers.call(Seat(2), RpcKind::Vote, vec![7], Duration::from_secs(1)).await {
            Err(TransportError::Unreachable { .. }) => break,
            other => assert!(started.elapsed() < PATIENCE, "{other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
