//! The machine driven as three nodes would: genesis, admissions, beacons, key generation, policy, intents, snapshots.

mod adopt;
mod adopt_property;
mod coordinated;
mod env;
mod sign;

use std::collections::BTreeMap;
use std::sync::Arc;

use dstack_audit::{VouchedHead, verify_log, verify_receipt};
use dstack_protocol::ceremony::{AdmitBody, JoinBody, Message, MessageKind, Open, Step, StepKind, What, body_digest};
use dstack_protocol::command::{Command, CommandAnswer};
use dstack_protocol::coordinated::Coordinated;
use dstack_protocol::genesis::{AllowedNode, Authority, CaAlgorithm, Genesis, SeatGrant, collateral_id};
use dstack_protocol::governance::{Action, ActionKind, Approval, Entry, Object};
use dstack_protocol::log::{BeaconBody, Reading, Record, RecordKind, body_hash};
use dstack_protocol::policy::{AppPolicy, Rate};
use dstack_protocol::release::{Intent, KeyClass, Mode};
use dstack_protocol::{AppId, ClusterId, Epoch, Generation, NodeIndex, Platform, RefusalCode, RootTag, Seat, TcbStatus, UnixMillis, Wire};
use dstack_secret::Secret;
use dstack_threshold::dkg::{Checked, EncryptionKey, Participant};
use dstack_threshold::group::Ristretto255;
use ed25519_dalek::{Signer as _, SigningKey};

use super::{Birth, Effect, Formation, KmsMachine, ceremony, view};
use crate::contract::{Applied, Leaf, Machine};

const T0: u64 = 1_800_000_000_000;
const APP: AppId = AppId([1; 20]);

struct World {
    machine: KmsMachine,
    cluster_id: ClusterId,
    nodes: Vec<SigningKey>,
    operators: Vec<SigningKey>,
    leaves: Vec<Leaf>,
    commands: Vec<Vec<u8>>,
    effects: Vec<Effect>,
}

fn birth() -> Arc<Birth> {
    let operators: Vec<SigningKey> = (1..=3).map(|i| SigningKey::from_bytes(&[i; 32])).collect();
    let mut keys: Vec<[u8; 32]> = operators.iter().map(|k| k.verifying_key().to_bytes()).collect();
    keys.sort_unstable();
    let collateral = br#"{"format":1,"tdx":{}}"#;
    let genesis = Genesis {
        random: [7; 32],
        n: 3,
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
        seats: (1..=3u16)
            .map(|i| SeatGrant { seat: Seat(i), address: format!("127.0.0.1:{i}"), platform_identity: vec![i as u8; 16] })
            .collect(),
        collateral_id: collateral_id(collateral),
    };
    Arc::new(Birth::new(&genesis.encode(), collateral).unwrap())
}

impl World {
    fn new() -> Self {
        let birth = birth();
        Self {
            cluster_id: *birth.cluster_id(),
            machine: KmsMachine::new(birth),
            nodes: (11..=13).map(|i| SigningKey::from_bytes(&[i; 32])).collect(),
            operators: (1..=3).map(|i| SigningKey::from_bytes(&[i; 32])).collect(),
            leaves: vec![],
            commands: vec![],
            effects: vec![],
        }
    }

    fn apply(&mut self, command: &Command) -> CommandAnswer {
        let bytes = command.encode();
        let Applied { response, leaves, effects } = self.machine.apply(&bytes);
        self.commands.push(bytes);
        self.leaves.extend(leaves);
        self.effects = effects;
        CommandAnswer::decode(&response).unwrap()
    }

    fn code(&mut self, command: &Command) -> Option<RefusalCode> {
        RefusalCode::from_number(self.apply(command).outcomes[0].code)
    }

    fn sign(&self, node: usize, kind: MessageKind, index: u16, inst: [u8; 32], body: Vec<u8>) -> Command {
        let mut message = Message { kind, index: NodeIndex(index), inst, body, sig: [0; 64] };
        message.sig = self.nodes[node].sign(&message.signed_bytes(&self.cluster_id)).to_bytes();
        Command::Ceremony(message)
    }

    fn admit(&self, node: usize, incarnation: u64) -> (Command, [u8; 32]) {
        let body = AdmitBody {
            seat: Seat(node as u16 + 1),
            node_key: self.nodes[node].verifying_key().to_bytes(),
            incarnation,
            beacon_pos: 0,
            beacon: self.cluster_id.0,
            evidence: vec![1, 2, 3],
        }
        .encode();
        let hash = body_digest(&body);
        (self.sign(node, MessageKind::Admit, 0, [0; 32], body), hash)
    }

    fn form(&mut self) {
        let genesis = self.machine.birth().command();
        assert_eq!(self.code(&genesis), None);
        let hashes: Vec<[u8; 32]> = (0..3)
            .map(|node| {
                let (command, hash) = self.admit(node, 1);
                assert_eq!(self.code(&command), None);
                hash
            })
            .collect();
        for hash in hashes {
            for node in 0..3 {
                let vouch = self.sign(node, MessageKind::Vouch, node as u16 + 1, [0; 32], hash.to_vec());
                assert_eq!(self.code(&vouch), None);
            }
        }
    }

    fn beacon(&mut self, clocks: &[u64]) -> Option<RefusalCode> {
        let command = self.beacon_command(clocks);
        self.code(&command)
    }

    fn beacon_command(&self, clocks: &[u64]) -> Command {
        let state = self.machine.state().unwrap();
        let (prev_beacon_pos, prev_beacon) = view::latest_beacon(state).map_or((0, self.cluster_id.0), |(pos, row)| (pos, row.value));
        let readings = clocks
            .iter()
            .enumerate()
            .map(|(node, unix_ms)| {
                let mut reading = Reading {
                    prev_beacon_pos,
                    prev_beacon,
                    index: NodeIndex(node as u16 + 1),
                    unix_ms: UnixMillis(*unix_ms),
                    rand: [9; 32],
                    sig: [0; 64],
                };
                reading.sig = self.nodes[node].sign(&reading.signed_bytes(&self.cluster_id)).to_bytes();
                reading
            })
            .collect();
        Command::Beacon(BeaconBody { cluster_id: self.cluster_id, readings })
    }

    fn open(attempt: u32) -> Open {
        let all: Vec<NodeIndex> = (1..=3).map(NodeIndex).collect();
        Open {
            generation: Generation(0),
            what: What::Dkg,
            old_epoch: Epoch(0),
            new_epoch: Epoch(1),
            attempt,
            t: 2,
            roots: vec![RootTag::Prf],
            dealers: all.clone(),
            holders: all,
        }
    }

    /// Opens attempt `attempt` and joins all; returns the participants.
    fn joined(&mut self, attempt: u32) -> Vec<Participant<Ristretto255>> {
        let open = Self::open(attempt);
        assert_eq!(self.code(&Command::Open(open.clone())), None);
        let join_id = open.join_id(&self.cluster_id);
        let keys: Vec<EncryptionKey> = (0..3).map(|i| EncryptionKey::new(Secret::from_fn(|b| b.fill(20 + i)))).collect();
        let (beacon_pos, beacon) = view::latest_beacon(self.machine.state().unwrap()).map(|(p, r)| (p, r.value)).unwrap();
        for (node, key) in keys.iter().enumerate() {
            let body = JoinBody { beacon_pos, beacon, keys: vec![(RootTag::Prf, key.public())], evidence: vec![5] }.encode();
            let join = self.sign(node, MessageKind::Join, node as u16 + 1, join_id, body);
            assert_eq!(self.code(&join), None);
        }
        let run = self.run();
        keys.into_iter()
            .enumerate()
            .map(|(node, key)| {
                let seed = Secret::from_fn(|b| b.fill(40 + node as u8));
                Participant::new(run.instance().clone(), NodeIndex(node as u16 + 1), key, seed).unwrap()
            })
            .collect()
    }

    fn run(&self) -> dstack_threshold::dkg::Ceremony<Ristretto255> {
        let state = self.machine.state().unwrap();
        ceremony::instance(state, &self.cluster_id, state.attempt.as_ref().unwrap()).unwrap()
    }

    fn dkg(&mut self) {
        let mut participants = self.joined(1);
        let inst = self.run().instance().inst();
        for kind in [MessageKind::Commit, MessageKind::Deal] {
            for (node, participant) in participants.iter().enumerate() {
                let package = participant.package();
                let body = if kind == MessageKind::Commit { package.commit.to_vec() } else { package.body.clone() };
                let command = self.sign(node, kind, node as u16 + 1, inst, body);
                assert_eq!(self.code(&command), None);
            }
        }
        let run = self.run();
        for (node, participant) in participants.iter_mut().enumerate() {
            let Checked::Ready(ready) = participant.check(&run).unwrap() else { panic!("honest deals are right") };
            let command = self.sign(node, MessageKind::Ready, node as u16 + 1, inst, ready.encode());
            assert_eq!(self.code(&command), None);
        }
        let step = Command::Step(Step { kind: StepKind::Switched, join_id: Self::open(1).join_id(&self.cluster_id) });
        assert_eq!(self.code(&step), None);
    }

    fn govern(&mut self, kind: ActionKind, object: Object, base_version: u64, body: Vec<u8>, id: u8) -> Option<RefusalCode> {
        let action = Action {
            cluster_id: self.cluster_id,
            action_id: [id; 16],
            kind,
            object,
            base_version,
            body,
            not_after: UnixMillis(T0 + 10_000_000),
        };
        let approvals = self
            .operators
            .iter()
            .take(2)
            .map(|k| Approval { operator: k.verifying_key().to_bytes(), sig: k.sign(&action.encode()).to_bytes() })
            .collect();
        self.code(&Command::Governance(Entry::Propose { action, approvals }))
    }

    fn policy(rate: Rate) -> AppPolicy {
        AppPolicy {
            name: "web".into(),
            platforms: vec![Platform::Tdx],
            compose_hashes: vec![[4; 32]],
            any_os_image: true,
            os_images: vec![],
            tcb_allowed: vec![TcbStatus::UpToDate],
            classes: vec![KeyClass::K256],
            paths: vec![],
            rate,
            session_ms: 3_600_000,
            allow_legacy: false,
            tcb: dstack_protocol::policy::TcbRules::default(),
            ask_authority: false,
        }
    }

    fn intent(&self, nonce: u8) -> Intent {
        let (beacon_pos, _) = view::latest_beacon(self.machine.state().unwrap()).unwrap();
        Intent {
            req_hash: [nonce; 32],
            evidence_hash: [2; 32],
            generation: Generation(0),
            mode: Mode::Client,
            coordinator: NodeIndex(0),
            beacon_pos,
            app_id: APP,
            wishes: vec![(KeyClass::K256, [0; 32])],
        }
    }

    /// The batch as node `by` (from 0) signs it in the name of `coordinator`.
    fn spoken(&self, by: usize, coordinator: u16, intents: Vec<Intent>) -> Coordinated {
        // One statement in one encoding, where a test does not say otherwise.
        let statements = intents.iter().filter(|intent| intent.mode != Mode::Client).map(|intent| intent.evidence_hash).collect();
        self.told(by, Coordinated { coordinator: NodeIndex(coordinator), sig: [0; 64], intents, statements })
    }

    /// The batch, signed by node `by` (from 0).
    fn told(&self, by: usize, mut batch: Coordinated) -> Coordinated {
        batch.sig = self.nodes[by].sign(&batch.word().signed_bytes(&self.cluster_id)).to_bytes();
        batch
    }

    /// The command by which the node that the first intent names records them.
    fn recorded(&self, intents: Vec<Intent>) -> Command {
        let coordinator = intents[0].coordinator.0;
        if coordinator == 0 {
            return Command::Intents(intents);
        }
        let key = usize::from(coordinator - 1).min(2);
        Command::Coordinated(self.spoken(key, coordinator, intents))
    }

    /// A formed cluster with a root and one app.
    fn formed(rate: Rate) -> Self {
        let mut w = Self::new();
        w.form();
        assert_eq!(w.beacon(&[T0, T0 + 5]), None);
        w.dkg();
        assert_eq!(w.govern(ActionKind::SetAppPolicy, Object::App(APP), 0, Self::policy(rate).encode(), 1), None);
        w
    }
}

#[test]
fn forms_step_by_step_and_the_whole_log_verifies() {
    let mut w = World::new();
    assert_eq!(view::formation(w.machine.state()), Formation::AwaitingGenesis);
    assert_eq!(w.code(&Command::Checkpoint), Some(RefusalCode::NoGenesis));
    w.form();
    assert_eq!(view::formation(w.machine.state()), Formation::AwaitingBeacon);
    assert_eq!(w.beacon(&[T0]), Some(RefusalCode::TooFewReadings));
    assert_eq!(w.beacon(&[T0 + 7, T0 + 3]), None);
    assert!(w.effects.iter().any(|e| matches!(e, Effect::HeadDue(head) if head.state_root == [0; 32])));
    assert_eq!(w.machine.state().unwrap().log_time, UnixMillis(T0 + 3));
    w.dkg();
    assert_eq!(view::formation(w.machine.state()), Formation::Formed);
    let records = w.leaves.iter().map(|leaf| (leaf.record.clone(), Some(leaf.body.clone())));
    let report = verify_log(w.cluster_id, [], records).unwrap();
    assert_eq!(report.size, w.machine.size());
    assert_eq!(report.members_version, Some(0));
    assert_eq!(report.epoch, Epoch(1));
}

#[test]
fn intents_are_recorded_once_and_their_receipts_verify() {
    let mut w = World::formed(Rate { per_second: 1, burst: 3 });
    let (a, b) = (w.intent(1), w.intent(2));
    let size = w.machine.size();
    let answer = w.apply(&Command::Intents(vec![a.clone(), b.clone(), a.clone()]));
    assert_eq!(answer.outcomes.iter().map(|o| o.pos).collect::<Vec<_>>(), vec![size, size + 1, size]);
    assert_eq!(w.machine.size(), size + 2);
    let Some(Effect::IntentsRecorded(receipts)) = w.effects.pop() else { panic!("receipts") };
    let committed = verify_receipt(&receipts[1], &b).unwrap();
    committed.agrees_with(&[VouchedHead { holder: NodeIndex(1), pos: size + 1, size: size + 2, log_root: answer.log_root }]).unwrap();
    // A retry finds its intent and adds no leaf; a third intent spends the bucket, a fourth is refused with the wait.
    assert_eq!(w.apply(&Command::Intents(vec![a])).outcomes[0].pos, size);
    let (c, d) = (w.intent(3), w.intent(4));
    let answer = w.apply(&Command::Intents(vec![c, d]));
    assert_eq!(answer.outcomes[0].code, 0);
    assert_eq!(RefusalCode::from_number(answer.outcomes[1].code), Some(RefusalCode::RateLimited));
    assert_eq!(answer.outcomes[1].retry_after_ms, 1000);
}

#[test]
fn intents_break_on_revocation_stale_beacon_and_unknown_things() {
    let mut w = World::formed(Rate::DEFAULT);
    let refused = |w: &mut World, intent: Intent| RefusalCode::from_number(w.apply(&Command::Intents(vec![intent])).outcomes[0].code);
    let mut other_app = w.intent(1);
    other_app.app_id = AppId([9; 20]);
    assert_eq!(refused(&mut w, other_app), Some(RefusalCode::AppUnknown));
    let mut generation = w.intent(1);
    generation.generation = Generation(1);
    assert_eq!(refused(&mut w, generation), Some(RefusalCode::UnknownGeneration));
    let mut beacon = w.intent(1);
    beacon.beacon_pos += 1;
    assert_eq!(refused(&mut w, beacon), Some(RefusalCode::UnknownBeacon));
    let old = w.intent(1);
    assert_eq!(w.beacon(&[T0 + 120_010, T0 + 120_010]), None);
    assert_eq!(refused(&mut w, old), Some(RefusalCode::BeaconStale));
    let good = w.intent(2);
    assert_eq!(w.govern(ActionKind::Revoke, Object::App(APP), 1, vec![], 2), None);
    assert_eq!(refused(&mut w, good), Some(RefusalCode::AppRevoked));
}

#[test]
fn rows_beacons_and_policies_leave_with_log_time() {
    let mut w = World::formed(Rate::DEFAULT);
    let intent = w.intent(1);
    w.apply(&Command::Intents(vec![intent.clone()]));
    let old_policy = w.machine.state().unwrap().apps[&APP].policy_hash;
    let mut next = World::policy(Rate::DEFAULT);
    next.name = "web2".into();
    assert_eq!(w.govern(ActionKind::SetAppPolicy, Object::App(APP), 1, next.encode(), 3), None);
    assert_eq!(w.beacon(&[T0 + 200_000, T0 + 200_000]), None);
    assert!(w.machine.state().unwrap().policies.contains_key(&old_policy), "a row names it");
    assert_eq!(w.beacon(&[T0 + 250_000, T0 + 250_000]), None);
    let state = w.machine.state().unwrap();
    assert!(state.intents.is_empty());
    assert!(!state.policies.contains_key(&old_policy));
    assert_eq!(state.beacons.len(), 3);
    assert_eq!(w.beacon(&[T0 + 5_000_000, T0 + 5_000_000]), None);
    assert_eq!(w.machine.state().unwrap().beacons.len(), 1);
}

#[test]
fn log_time_never_runs_back_and_bad_readings_are_refused() {
    let mut w = World::new();
    w.form();
    assert_eq!(w.beacon(&[T0, T0]), None);
    let stale = w.beacon_command(&[T0 + 9, T0 + 9]);
    assert_eq!(w.beacon(&[T0 - 500, T0 + 500]), None);
    assert_eq!(w.machine.state().unwrap().log_time, UnixMillis(T0));
    assert_eq!(w.code(&stale), Some(RefusalCode::BadReading), "names an older beacon");
    let Command::Beacon(mut body) = w.beacon_command(&[T0 + 9, T0 + 9]) else { panic!() };
    body.readings[0].unix_ms.0 += 1;
    assert_eq!(w.code(&Command::Beacon(body)), Some(RefusalCode::BadReading));
    // One clock ten years ahead does not move time: the earliest of t readings counts.
    assert_eq!(w.beacon(&[T0 + 10, T0 + 315_360_000_000]), None);
    assert_eq!(w.machine.state().unwrap().log_time, UnixMillis(T0 + 10));
}

#[test]
fn admissions_need_their_own_signature_and_every_vouch() {
    let mut w = World::new();
    let genesis = w.machine.birth().command();
    w.apply(&genesis);
    assert_eq!(w.code(&genesis), Some(RefusalCode::GenesisRepeated));
    let (good, hash) = w.admit(0, 5);
    let Command::Ceremony(mut forged) = good.clone() else { panic!() };
    forged.sig[0] ^= 1;
    assert_eq!(w.code(&Command::Ceremony(forged)), Some(RefusalCode::BadMessageSignature));
    assert_eq!(w.code(&good), None);
    let (older, _) = w.admit(0, 4);
    assert_eq!(w.code(&older), Some(RefusalCode::SeatTaken));
    let stranger = w.sign(1, MessageKind::Vouch, 2, [0; 32], hash.to_vec());
    assert_eq!(w.code(&stranger), Some(RefusalCode::NotAdmitted), "seat 2 has brought no key");
    assert_eq!(view::formation(w.machine.state()), Formation::AwaitingAdmissions);
}

#[test]
fn a_silent_dealer_times_out_and_a_false_complaint_convicts() {
    let mut w = World::new();
    w.form();
    assert_eq!(w.beacon(&[T0, T0]), None);
    w.joined(1);
    let abort =
        |attempt| Command::Step(Step { kind: StepKind::Aborted, join_id: World::open(attempt).join_id(&birth().cluster_id().to_owned()) });
    assert_eq!(w.code(&abort(1)), Some(RefusalCode::OutOfOrder), "the round is not over");
    assert_eq!(w.beacon(&[T0 + 60_001, T0 + 60_001]), None);
    assert_eq!(w.code(&abort(1)), None);
    assert_eq!(w.code(&Command::Open(World::open(1))), Some(RefusalCode::OutOfOrder), "attempts are numbered");
    let participants = w.joined(2);
    let inst = w.run().instance().inst();
    for kind in [MessageKind::Commit, MessageKind::Deal] {
        for (node, participant) in participants.iter().enumerate() {
            let package = participant.package();
            let body = if kind == MessageKind::Commit { package.commit.to_vec() } else { package.body.clone() };
            let command = w.sign(node, kind, node as u16 + 1, inst, body);
            assert_eq!(w.code(&command), None);
        }
    }
    let lie = dstack_protocol::ceremony::ComplainBody { dealer: NodeIndex(1), shared: [3; 32], c: [0; 32], s: [0; 32] };
    let complain = w.sign(2, MessageKind::Complain, 3, inst, lie.encode());
    assert_eq!(w.code(&complain), None, "it counts, against its author");
    let attempt = w.machine.state().unwrap().attempt.clone().unwrap();
    assert!(attempt.ended);
    assert_eq!(attempt.convicted.into_iter().collect::<Vec<_>>(), vec![NodeIndex(3)]);
    assert_eq!(w.code(&abort(2)), None);
}

#[test]
fn snapshots_restore_the_same_state_and_forgeries_are_refused() {
    let mut w = World::formed(Rate::DEFAULT);
    let intent = w.intent(1);
    w.apply(&Command::Intents(vec![intent]));
    assert_eq!(w.code(&Command::Checkpoint), None);
    assert!(w.machine.at_checkpoint());
    let Some(Effect::HeadDue(head)) = w.effects.last() else { panic!("a checkpoint's head is due") };
    let bytes = w.machine.snapshot();
    assert_eq!(head.state_root, dstack_protocol::codec::sha256(&[&bytes]));
    let restored = KmsMachine::new(birth()).restored(&bytes).unwrap();
    assert_eq!(restored.snapshot(), bytes);
    let forge = |change: &dyn Fn(&mut dstack_protocol::state::State)| {
        let mut state = w.machine.state().unwrap().clone();
        change(&mut state);
        KmsMachine::new(birth()).restored(&state.to_bytes())
    };
    assert!(forge(&|s| s.genesis.timelock_s = 9).is_err());
    assert!(forge(&|s| s.size += 1).is_err());
    assert!(forge(&|s| s.apps.get_mut(&APP).unwrap().policy_hash = [0; 32]).is_err());
    assert!(forge(&|s| s.governance.proofs.values_mut().for_each(|p| p.approvals[0].sig[1] ^= 1)).is_err());
    assert!(forge(&|s| s.seats.get_mut(&Seat(1)).unwrap().node_key[0] ^= 1).is_err());
    assert!(forge(&|s| s.roots.values_mut().for_each(|r| r.public_key.0[0] ^= 1)).is_err());
    assert!(forge(&|s| s.ceremonies.values_mut().for_each(|a| a.messages[0].sig[0] ^= 1)).is_err());
    assert!(forge(&|s| s.ceremonies.clear()).is_err(), "roots without the messages they rest on");
    assert!(forge(&|s| s.roots.clear()).is_err(), "messages without the roots they made");
    for cut in [1, bytes.len() / 2, bytes.len() - 1] {
        assert!(KmsMachine::new(birth()).restored(&bytes[..cut]).is_err());
    }
}

#[test]
fn the_same_commands_give_the_same_state_and_garbage_changes_nothing() {
    let mut w = World::formed(Rate::DEFAULT);
    let before = w.machine.snapshot();
    for garbage in [&b""[..], b"DKMS-V1-CMD", &[0xff; 300]] {
        let applied = w.machine.apply(garbage);
        assert!(applied.leaves.is_empty());
        let answer = CommandAnswer::decode(&applied.response).unwrap();
        assert_eq!(RefusalCode::from_number(answer.outcomes[0].code), Some(RefusalCode::Malformed));
    }
    assert_eq!(w.machine.snapshot(), before);
    let mut other = KmsMachine::new(birth());
    for command in &w.commands {
        other.apply(command);
    }
    assert_eq!(other.snapshot(), before);
}

#[test]
fn a_sighting_is_of_the_statement_and_not_of_its_encoding() {
    let mut w = World::formed(Rate { per_second: 100, burst: 100 });
    let over = |w: &World, number: u32, encoding: u8| {
        let intents = vec![legacy(w, number, 1, encoding)];
        let unsigned = Coordinated { coordinator: NodeIndex(1), sig: [0; 64], intents, statements: vec![[7; 32]] };
        Command::Coordinated(w.told(0, unsigned))
    };
    for (at, expected) in [(0, None), (86_400_000, None), (86_400_001, Some(RefusalCode::EvidenceSeen))] {
        if at > 0 {
            assert_eq!(w.beacon(&[T0 + at, T0 + at]), None);
        }
        for encoding in [1, 2] {
            let command = over(&w, u32::from(encoding), encoding);
            assert_eq!(w.code(&command), expected, "encoding {encoding} after {at} ms");
        }
    }
    let sightings = &w.machine.state().unwrap().sightings;
    assert_eq!(sightings[&APP].iter().map(|(name, at)| (*name, at.0)).collect::<Vec<_>>(), [([7; 32], T0)]);
}

fn legacy(w: &World, number: u32, coordinator: u16, evidence: u8) -> Intent {
    let mut intent = Intent { mode: Mode::Legacy, coordinator: NodeIndex(coordinator), evidence_hash: [evidence; 32], ..w.intent(0) };
    intent.req_hash[..4].copy_from_slice(&number.to_be_bytes());
    intent
}

fn outcome(w: &mut World, intent: Intent) -> (Option<RefusalCode>, u32) {
    let command = w.recorded(vec![intent]);
    let outcome = w.apply(&command).outcomes[0];
    (RefusalCode::from_number(outcome.code), outcome.retry_after_ms)
}

#[test]
fn a_serving_node_spends_thirty_seconds_worth_and_waits_for_log_time() {
    let mut w = World::formed(Rate { per_second: 100_000, burst: 10_000_000 });
    let burst = Rate::LEGACY_NODE.burst;
    let numbers: Vec<u32> = (0..burst).collect();
    for batch in numbers.chunks(256) {
        let command = w.recorded(batch.iter().map(|number| legacy(&w, *number, 1, 7)).collect());
        assert!(w.apply(&command).outcomes.iter().all(|outcome| outcome.code == 0));
    }
    let next = legacy(&w, burst, 1, 7);
    assert_eq!(outcome(&mut w, next), (Some(RefusalCode::RateLimited), 2), "a token comes in 5/3 ms");
    let other = legacy(&w, burst, 2, 7);
    assert_eq!(outcome(&mut w, other).0, None, "another node has its own");
    let native = w.intent(5);
    assert_eq!(outcome(&mut w, native).0, None, "mode C has no such quota");
    assert_eq!(w.beacon(&[T0 + 10, T0 + 10]), None);
    let later = legacy(&w, burst + 1, 1, 7);
    assert_eq!(outcome(&mut w, later).0, None);
    assert_eq!(w.beacon(&[T0 + 30_100, T0 + 30_100]), None);
    assert!(w.machine.state().unwrap().legacy_rates.is_empty(), "full buckets have no rows");
}

#[test]
fn first_sightings_are_noted_by_accepted_intents_and_kept_for_400_days() {
    let day = 86_400_000;
    let mut w = World::formed(Rate { per_second: 1, burst: 2 });
    let seen = |w: &World| -> Vec<(u8, u64)> {
        w.machine.state().unwrap().sightings.get(&APP).into_iter().flatten().map(|(hash, at)| (hash[0], at.0 - T0)).collect()
    };
    let stranger = legacy(&w, 0, 9, 1);
    assert_eq!(outcome(&mut w, stranger).0, Some(RefusalCode::NotTheCoordinator), "no node of that index");
    for number in [1, 2] {
        let intent = legacy(&w, number, 1, 1);
        assert_eq!(outcome(&mut w, intent).0, None);
    }
    let refused = legacy(&w, 3, 1, 2);
    assert_eq!(outcome(&mut w, refused).0, Some(RefusalCode::RateLimited));
    assert_eq!(seen(&w), [(1, 0)], "what is refused leaves nothing");
    for (at, evidence, expected) in [
        (day, 1, None),
        (day + 1, 1, Some(RefusalCode::EvidenceSeen)),
        (day + 5, 2, None),
        (400 * day, 1, Some(RefusalCode::EvidenceSeen)),
        (400 * day + 1, 1, None),
    ] {
        assert_eq!(w.beacon(&[T0 + at, T0 + at]), None);
        let intent = legacy(&w, 9, 2, evidence);
        assert_eq!(outcome(&mut w, intent).0, expected, "evidence {evidence} at {at}");
    }
    assert_eq!(seen(&w), [(1, 400 * day + 1), (2, day + 5)]);
    // The rows are part of the state that a snapshot carries.
    assert_eq!(w.apply(&Command::Checkpoint).outcomes[0].code, 0);
    let restored = w.machine.restored(&w.machine.snapshot()).unwrap();
    assert_eq!(restored.state(), w.machine.state());
}
