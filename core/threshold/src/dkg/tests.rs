//! Whole runs, honest and faulty, in every group.

mod groups;

use dstack_protocol::ceremony::{ComplainBody, DealBody, InstHolder, MessageKind, Open, ReadyBody, What, key_hash};
use dstack_protocol::release::{KeyClass, Wish};
use dstack_protocol::{AppId, ClusterId, DecodeError, Epoch, Generation, NodeIndex, RootTag, UnixMillis, Wire as _};
use dstack_secret::Secret;

use super::complaint::complain;
use super::encryption::{Envelope, SharedPoint, Stream, SubshareFault};
use super::*;
use crate::combine::Combiner;
use crate::group::{Edwards25519, Group, NistP256, Ristretto255, Secp256k1};
use crate::prf::{Batch, evaluate};
use crate::shamir::lagrange_at_zero;
use crate::testing::{scalar, subsets};

const CLUSTER: ClusterId = ClusterId([0x51; 32]);

fn seed(label: &str, index: NodeIndex) -> Secret<64> {
    Secret::from_fn(|s| {
        *s = dstack_protocol::codec::sha512(&[b"dkg test", label.as_bytes(), &index.0.to_be_bytes()]);
    })
}

fn key(index: NodeIndex) -> EncryptionKey {
    EncryptionKey::new(seed("key", index))
}

fn members(n: u16) -> Vec<NodeIndex> {
    (1..=n).map(NodeIndex).collect()
}

fn open(root: RootTag, t: u16, n: u16) -> Open {
    Open {
        generation: Generation(0),
        what: What::Dkg,
        old_epoch: Epoch(0),
        new_epoch: Epoch(1),
        attempt: 1,
        t,
        roots: vec![root],
        dealers: members(n),
        holders: members(n),
    }
}

fn holders(n: u16) -> Vec<InstHolder> {
    members(n).into_iter().map(|index| InstHolder { index, key_hash: key_hash(&[7; 32]), ek: key(index).public() }).collect()
}

fn instance<G: Group>(root: RootTag, t: u16, n: u16) -> Instance<G> {
    Instance::new(&CLUSTER, &open(root, t, n), root, &holders(n)).unwrap()
}

struct Run<G: Group> {
    nodes: Vec<Participant<G>>,
    ceremony: Ceremony<G>,
}

/// A run after all commits, `bodies` being what will be dealt.
fn committed<G: Group>(root: RootTag, t: u16, n: u16) -> (Run<G>, Vec<Vec<u8>>) {
    let instance = instance::<G>(root, t, n);
    let nodes: Vec<Participant<G>> =
        members(n).into_iter().map(|i| Participant::new(instance.clone(), i, key(i), seed("deal", i)).unwrap()).collect();
    let bodies = nodes.iter().map(|node| node.package().body.clone()).collect();
    (Run { nodes, ceremony: Ceremony::new(instance) }, bodies)
}

/// A prf run of 2 of 3 in which dealer 2 commits to and deals `change`d bytes.
fn dealt_with(change: impl FnOnce(&mut DealBody)) -> (Run<Ristretto255>, Result<Progress, CeremonyError>) {
    dealt_in(RootTag::Prf, change)
}

/// The same for any root and group.
fn dealt_in<G: Group>(root: RootTag, change: impl FnOnce(&mut DealBody)) -> (Run<G>, Result<Progress, CeremonyError>) {
    let (mut run, mut bodies) = committed::<G>(root, 2, 3);
    let mut deal = DealBody::decode(&bodies[1], G::ELEMENT_BYTES, true).unwrap();
    change(&mut deal);
    bodies[1] = deal.encode();
    let inst = run.ceremony.instance().inst();
    for (i, body) in (1..).map(NodeIndex).zip(&bodies) {
        run.ceremony.apply(MessageKind::Commit, i, &commit_hash(&inst, i, body)).unwrap();
    }
    let mut last = Ok(Progress::Accepted);
    for (i, body) in (1..).map(NodeIndex).zip(&bodies) {
        last = run.ceremony.apply(MessageKind::Deal, i, body);
        if !matches!(last, Ok(Progress::Accepted)) {
            break;
        }
    }
    (run, last)
}

fn ended(culprit: u16, guilt: Guilt) -> Result<Progress, CeremonyError> {
    Ok(Progress::Moved(Stage::Ended(End::Convicted { culprit: NodeIndex(culprit), guilt })))
}

/// An honest run to its end.
pub(crate) fn complete<G: Group>(root: RootTag, t: u16, n: u16) -> Vec<Outcome<G>> {
    let (mut run, bodies) = committed::<G>(root, t, n);
    assert_eq!(run.ceremony.stage(), Stage::AwaitingCommits);
    for (i, node) in members(n).into_iter().zip(&run.nodes) {
        run.ceremony.apply(MessageKind::Commit, i, &node.package().commit).unwrap();
    }
    assert_eq!(run.ceremony.stage(), Stage::AwaitingDeals);
    for (i, body) in members(n).into_iter().zip(&bodies) {
        run.ceremony.apply(MessageKind::Deal, i, body).unwrap();
    }
    assert_eq!(run.ceremony.stage(), Stage::AwaitingReady);
    for (i, node) in members(n).into_iter().zip(&mut run.nodes) {
        let Checked::Ready(ready) = node.check(&run.ceremony).unwrap() else { panic!("{i} complains") };
        assert_eq!(run.ceremony.switched(), Err(CeremonyError::Incomplete(run.ceremony.missing())));
        let ready = ReadyBody { setup: [if run.ceremony.instance().has_pairwise_setup() { 7 } else { 0 }; 32], ..ready };
        run.ceremony.apply(MessageKind::Ready, i, &ready.encode()).unwrap();
    }
    assert_eq!(run.ceremony.stage(), Stage::Complete);
    let ceremony = run.ceremony;
    run.nodes.into_iter().map(|node| node.finish(&ceremony).unwrap()).collect()
}

/// Only tests sum what dealers know: `Σ_i a_i0` of an honest run, as the memory search does.
fn root_of<G: Group>(t: u16, n: u16, root: RootTag) -> G::Scalar {
    members(n).into_iter().fold(G::scalar_from_u64(0), |sum, i| {
        let mut stream = Stream::new(seed("deal", i), &instance::<G>(root, t, n).inst());
        stream.scalar::<G>().expose(|constant| sum + *constant)
    })
}

fn honest_run<G: Group>(root: RootTag, t: u16, n: u16) {
    let outcomes = complete::<G>(root, t, n);
    let secret = root_of::<G>(t, n, root);
    let first = outcomes[0].sharing().clone();
    assert_eq!(first.public_key(), G::encode(&G::mul_base(&secret)).as_ref());
    assert_eq!(first.threshold(), t);
    let mut shares = Vec::new();
    for (outcome, (index, vk)) in outcomes.iter().zip(first.verification_keys()) {
        assert_eq!(*outcome.sharing(), first);
        let share = crate::group::SecretScalar::<G>::from_secret(outcome.share()).unwrap();
        assert_eq!(G::encode(&share.public()).as_ref(), vk, "node {index}");
        shares.push(share);
    }
    for set in subsets(n, t) {
        let weights = lagrange_at_zero::<G>(&set).unwrap();
        let rebuilt = set
            .iter()
            .zip(weights)
            .fold(G::scalar_from_u64(0), |sum, (i, weight)| shares[usize::from(i.0) - 1].expose(|share| sum + *share * weight));
        assert!(rebuilt == secret, "{t}/{n} {set:?}");
    }
}

#[test]
fn an_honest_run_shares_one_root_in_every_group() {
    for (t, n) in [(2, 3), (3, 5), (5, 9)] {
        honest_run::<Ristretto255>(RootTag::Prf, t, n);
    }
    honest_run::<Edwards25519>(RootTag::Ca, 2, 3);
    honest_run::<NistP256>(RootTag::Ca, 2, 3);
    honest_run::<Secp256k1>(RootTag::Id, 3, 5);
}

#[test]
fn shares_of_a_run_evaluate_the_prf() {
    let outcomes = complete::<Ristretto255>(RootTag::Prf, 2, 3);
    let pk: [u8; 32] = outcomes[0].sharing().public_key().try_into().unwrap();
    let shares: Vec<_> = outcomes.into_iter().map(|o| o.into_prf_share().unwrap()).collect();
    let wish = Wish::new(KeyClass::Disk, vec![]).unwrap();
    let batch = Batch::new(&CLUSTER, &AppId([1; 20]), &[wish]).unwrap();
    let mut seen = None;
    for set in subsets(3, 2) {
        let mut combiner = Combiner::new(batch.clone(), Generation(0), &pk).unwrap();
        for i in &set {
            let share = &shares[usize::from(i.0) - 1];
            assert_eq!(share.epoch(), Epoch(1));
            combiner.add(&evaluate(share, &batch, &[1; 64]).into_plain(0, 1, [0; 32])).unwrap();
        }
        let group = *combiner.groups().keys().next().unwrap();
        let z = combiner.combine(&group, 2, None).unwrap().outputs[0].expose(|z| *z);
        assert_eq!(*seen.get_or_insert(z), z);
    }
}

#[test]
fn a_run_is_deterministic_in_its_seeds_and_separate_per_attempt() {
    let package = |attempt| {
        let open = Open { attempt, ..open(RootTag::Prf, 2, 3) };
        let instance = Instance::<Ristretto255>::new(&CLUSTER, &open, RootTag::Prf, &holders(3)).unwrap();
        let i = NodeIndex(1);
        Participant::new(instance, i, key(i), seed("deal", i)).unwrap().package().clone()
    };
    assert_eq!(package(1), package(1));
    assert_ne!(package(1).body[..34], package(2).body[..34], "even a repeated seed gives another polynomial");
}

#[test]
fn a_bad_sub_share_convicts_its_dealer() {
    type Change = fn(&mut DealBody);
    let cases: [(SubshareFault, Change); 3] = [
        (SubshareFault::DoesNotOpen, |deal| deal.shares[2].ct[0] ^= 1),
        (SubshareFault::NotCommitted, |deal| reseal(deal, NodeIndex(2), NodeIndex(3), [9; 32])),
        (SubshareFault::NotCanonical, |deal| reseal(deal, NodeIndex(2), NodeIndex(3), [0xff; 32])),
    ];
    for (fault, change) in cases {
        let (mut run, last) = dealt_with(change);
        assert_eq!(last, Ok(Progress::Moved(Stage::AwaitingReady)));
        assert!(matches!(run.nodes[0].check(&run.ceremony), Ok(Checked::Ready(_))));
        let Ok(Checked::Complaints(complaints)) = run.nodes[2].check(&run.ceremony) else { panic!("3 is content") };
        assert_eq!(complaints.iter().map(|c| c.dealer).collect::<Vec<_>>(), [NodeIndex(2)]);
        let verdict = run.ceremony.apply(MessageKind::Complain, NodeIndex(3), &complaints[0].encode());
        assert_eq!(verdict, ended(2, Guilt::Subshare { recipient: NodeIndex(3), fault }));
        assert!(matches!(run.ceremony.switched(), Err(CeremonyError::Ended(_))));
        assert_eq!(run.nodes[0].check(&run.ceremony), Err(ParticipantError::NotDealt));
        let late = run.ceremony.apply(MessageKind::Complain, NodeIndex(3), &complaints[0].encode());
        assert!(matches!(late, Err(CeremonyError::WrongStage { .. })));
    }
}

/// Replaces the sub-share of `recipient` by `scalar` bytes under a valid encryption.
fn reseal(deal: &mut DealBody, dealer: NodeIndex, recipient: NodeIndex, scalar_bytes: [u8; 32]) {
    reseal_in(&instance::<Ristretto255>(RootTag::Prf, 2, 3).inst(), deal, dealer, recipient, scalar_bytes);
}

fn reseal_in(inst: &[u8; 32], deal: &mut DealBody, dealer: NodeIndex, recipient: NodeIndex, scalar_bytes: [u8; 32]) {
    use chacha20poly1305::aead::AeadInOut as _;
    use chacha20poly1305::{ChaCha20Poly1305, KeyInit as _};
    let secret = scalar::<Ristretto255>(b"reseal", 1);
    let ephemeral = secret.public();
    let recipient_key = key(recipient);
    // The key schedule written out again, from the text of the specification.
    let shared = secret.expose(|e| Ristretto255::mul(recipient_key.element(), e));
    let info = [&inst[..], &dealer.0.to_be_bytes(), &recipient.0.to_be_bytes(), &Ristretto255::encode(&ephemeral), &recipient_key.public()]
        .concat();
    let mut cipher_key = [0; 32];
    hkdf::Hkdf::<sha2::Sha256>::new(Some(b"DKMS-V1-DEAL"), &Ristretto255::encode(&shared)).expand(&info, &mut cipher_key).unwrap();
    let mut buffer = scalar_bytes;
    let tag = ChaCha20Poly1305::new(&cipher_key.into())
        .encrypt_inout_detached(&[0; 12].into(), &info[..36], buffer.as_mut_slice().into())
        .unwrap();
    let share = deal.shares.iter_mut().find(|share| share.to == recipient).unwrap();
    share.ephemeral = Ristretto255::encode(&ephemeral);
    share.ct = [&buffer[..], &tag].concat().try_into().unwrap();
}

#[test]
fn the_encryption_is_the_one_of_the_specification() {
    // An honest scalar under the key schedule written out in `reseal` is accepted.
    let right = {
        let instance = instance::<Ristretto255>(RootTag::Prf, 2, 3);
        let mut stream = Stream::new(seed("deal", NodeIndex(2)), &instance.inst());
        crate::shamir::Polynomial::<Ristretto255>::deal(2, || stream.scalar()).eval(NodeIndex(3))
    };
    let bytes = right.expose(|s| s.to_bytes());
    let (mut run, _) = dealt_with(|deal| reseal(deal, NodeIndex(2), NodeIndex(3), bytes));
    assert!(matches!(run.nodes[2].check(&run.ceremony), Ok(Checked::Ready(_))));
}

#[test]
fn names_and_challenges_are_those_of_the_specification() {
    use sha2::{Digest as _, Sha256};
    let (run, bodies) = committed::<Ristretto255>(RootTag::Prf, 2, 3);
    // inst, written out from threshold.md §3.
    let mut text = [&b"DKMS-V1-INST"[..], &CLUSTER.0, &[0; 4], b"D", &[1], &[0; 8]].concat();
    text.extend_from_slice(&[&1u64.to_be_bytes()[..], &1u32.to_be_bytes(), &[0, 2], &[0, 3, 0, 1, 0, 2, 0, 3], &[0, 3]].concat());
    for i in members(3) {
        let key_hash = Sha256::digest([&b"DKMS-V1-NODEKEY"[..], &[7; 32]].concat());
        text.extend_from_slice(&[&i.0.to_be_bytes()[..], &key_hash, &key(i).public()].concat());
    }
    let inst: [u8; 32] = Sha256::digest(&text).into();
    assert_eq!(run.ceremony.instance().inst(), inst);
    // h_i and transcript.
    let digest = |body: &[u8]| Sha256::digest([&b"DKMS-V1-CBODY"[..], body].concat());
    let h = Sha256::digest([&b"DKMS-V1-DKG0"[..], &inst, &[0, 1], &digest(&bodies[0])].concat());
    assert_eq!(run.nodes[0].package().commit[..], h[..]);
    let mut text = [&b"DKMS-V1-TRANS"[..], &inst, &[0, 3]].concat();
    for (i, body) in members(3).into_iter().zip(&bodies) {
        text.extend_from_slice(&[&i.0.to_be_bytes()[..], &digest(body)].concat());
    }
    let (dealt, _) = dealt_with(|_| {});
    assert_eq!(dealt.ceremony.deals().unwrap().1.transcript()[..], Sha256::digest(&text)[..]);
    // Deal: count(2) ‖ C_i0 ‖ C_i1 ‖ c ‖ z ‖ count(2) ‖ { j(2) ‖ E_ij ‖ ct_ij(48) }*, and its proof of possession.
    let body = &bodies[0];
    assert_eq!(body.len(), 2 + 64 + 64 + 2 + 3 * 82);
    assert_eq!((&body[..2], &body[130..134]), (&[0, 2][..], &[0, 3, 0, 1][..]));
    let scalar_at = |at: usize| Ristretto255::decode_scalar(&body[at..at + 32].try_into().unwrap()).unwrap();
    let (constant, c, z) = (Ristretto255::decode(&body[2..34]).unwrap(), scalar_at(66), scalar_at(98));
    let r = Ristretto255::mul_base(&z) - constant * c;
    let challenge = Ristretto255::hash_to_scalar(&[b"DKMS-V1-POP", &inst, &[0, 1], &body[2..34], &Ristretto255::encode(&r)]);
    assert!(c == challenge);
}

#[test]
fn a_false_complaint_convicts_its_author() {
    // Honest deals; node 3 opens its sub-share of dealer 1 with a valid proof: the sub-share is right.
    let (run, _) = dealt_with(|_| {});
    let (deals, _) = run.ceremony.deals().unwrap();
    let ephemeral = deals[&NodeIndex(1)].shares[&NodeIndex(3)].ephemeral;
    let honest = complain(NodeIndex(1), &key(NodeIndex(3)), &ephemeral, &seed("rng", NodeIndex(3)));
    let guilt = Guilt::FalseComplaint { dealer: NodeIndex(1) };
    let apply = |from: u16, body: &[u8]| run.ceremony.clone().apply(MessageKind::Complain, NodeIndex(from), body);
    assert_eq!(apply(3, &honest.encode()), ended(3, guilt.clone()));
    // The same opening posted by another node proves nothing about that node's sub-share.
    assert_eq!(apply(2, &honest.encode()), ended(2, guilt.clone()));
    // A made-up shared key, a broken proof, a dealer that is none.
    let other = Ristretto255::encode(&scalar::<Ristretto255>(b"other", 0).public());
    assert_eq!(apply(3, &ComplainBody { shared: other, ..honest.clone() }.encode()), ended(3, guilt.clone()));
    assert_eq!(apply(3, &ComplainBody { shared: [0; 32], ..honest.clone() }.encode()), ended(3, guilt.clone()));
    let mut c = honest.c;
    c[0] ^= 1;
    assert_eq!(apply(3, &ComplainBody { c, ..honest.clone() }.encode()), ended(3, guilt));
    let stranger = ComplainBody { dealer: NodeIndex(9), ..honest };
    assert_eq!(apply(3, &stranger.encode()), ended(3, Guilt::FalseComplaint { dealer: NodeIndex(9) }));
    // Bytes that are no complaint.
    let error = DecodeError::Truncated { field: "dealer", need: 2, have: 0 };
    assert_eq!(apply(3, &[]), ended(3, Guilt::Malformed(error)));
}

#[test]
fn judging_answers_who_and_why() {
    let (run, _) = dealt_with(|deal| deal.shares[2].ct[5] ^= 1);
    let (deals, _) = run.ceremony.deals().unwrap();
    let deal = &deals[&NodeIndex(2)];
    let instance = run.ceremony.instance();
    let complaint = complain(NodeIndex(2), &key(NodeIndex(3)), &deal.shares[&NodeIndex(3)].ephemeral, &seed("r", NodeIndex(3)));
    let dealer = Verdict::Dealer { dealer: NodeIndex(2), fault: SubshareFault::DoesNotOpen };
    assert_eq!(judge(instance, NodeIndex(3), &complaint, deal), Some(dealer));
    let forged = ComplainBody { s: [0; 32], ..complaint.clone() };
    let liar = Verdict::Complainer { complainer: NodeIndex(3), proof_verified: false };
    assert_eq!(judge(instance, NodeIndex(3), &forged, deal), Some(liar));
    assert_eq!(judge(instance, NodeIndex(4), &complaint, deal), None);
}

#[test]
fn a_bad_deal_convicts_its_dealer_at_once() {
    let other = || Ristretto255::encode(&scalar::<Ristretto255>(b"other", 0).public());
    let refused = |fault: DealFault, change: &dyn Fn(&mut DealBody)| {
        let (_, last) = dealt_with(change);
        assert_eq!(last, ended(2, Guilt::Deal(fault)));
    };
    refused(DealFault::Degree { want: 2, got: 3 }, &|d| d.commitments.push(other().to_vec()));
    refused(DealFault::Degree { want: 2, got: 1 }, &|d| d.commitments.truncate(1));
    refused(DealFault::Commitment(1), &|d| d.commitments[1] = vec![0; 32]);
    refused(DealFault::Commitment(0), &|d| d.commitments[0] = vec![0xff; 32]);
    refused(DealFault::Possession, &|d| d.commitments[0] = other().to_vec());
    refused(DealFault::Possession, &|d| d.possession.as_mut().unwrap().1[0] ^= 1);
    refused(DealFault::Possession, &|d| d.possession.as_mut().unwrap().0 = [0xff; 32]);
    refused(DealFault::Recipients, &|d| d.shares.truncate(2));
    refused(DealFault::Recipients, &|d| d.shares[2].to = NodeIndex(4));
    refused(DealFault::Ephemeral(NodeIndex(1)), &|d| d.shares[0].ephemeral = [0; 32]);
    // A commitment that differs from the polynomial of the sub-shares: every recipient complains, rightly.
    let (mut run, _) = dealt_with(|d| d.commitments[1] = other().to_vec());
    for node in &mut run.nodes {
        assert!(matches!(node.check(&run.ceremony), Ok(Checked::Complaints(list)) if list[0].dealer == NodeIndex(2)));
    }
}

#[test]
fn a_copied_deal_has_no_proof_of_possession() {
    // Node 2 deals node 1's constant as its own, proof included: the challenge binds the dealer.
    let (run, bodies) = committed::<Ristretto255>(RootTag::Prf, 2, 3);
    let inst = run.ceremony.instance().inst();
    let commit = commit_hash(&inst, NodeIndex(2), &bodies[0]);
    let error = check_deal(run.ceremony.instance(), NodeIndex(2), &commit, &bodies[0]).unwrap_err();
    assert_eq!(error, DealFault::Possession);
}

#[test]
fn a_deal_other_than_the_committed_one_is_refused() {
    let (mut run, bodies) = committed::<Ristretto255>(RootTag::Prf, 2, 3);
    for (i, node) in members(3).into_iter().zip(&run.nodes) {
        run.ceremony.apply(MessageKind::Commit, i, &node.package().commit).unwrap();
    }
    // Dealer 1 saw the others' commits and deals another polynomial.
    let instance = run.ceremony.instance().clone();
    let again = Participant::new(instance, NodeIndex(1), key(NodeIndex(1)), seed("another", NodeIndex(1))).unwrap();
    let verdict = run.ceremony.apply(MessageKind::Deal, NodeIndex(1), &again.package().body);
    assert_eq!(verdict, ended(1, Guilt::Deal(DealFault::NotCommitted)));
    assert_ne!(again.package().body, bodies[0]);
}

#[test]
fn truncated_and_extended_bodies_convict_without_panic() {
    let (_, bodies) = committed::<Ristretto255>(RootTag::Prf, 2, 3);
    let instance = instance::<Ristretto255>(RootTag::Prf, 2, 3);
    for len in (0..bodies[0].len()).chain([bodies[0].len() + 1]) {
        let mut body = bodies[0].clone();
        body.resize(len, 0);
        let commit = commit_hash(&instance.inst(), NodeIndex(1), &body);
        assert!(check_deal(&instance, NodeIndex(1), &commit, &body).is_err(), "{len} bytes");
    }
    let mut ceremony = Ceremony::new(instance);
    let verdict = ceremony.apply(MessageKind::Commit, NodeIndex(1), &[0; 31]);
    assert!(matches!(verdict, Ok(Progress::Moved(Stage::Ended(End::Convicted { culprit: NodeIndex(1), .. })))));
}

#[test]
fn every_flipped_byte_of_a_deal_is_noticed() {
    // By the public checks, or by the recipient whose sub-share was touched.
    let (_, bodies) = committed::<Ristretto255>(RootTag::Prf, 2, 3);
    let instance = instance::<Ristretto255>(RootTag::Prf, 2, 3);
    let inst = instance.inst();
    for at in 0..bodies[1].len() {
        let mut body = bodies[1].clone();
        body[at] ^= 0x20;
        let dealer = NodeIndex(2);
        let Ok(deal) = check_deal(&instance, dealer, &commit_hash(&inst, dealer, &body), &body) else { continue };
        let opened = members(3).into_iter().all(|j| {
            let key = key(j);
            let sealed = &deal.shares[&j];
            let envelope = Envelope { inst: &inst, dealer, recipient: j, ephemeral: &sealed.ephemeral, key: key.element() };
            envelope.open(&key.shared(&sealed.ephemeral), &sealed.ct, &deal.commitment).is_ok()
        });
        assert!(!opened, "byte {at}");
    }
}

#[test]
fn a_silent_node_is_named_but_not_convicted() {
    let (mut run, bodies) = committed::<Ristretto255>(RootTag::Prf, 2, 3);
    let (start, late) = (UnixMillis(1_000), UnixMillis(61_001));
    for i in [1, 2].map(NodeIndex) {
        run.ceremony.apply(MessageKind::Commit, i, &run.nodes[usize::from(i.0) - 1].package().commit).unwrap();
    }
    assert_eq!(run.ceremony.overdue(start, UnixMillis(61_000)), []);
    assert_eq!(run.ceremony.overdue(start, late), [NodeIndex(3)]);
    assert_eq!(run.ceremony.stage(), Stage::AwaitingCommits);
    run.ceremony.apply(MessageKind::Commit, NodeIndex(3), &run.nodes[2].package().commit).unwrap();
    run.ceremony.apply(MessageKind::Deal, NodeIndex(2), &bodies[1]).unwrap();
    assert_eq!(run.ceremony.overdue(start, late), [NodeIndex(1), NodeIndex(3)]);
    for i in [1, 3].map(NodeIndex) {
        run.ceremony.apply(MessageKind::Deal, i, &bodies[usize::from(i.0) - 1]).unwrap();
    }
    let Checked::Ready(ready) = run.nodes[0].check(&run.ceremony).unwrap() else { panic!() };
    run.ceremony.apply(MessageKind::Ready, NodeIndex(1), &ready.encode()).unwrap();
    assert_eq!(run.ceremony.overdue(start, late), [NodeIndex(2), NodeIndex(3)]);
    assert!(matches!(run.ceremony.switched(), Err(CeremonyError::Incomplete(list)) if list.len() == 2));
}

#[test]
fn an_equivocating_dealer_cannot_finish() {
    // Node 1 shows one deal to nodes 1 and 2 and, on a forked log, another to node 3.
    let (mut here, bodies) = committed::<Ristretto255>(RootTag::Prf, 2, 3);
    let (mut there, _) = committed::<Ristretto255>(RootTag::Prf, 2, 3);
    let instance = here.ceremony.instance().clone();
    let inst = instance.inst();
    let other = Participant::new(instance, NodeIndex(1), key(NodeIndex(1)), seed("fork", NodeIndex(1))).unwrap();
    let mut forked = bodies.clone();
    forked[0] = other.package().body.clone();
    for (run, bodies) in [(&mut here, &bodies), (&mut there, &forked)] {
        for kind in [MessageKind::Commit, MessageKind::Deal] {
            for (i, body) in members(3).into_iter().zip(bodies) {
                let commit = commit_hash(&inst, i, body);
                let body = if kind == MessageKind::Commit { &commit[..] } else { body };
                run.ceremony.apply(kind, i, body).unwrap();
            }
        }
    }
    let Checked::Ready(ready) = there.nodes[2].check(&there.ceremony).unwrap() else { panic!() };
    let verdict = here.ceremony.apply(MessageKind::Ready, NodeIndex(3), &ready.encode());
    assert_eq!(verdict, ended(3, Guilt::Ready(ReadyFault::Transcript)));
    assert!(here.ceremony.switched().is_err());
}

#[test]
fn ready_must_state_what_the_deals_give() {
    let (run, _) = dealt_with(|_| {});
    let (_, sharing) = run.ceremony.deals().unwrap();
    let right = sharing.ready_body(NodeIndex(2)).unwrap();
    let check = |ready: ReadyBody| sharing.check_ready(NodeIndex(2), &ready.encode());
    assert_eq!(check(right.clone()), Ok([0; 32]));
    assert_eq!(check(ReadyBody { transcript: [0; 32], ..right.clone() }), Err(ReadyFault::Transcript));
    let vk = sharing.ready_body(NodeIndex(1)).unwrap().vk;
    assert_eq!(check(ReadyBody { vk, ..right.clone() }), Err(ReadyFault::VerificationKey));
    assert_eq!(check(ReadyBody { setup: [1; 32], ..right.clone() }), Err(ReadyFault::Setup));
    assert_eq!(sharing.check_ready(NodeIndex(4), &right.encode()), Err(ReadyFault::NotAHolder(NodeIndex(4))));
    assert!(matches!(sharing.check_ready(NodeIndex(2), &[1, 2]), Err(ReadyFault::Malformed(_))));
}

#[test]
fn messages_out_of_place_have_no_effect() {
    let (mut run, bodies) = committed::<Ristretto255>(RootTag::Prf, 2, 3);
    let one = NodeIndex(1);
    let commit = run.nodes[0].package().commit;
    let wrong = |kind, stage| Err(CeremonyError::WrongStage { kind, stage });
    let ceremony = &mut run.ceremony;
    assert_eq!(ceremony.apply(MessageKind::Deal, one, &bodies[0]), wrong(MessageKind::Deal, Stage::AwaitingCommits));
    assert_eq!(ceremony.apply(MessageKind::Ready, one, &[]), wrong(MessageKind::Ready, Stage::AwaitingCommits));
    assert_eq!(ceremony.apply(MessageKind::Live, one, &[]), wrong(MessageKind::Live, Stage::AwaitingCommits));
    assert_eq!(ceremony.apply(MessageKind::Commit, NodeIndex(4), &commit), Err(CeremonyError::NotAMember(NodeIndex(4))));
    ceremony.apply(MessageKind::Commit, one, &commit).unwrap();
    let again = Err(CeremonyError::Repeated { index: one, kind: MessageKind::Commit });
    assert_eq!(ceremony.apply(MessageKind::Commit, one, &[0; 32]), again);
    assert_eq!(run.nodes[0].check(&run.ceremony), Err(ParticipantError::NotDealt));
    // A participant of another attempt is not confused by this one.
    let other = Open { attempt: 2, ..open(RootTag::Prf, 2, 3) };
    let other = Instance::<Ristretto255>::new(&CLUSTER, &other, RootTag::Prf, &holders(3)).unwrap();
    let mut stray = Participant::new(other, one, key(one), seed("deal", one)).unwrap();
    assert_eq!(stray.check(&run.ceremony), Err(ParticipantError::OtherRun));
}

#[test]
fn unready_ends_the_attempt_without_guilt() {
    let (mut run, _) = dealt_with(|_| {});
    let two = NodeIndex(2);
    let stage = Stage::AwaitingReady;
    let early = Err(CeremonyError::WrongStage { kind: MessageKind::Unready, stage });
    assert_eq!(run.ceremony.apply(MessageKind::Unready, two, &[]), early);
    let Ok(Checked::Ready(ready)) = run.nodes[1].check(&run.ceremony) else { panic!() };
    run.ceremony.apply(MessageKind::Ready, two, &ready.encode()).unwrap();
    let ended = run.ceremony.apply(MessageKind::Unready, two, &[]);
    assert_eq!(ended, Ok(Progress::Moved(Stage::Ended(End::ShareLost(two)))));
}

#[test]
fn a_restarted_node_without_its_key_takes_no_part() {
    let instance = instance::<Ristretto255>(RootTag::Prf, 2, 3);
    let fresh = EncryptionKey::new(seed("after restart", NodeIndex(1)));
    let error = Participant::new(instance.clone(), NodeIndex(1), fresh, seed("deal", NodeIndex(1))).unwrap_err();
    assert_eq!(error, ParticipantError::NotAMember(NodeIndex(1)));
    // One that never checked its sub-shares has nothing to take away.
    let unchecked = Participant::new(instance, NodeIndex(1), key(NodeIndex(1)), seed("deal", NodeIndex(1))).unwrap();
    let (mut run, _) = dealt_with(|_| {});
    for (i, node) in members(3).into_iter().zip(&mut run.nodes) {
        let Ok(Checked::Ready(ready)) = node.check(&run.ceremony) else { panic!() };
        run.ceremony.apply(MessageKind::Ready, i, &ready.encode()).unwrap();
    }
    assert_eq!(unchecked.finish(&run.ceremony).err(), Some(ParticipantError::NotChecked));
}

#[test]
fn instances_are_checked() {
    let make = |open: &Open, holders: &[InstHolder]| Instance::<Ristretto255>::new(&CLUSTER, open, RootTag::Prf, holders).map(|i| i.inst());
    let good = open(RootTag::Prf, 2, 3);
    assert!(make(&good, &holders(3)).is_ok());
    assert_eq!(make(&Open { what: What::Reshare, ..good.clone() }, &holders(3)), Err(InstanceError::NotDkg));
    assert_eq!(make(&Open { old_epoch: Epoch(1), ..good.clone() }, &holders(3)), Err(InstanceError::NotDkg));
    assert_eq!(make(&Open { roots: vec![RootTag::Id], ..good.clone() }, &holders(3)), Err(InstanceError::Root(RootTag::Prf)));
    assert_eq!(make(&Open { t: 1, ..good.clone() }, &holders(3)), Err(InstanceError::Threshold { t: 1, n: 3 }));
    assert_eq!(make(&Open { t: 4, ..good.clone() }, &holders(3)), Err(InstanceError::Threshold { t: 4, n: 3 }));
    assert_eq!(make(&open(RootTag::Prf, 2, 2), &holders(2)), Err(InstanceError::Threshold { t: 2, n: 2 }));
    assert_eq!(make(&good, &holders(2)), Err(InstanceError::Members));
    assert_eq!(make(&Open { dealers: members(2), ..good.clone() }, &holders(3)), Err(InstanceError::Members));
    let mut bad = holders(3);
    bad[1].ek = [0; 32];
    assert_eq!(make(&good, &bad), Err(InstanceError::Key(NodeIndex(2))));
    // A share of one root is never used in another's protocol.
    let crossed = Instance::<Secp256k1>::new(&CLUSTER, &good, RootTag::Prf, &holders(3)).unwrap_err();
    assert_eq!(crossed, InstanceError::Group { root: RootTag::Prf, group: "secp256k1" });
    // Every field of the attempt is in the name.
    let name = make(&good, &holders(3)).unwrap();
    assert_ne!(make(&Open { attempt: 2, ..good.clone() }, &holders(3)).unwrap(), name);
    assert_ne!(make(&Open { generation: Generation(1), ..good.clone() }, &holders(3)).unwrap(), name);
    let mut other = holders(3);
    other[0].key_hash = [0; 32];
    assert_ne!(make(&good, &other).unwrap(), name);
}

#[test]
fn secrets_print_nothing() {
    let node = Participant::new(instance::<Ristretto255>(RootTag::Prf, 2, 3), NodeIndex(1), key(NodeIndex(1)), seed("deal", NodeIndex(1)))
        .unwrap();
    assert_eq!(format!("{node:?}"), "Participant { index: NodeIndex(1), .. }");
    assert_eq!(format!("{:?}", key(NodeIndex(1))), "EncryptionKey(redacted)");
    drop(SharedPoint(scalar::<Ristretto255>(b"x", 0).public()));
}

#[cfg(feature = "insecure-test-export")]
#[test]
fn exported_constants_sum_to_the_root() {
    let (run, _) = committed::<Ristretto255>(RootTag::Prf, 2, 3);
    let sum = run.nodes.iter().fold(Ristretto255::scalar_from_u64(0), |sum, node| {
        sum + node.package().dealer_constant.expose(|c| Ristretto255::decode_scalar(c).unwrap())
    });
    assert!(sum == root_of::<Ristretto255>(2, 3, RootTag::Prf));
}

/// A run of `id` whose first holder states setup 7 and whose second one `setup`.
fn ready_with(setup: u8) -> Result<Progress, CeremonyError> {
    let (mut run, bodies) = committed::<Secp256k1>(RootTag::Id, 2, 3);
    (1..).zip(&run.nodes).for_each(|(i, node)| drop(run.ceremony.apply(MessageKind::Commit, NodeIndex(i), &node.package().commit)));
    (1..).zip(&bodies).for_each(|(i, body)| drop(run.ceremony.apply(MessageKind::Deal, NodeIndex(i), body)));
    let mut last = Ok(Progress::Accepted);
    for (i, setup) in [(1, 7), (2, setup)] {
        let Checked::Ready(ready) = run.nodes[i - 1].check(&run.ceremony).unwrap() else { panic!("honest deals are right") };
        last = run.ceremony.apply(MessageKind::Ready, NodeIndex(i as u16), &ReadyBody { setup: [setup; 32], ..ready }.encode());
    }
    last
}

#[test]
fn holders_state_one_pairwise_setup_or_the_run_ends() {
    assert_eq!(ready_with(7), Ok(Progress::Accepted));
    let differs = End::SetupDiffers(NodeIndex(1), NodeIndex(2));
    assert_eq!(ready_with(8), Ok(Progress::Moved(Stage::Ended(differs))), "one of two lies, and nobody is convicted");
    assert_eq!(ready_with(0), ended(2, Guilt::Ready(ReadyFault::Setup)), "a Ready without a setup");
}
