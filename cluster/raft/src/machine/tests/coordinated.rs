//! Who speaks for intents of modes L and E: the node that they name, under its own key, and nobody else.

use dstack_audit::AuditError;
use dstack_protocol::command::CommandAnswer;
use dstack_protocol::coordinated::CoordinatorWord;

use super::*;

const NAMED: u16 = 2;

fn codes(answer: &CommandAnswer) -> Vec<Option<RefusalCode>> {
    answer.outcomes.iter().map(|outcome| RefusalCode::from_number(outcome.code)).collect()
}

fn kinds(w: &World, from: usize) -> Vec<RecordKind> {
    w.leaves[from..].iter().map(|leaf| Record::decode(&leaf.record).unwrap().kind).collect()
}

fn judged(w: &World) -> Result<dstack_audit::LogReport, AuditError> {
    verify_log(w.cluster_id, [], w.leaves.iter().map(|leaf| (leaf.record.clone(), Some(leaf.body.clone()))))
}

/// A batch that a lying leader writes into the log itself: nothing but `apply` stands between it and the record.
#[test]
fn a_leader_that_names_another_node_spends_and_records_nothing() {
    let mut w = World::formed(Rate { per_second: 100, burst: 100 });
    let intent = legacy(&w, 1, NAMED, 7);
    let right = w.spoken(1, NAMED, vec![intent.clone()]);
    let mut bent = right.clone();
    bent.sig[3] ^= 1;
    let other = legacy(&w, 2, NAMED, 7);
    let elsewhere = Coordinated { statements: vec![[8; 32]], ..right.clone() };
    let lies = [
        ("unsigned", Command::Intents(vec![intent.clone()])),
        ("signed by the liar", Command::Coordinated(w.spoken(0, NAMED, vec![intent.clone()]))),
        ("signed by the liar in its own name", Command::Coordinated(w.spoken(0, 1, vec![intent.clone()]))),
        ("a bent signature", Command::Coordinated(bent)),
        ("another statement", Command::Coordinated(elsewhere)),
        ("the signature of another batch", Command::Coordinated(Coordinated { intents: vec![other], ..right.clone() })),
        (
            "an intent smuggled into a signed batch",
            Command::Coordinated(Coordinated { intents: vec![intent.clone(), legacy(&w, 3, NAMED, 8)], ..right.clone() }),
        ),
        ("an index without a seat", Command::Coordinated(w.spoken(0, 9, vec![Intent { coordinator: NodeIndex(9), ..intent.clone() }]))),
    ];
    let before = w.machine.state().unwrap().clone();
    for (what, command) in lies {
        let from = w.leaves.len();
        let answer = w.apply(&command);
        assert!(codes(&answer).iter().all(|code| *code == Some(RefusalCode::NotTheCoordinator)), "{what}: {answer:?}");
        assert!(w.effects.contains(&Effect::Rejected { kind: RecordKind::Intent, code: RefusalCode::NotTheCoordinator }), "{what}");
        assert!(kinds(&w, from).iter().all(|kind| *kind == RecordKind::Intent), "{what}: no word of anybody is recorded");
        let after = w.machine.state().unwrap();
        assert_eq!(
            (&after.intents, &after.legacy_rates, &after.sightings, &after.apps),
            (&before.intents, &before.legacy_rates, &before.sightings, &before.apps),
            "{what}"
        );
    }
    // What was refused is not lost: the node itself records it.
    assert_eq!(codes(&w.apply(&Command::Coordinated(right.clone()))), [None]);
    assert_eq!(w.machine.state().unwrap().legacy_rates.keys().copied().collect::<Vec<_>>(), [NodeIndex(NAMED)]);
    // Brought again by whoever has seen it, it is the same intent: no leaf, nothing spent.
    let spent = w.machine.state().unwrap().legacy_rates.clone();
    let size = w.machine.size();
    let again = w.apply(&Command::Coordinated(right));
    assert_eq!(codes(&again), [None]);
    assert_eq!((again.outcomes[0].pos, w.machine.size()), (size - 1, size));
    assert_eq!(w.machine.state().unwrap().legacy_rates, spent);
    assert_eq!(judged(&w).unwrap().combined, BTreeMap::from([(NodeIndex(NAMED), 1)]));
}

#[test]
fn one_signature_stands_for_the_batch_and_mode_c_needs_none() {
    let mut w = World::formed(Rate { per_second: 100, burst: 100 });
    let from = w.leaves.len();
    let batch = vec![w.intent(1), legacy(&w, 1, NAMED, 7), w.intent(2), legacy(&w, 2, NAMED, 7), legacy(&w, 1, NAMED, 7)];
    let answer = w.apply(&Command::Coordinated(w.spoken(1, NAMED, batch.clone())));
    assert_eq!(codes(&answer), [None; 5]);
    let first = from as u64;
    let positions: Vec<u64> = answer.outcomes.iter().map(|outcome| outcome.pos).collect();
    assert_eq!(positions, [first + 1, first + 2, first + 3, first + 4, first + 2], "the word has the first leaf, the copy none");
    assert_eq!(kinds(&w, from), [RecordKind::Coordinator, RecordKind::Intent, RecordKind::Intent, RecordKind::Intent, RecordKind::Intent]);
    let word = CoordinatorWord::decode(&w.leaves[from].body).unwrap();
    let named: Vec<_> = word.named.iter().map(|named| (named.intent_id, named.statement_id)).collect();
    assert_eq!(named, [1, 3, 1].map(|at: usize| (batch[at].id(), [7; 32])));
    let Some(Effect::IntentsRecorded(receipts)) = w.effects.pop() else { panic!("receipts") };
    for (receipt, intent) in receipts.iter().zip(&batch) {
        verify_receipt(receipt, intent).unwrap();
    }
    // A wrong signature costs the clients of mode C nothing.
    let mixed = vec![w.intent(3), legacy(&w, 5, NAMED, 7)];
    let answer = w.apply(&Command::Coordinated(w.spoken(0, NAMED, mixed)));
    assert_eq!(codes(&answer), [None, Some(RefusalCode::NotTheCoordinator)]);
    let report = judged(&w).unwrap();
    assert_eq!(report.combined, BTreeMap::from([(NodeIndex(NAMED), 2)]));
    assert_eq!(report.intents["legacy"], (2, 1));
}

#[test]
fn a_log_in_which_a_node_is_named_without_its_word_is_found_offline() {
    let mut w = World::formed(Rate { per_second: 100, burst: 100 });
    let from = w.leaves.len();
    let command = w.recorded(vec![legacy(&w, 1, NAMED, 7)]);
    assert_eq!(w.code(&command), None);
    assert_eq!(judged(&w).unwrap().combined, BTreeMap::from([(NodeIndex(NAMED), 1)]));
    // The log as dishonest nodes would have written it: the leaf after the word replaced, the word replaced, the word left out.
    let entry = |w: &World, at: usize, kind: RecordKind, body: Vec<u8>| {
        let record = Record { pos: at as u64, body_hash: body_hash(kind, &body), ..Record::decode(&w.leaves[at].record).unwrap() };
        Leaf { pos: at as u64, record: Record { kind, ..record }.encode(), body }
    };
    let rule = |outcome: Result<dstack_audit::LogReport, AuditError>| match outcome {
        Err(AuditError::LogRule { pos, rule }) => (pos as usize, rule),
        other => panic!("{other:?}"),
    };
    let stands = "an applied intent of modes L and E stands behind its coordinator's signature";
    let honest = w.leaves.clone();
    w.leaves[from + 1] = entry(&w, from + 1, RecordKind::Intent, legacy(&w, 2, NAMED, 7).encode());
    assert_eq!(rule(judged(&w)), (from + 1, stands));
    w.leaves = honest.clone();
    let liars = w.spoken(0, NAMED, vec![legacy(&w, 1, NAMED, 7)]).word().encode();
    w.leaves[from] = entry(&w, from, RecordKind::Coordinator, liars);
    assert_eq!(judged(&w).unwrap_err(), AuditError::BadSignature { index: NodeIndex(NAMED) });
    w.leaves = honest;
    let intent = w.leaves[from + 1].body.clone();
    w.leaves[from] = entry(&w, from, RecordKind::Intent, intent);
    w.leaves.truncate(from + 1);
    assert_eq!(rule(judged(&w)), (from, stands));
}
