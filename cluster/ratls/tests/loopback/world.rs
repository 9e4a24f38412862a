//! What every test needs: software roots, a node that listens, ways to reach it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::extract::Extension;
use axum::routing::{get, post};
use axum::{Router, body::Bytes};
use dstack_attest::{CollateralBundle, TcbPolicy, TrustRoots};
use dstack_protocol::{ClusterId, Seat, UnixMillis};
use dstack_ratls::attest_judge::{Beacons, TrustMaterial};
use dstack_ratls::client::{ClientDialer, ClientRequest};
use dstack_ratls::peer_client::{PeerClient, PeerDialer, PeerLimits};
use dstack_ratls::server::{ServerHandle, Setup};
use dstack_ratls::{
    AttestJudge, CertificateSource, CertifiedIdentity, ClientPeer, EvidenceJudge, HelloIdentity, Limits, NodePeer, Now, Server,
};
use dstack_secret::Secret;
use dstack_testkit::{Host, Measured, SoftwareRoots, Validity};
use ed25519_dalek::SigningKey;
use hyper::Method;
use tokio_util::sync::CancellationToken;

pub const NOW_MS: u64 = 1_790_000_000_000;
pub const CLUSTER: ClusterId = ClusterId([0xc1; 32]);
pub const BEACON_POS: u64 = 77;
pub const BEACON: [u8; 32] = [0xbe; 32];
pub const COMPOSE: &[u8] = br#"{"manifest_version":2,"name":"app"}"#;
pub const NODE_BINARY: &[u8] = b"node binary";
pub const SECOND: Duration = Duration::from_secs(1);

pub struct World {
    pub roots: SoftwareRoots,
    clock: Arc<AtomicU64>,
}

struct OneBeacon;

impl Beacons for OneBeacon {
    fn cluster_id(&self) -> ClusterId {
        CLUSTER
    }

    fn beacon(&self, beacon_pos: u64) -> Option<[u8; 32]> {
        (beacon_pos == BEACON_POS).then_some(BEACON)
    }
}

impl World {
    pub fn new() -> Self {
        let roots = SoftwareRoots::from_seed(&Secret::from_fn(|bytes| bytes.fill(1)), Validity::around(NOW_MS / 1000)).unwrap();
        Self { roots, clock: Arc::new(AtomicU64::new(NOW_MS)) }
    }

    pub fn now(&self) -> Now {
        let clock = Arc::clone(&self.clock);
        Arc::new(move || UnixMillis(clock.load(Ordering::SeqCst)))
    }

    pub fn advance(&self, by: Duration) {
        self.clock.fetch_add(by.as_millis() as u64, Ordering::SeqCst);
    }

    pub fn material(&self) -> TrustMaterial {
        let roots = TrustRoots::production().with_software_root(self.roots.tdx_root_der()).unwrap();
        let roots = roots.with_software_root(self.roots.nitro_root_der()).unwrap();
        TrustMaterial { roots, collateral: CollateralBundle::parse(self.roots.bundle()).unwrap(), tcb: TcbPolicy::default() }
    }

    /// Accepts what our software roots vouch for; nodes only with the right executable.
    pub fn judge(&self) -> Arc<AttestJudge> {
        let node_measurement = self.tdx().measurement(&Measured::executable(NODE_BINARY));
        let rule = move |role, identity: &dstack_attest::VerifiedIdentity| {
            let is_client = role == dstack_ratls::PeerRole::Client;
            if is_client || identity.measurement() == node_measurement { Ok(()) } else { Err("another executable".to_owned()) }
        };
        Arc::new(AttestJudge::new(self.material()).with_beacons(Arc::new(OneBeacon)).with_acceptance(Box::new(rule)))
    }

    pub fn tdx(&self) -> Host {
        Host::tdx("machine", &self.roots).unwrap()
    }

    pub fn evidence(&self, measured: &Measured, report_data: [u8; 64]) -> Result<Vec<u8>, String> {
        self.tdx().evidence(measured, &report_data, (self.now())()).map_err(|error| error.to_string())
    }

    pub fn node_certificate(&self, lifetime: Duration) -> CertifiedIdentity {
        self.certificate_of(NODE_BINARY, lifetime)
    }

    pub fn certificate_of(&self, executable: &[u8], lifetime: Duration) -> CertifiedIdentity {
        let measured = Measured::executable(executable);
        CertifiedIdentity::for_node((self.now())(), lifetime, |report_data| self.evidence(&measured, report_data)).unwrap()
    }

    pub fn source(&self) -> Arc<CertificateSource> {
        CertificateSource::new(self.node_certificate(Duration::from_secs(3600)))
    }

    pub async fn server(&self, seat: u16, limits: Limits) -> Running {
        self.server_at("127.0.0.1:0".parse().unwrap(), seat, limits, self.source()).await
    }

    pub async fn server_at(&self, address: SocketAddr, seat: u16, limits: Limits, source: Arc<CertificateSource>) -> Running {
        self.server_judging(address, seat, limits, source, self.judge()).await
    }

    pub async fn server_judging(
        &self,
        address: SocketAddr,
        seat: u16,
        limits: Limits,
        source: Arc<CertificateSource>,
        client_judge: Arc<dyn EvidenceJudge>,
    ) -> Running {
        let setup = Setup {
            source: Arc::clone(&source),
            node_judge: self.judge(),
            client_judge,
            now: self.now(),
            limits,
            judge_threads: 2,
            hello: hello(seat),
            node_router: node_router(),
            client_router: client_router(),
        };
        let server = Server::bind(address, setup).await.unwrap();
        let (address, handle, shutdown) = (server.local_address().unwrap(), server.handle(), CancellationToken::new());
        let task = tokio::spawn(server.run(shutdown.clone()));
        Running { address, handle, source, shutdown, task }
    }

    pub fn dialer(&self, seat: u16) -> PeerDialer {
        self.dialer_with(hello(seat), self.source(), PeerLimits::default())
    }

    pub fn dialer_with(&self, hello: HelloIdentity, source: Arc<CertificateSource>, limits: PeerLimits) -> PeerDialer {
        PeerDialer::new(source, self.judge(), self.now(), hello, limits).unwrap()
    }

    pub fn client(&self, certificate: Option<CertifiedIdentity>) -> ClientDialer {
        ClientDialer::new(certificate.map(CertificateSource::new), self.judge(), self.now()).unwrap()
    }
}

pub struct Running {
    pub address: SocketAddr,
    pub handle: ServerHandle,
    pub source: Arc<CertificateSource>,
    pub shutdown: CancellationToken,
    pub task: tokio::task::JoinHandle<()>,
}

impl Running {
    pub async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(20 * SECOND, self.task).await.unwrap().unwrap();
    }
}

pub fn node_key(seat: u16) -> SigningKey {
    SigningKey::from_bytes(&[seat as u8; 32])
}

pub fn hello(seat: u16) -> HelloIdentity {
    HelloIdentity { cluster_id: CLUSTER, seat: Seat(seat), signer: Arc::new(node_key(seat)) }
}

fn node_router() -> Router {
    Router::new().route("/whoami", post(node_whoami)).route("/echo", post(echo)).route("/slow", post(slow))
}

pub fn client_router() -> Router {
    Router::new().route("/whoami", get(client_whoami)).route("/echo", post(echo)).route("/slow", post(slow))
}

async fn node_whoami(Extension(peer): Extension<NodePeer>) -> String {
    format!("seat {} key {} measurement {}", peer.hello.seat, hex::encode(peer.hello.node_key), hex::encode(peer.identity.measurement()))
}

async fn client_whoami(Extension(peer): Extension<ClientPeer>) -> String {
    match peer.attested {
        None => "anonymous".to_owned(),
        Some(client) => format!("app {:?} session {:?} spki {}", client.identity.app_id(), client.session, hex::encode(&client.spki)),
    }
}

async fn echo(body: Bytes) -> Bytes {
    body
}

/// Answers after as many milliseconds as the body says.
async fn slow(body: String) -> String {
    tokio::time::sleep(Duration::from_millis(body.parse().unwrap())).await;
    format!("waited {body}")
}

pub fn get_request(path: &str) -> ClientRequest<'_> {
    ClientRequest {
        method: Method::GET,
        path,
        content_type: "",
        body: hyper::body::Bytes::new(),
        headers: &[],
        answer_bytes_max: 1 << 20,
        timeout: 10 * SECOND,
    }
}

pub fn text(answer: (u16, hyper::body::Bytes)) -> String {
    assert_eq!(answer.0, 200, "{answer:?}");
    String::from_utf8(answer.1.to_vec()).unwrap()
}

pub async fn whoami(peer: &PeerClient) -> Result<String, dstack_ratls::PeerError> {
    peer.post("/whoami", "", 10 * SECOND).await.map(text)
}
