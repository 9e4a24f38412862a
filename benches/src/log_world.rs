//! A replicated machine in the state of a formed cluster, and batches of intents for it. Owns: three nodes' keys, genesis, key
//! generation, one app. Never: Raft itself; commands are applied here in the order in which they are made.

use std::sync::Arc;

use dstack_protocol::ceremony::{AdmitBody, JoinBody, Message, MessageKind, Open, Step, StepKind, What, body_digest};
use dstack_protocol::command::{Command, CommandAnswer};
use dstack_protocol::genesis::{AllowedNode, Authority, CaAlgorithm, Genesis, SeatGrant, collateral_id};
use dstack_protocol::governance::{Action, ActionKind, Approval, Entry, Object};
use dstack_protocol::log::{BeaconBody, Reading};
use dstack_protocol::policy::{AppPolicy, Rate};
use dstack_protocol::release::{Intent, KeyClass, Mode};
use dstack_protocol::{AppId, ClusterId, Epoch, Generation, NodeIndex, Platform, RootTag, Seat, TcbStatus, UnixMillis, Wire};
use dstack_raft::Machine;
use dstack_raft::machine::{Birth, KmsMachine, instance, view};
use dstack_secret::Secret;
use dstack_threshold::dkg::{Ceremony, Checked, EncryptionKey, Participant};
use dstack_threshold::group::Ristretto255;
use ed25519_dalek::{Signer as _, SigningKey};

const T0: u64 = 1_800_000_000_000;
const APP: AppId = AppId([1; 20]);
const NODES: u16 = 3;

/// See the module text.
pub struct LogWorld {
    machine: KmsMachine,
    cluster_id: ClusterId,
    nodes: Vec<SigningKey>,
    operators: Vec<SigningKey>,
}

impl Default for LogWorld {
    fn default() -> Self {
        Self::formed()
    }
}

impl LogWorld {
    /// Genesis, admissions, a beacon, key generation 2 of 3, one app without a limit that a benchmark would meet.
    #[must_use]
    pub fn formed() -> Self {
        let keys = |from: u8| (from..from + 3).map(|seed| SigningKey::from_bytes(&[seed; 32])).collect::<Vec<_>>();
        let (nodes, operators) = (keys(11), keys(1));
        let birth = birth(&operators);
        let mut world = Self { cluster_id: *birth.cluster_id(), machine: KmsMachine::new(birth), nodes, operators };
        world.admit();
        world.beacon();
        world.generate();
        world.register();
        assert!(world.machine.state().unwrap().apps.contains_key(&APP));
        world
    }

    /// A copy of the machine, to apply commands to.
    #[must_use]
    pub fn machine(&self) -> KmsMachine {
        self.machine.clone()
    }

    /// The bytes of a command that records `count` intents for `keys` keys each.
    #[must_use]
    pub fn intents(&self, count: u16, keys: u8) -> Vec<u8> {
        let (beacon_pos, _) = view::latest_beacon(self.machine.state().unwrap()).unwrap();
        let intent = |number: u16| {
            let mut req_hash = [0; 32];
            req_hash[..2].copy_from_slice(&number.to_be_bytes());
            Intent {
                req_hash,
                evidence_hash: [2; 32],
                generation: Generation(0),
                mode: Mode::Client,
                coordinator: NodeIndex(0),
                beacon_pos,
                app_id: APP,
                wishes: (0..keys).map(|key| (KeyClass::K256, [key; 32])).collect(),
            }
        };
        Command::Intents((0..count).map(intent).collect()).encode()
    }

    fn apply(&mut self, command: &Command) {
        let answer = CommandAnswer::decode(&self.machine.apply(&command.encode()).response).unwrap();
        assert!(answer.outcomes.iter().all(|outcome| outcome.code == 0), "{answer:?}");
    }

    fn sign(&self, node: u16, kind: MessageKind, index: u16, inst: [u8; 32], body: Vec<u8>) -> Command {
        let mut message = Message { kind, index: NodeIndex(index), inst, body, sig: [0; 64] };
        message.sig = self.nodes[usize::from(node)].sign(&message.signed_bytes(&self.cluster_id)).to_bytes();
        Command::Ceremony(message)
    }

    fn admit(&mut self) {
        self.apply(&self.machine.birth().command());
        let mut hashes = Vec::new();
        for node in 0..NODES {
            let body = AdmitBody {
                seat: Seat(node + 1),
                node_key: self.nodes[usize::from(node)].verifying_key().to_bytes(),
                incarnation: 1,
                beacon_pos: 0,
                beacon: self.cluster_id.0,
                evidence: vec![1, 2, 3],
            };
            hashes.push(body_digest(&body.encode()));
            self.apply(&self.sign(node, MessageKind::Admit, 0, [0; 32], body.encode()));
        }
        for hash in hashes {
            for node in 0..NODES {
                self.apply(&self.sign(node, MessageKind::Vouch, node + 1, [0; 32], hash.to_vec()));
            }
        }
    }

    fn beacon(&mut self) {
        let reading = |node: u16| {
            let mut reading = Reading {
                prev_beacon_pos: 0,
                prev_beacon: self.cluster_id.0,
                index: NodeIndex(node + 1),
                unix_ms: UnixMillis(T0),
                rand: [9; 32],
                sig: [0; 64],
            };
            reading.sig = self.nodes[usize::from(node)].sign(&reading.signed_bytes(&self.cluster_id)).to_bytes();
            reading
        };
        let readings = (0..2).map(reading).collect();
        self.apply(&Command::Beacon(BeaconBody { cluster_id: self.cluster_id, readings }));
    }

    fn generate(&mut self) {
        let all: Vec<NodeIndex> = (1..=NODES).map(NodeIndex).collect();
        let open = Open {
            generation: Generation(0),
            what: What::Dkg,
            old_epoch: Epoch(0),
            new_epoch: Epoch(1),
            attempt: 1,
            t: 2,
            roots: vec![RootTag::Prf],
            dealers: all.clone(),
            holders: all,
        };
        self.apply(&Command::Open(open.clone()));
        let join_id = open.join_id(&self.cluster_id);
        let keys: Vec<EncryptionKey> = (20..23u8).map(|seed| EncryptionKey::new(Secret::from_fn(|b| b.fill(seed)))).collect();
        let (beacon_pos, beacon) = view::latest_beacon(self.machine.state().unwrap()).map(|(pos, row)| (pos, row.value)).unwrap();
        for (node, key) in (0..NODES).zip(&keys) {
            let body = JoinBody { beacon_pos, beacon, keys: vec![(RootTag::Prf, key.public())], evidence: vec![5] };
            self.apply(&self.sign(node, MessageKind::Join, node + 1, join_id, body.encode()));
        }
        let run = self.run();
        let participant = |(node, key): (u16, EncryptionKey)| {
            let seed = Secret::from_fn(|bytes| bytes.fill(40 + node as u8));
            Participant::new(run.instance().clone(), NodeIndex(node + 1), key, seed).unwrap()
        };
        let mut participants: Vec<Participant<Ristretto255>> = (0..NODES).zip(keys).map(participant).collect();
        let inst = run.instance().inst();
        for kind in [MessageKind::Commit, MessageKind::Deal] {
            for (node, participant) in (0..NODES).zip(&participants) {
                let package = participant.package();
                let body = if kind == MessageKind::Commit { package.commit.to_vec() } else { package.body.clone() };
                self.apply(&self.sign(node, kind, node + 1, inst, body));
            }
        }
        let run = self.run();
        for (node, participant) in (0..NODES).zip(&mut participants) {
            let Checked::Ready(ready) = participant.check(&run).unwrap() else { panic!("honest deals are right") };
            self.apply(&self.sign(node, MessageKind::Ready, node + 1, inst, ready.encode()));
        }
        self.apply(&Command::Step(Step { kind: StepKind::Switched, join_id }));
    }

    fn run(&self) -> Ceremony<Ristretto255> {
        let state = self.machine.state().unwrap();
        instance(state, &self.cluster_id, state.attempt.as_ref().unwrap()).unwrap()
    }

    fn register(&mut self) {
        let policy = AppPolicy {
            name: "web".into(),
            platforms: vec![Platform::Tdx],
            compose_hashes: vec![[4; 32]],
            any_os_image: true,
            os_images: vec![],
            tcb_allowed: vec![TcbStatus::UpToDate],
            classes: vec![KeyClass::K256],
            paths: vec![],
            rate: Rate { per_second: 1_000_000, burst: 1_000_000 },
            session_ms: 3_600_000,
            allow_legacy: false,
            tcb: dstack_protocol::policy::TcbRules::default(),
            ask_authority: false,
        };
        let action = Action {
            cluster_id: self.cluster_id,
            action_id: [1; 16],
            kind: ActionKind::SetAppPolicy,
            object: Object::App(APP),
            base_version: 0,
            body: policy.encode(),
            not_after: UnixMillis(T0 + 10_000_000),
        };
        let approve = |key: &SigningKey| Approval { operator: key.verifying_key().to_bytes(), sig: key.sign(&action.encode()).to_bytes() };
        let approvals = self.operators.iter().take(2).map(approve).collect();
        self.apply(&Command::Governance(Entry::Propose { action, approvals }));
    }
}

fn birth(operators: &[SigningKey]) -> Arc<Birth> {
    let mut keys: Vec<[u8; 32]> = operators.iter().map(|key| key.verifying_key().to_bytes()).collect();
    keys.sort_unstable();
    let collateral = br#"{"format":1,"tdx":{}}"#;
    let genesis = Genesis {
        random: [7; 32],
        n: NODES,
        t: 2,
        f: 0,
        ca_algorithm: CaAlgorithm::Ed25519,
        authority: Authority::OperatorQuorum,
        chain_settings: vec![],
        k: 2,
        r: 1,
        timelock_s: 0,
        operators: keys,
        allowed_nodes: vec![AllowedNode { platform: Platform::Tdx, measurement: vec![1; 224] }],
        software_roots: vec![],
        seats: (1..=NODES)
            .map(|seat| SeatGrant { seat: Seat(seat), address: format!("127.0.0.1:{seat}"), platform_identity: vec![seat as u8; 16] })
            .collect(),
        collateral_id: collateral_id(collateral),
    };
    Arc::new(Birth::new(&genesis.encode(), collateral).unwrap())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_intent_of_a_batch_is_recorded() {
        let world = LogWorld::formed();
        let mut machine = world.machine();
        let applied = machine.apply(&world.intents(128, 4));
        let answer = CommandAnswer::decode(&applied.response).unwrap();
        assert_eq!((answer.outcomes.len(), applied.leaves.len()), (128, 128));
        assert!(answer.outcomes.iter().all(|outcome| outcome.code == 0));
    }
}
