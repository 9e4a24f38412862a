//! Bytes from peers: whatever they are, the answer is a typed error, never a panic.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use dstack_protocol::ceremony::{InstHolder, MessageKind, Open, What, key_hash};
use dstack_protocol::release::{KeyClass, Out, PartialPlain, Wish};
use dstack_protocol::{AppId, ClusterId, Epoch, Generation, NodeIndex, RootTag, Wire as _};
use dstack_secret::Secret;
use dstack_threshold::answer::{AnswerContext, RecipientKey, open_partial};
use dstack_threshold::combine::Combiner;
use dstack_threshold::dkg::{Ceremony, EncryptionKey, Instance, Participant, Stage, check_deal, commit_hash};
use dstack_threshold::group::{Group, NistP256, Ristretto255};
use dstack_threshold::message;
use dstack_threshold::prf::Batch;
use dstack_threshold::share_file::{self, SealingKey, ShareName};
use proptest::prelude::*;

const CLUSTER: ClusterId = ClusterId([3; 32]);

fn key(index: u16) -> EncryptionKey {
    EncryptionKey::new(Secret::from_fn(|s| s.fill(index as u8)))
}

fn instance<G: Group>(root: RootTag) -> Instance<G> {
    let members: Vec<NodeIndex> = (1..=3).map(NodeIndex).collect();
    let open = Open {
        generation: Generation(0),
        what: What::Dkg,
        old_epoch: Epoch(0),
        new_epoch: Epoch(1),
        attempt: 1,
        t: 2,
        roots: vec![root],
        dealers: members.clone(),
        holders: members.clone(),
    };
    let holders: Vec<InstHolder> =
        members.iter().map(|i| InstHolder { index: *i, key_hash: key_hash(&[1; 32]), ek: key(i.0).public() }).collect();
    Instance::new(&CLUSTER, &open, root, &holders).unwrap()
}

/// A ceremony that waits for Ready.
fn dealt() -> Ceremony<Ristretto255> {
    let instance = instance::<Ristretto255>(RootTag::Prf);
    let mut ceremony = Ceremony::new(instance.clone());
    let nodes: Vec<_> = (1..=3)
        .map(|i| Participant::new(instance.clone(), NodeIndex(i), key(i), Secret::from_fn(|s| s.fill(0x40 + i as u8))).unwrap())
        .collect();
    for (i, node) in (1..).map(NodeIndex).zip(&nodes) {
        ceremony.apply(MessageKind::Commit, i, &node.package().commit).unwrap();
    }
    for (i, node) in (1..).map(NodeIndex).zip(&nodes) {
        ceremony.apply(MessageKind::Deal, i, &node.package().body).unwrap();
    }
    assert_eq!(ceremony.stage(), Stage::AwaitingReady);
    ceremony
}

fn any_kind() -> impl Strategy<Value = MessageKind> {
    (0u8..=0x20).prop_filter_map("a kind", MessageKind::from_byte)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_body_at_any_stage_is_judged(
        kind in any_kind(),
        from in 0u16..6,
        body in prop::collection::vec(any::<u8>(), 0..400),
        early in any::<bool>(),
    ) {
        let mut ceremony = if early { Ceremony::new(instance::<Ristretto255>(RootTag::Prf)) } else { dealt() };
        let outcome = ceremony.apply(kind, NodeIndex(from), &body);
        prop_assert!(from != 0 && from < 4 || outcome.is_err());
        prop_assert!(ceremony.switched().is_err());
    }

    #[test]
    fn any_committed_bytes_are_no_deal(body in prop::collection::vec(any::<u8>(), 0..600)) {
        let instance = instance::<NistP256>(RootTag::Ca);
        let commit = commit_hash(&instance.inst(), NodeIndex(1), &body);
        prop_assert!(check_deal(&instance, NodeIndex(1), &commit, &body).is_err());
    }

    #[test]
    fn any_partial_is_refused(
        index in any::<u16>(),
        vk in any::<[u8; 32]>(),
        elements in prop::collection::vec(any::<[u8; 32]>(), 0..4),
        c in any::<[u8; 32]>(),
        s in any::<[u8; 32]>(),
    ) {
        let wish = Wish::new(KeyClass::Disk, vec![]).unwrap();
        let batch = Batch::new(&CLUSTER, &AppId([1; 20]), &[wish]).unwrap();
        let pk: [u8; 32] = dealt().instance().inst();
        // Any element serves as a public key here; a hash seldom is one.
        let pk = Combiner::new(batch.clone(), Generation(0), &pk).map_or(key(1).public(), |_| pk);
        let mut combiner = Combiner::new(batch, Generation(0), &pk).unwrap();
        let (generation, epoch) = (Generation(0), Epoch(1));
        let plain = PartialPlain { index: NodeIndex(index), generation, epoch, pos: 0, size: 1, log_root: [0; 32], vk, elements: elements.into(), c, s };
        prop_assert_eq!(combiner.add(&plain).unwrap_err().index, NodeIndex(index));
        prop_assert!(combiner.groups().is_empty());
    }

    #[test]
    fn any_answer_fails_to_open(bytes in prop::collection::vec(any::<u8>(), 0..300), kem in any::<[u8; 32]>()) {
        let key = RecipientKey::new(Secret::from_fn(|s| s.fill(1)));
        let context = AnswerContext { cluster_id: &CLUSTER, generation: Generation(0), req_hash: &[0; 32] };
        prop_assert!(Out::decode(&bytes).is_err());
        let out = Out { index: NodeIndex(1), epoch: Epoch(1), kem, ct: bytes };
        prop_assert!(open_partial(&out, &context, &key).is_err());
    }

    #[test]
    fn any_file_fails_to_open(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let key = SealingKey::derive(&CLUSTER, b"m", None, Some(&Secret::from_fn(|s| s.fill(1)))).unwrap();
        prop_assert!(share_file::open(&key, &ShareName::node_key(CLUSTER, NodeIndex(1)), &bytes).is_err());
        prop_assert!(share_file::name_of(&bytes).is_err());
    }

    #[test]
    fn any_signature_is_refused(key in any::<[u8; 32]>(), sig in any::<[u8; 64]>(), text in any::<[u8; 8]>()) {
        prop_assert!(!message::verify(&key, &text, &sig));
    }
}
