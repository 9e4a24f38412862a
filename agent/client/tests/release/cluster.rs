//! A cluster's outside: real TLS listeners with real evidence, real shares and a real log behind them. What it leaves out is how nodes
//! agree; what it adds is nodes that lie.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::Extension;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use curve25519_dalek::ristretto::RistrettoPoint;
use curve25519_dalek::scalar::Scalar;
use dstack_attest::{CollateralBundle, TcbPolicy, TrustRoots};
use dstack_audit::{Frontier, leaf_hash, make_receipt};
use dstack_client::app_key::PATH_APP_KEY;
use dstack_client::{EvidenceOf, KcvStore, KmsClient, NodeUrl, Pin, Settings, trust};
use dstack_protocol::binding::evidence_hash;
use dstack_protocol::genesis::{Authority, CaAlgorithm, Genesis, SeatGrant};
use dstack_protocol::log::{Record, RecordKind, body_hash};
use dstack_protocol::receipt::Receipt;
use dstack_protocol::release::Out;
use dstack_protocol::rpc::{
    BeaconAnswer, NodesAnswer, PATH_BEACON, PATH_NODES, PATH_RELEASE, PATH_ROOT_CA, REQUEST_ID_HEADER, ReleaseAnswer, ReleaseAsk,
};
use dstack_protocol::sign::AppPkClaim;
use dstack_protocol::{AppId, ClusterId, Epoch, Generation, NodeIndex, Refusal, RefusalCode, Seat, UnixMillis, Wire};
use dstack_ratls::attest_judge::{Beacons, TrustMaterial};
use dstack_ratls::server::{AttestedClient, Setup};
use dstack_ratls::{AttestJudge, CertificateSource, CertifiedIdentity, ClientPeer, HelloIdentity, Limits, Now, Server};
use dstack_secret::Secret;
use dstack_tee::software::protocol::{HexArray, HexBytes};
use dstack_tee::{Boot, Device};
use dstack_testkit::{Machine, SoftwareRoots};
use dstack_threshold::answer::{AnswerContext, seal_partial};
use dstack_threshold::prf::{Batch, PrfShare, evaluate};
use ed25519_dalek::SigningKey;
use p256::ecdsa::signature::Verifier as _;
use p256::pkcs8::DecodePublicKey as _;
use tokio_util::sync::CancellationToken;

/// threshold.md §1.5: secret, cluster and app of the known answers, so that the keys can be compared with it.
pub const CLUSTER: ClusterId = ClusterId([0x11; 32]);
pub const APP: AppId = AppId([0x22; 20]);
const SECRET: &str = "e6f73f344b79b379f1a0dd37e07ff62e38d9f71345ce62ae3a9bc60b04ccd909";
const SLOPE: &str = "222a5e897cf59db8145db8d16e597e8facb80ae7d4e26d9881aa6f61d645fc0e";
pub const PK_PRF: &str = "c803e2cc6b05fc15064549b5920659ca4a77b2cca6f04f6b357009335476ad4e";
const THRESHOLD: usize = 2;
const HOLDERS: u16 = 3;
const EPOCH: Epoch = Epoch(1);
const BEACON_POS: u64 = 4;

/// How a node misbehaves, if at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conduct {
    Honest,
    /// Answers nothing but this status.
    Status(u16),
    Refuses(RefusalCode),
    /// Never answers.
    Silent,
    /// Says that it belongs to another cluster.
    OtherCluster,
    /// Its receipt names another intent.
    ReceiptOfAnother,
    /// Its receipt holds by itself, in a log that no holder has.
    ReceiptOfItsOwnLog,
    /// Gives a beacon that the log does not have.
    FalseBeacon,
    /// Puts the intent on record, then finds too few holders.
    RecordsOnly,
    /// Spoils the answers of all other holders on their way.
    SpoilsOthers,
}

/// How a holder misbehaves, if at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holding {
    Honest,
    /// One element is not its share's.
    WrongElement,
    /// Everything fits a share that is not its own.
    WrongShare,
}

pub struct Cluster {
    roots: SoftwareRoots,
    holdings: Mutex<Vec<Holding>>,
    log: Mutex<Log>,
    /// What nodes and clients are ahead of the system's clock by, ms.
    ahead_ms: Arc<AtomicU64>,
    /// Requests by path, over all nodes.
    pub asked: AtomicUsize,
    pub request_ids: Mutex<Vec<String>>,
    pub session_keys: Mutex<std::collections::BTreeSet<Vec<u8>>>,
    /// What nodes give out as the addresses of the cluster's nodes. The document is of their own making, so it is a lie.
    pub given_out: Mutex<Vec<String>>,
    /// How often they did.
    pub lists: AtomicUsize,
}

struct Log {
    frontier: Frontier,
    receipts: BTreeMap<[u8; 32], Receipt>,
}

pub struct Node {
    pub url: NodeUrl,
    conduct: Arc<Mutex<Conduct>>,
    shutdown: CancellationToken,
}

impl Node {
    pub fn conducts(&self, conduct: Conduct) {
        *self.conduct.lock().unwrap() = conduct;
    }

    pub fn stop(&self) {
        self.shutdown.cancel();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

struct TheBeacon;

fn beacon() -> [u8; 32] {
    [0xbe; 32]
}

impl Beacons for TheBeacon {
    fn cluster_id(&self) -> ClusterId {
        CLUSTER
    }

    fn beacon(&self, beacon_pos: u64) -> Option<[u8; 32]> {
        (beacon_pos == BEACON_POS).then(beacon)
    }
}

fn wall() -> UnixMillis {
    dstack_runtime::clock::Clock::now(&dstack_runtime::clock::SystemClock::new())
}

impl Cluster {
    pub fn new() -> Arc<Self> {
        Self::under(SoftwareRoots::generate(wall()).unwrap())
    }

    /// A cluster whose nodes run on machines under these roots.
    pub fn under(roots: SoftwareRoots) -> Arc<Self> {
        let mut frontier = Frontier::new();
        for leaf in 0..7 {
            frontier.append(leaf_hash(&[leaf])).unwrap();
        }
        let log = Mutex::new(Log { frontier, receipts: BTreeMap::new() });
        let holdings = Mutex::new(vec![Holding::Honest; usize::from(HOLDERS)]);
        Arc::new(Self {
            roots,
            holdings,
            log,
            ahead_ms: Arc::default(),
            asked: AtomicUsize::new(0),
            request_ids: Mutex::default(),
            session_keys: Mutex::default(),
            given_out: Mutex::default(),
            lists: AtomicUsize::new(0),
        })
    }

    pub fn holds(&self, index: u16, holding: Holding) {
        self.holdings.lock().unwrap()[usize::from(index) - 1] = holding;
    }

    fn now(&self) -> Now {
        let ahead_ms = Arc::clone(&self.ahead_ms);
        Arc::new(move || wall().plus_ms(ahead_ms.load(Ordering::SeqCst)))
    }

    /// Time passes for nodes and clients.
    pub fn advance(&self, by: Duration) {
        self.ahead_ms.fetch_add(u64::try_from(by.as_millis()).unwrap(), Ordering::SeqCst);
    }

    /// Intents on record.
    pub fn recorded(&self) -> usize {
        self.log.lock().unwrap().receipts.len()
    }

    pub fn material(&self) -> TrustMaterial {
        let roots = TrustRoots::none().with_software_root(self.roots.tdx_root_der()).unwrap();
        let roots = roots.with_software_root(self.roots.nitro_root_der()).unwrap();
        TrustMaterial { roots, collateral: CollateralBundle::parse(self.roots.bundle()).unwrap(), tcb: TcbPolicy::default() }
    }

    /// Measurement of the nodes.
    pub fn node_measurement(&self) -> Vec<u8> {
        Machine::tdx("node", &self.roots).unwrap().measurement()
    }

    pub async fn node(self: &Arc<Self>) -> Node {
        let machine = Machine::tdx("node", &self.roots).unwrap();
        let certified = CertifiedIdentity::for_node((self.now())(), Duration::from_secs(3600), |report_data| {
            machine.evidence(report_data).map_err(|error| error.to_string())
        });
        let judge = || Arc::new(AttestJudge::new(self.material()).with_beacons(Arc::new(TheBeacon)));
        let conduct = Arc::new(Mutex::new(Conduct::Honest));
        let router = Router::new()
            .route(PATH_BEACON, get(serve_beacon))
            .route(PATH_NODES, get(serve_nodes))
            .route(PATH_RELEASE, post(serve_release))
            .route(PATH_APP_KEY, post(serve_app_key))
            .route(PATH_ROOT_CA, get(serve_root_ca))
            .layer(Extension(Arc::clone(&conduct)))
            .layer(Extension(Arc::clone(self)));
        let setup = Setup {
            source: CertificateSource::new(certified.unwrap()),
            node_judge: judge(),
            client_judge: judge(),
            now: self.now(),
            limits: Limits::default(),
            judge_threads: 1,
            hello: HelloIdentity { cluster_id: CLUSTER, seat: Seat(1), signer: Arc::new(SigningKey::from_bytes(&[1; 32])) },
            node_router: Router::new(),
            client_router: router,
        };
        let server = Server::bind(SocketAddr::from(([127, 0, 0, 1], 0)), setup).await.unwrap();
        let url = format!("https://{}", server.local_address().unwrap()).parse().unwrap();
        let shutdown = CancellationToken::new();
        tokio::spawn(server.run(shutdown.clone()));
        Node { url, conduct, shutdown }
    }

    /// A client in a guest of its own on TDX.
    pub fn client(&self, pin: Pin, nodes: &[&Node], measurements: Vec<Vec<u8>>, kcvs: Option<KcvStore>) -> KmsClient {
        self.patient_client(pin, nodes, measurements, kcvs, Duration::from_millis(100))
    }

    /// As above; tries again for as long as `patience`.
    pub fn patient_client(
        &self,
        pin: Pin,
        nodes: &[&Node],
        measurements: Vec<Vec<u8>>,
        kcvs: Option<KcvStore>,
        patience: Duration,
    ) -> KmsClient {
        let settings = Settings {
            hedge_after: Duration::from_millis(400),
            patience,
            request_timeout: Duration::from_secs(8),
            discover_every: None,
            ..Settings::default()
        };
        self.client_with(pin, nodes, measurements, kcvs, settings)
    }

    /// As above, with all settings.
    pub fn client_with(
        &self,
        pin: Pin,
        nodes: &[&Node],
        measurements: Vec<Vec<u8>>,
        kcvs: Option<KcvStore>,
        settings: Settings,
    ) -> KmsClient {
        let machine = Machine::tdx("guest", &self.roots).unwrap();
        let boot = Boot { compose: HexBytes(b"{}".to_vec()), app_id: Some(HexArray(APP.0)), instance_seed: None, key_provider: None };
        machine.boot_app(boot).unwrap();
        let evidence_of: EvidenceOf = Arc::new(move |report_data| machine.evidence(report_data).map_err(|error| error.to_string()));
        let urls = nodes.iter().map(|node| node.url.clone()).collect();
        KmsClient::new(pin, urls, settings, trust::judge_of(self.material(), measurements), self.now(), evidence_of, kcvs).unwrap()
    }

    /// Puts the intent on record, once.
    fn record(&self, ask: &ReleaseAsk) -> Receipt {
        let intent = ask.request.intent(NodeIndex(0));
        let mut log = self.log.lock().unwrap();
        if let Some(receipt) = log.receipts.get(&intent.id()) {
            return receipt.clone();
        }
        let record = Record {
            pos: log.frontier.size(),
            log_time: UnixMillis(1),
            epoch: EPOCH,
            kind: RecordKind::Intent,
            outcome: 0,
            body_hash: body_hash(RecordKind::Intent, &intent.encode()),
        };
        let nodes = log.frontier.append_batch(&[record.leaf()]).unwrap();
        let receipt = make_receipt(intent.clone(), record, &nodes, nodes.size()).unwrap();
        log.receipts.insert(intent.id(), receipt.clone());
        receipt
    }

    /// What holder `index` answers.
    fn partial(&self, index: u16, ask: &ReleaseAsk, receipt: &Receipt) -> Out {
        let holding = self.holdings.lock().unwrap()[usize::from(index) - 1];
        let scalar = |text: &str| Scalar::from_canonical_bytes(hex::decode(text).unwrap().try_into().unwrap()).unwrap();
        let mut share = scalar(SECRET) + scalar(SLOPE) * Scalar::from(index);
        if holding == Holding::WrongShare {
            // On no line, or the errors of two would cancel out.
            share += Scalar::from(1 + index * index);
        }
        let vk = RistrettoPoint::mul_base(&share).compress();
        let share = PrfShare::new(NodeIndex(index), Generation(0), EPOCH, Secret::take(&mut share.to_bytes()), vk.as_bytes()).unwrap();
        let batch = Batch::of_request(&ask.request).unwrap();
        let mut plain = evaluate(&share, &batch, &random()).into_plain(receipt.record.pos, receipt.size, receipt.log_root);
        if holding == Holding::WrongElement {
            plain.elements[0] = RistrettoPoint::mul_base(&Scalar::from(7_u8)).compress().to_bytes();
        }
        let req_hash = ask.request.req_hash();
        let context = AnswerContext { cluster_id: &CLUSTER, generation: Generation(0), req_hash: &req_hash };
        seal_partial(plain, &context, &ask.request.epk, Secret::from_fn(|seed| *seed = random())).unwrap()
    }
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).unwrap();
    bytes
}

type Answer = (StatusCode, Vec<u8>);

fn refuse(code: RefusalCode, expected: &str, got: &str) -> Answer {
    (StatusCode::from_u16(code.http_status()).unwrap(), Refusal::new(code, expected, got).encode())
}

async fn misconduct(conduct: Conduct) -> Option<Answer> {
    match conduct {
        Conduct::Status(status) => Some((StatusCode::from_u16(status).unwrap(), b"nonsense".to_vec())),
        Conduct::Refuses(code) => Some(refuse(code, "something else", "this")),
        Conduct::Silent => std::future::pending().await,
        _ => None,
    }
}

async fn serve_beacon(Extension(conduct): Extension<Arc<Mutex<Conduct>>>) -> Answer {
    let conduct = *conduct.lock().unwrap();
    // Refusals are for releases; a silent or broken node is so for everything.
    if !matches!(conduct, Conduct::Refuses(_))
        && let Some(answer) = misconduct(conduct).await
    {
        return answer;
    }
    let cluster_id = if conduct == Conduct::OtherCluster { ClusterId([9; 32]) } else { CLUSTER };
    let beacon_pos = if conduct == Conduct::FalseBeacon { BEACON_POS + 1 } else { BEACON_POS };
    let answer = BeaconAnswer { cluster_id, generation: Generation(0), beacon_pos, beacon: beacon(), log_time: UnixMillis(1) };
    (StatusCode::OK, answer.encode())
}

/// A list of nodes in the form of a true one, out of a document that is not the cluster's.
async fn serve_nodes(Extension(cluster): Extension<Arc<Cluster>>, Extension(conduct): Extension<Arc<Mutex<Conduct>>>) -> Answer {
    let conduct = *conduct.lock().unwrap();
    cluster.lists.fetch_add(1, Ordering::SeqCst);
    if let Some(answer) = misconduct(conduct).await {
        return answer;
    }
    let given_out = cluster.given_out.lock().unwrap().clone();
    let grant = |(seat, address): (u16, String)| SeatGrant { seat: Seat(seat), address, platform_identity: seat.to_be_bytes().to_vec() };
    let seats: Vec<SeatGrant> = (1..).zip(given_out).map(grant).collect();
    let n = u16::try_from(seats.len()).unwrap();
    let genesis = Genesis {
        random: [0; 32],
        n,
        t: Genesis::threshold_for(n),
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
        seats,
        collateral_id: [0; 32],
    };
    let answer = NodesAnswer { genesis, own: Seat(1), seats: (1..=n).map(Seat).collect() };
    (StatusCode::OK, answer.encode())
}

/// Secret of the identity that signs app keys here.
pub const IDENTITY: [u8; 32] = [9; 32];

/// A self-signed CA that stands for the cluster's root.
pub fn root_ca() -> Vec<u8> {
    dstack_certificates::temp::temp_ca(&CLUSTER).unwrap().der().to_vec()
}

/// Its public key, as a pin names it.
pub fn ca_pub() -> [u8; 33] {
    dstack_certificates::read::Certificate::read(&root_ca()).unwrap().key().p256_compressed().unwrap()
}

async fn serve_root_ca(Extension(conduct): Extension<Arc<Mutex<Conduct>>>) -> Answer {
    let conduct = *conduct.lock().unwrap();
    match misconduct(conduct).await {
        Some(answer) => answer,
        None => (StatusCode::OK, root_ca()),
    }
}

/// Judges a claim as nodes do (threshold.md §5.1) and signs.
async fn serve_app_key(
    Extension(cluster): Extension<Arc<Cluster>>,
    Extension(conduct): Extension<Arc<Mutex<Conduct>>>,
    body: Bytes,
) -> Answer {
    let conduct = *conduct.lock().unwrap();
    if !matches!(conduct, Conduct::Refuses(_))
        && let Some(answer) = misconduct(conduct).await
    {
        return answer;
    }
    let claim = AppPkClaim::decode(&body).unwrap();
    assert_eq!((claim.beacon_pos, claim.beacon), (BEACON_POS, beacon()));
    let material = cluster.material();
    let context = dstack_attest::VerifyContext {
        now: (cluster.now())(),
        roots: &material.roots,
        collateral: &material.collateral,
        tcb: &material.tcb,
    };
    let proven = dstack_attest::verify(&claim.evidence, &context).unwrap();
    assert_eq!((proven.report_data(), proven.app_id()), (&claim.report_data(&CLUSTER), Some(claim.app_id)));
    dstack_certificates::identity::verify_plain(&claim.app_pk, &claim.digest(&CLUSTER), &claim.sig).unwrap();
    let key = k256::ecdsa::SigningKey::from_slice(&IDENTITY).unwrap();
    let (rs, recovery) = key.sign_prehash_recoverable(&claim.object().identity_digest().unwrap());
    (StatusCode::OK, [rs.to_bytes().as_slice(), &[recovery.to_byte()]].concat())
}

async fn serve_release(
    Extension(cluster): Extension<Arc<Cluster>>,
    Extension(conduct): Extension<Arc<Mutex<Conduct>>>,
    Extension(peer): Extension<ClientPeer>,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    let conduct = *conduct.lock().unwrap();
    cluster.asked.fetch_add(1, Ordering::SeqCst);
    cluster.request_ids.lock().unwrap().push(headers[REQUEST_ID_HEADER].to_str().unwrap().to_owned());
    if let Some(answer) = misconduct(conduct).await {
        return answer;
    }
    let ask = ReleaseAsk::decode(&body).unwrap();
    let Some(AttestedClient { identity, evidence, spki, session: Some(BEACON_POS) }) = peer.attested else {
        return refuse(RefusalCode::NotASession, "a session", "none");
    };
    cluster.session_keys.lock().unwrap().insert(spki.to_vec());
    assert_eq!(ask.request.evidence_hash, evidence_hash(&evidence));
    assert_eq!((ask.request.beacon_pos, ask.request.beacon), (BEACON_POS, beacon()));
    let key = p256::ecdsa::VerifyingKey::from_public_key_der(&spki).unwrap();
    key.verify(&ask.request.encode(), &p256::ecdsa::Signature::from_slice(&ask.sig).unwrap()).unwrap();
    if identity.app_id() != Some(ask.request.app_id) {
        return refuse(RefusalCode::AppIdMismatch, &format!("{:?}", identity.app_id()), &ask.request.app_id.to_string());
    }
    let holders: Vec<u16> = (1..=HOLDERS).filter(|index| !ask.exclude.contains(&NodeIndex(*index))).collect();
    if holders.len() < THRESHOLD {
        return refuse(RefusalCode::NotEnoughPartials, "2 holders", &holders.len().to_string());
    }
    let mut receipt = cluster.record(&ask);
    let mut outs: Vec<Out> = holders.iter().take(THRESHOLD).map(|index| cluster.partial(*index, &ask, &receipt)).collect();
    match conduct {
        Conduct::RecordsOnly => return refuse(RefusalCode::NotEnoughPartials, "2 holders", "1"),
        Conduct::ReceiptOfAnother => receipt.intent.beacon_pos += 1,
        Conduct::ReceiptOfItsOwnLog => {
            let mut frontier = Frontier::new();
            let record = Record { pos: 0, ..receipt.record };
            let nodes = frontier.append_batch(&[record.leaf()]).unwrap();
            receipt = make_receipt(receipt.intent, record, &nodes, nodes.size()).unwrap();
        }
        Conduct::SpoilsOthers => outs.iter_mut().filter(|out| out.index != NodeIndex(1)).for_each(|out| out.ct[0] ^= 1),
        _ => {}
    }
    (StatusCode::OK, ReleaseAnswer { receipt, outs }.encode())
}
