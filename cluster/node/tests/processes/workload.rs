//! A workload on an emulated machine: the client library as agents use it, and raw requests for tests that lie.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dstack_client::{EvidenceOf, KmsClient, Pin, ReleasedKeys, Settings, Trust};
use dstack_protocol::binding::evidence_hash;
use dstack_protocol::release::{KeyClass, Mode, RelReq, Wish};
use dstack_protocol::rpc::{BeaconAnswer, MEDIA_TYPE, PATH_BEACON, PATH_RELEASE, ReleaseAnswer, ReleaseAsk};
use dstack_protocol::{AppId, Refusal, Wire as _};
use dstack_ratls::certificate::SessionBinding;
use dstack_ratls::client::{ClientConnection, ClientDialer, ClientRequest};
use dstack_ratls::{AttestJudge, CertificateSource, CertifiedIdentity, Now, PeerError};
use dstack_runtime::clock::{Clock as _, SystemClock};
use dstack_secret::Secret;
use dstack_tee::{Boot, Device};
use dstack_testkit::cluster::{App, Cluster, MachineKind};
use dstack_threshold::answer::RecipientKey;

/// How long a whole release may take before the client gives up.
const PATIENCE: Duration = Duration::from_secs(25);

/// A booted guest and what it knows.
pub(crate) struct Workload {
    pub(crate) app_id: AppId,
    pub(crate) pin: Pin,
    device: Arc<dyn Device>,
    trust: Trust,
    judge: Arc<AttestJudge>,
    pub(crate) now: Now,
}

/// A docker-compose file of a test.
pub(crate) fn compose_file(dir: &Path, name: &str, image: &str) -> std::path::PathBuf {
    let path = dir.join(format!("{name}.yml"));
    std::fs::write(&path, format!("services:\n  {name}:\n    image: {image}\n")).unwrap();
    path
}

/// Measures and registers an app.
pub(crate) fn registered(cluster: &Cluster, name: &str, kind: MachineKind) -> App {
    let app = cluster.measure(name, &compose_file(cluster.dir(), name, "alpine:3"), kind).unwrap();
    assert_eq!(cluster.register(&app, &[&app.compose_hash]).unwrap(), "applied");
    app
}

/// The wishes of most tests.
pub(crate) fn wishes() -> Vec<Wish> {
    vec![wish(KeyClass::Env, ""), wish(KeyClass::K256, ""), wish(KeyClass::Custom, "db/password")]
}

pub(crate) fn wish(class: KeyClass, ctx: &str) -> Wish {
    Wish::new(class, ctx.as_bytes().to_vec()).unwrap()
}

/// Check values of released keys, in hex: equal ones mean equal keys.
pub(crate) fn check_values(released: &ReleasedKeys) -> Vec<String> {
    released.keys.iter().map(|key| hex::encode(key.kcv().0)).collect()
}

impl Workload {
    /// Boots `app` on `machine`.
    pub(crate) fn boot(cluster: &Cluster, machine: &str, app: &App) -> Self {
        Self::boot_document(cluster, machine, &std::fs::read(&app.compose).unwrap(), &app.app_id)
    }

    /// Boots any document under any app id.
    pub(crate) fn boot_document(cluster: &Cluster, machine: &str, compose: &[u8], app_id: &str) -> Self {
        let device = dstack_tee::open(&cluster.device.text(machine)).unwrap();
        let mut id = [0; 20];
        hex::decode_to_slice(app_id, &mut id).unwrap();
        let boot = serde_json::json!({"compose": hex::encode(compose), "app_id": app_id, "instance_seed": null, "key_provider": null});
        let boot: Boot = serde_json::from_value(boot).unwrap();
        assert_eq!(device.boot_app(boot).unwrap().app_id.0, id);
        let trust =
            Trust { software_roots: cluster.device.roots().to_vec(), collateral: Some(cluster.device.collateral()), ..Trust::default() };
        let clock = SystemClock::new();
        let judge = trust.judge().unwrap();
        Self { app_id: AppId(id), pin: Pin::of_compose(compose).unwrap(), device, trust, judge, now: Arc::new(move || clock.now()) }
    }

    /// Evidence of the guest.
    pub(crate) fn evidence(&self, report_data: [u8; 64]) -> Result<Vec<u8>, String> {
        self.device.evidence(report_data).map_err(|error| error.to_string())
    }

    fn evidence_of(&self) -> EvidenceOf {
        let device = Arc::clone(&self.device);
        Arc::new(move |report_data| device.evidence(report_data).map_err(|error| error.to_string()))
    }

    /// A client that asks these nodes, in this order.
    pub(crate) fn client(&self, urls: &str) -> KmsClient {
        self.client_with(urls, Settings { patience: PATIENCE, ..Settings::default() })
    }

    /// The same, with other patience.
    pub(crate) fn client_with(&self, urls: &str, settings: Settings) -> KmsClient {
        self.client_of_measurements(urls, &[], settings)
    }

    /// A client that asks nodes of these measurements only, or of any where there is none.
    pub(crate) fn client_of_measurements(&self, urls: &str, measurements: &[String], settings: Settings) -> KmsClient {
        let urls = urls.split(',').map(|url| url.parse().unwrap()).collect();
        let judge = Trust { node_measurements: measurements.to_vec(), ..self.trust.clone() }.judge().unwrap();
        KmsClient::new(self.pin, urls, settings, judge, self.now.clone(), self.evidence_of(), None).unwrap()
    }

    /// Keys of the usual wishes through a new client of these nodes.
    pub(crate) async fn keys(&self, urls: &str) -> ReleasedKeys {
        self.client(urls).release(&self.app_id, &wishes()).await.unwrap()
    }

    /// The refusal that a new client of these nodes gets for the usual wishes.
    pub(crate) async fn refusal(&self, urls: &str) -> Refusal {
        let error = self.client(urls).release(&self.app_id, &wishes()).await.unwrap_err();
        error.refusal().unwrap_or_else(|| panic!("no refusal, but {error}")).clone()
    }

    /// A connection without a certificate.
    pub(crate) async fn anonymous(&self, address: SocketAddr) -> ClientConnection {
        let dialer = ClientDialer::new(None, self.judge.clone(), self.now.clone()).unwrap();
        dialer.connect(address, Duration::from_secs(10)).await.unwrap()
    }

    /// The latest certified beacon, as soon as there is one.
    pub(crate) async fn beacon(&self, address: SocketAddr) -> BeaconAnswer {
        let connection = self.anonymous(address).await;
        for _ in 0..100 {
            let (status, body) = get(&connection, PATH_BEACON).await;
            if status == 200 {
                return BeaconAnswer::decode(&body).unwrap();
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("no certified beacon");
    }

    /// A session with a node, in the binding that its latest beacon asks for.
    pub(crate) async fn session(&self, address: SocketAddr) -> Session {
        let beacon = self.beacon(address).await;
        self.session_over(address, beacon, |report_data| report_data).await
    }

    /// A session certificate for `beacon` whose evidence is over what `twist` makes of the right report data.
    pub(crate) fn certificate(&self, beacon: &BeaconAnswer, twist: impl FnOnce([u8; 64]) -> [u8; 64]) -> CertifiedIdentity {
        let binding = SessionBinding { cluster_id: beacon.cluster_id, beacon_pos: beacon.beacon_pos, beacon: beacon.beacon };
        let evidence_of = self.evidence_of();
        CertifiedIdentity::for_session((self.now)(), Duration::from_secs(3600), &binding, |data| evidence_of(twist(data))).unwrap()
    }

    /// A session whose certificate may lie.
    pub(crate) async fn session_over(
        &self,
        address: SocketAddr,
        beacon: BeaconAnswer,
        twist: impl FnOnce([u8; 64]) -> [u8; 64],
    ) -> Session {
        self.connect(address, beacon, self.certificate(&beacon, twist)).await.unwrap()
    }

    /// Connects with this certificate.
    pub(crate) async fn connect(
        &self,
        address: SocketAddr,
        beacon: BeaconAnswer,
        identity: CertifiedIdentity,
    ) -> Result<Session, PeerError> {
        self.connect_again(address, beacon, CertificateSource::new(identity)).await
    }

    async fn connect_again(&self, address: SocketAddr, beacon: BeaconAnswer, source: Arc<CertificateSource>) -> Result<Session, PeerError> {
        let dialer = ClientDialer::new(Some(Arc::clone(&source)), self.judge.clone(), self.now.clone()).unwrap();
        let connection = dialer.connect(address, Duration::from_secs(10)).await?;
        Ok(Session { app_id: self.app_id, pin: self.pin, identity: source.current(), source, connection, beacon })
    }
}

/// A connection with a session certificate.
pub(crate) struct Session {
    app_id: AppId,
    pin: Pin,
    pub(crate) identity: Arc<CertifiedIdentity>,
    source: Arc<CertificateSource>,
    pub(crate) connection: ClientConnection,
    pub(crate) beacon: BeaconAnswer,
}

impl Session {
    /// The same session at another node.
    pub(crate) async fn elsewhere(&self, workload: &Workload, address: SocketAddr) -> Self {
        workload.connect_again(address, self.beacon, Arc::clone(&self.source)).await.unwrap()
    }

    /// A right request.
    pub(crate) fn request(&self) -> RelReq {
        let mut nonce = [0; 32];
        getrandom::fill(&mut nonce).unwrap();
        let recipient = RecipientKey::new(Secret::try_from_fn(|seed: &mut [u8; 32]| getrandom::fill(seed)).unwrap());
        RelReq {
            cluster_id: self.pin.cluster_id,
            generation: self.pin.generation,
            beacon_pos: self.beacon.beacon_pos,
            beacon: self.beacon.beacon,
            mode: Mode::Client,
            evidence_hash: evidence_hash(self.identity.evidence()),
            epk: recipient.public(),
            nonce,
            app_id: self.app_id,
            wishes: wishes(),
        }
    }

    /// Signed by this session.
    pub(crate) fn signed(&self, request: RelReq) -> ReleaseAsk {
        let sig = self.identity.key().sign_fixed(&request.encode()).unwrap();
        ReleaseAsk { request, sig, exclude: Vec::new() }
    }

    /// Sends it: the answer, or the refusal.
    pub(crate) async fn ask(&self, ask: &ReleaseAsk) -> Result<ReleaseAnswer, Refusal> {
        let (status, body) = post(&self.connection, PATH_RELEASE, ask.encode()).await.unwrap();
        if status == 200 { Ok(ReleaseAnswer::decode(&body).unwrap()) } else { Err(refusal(&body)) }
    }
}

/// A refusal in a body.
pub(crate) fn refusal(body: &[u8]) -> Refusal {
    Refusal::decode(body).unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(body)))
}

pub(crate) async fn get(connection: &ClientConnection, path: &str) -> (u16, Vec<u8>) {
    request(connection, "GET", path, Vec::new()).await.unwrap()
}

pub(crate) async fn post(connection: &ClientConnection, path: &str, body: Vec<u8>) -> Result<(u16, Vec<u8>), PeerError> {
    request(connection, "POST", path, body).await
}

async fn request(connection: &ClientConnection, method: &str, path: &str, body: Vec<u8>) -> Result<(u16, Vec<u8>), PeerError> {
    let request = ClientRequest {
        method: method.parse().unwrap(),
        path,
        content_type: MEDIA_TYPE,
        body: body.into(),
        headers: &[],
        answer_bytes_max: 1 << 20,
        timeout: Duration::from_secs(20),
    };
    connection.request(request).await.map(|(status, body)| (status, body.to_vec()))
}

/// A runtime for the asynchronous half of a test; processes are started from the test's own thread.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}
