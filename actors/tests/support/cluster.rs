//! A cluster up to its first beacon, or up to its root: admissions, beacons, key generation and governance through the real machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use dstack_actors::ports::{Evidence, Judge};
use dstack_actors::recorder::Author;
use dstack_attest::{CollateralBundle, TcbPolicy, TrustRoots, VerifyContext, verify, verify_legacy};
use dstack_protocol::binding;
use dstack_protocol::ceremony::{AdmitBody, JoinBody, MessageKind, Open, Step, StepKind, What, body_digest};
use dstack_protocol::codec::{Reader, sha256};
use dstack_protocol::command::Command;
use dstack_protocol::genesis::{AllowedNode, Authority, CaAlgorithm, Genesis, SeatGrant, collateral_id};
use dstack_protocol::governance::{Action, ActionKind, Approval, Entry, Object};
use dstack_protocol::log::{BeaconBody, Reading};
use dstack_protocol::policy::{AppPolicy, PathRule, Rate};
use dstack_protocol::release::{Intent, KeyClass, RelReq};
use dstack_protocol::{
    AppId, ClusterId, Epoch, Generation, NodeIndex, Platform, Refusal, RefusalCode, RootTag, Seat, TcbStatus, UnixMillis, Wire,
};
use dstack_raft::machine::{Birth, instance, view};
use dstack_secret::Secret;
use dstack_tee::Device as _;
use dstack_testkit::{Machine, SoftwareRoots};
use dstack_threshold::dkg::{Checked, EncryptionKey, Participant};
use dstack_threshold::group::{Group as _, Ristretto255};
use dstack_threshold::message::NodeKey;
use dstack_threshold::prf::{Batch, PrfShare, evaluate};
use dstack_threshold::shamir::lagrange_at_zero;

use super::log::SharedLog;
use super::system_now;

/// The app that clients of tests are.
pub const APP: AppId = AppId([1; 20]);
/// Its compose document.
pub const COMPOSE: &[u8] = b"{\"name\":\"web\"}";

/// See the module text.
pub struct Cluster {
    pub roots: SoftwareRoots,
    pub birth: Arc<Birth>,
    pub id: ClusterId,
    pub log: Arc<SharedLog>,
    pub machines: Vec<Arc<Machine>>,
    pub keys: Vec<Arc<NodeKey>>,
    /// Log time of the first beacon: the time of the test.
    pub born: UnixMillis,
    pub operators: Vec<NodeKey>,
    actions: AtomicU8,
}

/// Ten bytes of a key that is the same in every run.
fn key(label: u8, number: u16) -> NodeKey {
    NodeKey::new(Secret::from_fn(|seed| {
        seed.fill(label);
        seed[..2].copy_from_slice(&number.to_be_bytes());
    }))
}

impl Cluster {
    /// `n` admitted nodes, one beacon, no root.
    pub fn new(n: u16, timelock_s: u64) -> Self {
        Self::with_ca(n, timelock_s, CaAlgorithm::Ed25519)
    }

    /// As [`Cluster::new`], with that algorithm of root `ca`.
    pub fn with_ca(n: u16, timelock_s: u64, ca_algorithm: CaAlgorithm) -> Self {
        let born = system_now();
        let roots = SoftwareRoots::generate(born).unwrap();
        let machines: Vec<Arc<Machine>> = (1..=n).map(|i| Arc::new(Machine::tdx(&format!("node-{i}"), &roots).unwrap())).collect();
        let operators: Vec<NodeKey> = (1..=3).map(|i| key(1, i)).collect();
        let mut operator_keys: Vec<[u8; 32]> = operators.iter().map(NodeKey::public).collect();
        operator_keys.sort_unstable();
        let software_roots = TrustRoots::none().with_software_root(roots.tdx_root_der()).unwrap();
        let genesis = Genesis {
            random: [7; 32],
            n,
            t: Genesis::threshold_for(n),
            f: 0,
            ca_algorithm,
            authority: Authority::OperatorQuorum,
            chain_settings: vec![],
            k: 2,
            r: 1,
            timelock_s,
            operators: operator_keys,
            allowed_nodes: vec![AllowedNode { platform: Platform::Tdx, measurement: machines[0].measurement() }],
            software_roots: software_roots.iter().map(|root| *root.spki_sha256()).collect(),
            seats: (1..=n)
                .zip(&machines)
                .map(|(i, machine)| SeatGrant {
                    seat: Seat(i),
                    address: format!("127.0.0.1:{i}"),
                    platform_identity: machine.host().identity(),
                })
                .collect(),
            collateral_id: collateral_id(roots.bundle()),
        };
        let birth = Arc::new(Birth::new(&genesis.encode(), roots.bundle()).unwrap().with_roots(software_roots).unwrap());
        let cluster = Self {
            id: *birth.cluster_id(),
            log: SharedLog::new(Arc::clone(&birth)),
            birth,
            machines,
            keys: (1..=n).map(|i| Arc::new(key(2, i))).collect(),
            operators,
            actions: AtomicU8::new(1),
            born,
            roots,
        };
        cluster.form();
        assert_eq!(cluster.beacon(born), None);
        cluster
    }

    /// A cluster with a root and the app; its shares, in the order of the nodes.
    pub fn with_root(n: u16) -> (Self, Vec<PrfShare>) {
        let cluster = Self::new(n, 0);
        let shares = cluster.dkg();
        assert_eq!(cluster.set_policy(APP), None);
        (cluster, shares)
    }

    pub fn n(&self) -> u16 {
        u16::try_from(self.keys.len()).unwrap()
    }

    fn signed(&self, node: usize, kind: MessageKind, index: u16, inst: [u8; 32], body: Vec<u8>) -> Command {
        Command::Ceremony(self.keys[node].sign_message(&self.id, kind, NodeIndex(index), inst, body))
    }

    fn form(&self) {
        assert_eq!(self.log.code(&self.birth.command()), None);
        let mut hashes = Vec::new();
        for (node, machine) in self.machines.iter().enumerate() {
            let (seat, node_key) = (Seat(node as u16 + 1), self.keys[node].public());
            let evidence = machine.evidence(binding::admit(&self.id, seat, &node_key, 1, 0, &self.id.0)).unwrap();
            let body = AdmitBody { seat, node_key, incarnation: 1, beacon_pos: 0, beacon: self.id.0, evidence }.encode();
            hashes.push(body_digest(&body));
            assert_eq!(self.log.code(&self.signed(node, MessageKind::Admit, 0, [0; 32], body)), None);
        }
        for hash in hashes {
            for node in 0..self.keys.len() {
                let vouch = self.signed(node, MessageKind::Vouch, node as u16 + 1, [0; 32], hash.to_vec());
                assert_eq!(self.log.code(&vouch), None);
            }
        }
    }

    /// A beacon of `t` clocks that all say `at`.
    pub fn beacon(&self, at: UnixMillis) -> Option<RefusalCode> {
        let (pos, value) = self.latest_beacon();
        let t = usize::from(Genesis::threshold_for(self.n()));
        let readings = (1..=self.n())
            .zip(&self.keys)
            .take(t)
            .map(|(index, key)| {
                let mut reading =
                    Reading { prev_beacon_pos: pos, prev_beacon: value, index: NodeIndex(index), unix_ms: at, rand: [9; 32], sig: [0; 64] };
                reading.sig = key.sign(&reading.signed_bytes(&self.id));
                reading
            })
            .collect();
        self.log.code(&Command::Beacon(BeaconBody { cluster_id: self.id, readings }))
    }

    /// Position and value; before the first beacon what takes its place.
    pub fn latest_beacon(&self) -> (u64, [u8; 32]) {
        self.log.read(|state| view::latest_beacon(state).map_or((0, self.id.0), |(pos, row)| (pos, row.value)))
    }

    pub fn log_time(&self) -> UnixMillis {
        self.log.read(|state| state.log_time)
    }

    /// Runs key generation as honest nodes would and gives their shares.
    pub fn dkg(&self) -> Vec<PrfShare> {
        let all: Vec<NodeIndex> = (1..=self.n()).map(NodeIndex).collect();
        let open = Open {
            generation: Generation(0),
            what: What::Dkg,
            old_epoch: Epoch(0),
            new_epoch: Epoch(1),
            attempt: 1,
            t: Genesis::threshold_for(self.n()),
            roots: vec![RootTag::Prf],
            dealers: all.clone(),
            holders: all.clone(),
        };
        let join_id = open.join_id(&self.id);
        assert_eq!(self.log.code(&Command::Open(open)), None);
        let (beacon_pos, beacon) = self.latest_beacon();
        let secrets: Vec<EncryptionKey> = all.iter().map(|i| EncryptionKey::new(Secret::from_fn(|b| b.fill(20 + i.0 as u8)))).collect();
        for (node, key) in secrets.iter().enumerate() {
            let body = JoinBody { beacon_pos, beacon, keys: vec![(RootTag::Prf, key.public())], evidence: vec![5] }.encode();
            assert_eq!(self.log.code(&self.signed(node, MessageKind::Join, node as u16 + 1, join_id, body)), None);
        }
        let run = || self.log.read(|state| instance(state, &self.id, state.attempt.as_ref().unwrap()).unwrap());
        let inst = run().instance().inst();
        let mut participants: Vec<Participant<Ristretto255>> = secrets
            .into_iter()
            .zip(&all)
            .map(|(key, index)| {
                let seed = Secret::from_fn(|b| getrandom::fill(b).unwrap());
                Participant::new(run().instance().clone(), *index, key, seed).unwrap()
            })
            .collect();
        for kind in [MessageKind::Commit, MessageKind::Deal] {
            for (node, participant) in participants.iter().enumerate() {
                let package = participant.package();
                let body = if kind == MessageKind::Commit { package.commit.to_vec() } else { package.body.clone() };
                assert_eq!(self.log.code(&self.signed(node, kind, node as u16 + 1, inst, body)), None);
            }
        }
        let dealt = run();
        for (node, participant) in participants.iter_mut().enumerate() {
            let Checked::Ready(ready) = participant.check(&dealt).unwrap() else { panic!("honest deals are right") };
            assert_eq!(self.log.code(&self.signed(node, MessageKind::Ready, node as u16 + 1, inst, ready.encode())), None);
        }
        let complete = run();
        assert_eq!(self.log.code(&Command::Step(Step { kind: StepKind::Switched, join_id })), None);
        participants.into_iter().map(|participant| participant.finish(&complete).unwrap().into_prf_share().unwrap()).collect()
    }

    /// Signs for a node's recorder.
    pub fn author(&self, seat: u16) -> Author {
        Author { cluster_id: self.id, node_key: Arc::clone(&self.keys[usize::from(seat) - 1]) }
    }

    /// The command by which the node that an intent names records it, resting on that statement.
    pub fn recorded(&self, intent: &Intent, statement_id: Option<[u8; 32]>) -> Command {
        self.author(intent.coordinator.0.max(1)).command(vec![(intent.clone(), statement_id)])
    }

    /// Proposes an action that all operators approve.
    pub fn govern(&self, kind: ActionKind, object: Object, body: Vec<u8>) -> Option<RefusalCode> {
        let base_version = self.log.read(|state| state.governance.versions.get(&object).copied().unwrap_or(0));
        let action = Action {
            cluster_id: self.id,
            action_id: [self.actions.fetch_add(1, Ordering::SeqCst); 16],
            kind,
            object,
            base_version,
            body,
            not_after: self.log_time().plus_ms(10_000_000),
        };
        let approvals =
            self.operators.iter().take(2).map(|key| Approval { operator: key.public(), sig: key.sign(&action.encode()) }).collect();
        self.log.code(&Command::Governance(Entry::Propose { action, approvals }))
    }

    pub fn set_policy(&self, app: AppId) -> Option<RefusalCode> {
        self.govern(ActionKind::SetAppPolicy, Object::App(app), Self::policy().encode())
    }

    /// What an app of dstack's own guests may have.
    pub fn legacy_policy() -> AppPolicy {
        let classes = vec![KeyClass::Disk, KeyClass::Env, KeyClass::K256, KeyClass::P256];
        AppPolicy { classes, paths: vec![], allow_legacy: true, ..Self::policy() }
    }

    /// What the app may have.
    pub fn policy() -> AppPolicy {
        AppPolicy {
            name: "web".into(),
            platforms: vec![Platform::Tdx],
            compose_hashes: vec![sha256(&[COMPOSE])],
            any_os_image: true,
            os_images: vec![],
            tcb_allowed: vec![TcbStatus::UpToDate],
            classes: vec![KeyClass::Disk, KeyClass::K256, KeyClass::Custom],
            paths: vec![PathRule::Prefix("db/".into())],
            rate: Rate { per_second: 1000, burst: 100_000 },
            session_ms: 3_600_000,
            allow_legacy: false,
            tcb: dstack_protocol::policy::TcbRules::default(),
            ask_authority: false,
        }
    }

    /// Production verification under the cluster's roots and collateral.
    pub fn judge(&self) -> Judge {
        let trusted = TrustRoots::none().with_software_root(self.roots.tdx_root_der()).unwrap();
        let collateral = CollateralBundle::parse(self.roots.bundle()).unwrap();
        Arc::new(move |evidence, collateral_id, now| {
            assert_eq!(collateral_id, collateral.id(), "asked for the bundle in force");
            let context = VerifyContext { now, roots: &trusted, collateral: &collateral, tcb: &TcbPolicy::default() };
            legacy_pair(evidence)
                .map_or_else(|| verify(evidence, &context), |(quote, log)| verify_legacy(quote, log, &context))
                .map(Arc::new)
                .map_err(|error| Refusal::new(RefusalCode::EvidenceInvalid, "evidence that verifies", error.to_string()))
        })
    }

    pub fn public_key(&self) -> [u8; 32] {
        self.log.read(|state| state.roots[&(Generation(0), RootTag::Prf)].public_key.0.clone().try_into().unwrap())
    }
}

/// The pair inside evidence of dstack's legacy extensions.
fn legacy_pair(evidence: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut reader = Reader::new(evidence);
    reader.label("DKMS-V1-LEGACY").ok()?;
    Some((reader.lp4("quote", evidence.len()).ok()?, reader.lp4("event log", evidence.len()).ok()?))
}

/// A second copy of a share, so that a test may evaluate beside the holder.
pub fn copy(share: &PrfShare) -> PrfShare {
    let scalar = share.scalar().expose(|bytes| Secret::from_fn(|out| out.copy_from_slice(bytes)));
    PrfShare::new(share.index(), share.generation(), share.epoch(), scalar, &share.vk()).unwrap()
}

/// A liar's share: another holder's scalar under the name of `index`. What it evaluates is proven well, for the wrong key.
pub fn renamed(share: &PrfShare, index: NodeIndex) -> PrfShare {
    let scalar = share.scalar().expose(|bytes| Secret::from_fn(|out| out.copy_from_slice(bytes)));
    PrfShare::new(index, share.generation(), share.epoch(), scalar, &share.vk()).unwrap()
}

/// What `request` gives under the whole secret, which only a test ever puts together: no combination of elements is involved.
pub fn direct(cluster: &Cluster, shares: &[PrfShare], request: &RelReq) -> Vec<[u8; 64]> {
    let t = usize::from(Genesis::threshold_for(cluster.n()));
    let set: Vec<NodeIndex> = shares.iter().take(t).map(PrfShare::index).collect();
    let weights = lagrange_at_zero::<Ristretto255>(&set).unwrap();
    let secret = shares.iter().zip(weights).fold(Ristretto255::scalar_from_u64(0), |sum, (share, weight)| {
        sum + share.scalar().expose(|bytes| Ristretto255::decode_scalar(bytes).unwrap()) * weight
    });
    let whole = Secret::take(&mut Ristretto255::encode_scalar(&secret));
    let whole = PrfShare::new(NodeIndex(1), Generation(0), Epoch(1), whole, &cluster.public_key()).unwrap();
    let elements = evaluate(&whole, &Batch::of_request(request).unwrap(), &[7; 64]).into_plain(0, 0, [0; 32]).elements;
    let lp = |bytes: &[u8]| [&u16::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat();
    let inputs = request.wishes.iter().map(|wish| wish.prf_input(&request.cluster_id, &request.app_id));
    inputs.zip(elements.iter()).map(|(x, y)| dstack_protocol::codec::sha512(&[&lp(&x), &lp(y), b"Finalize"])).collect()
}

/// A machine as a node's device.
pub struct DeviceEvidence(pub Arc<Machine>);

impl Evidence for DeviceEvidence {
    fn evidence(&self, report_data: [u8; 64]) -> Result<Vec<u8>, String> {
        self.0.evidence(report_data).map_err(|error| error.to_string())
    }
}
