//! Three nodes with their listeners in one process, one root that signs as the cluster's would, guests with emulated machines, and curl.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dstack_actors::ports::{Later, Log, read};
use dstack_attest::wire::{Attestation, CertificateConfig, CertificateRequest, EventVersion, PlatformEvidence, RuntimeEvent, TdxEvent};
use dstack_attest::x509ext::CertificateEvidence;
use dstack_certificates::{PublicKey, issue, pem, temp::temp_ca};
use dstack_protocol::command::{Command as LogCommand, CommandAnswer};
use dstack_protocol::env::EnvPubBody;
use dstack_protocol::governance::{ActionKind, Object};
use dstack_protocol::policy::AppPolicy;
use dstack_protocol::sign::{Basis, SignKey, SignObject};
use dstack_protocol::state::{AskRow, Blob, EnvRow, SignedRow, State};
use dstack_protocol::{NodeIndex, Refusal, RootTag, UnixMillis, Wire as _, binding};
use dstack_tee::Device as _;
use dstack_tee::software::protocol::{Boot, HexArray, HexBytes};
use dstack_testkit::{Machine, Measured};
use ed25519_dalek::Signer as _;
use rcgen::{CertificateParams, CustomExtension, KeyPair, SigningKey as _};
use serde_json::Value;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::super::onboard::bootstrap::BootstrapInfo;
use super::super::signatures::Signatures;
use super::super::{GENERATION, Parts, start};
use crate::config::DstackConfig;
use crate::support::cluster::{APP, COMPOSE, Cluster, copy};
use crate::support::holders::Node;
use crate::support::peers::{InProcess, Manner};
use crate::support::{system_now, until};

/// The app's env public key, as the log would hold it.
pub(super) const ENVPUB: [u8; 32] = [0x42; 32];

/// Roots `ca` and `id` with one holder, signing as a committee would: from the rows, with the roots' own rules.
pub(super) struct Roots {
    cluster_id: dstack_protocol::ClusterId,
    ca: ed25519_dalek::SigningKey,
    id: k256::ecdsa::SigningKey,
    book: Mutex<BTreeMap<SignKey, SignedRow>>,
    log: Arc<dyn Log>,
}

impl Roots {
    fn ca_public(&self) -> PublicKey {
        PublicKey::Ed25519(self.ca.verifying_key().to_bytes())
    }
    pub(super) fn identity(&self) -> Vec<u8> {
        self.id.verifying_key().to_sec1_point(true).as_bytes().to_vec()
    }
    /// The date of the env key's latest signature with one, s.
    pub(super) fn dated(&self) -> Option<u64> {
        match self.book.lock().unwrap().get(&SignKey::EnvKeyAt(GENERATION, APP))?.ask.object {
            SignObject::EnvKeyAt { timestamp_s, .. } => Some(timestamp_s),
            _ => None,
        }
    }
    fn made(&self, object: SignObject, basis: Basis, pos: u64) -> SignedRow {
        let log_time = read(&*self.log, |state| state.log_time).unwrap();
        let ask = AskRow { pos, log_time, author: NodeIndex(1), object, basis, attempts: 1 };
        let bytes = match ask.object.identity_digest() {
            Some(digest) => {
                let (signature, recovery) = self.id.sign_prehash_recoverable(&digest);
                [&signature.to_bytes()[..], &[recovery.to_byte()]].concat()
            }
            None => {
                let tbs = issue::to_be_signed(&self.cluster_id, &ask, &self.ca_public()).unwrap();
                issue::assemble(&tbs, &self.ca_public(), &self.ca.sign(&tbs).to_bytes()).unwrap()
            }
        };
        SignedRow { ask, pos: pos + 1, bytes: Blob(bytes) }
    }
}

impl Signatures for Roots {
    fn sign(&self, object: SignObject, basis: Basis) -> Later<Result<SignedRow, Refusal>> {
        // What the log asks of a basis.
        let released = match basis {
            Basis::Release { intent_id } => read(&*self.log, |state| state.intents.contains_key(&intent_id)).unwrap(),
            _ => !matches!(object, SignObject::AppKey { .. } | SignObject::AppCa { .. }),
        };
        assert!(released, "{object:?} rests on a release");
        let mut book = self.book.lock().unwrap();
        let pos = 1000 + u64::try_from(book.len()).unwrap();
        let row = match book.get(&object.key()) {
            Some(row) if row.ask.object == object => row.clone(),
            _ => self.made(object.clone(), basis, pos),
        };
        book.insert(object.key(), row.clone());
        Box::pin(std::future::ready(Ok(row)))
    }
}

/// The log with rows of the two roots and of the env key, which the support's cluster does not make.
struct Grown {
    log: Arc<dyn Log>,
    roots: Mutex<Option<Arc<Roots>>>,
}

impl Log for Grown {
    fn propose(&self, command: LogCommand, patience: Duration) -> Later<Result<CommandAnswer, Refusal>> {
        self.log.propose(command, patience)
    }
    fn show(&self, read: &mut dyn FnMut(Option<&State>)) -> Result<(), Refusal> {
        let roots = self.roots.lock().unwrap().clone().unwrap();
        self.log.show(&mut |state| {
            let mut state = state.cloned().unwrap();
            let prf = state.roots[&(GENERATION, RootTag::Prf)].clone();
            for (tag, key) in [(RootTag::Ca, roots.ca.verifying_key().to_bytes().to_vec()), (RootTag::Id, roots.identity())] {
                let mut root = prf.clone();
                root.public_key = Blob(key);
                state.roots.insert((GENERATION, tag), root);
            }
            let body = EnvPubBody { app_id: APP, generation: GENERATION, attempt: 1, envpub: ENVPUB }.encode();
            let kind = dstack_protocol::ceremony::MessageKind::EnvPub;
            let message = dstack_protocol::ceremony::Message { kind, index: NodeIndex(1), inst: [0; 32], body, sig: [0; 64] };
            let row = EnvRow { attempt: 1, attempt_pos: 9, since: UnixMillis(1), combiner: NodeIndex(1), published: Some(message) };
            state.env_keys.insert((GENERATION, APP), row);
            let book = roots.book.lock().unwrap();
            for (key, row) in book.iter() {
                let held = dstack_protocol::state::SignRow { open: BTreeMap::new(), signed: Some(row.clone()), recent: vec![] };
                state.signatures.insert(*key, held);
            }
            drop(book);
            read(Some(&state));
        })
    }
    fn applied(&self) -> watch::Receiver<u64> {
        self.log.applied()
    }
    fn leads(&self) -> bool {
        self.log.leads()
    }
}

/// See the module text.
pub(super) struct World {
    pub(super) cluster: Cluster,
    pub(super) nodes: Vec<Node>,
    pub(super) roots: Arc<Roots>,
    addresses: Vec<SocketAddr>,
    pub(super) dir: tempfile::TempDir,
    stop: CancellationToken,
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl World {
    /// Three nodes that serve `kms-<seat>.test`.
    pub(super) async fn new() -> Self {
        let (cluster, shares) = Cluster::with_root(3);
        let nodes: Vec<Node> = (1..).zip(&shares).map(|(seat, share)| Node::start(&cluster, seat, copy(share))).collect();
        let dir = tempfile::tempdir().unwrap();
        let log: Arc<dyn Log> = nodes[0].log.clone();
        let roots = Arc::new(Roots {
            cluster_id: cluster.id,
            ca: ed25519_dalek::SigningKey::from_bytes(&[7; 32]),
            id: k256::ecdsa::SigningKey::from_slice(&[8; 32]).unwrap(),
            book: Mutex::default(),
            log,
        });
        let stop = CancellationToken::new();
        let mut world = Self { cluster, nodes, roots, addresses: Vec::new(), dir, stop };
        world.set_policy(&Cluster::legacy_policy());
        for seat in 1..=3 {
            let address = world.listen(seat, &[]).await;
            world.addresses.push(address);
        }
        let root = world.roots.sign(SignObject::RootCa { generation: GENERATION }, Basis::State).await.unwrap();
        std::fs::write(world.root(), pem::certificate(&root.bytes.0)).unwrap();
        for seat in 1..=3 {
            // The first certificate is made soon after the start.
            let up = async { world.get(seat, "GetMeta", &[]).await.0 == 200 };
            tokio::pin!(up);
            let mut is_up = up.await;
            while !is_up {
                tokio::time::sleep(Duration::from_millis(100)).await;
                is_up = world.get(seat, "GetMeta", &[]).await.0 == 200;
            }
        }
        until("three listeners", || (world.addresses.len() == 3).then_some(())).await;
        world
    }

    /// A listener of that node over those peers, those named excepted.
    pub(super) async fn listen(&self, seat: u16, dead: &[u16]) -> SocketAddr {
        let node = &self.nodes[usize::from(seat) - 1];
        let others = self.nodes.iter().filter(|other| other.seat.0 != seat);
        let manner = |other: &Node| if dead.contains(&other.seat.0) { Manner::Silent } else { Manner::Honest(Arc::clone(&other.holder)) };
        let peers = InProcess::asked_by(seat, others.map(|other| (other.seat.0, manner(other))));
        let log = Arc::new(Grown { log: node.log.clone(), roots: Mutex::new(Some(Arc::clone(&self.roots))) });
        let parts = Parts {
            birth: Arc::clone(&self.cluster.birth),
            seat: node.seat,
            node_key: self.cluster.keys[usize::from(seat) - 1].public(),
            log,
            holder: Arc::clone(&node.holder),
            coordinator: node.coordinator(peers, 8),
            certificates: node.certs.clone(),
            now: node.now.port(),
            software: true,
            serving: Arc::new(|| Ok(())),
            signatures: Arc::clone(&self.roots) as _,
            bootstrap: BootstrapInfo::none(),
            standing: Arc::default(),
        };
        let config = DstackConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            hosts: vec![format!("kms-{seat}.test")],
            gateway_app_id: "the-gateway".to_owned(),
            admin: None,
            onboard: None,
        };
        let running = start(parts, &config, &Handle::current(), self.stop.clone()).await.unwrap();
        running.address
    }

    pub(super) fn set_policy(&self, policy: &AppPolicy) {
        assert_eq!(self.cluster.govern(ActionKind::SetAppPolicy, Object::App(APP), policy.encode()), None);
    }

    /// Where a node listens.
    pub(super) fn address(&self, seat: u16) -> SocketAddr {
        self.addresses[usize::from(seat) - 1]
    }

    /// The root's certificate, as an operator hands it out.
    pub(super) fn root(&self) -> PathBuf {
        self.dir.path().join("root.pem")
    }

    /// curl to a node's method (or another path, where it begins with a slash), verifying it by the root.
    pub(super) async fn curl(&self, seat: u16, method: &str, more: &[&str]) -> Output {
        self.curl_at(self.addresses[usize::from(seat) - 1], seat, method, more).await
    }

    pub(super) async fn curl_at(&self, address: SocketAddr, seat: u16, method: &str, more: &[&str]) -> Output {
        let mut curl = Command::new("curl");
        let host = format!("kms-{seat}.test");
        curl.args(["-sS", "--max-time", "30", "-w", "\n%{http_code}", "--cacert"]).arg(self.root());
        curl.args(["--resolve", &format!("{host}:{}:127.0.0.1", address.port())]).args(more);
        let path = if method.starts_with('/') { method.to_owned() } else { format!("/prpc/{method}") };
        curl.arg(format!("https://{host}:{}{path}", address.port()));
        tokio::task::spawn_blocking(move || curl.output().unwrap()).await.unwrap()
    }

    /// Status and JSON of a GET; 0 where there was no answer.
    pub(super) async fn get(&self, seat: u16, method: &str, more: &[&str]) -> (u16, Value) {
        parsed(&self.curl(seat, method, more).await)
    }

    /// Status and JSON of a POST as upstream's Rust clients send it: `?json`, no content type.
    pub(super) async fn post(&self, seat: u16, method: &str, body: &Value, more: &[&str]) -> (u16, Value) {
        let file = self.dir.path().join(format!("body-{seat}-{method}"));
        std::fs::write(&file, body.to_string()).unwrap();
        let data = format!("@{}", file.display());
        let more = [&["-H", "Content-Type:", "--data-binary", &data], more].concat();
        parsed(&self.curl(seat, &format!("{method}?json"), &more).await)
    }
}

/// Status and JSON body of what curl printed.
pub(super) fn parsed(output: &Output) -> (u16, Value) {
    let text = String::from_utf8_lossy(&output.stdout);
    let (body, status) = text.rsplit_once('\n').unwrap_or(("", "0"));
    (status.parse().unwrap_or(0), serde_json::from_str(body).unwrap_or(Value::Null))
}

/// A guest of dstack's with a key of its own.
pub(super) struct Guest {
    machine: Machine,
    pub(super) key: KeyPair,
    pub(super) instance: Vec<u8>,
}

impl Guest {
    pub(super) fn new(world: &World, name: &str) -> Self {
        Self::of_app(world, name, APP)
    }

    /// A guest in the middle of its boot: it has measured itself, and nothing of its keys.
    pub(super) fn booting(world: &World, name: &str) -> Self {
        let Self { machine, key, instance } = Self::new(world, name);
        let mut events = Measured::guest(&boot_of(name, APP)).td_registers().events;
        events.truncate(events.iter().position(|event| event.name == "boot-mr-done").unwrap() + 1);
        Self { machine: machine.running(Measured::Started(events)), key, instance }
    }

    pub(super) fn of_app(world: &World, name: &str, app: dstack_protocol::AppId) -> Self {
        let measured = Measured::guest(&boot_of(name, app));
        let machine = Machine::tdx(name, &world.cluster.roots).unwrap().running(measured.clone());
        let instance = machine.host().booted(&measured).unwrap().instance_id.0;
        Self { machine, key: KeyPair::generate().unwrap(), instance }
    }

    pub(super) fn spki(&self) -> Vec<u8> {
        rcgen::PublicKeyData::subject_public_key_info(&self.key)
    }

    /// Measures one more event, as a guest does while it boots.
    pub(super) fn measure(&self, event: &str, payload: &[u8]) {
        let event = RuntimeEvent { event: event.to_owned(), payload: payload.to_vec(), version: EventVersion::V1 };
        self.machine.measure(&event).unwrap();
    }

    /// Evidence in dstack's binding of a key.
    pub(super) fn evidence(&self, spki: &[u8]) -> Vec<u8> {
        self.machine.evidence(binding::ratls_certificate(spki)).unwrap()
    }

    /// curl's arguments for a certificate under the cluster's temp CA, as upstream's tools make it.
    pub(super) fn under_temp_ca(&self, world: &World) -> Vec<String> {
        let key = PublicKey::p256_from_spki("guest", &self.spki()).unwrap();
        let ca = temp_ca(&world.cluster.id).unwrap();
        let der = ca.client(&key, &self.evidence(&self.spki()), [9; 16], system_now().0 / 1000).unwrap();
        self.files(world, "temp-ca", &der)
    }

    /// The same for a self-signed certificate with other extensions and dates.
    pub(super) fn self_signed(&self, world: &World, name: &str, extensions: Vec<(u64, Vec<u8>)>, year: i32) -> Vec<String> {
        let mut params = CertificateParams::default();
        params.not_before = rcgen::date_time_ymd(year, 1, 1);
        params.not_after = rcgen::date_time_ymd(year + 10, 1, 1);
        let extension = |(last, content): (u64, Vec<u8>)| {
            let oid = dstack_certificates::names::oid(last);
            CustomExtension::from_oid_content(&oid, octets(&content))
        };
        params.custom_extensions = extensions.into_iter().map(extension).collect();
        let certificate = params.self_signed(&self.key).unwrap();
        self.files(world, name, certificate.der())
    }

    fn files(&self, world: &World, name: &str, der: &[u8]) -> Vec<String> {
        let (cert, key) = (world.dir.path().join(format!("{name}.pem")), world.dir.path().join(format!("{name}.key")));
        std::fs::write(&cert, pem::certificate(der)).unwrap();
        std::fs::write(&key, self.key.serialize_pem()).unwrap();
        vec!["--cert".into(), cert.display().to_string(), "--key".into(), key.display().to_string()]
    }

    /// Quote and event log (JSON) of the evidence, as 0.5.x guests show them.
    pub(super) fn legacy_pair(&self) -> (Vec<u8>, Vec<u8>) {
        match Attestation::decode(&self.evidence(&self.spki())).unwrap().platform {
            PlatformEvidence::Tdx(td) => (td.quote, TdxEvent::log_to_json(&td.event_log).into_bytes()),
            other => panic!("{other:?}"),
        }
    }

    /// A CSR for this guest's key, V2 or (with legacy evidence) V1, signed.
    pub(super) fn csr(&self, config: CertificateConfig, evidence: CertificateEvidence) -> (Vec<u8>, Vec<u8>) {
        let request = CertificateRequest { confirm: dstack_attest::wire::CONFIRM.to_owned(), public_key: self.spki(), config, evidence };
        let csr = request.encode();
        let signature = self.key.sign(&csr).unwrap();
        (csr, signature)
    }
}

fn boot_of(name: &str, app: dstack_protocol::AppId) -> Boot {
    let instance_seed = Some(HexBytes(name.as_bytes().to_vec()));
    Boot { compose: HexBytes(COMPOSE.to_vec()), app_id: Some(HexArray(app.0)), instance_seed, key_provider: None }
}

/// DER OCTET STRING.
fn octets(content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).unwrap().to_be_bytes();
    let head = match content.len() {
        0..=0x7f => vec![4, length[3]],
        0x80..=0xff => vec![4, 0x81, length[3]],
        0x100..=0xffff => vec![4, 0x82, length[2], length[3]],
        _ => vec![4, 0x83, length[1], length[2], length[3]],
    };
    [head, content.to_vec()].concat()
}
