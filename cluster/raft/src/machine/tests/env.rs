//! Env attempts: one at a time, numbered, ending by a key or by log time; the key pinned.

use dstack_protocol::env::{EnvAttempt, EnvPubBody, combiner};

use super::super::env;
use super::*;

const GENERATION: Generation = Generation(0);

fn attempt(number: u8) -> Command {
    Command::Env(EnvAttempt { app_id: APP, generation: GENERATION, attempt: number, operator: None })
}

impl World {
    fn by_operator(&self, number: u8, operator: &SigningKey) -> Command {
        let mut attempt = EnvAttempt { app_id: APP, generation: GENERATION, attempt: number, operator: None };
        let sig = operator.sign(&attempt.signed_bytes(&self.cluster_id)).to_bytes();
        attempt.operator = Some((operator.verifying_key().to_bytes(), sig));
        Command::Env(attempt)
    }

    fn publish(&self, node: u16, number: u8, envpub: [u8; 32]) -> Command {
        let body = EnvPubBody { app_id: APP, generation: GENERATION, attempt: number, envpub }.encode();
        self.sign(usize::from(node) - 1, MessageKind::EnvPub, node, [0; 32], body)
    }

    fn combiner(&self) -> u16 {
        self.machine.state().unwrap().env_keys[&(GENERATION, APP)].combiner.0
    }

    fn due(&self) -> Option<u8> {
        env::due(self.machine.state().unwrap()).map(|attempt| attempt.attempt)
    }
}

#[test]
fn an_app_registered_before_the_root_gets_its_attempt_with_it() {
    let mut w = World::new();
    w.form();
    assert_eq!(w.beacon(&[T0, T0 + 5]), None);
    let policy = World::policy(Rate { per_second: 1, burst: 1 });
    assert_eq!(w.govern(ActionKind::SetAppPolicy, Object::App(APP), 0, policy.encode(), 1), None);
    assert_eq!(w.due(), None);
    assert_eq!(w.code(&attempt(1)), Some(RefusalCode::RootMissing));
    w.dkg();
    assert_eq!(w.due(), Some(1));
    let refusal = w.machine.state().unwrap().env_key(GENERATION, &APP).unwrap_err();
    assert_eq!((refusal.code, refusal.got.as_str()), (RefusalCode::EnvKeyMissing, "no attempt yet"));
    assert_eq!(w.code(&attempt(1)), None);
    assert_eq!(
        w.leaves.last().map(|leaf| leaf.body.clone()),
        Some(EnvAttempt { app_id: APP, generation: GENERATION, attempt: 1, operator: None }.encode())
    );
    let state = w.machine.state().unwrap();
    let row = &state.env_keys[&(GENERATION, APP)];
    assert_eq!(row.attempt_pos, state.size - 1);
    let holders: Vec<NodeIndex> = (1..=3).map(NodeIndex).collect();
    assert_eq!(Some(row.combiner), combiner(&APP, GENERATION, 1, &holders));
    assert_eq!(env::named(state, row.combiner).len(), 1);
    assert!(env::named(state, NodeIndex(row.combiner.0 % 3 + 1)).is_empty());
    assert_eq!(w.due(), None);
}

#[test]
fn only_the_named_node_publishes_and_the_key_is_pinned() {
    let mut w = World::formed(Rate { per_second: 1, burst: 1 });
    let policy = |w: &World| w.machine.state().unwrap().env_key(GENERATION, &APP);
    assert_eq!(w.code(&w.publish(1, 1, [9; 32])), Some(RefusalCode::EnvNotNamed), "no attempt");
    assert_eq!(w.code(&attempt(2)), Some(RefusalCode::EnvAttemptOpen), "numbered from 1");
    assert_eq!(w.code(&attempt(1)), None);
    assert_eq!(w.code(&attempt(1)), Some(RefusalCode::EnvAttemptOpen));
    assert_eq!(w.code(&attempt(2)), Some(RefusalCode::EnvAttemptOpen), "one at a time");
    let named = w.combiner();
    let other = named % 3 + 1;
    assert_eq!(w.code(&w.publish(other, 1, [9; 32])), Some(RefusalCode::EnvNotNamed));
    assert_eq!(w.code(&w.publish(named, 2, [9; 32])), Some(RefusalCode::EnvNotNamed));
    assert_eq!(w.code(&w.publish(named, 1, [0; 32])), Some(RefusalCode::Malformed), "low order");
    let Command::Ceremony(mut forged) = w.publish(other, 1, [9; 32]) else { unreachable!() };
    forged.index = NodeIndex(named);
    assert_eq!(w.code(&Command::Ceremony(forged)), Some(RefusalCode::BadMessageSignature));
    let Command::Ceremony(mut elsewhere) = w.publish(named, 1, [9; 32]) else { unreachable!() };
    elsewhere.inst = [1; 32];
    assert_eq!(w.code(&Command::Ceremony(elsewhere)), Some(RefusalCode::UnknownInstance));
    assert_eq!(policy(&w).unwrap_err().code, RefusalCode::EnvKeyMissing);
    assert_eq!(w.code(&w.publish(named, 1, [9; 32])), None);
    let record = dstack_protocol::log::Record::decode(&w.leaves.last().unwrap().record).unwrap();
    assert_eq!(record.kind, dstack_protocol::log::RecordKind::Env);
    assert_eq!(policy(&w), Ok([9; 32]));
    assert_eq!(w.code(&w.publish(named, 1, [7; 32])), Some(RefusalCode::EnvKeyPinned));
    assert_eq!(w.code(&attempt(2)), Some(RefusalCode::EnvKeyPinned));
    assert_eq!(w.due(), None);
    assert_eq!(w.machine.state().unwrap().env_key(GENERATION, &AppId([9; 20])).unwrap_err().code, RefusalCode::AppUnknown);
}

#[test]
fn attempts_end_by_log_time_and_the_fourth_is_an_operators() {
    let mut w = World::formed(Rate { per_second: 1, burst: 1 });
    let mut now = T0 + 10;
    let mut named = Vec::new();
    for number in 1..=3 {
        assert_eq!(w.due(), Some(number));
        assert_eq!(w.code(&attempt(number)), None);
        named.push(w.combiner());
        now += 60_001;
        assert_eq!(w.beacon(&[now, now]), None);
        let late = w.publish(w.combiner(), number, [9; 32]);
        assert_eq!(w.code(&late), Some(RefusalCode::EnvNotNamed), "after 60 s");
    }
    assert_eq!(w.due(), None, "three need no operator");
    assert!(named.windows(2).any(|pair| pair[0] != pair[1]), "the number of the attempt moves the name: {named:?}");
    assert_eq!(w.code(&attempt(4)), Some(RefusalCode::EnvAttemptsSpent));
    assert_eq!(w.code(&w.by_operator(4, &SigningKey::from_bytes(&[99; 32]))), Some(RefusalCode::BadApproval));
    let Command::Env(mut forged) = w.by_operator(4, &w.operators[0]) else { unreachable!() };
    forged.operator.as_mut().unwrap().1[1] ^= 1;
    assert_eq!(w.code(&Command::Env(forged)), Some(RefusalCode::BadApproval));
    let Command::Env(mut replayed) = w.by_operator(4, &w.operators[0]) else { unreachable!() };
    replayed.attempt = 5;
    assert_eq!(w.code(&Command::Env(replayed)), Some(RefusalCode::EnvAttemptOpen));
    assert_eq!(w.code(&w.by_operator(4, &w.operators[0])), None);
    assert_eq!(w.code(&w.publish(w.combiner(), 4, [9; 32])), None);
    assert_eq!(w.machine.state().unwrap().env_key(GENERATION, &APP), Ok([9; 32]));
}

#[test]
fn a_revoked_app_gets_no_attempt() {
    let mut w = World::formed(Rate { per_second: 1, burst: 1 });
    assert_eq!(w.govern(ActionKind::Revoke, Object::App(APP), 1, vec![], 9), None);
    assert_eq!(w.due(), None);
    assert_eq!(w.code(&attempt(1)), Some(RefusalCode::AppRevoked));
}

#[test]
fn a_published_key_survives_a_snapshot_and_a_forged_one_does_not() {
    let mut w = World::formed(Rate { per_second: 1, burst: 1 });
    assert_eq!(w.code(&attempt(1)), None);
    assert_eq!(w.code(&w.publish(w.combiner(), 1, [9; 32])), None);
    let restored = w.machine.restored(&w.machine.snapshot()).unwrap();
    assert_eq!(restored.state().unwrap().env_key(GENERATION, &APP), Ok([9; 32]));
    let change = |change: &dyn Fn(&mut dstack_protocol::state::EnvRow)| {
        let mut state = w.machine.state().unwrap().clone();
        change(state.env_keys.get_mut(&(GENERATION, APP)).unwrap());
        w.machine.restored(&state.to_bytes()).err()
    };
    assert!(change(&|_| {}).is_none());
    assert!(change(&|row| *row.published.as_mut().unwrap().body.last_mut().unwrap() ^= 1).is_some());
    assert!(change(&|row| row.published.as_mut().unwrap().sig[9] ^= 1).is_some());
    assert!(change(&|row| row.combiner = NodeIndex(row.combiner.0 % 3 + 1)).is_some());
    assert!(change(&|row| row.attempt = 2).is_some());
    assert!(change(&|row| row.attempt_pos = u64::MAX).is_some());
}
