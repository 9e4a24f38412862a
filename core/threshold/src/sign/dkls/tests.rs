//! Setups and runs between simulated holders: whole, disturbed, dishonest.

mod redo;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use dstack_protocol::{ClusterId, Epoch, Generation, RootTag};
use proptest::prelude::*;
use sha3::{Digest as _, Keccak256};

use super::*;
use crate::dkg;
use crate::group::{Group, NistP256, Secp256k1, SecretScalar};
use crate::shamir::Polynomial;
use crate::sign::Scope;
use crate::sign::ecdsa::{EcdsaSignature, Progress, Rounds};
use crate::testing::{scalar, subsets};

const DIGEST: [u8; 32] = [0xd1; 32];

fn scope(attempt: u32) -> Scope {
    Scope { cluster_id: ClusterId([0x51; 32]), generation: Generation(0), root: RootTag::Id, epoch: Epoch(1), attempt }
}

fn run(attempt: u32, signers: &[NodeIndex]) -> Run {
    Run::new(&scope(attempt), DIGEST, signers).unwrap()
}

fn indices(list: &[u16]) -> Vec<NodeIndex> {
    list.iter().map(|i| NodeIndex(*i)).collect()
}

/// Shares at any indices, of a polynomial that only tests know.
fn dealt<G: EcdsaGroup>(t: u16, members: &[NodeIndex]) -> Vec<RootShare<G>> {
    let mut counter = 0;
    let polynomial = Polynomial::<G>::deal(t, || {
        counter += 1;
        scalar(b"ecdsa", counter)
    });
    let pk = G::encode(&polynomial.commit().constant());
    let secrets: Vec<SecretScalar<G>> = members.iter().map(|i| polynomial.eval(*i)).collect();
    let vks: Vec<_> = members.iter().zip(&secrets).map(|(i, s)| (*i, G::encode(&s.public()).as_ref().to_vec())).collect();
    let holders = Arc::new(Holders::new(t, pk.as_ref(), &vks).unwrap());
    let import =
        |(i, s): (&NodeIndex, &SecretScalar<G>)| Dkls23::<G>::import_share(*i, Arc::clone(&holders), Locked::new(s.to_secret())).unwrap();
    members.iter().zip(&secrets).map(import).collect()
}

struct Letter {
    from: NodeIndex,
    to: NodeIndex,
    bytes: Vec<u8>,
}

/// Participants and what is on the way between them.
struct Post<M: Rounds> {
    machines: BTreeMap<NodeIndex, M>,
    mail: VecDeque<Letter>,
    done: BTreeMap<NodeIndex, M::Output>,
    errors: Vec<(NodeIndex, EcdsaError)>,
}

impl<M: Rounds> Post<M> {
    fn new(begun: impl IntoIterator<Item = (NodeIndex, (M, Vec<Outgoing>))>) -> Self {
        let mut post = Self { machines: BTreeMap::new(), mail: VecDeque::new(), done: BTreeMap::new(), errors: Vec::new() };
        for (index, (machine, send)) in begun {
            post.machines.insert(index, machine);
            post.put(index, send);
        }
        post
    }

    fn put(&mut self, from: NodeIndex, send: Vec<Outgoing>) {
        self.mail.extend(send.into_iter().map(|o| Letter { from, to: o.to, bytes: o.bytes.expose(<[u8]>::to_vec) }));
    }

    fn deliver(&mut self, letter: &Letter) -> Result<(), EcdsaError> {
        let machine = self.machines.get_mut(&letter.to).expect("letters go to participants");
        let Progress { send, done } = machine.receive(letter.from, &letter.bytes).inspect_err(|error| {
            self.errors.push((letter.to, error.clone()));
        })?;
        self.put(letter.to, send);
        self.done.extend(done.map(|output| (letter.to, output)));
        Ok(())
    }

    /// Delivers until nothing is on the way. `pick`: which letter of how many goes next.
    fn settle(&mut self, mut pick: impl FnMut(usize) -> usize) {
        while !self.mail.is_empty() {
            let next = pick(self.mail.len());
            let letter = self.mail.remove(next).expect("a place in the queue");
            let _ = self.deliver(&letter);
        }
    }
}

fn setups<G: EcdsaGroup>(name: u8, members: &[NodeIndex]) -> Post<Setup<G>> {
    Post::new(members.iter().map(|i| (*i, Dkls23::<G>::setup([name; 32], *i, members).unwrap())))
}

fn set_up<G: EcdsaGroup>(members: &[NodeIndex]) -> BTreeMap<NodeIndex, Pairwise<G>> {
    let mut post = setups::<G>(0x33, members);
    post.settle(|_| 0);
    assert_eq!(post.errors, []);
    let digests: Vec<_> = post.done.values().map(Pairwise::digest).collect();
    assert_eq!(digests.len(), members.len());
    assert!(digests.windows(2).all(|pair| pair[0] == pair[1]), "`setup` is the same at all holders");
    post.done
}

/// Everything that signers need, once for many runs.
struct Cluster<G: EcdsaGroup> {
    shares: BTreeMap<NodeIndex, RootShare<G>>,
    pairwise: BTreeMap<NodeIndex, Pairwise<G>>,
}

impl<G: EcdsaGroup> Cluster<G> {
    fn new(t: u16, members: &[NodeIndex]) -> Self {
        let shares = dealt::<G>(t, members).into_iter().map(|share| (share.index(), share)).collect();
        Self { shares, pairwise: set_up(members) }
    }

    fn begin(&self, index: NodeIndex, run: &Run, digest: [u8; 32]) -> Result<(Signing<G>, Vec<Outgoing>), EcdsaError> {
        Dkls23::sign(&self.shares[&index], &self.pairwise[&index], run, digest)
    }

    fn runs(&self, run: &Run) -> Post<Signing<G>> {
        Post::new(run.signers().iter().map(|i| (*i, self.begin(*i, run, DIGEST).unwrap())))
    }

    fn public_key(&self) -> G::Element {
        *self.shares.values().next().unwrap().holders().public_element()
    }

    /// All signers ended with one valid signature.
    fn assert_signed(&self, post: &Post<Signing<G>>) -> EcdsaSignature {
        assert_eq!(post.done.len(), post.machines.len(), "{:?}", post.errors);
        let first = *post.done.values().next().unwrap();
        assert!(post.done.values().all(|signature| *signature == first));
        assert!(G::verify(&self.public_key(), &DIGEST, &first));
        first
    }
}

fn every_subset_signs<G: EcdsaGroup>(t: u16, n: u16) {
    let members: Vec<NodeIndex> = (1..=n).map(NodeIndex).collect();
    let cluster = Cluster::<G>::new(t, &members);
    for (attempt, set) in (0..).zip(subsets(n, t)) {
        let mut post = cluster.runs(&run(attempt, &set));
        post.settle(|_| 0);
        assert_eq!(post.errors, []);
        cluster.assert_signed(&post);
    }
}

#[test]
fn every_2_of_3_sign_under_secp256k1() {
    every_subset_signs::<Secp256k1>(2, 3);
}

#[test]
fn every_2_of_3_sign_under_p256() {
    every_subset_signs::<NistP256>(2, 3);
}

#[test]
fn every_3_of_5_sign() {
    every_subset_signs::<Secp256k1>(3, 5);
}

#[test]
fn indices_need_not_be_small_or_dense() {
    // Beyond one byte, which the engine's own party numbers are.
    let members = indices(&[2, 300, 0x7fff]);
    let cluster = Cluster::<Secp256k1>::new(2, &members);
    for (attempt, set) in (0..).zip([[2, 300], [2, 0x7fff], [300, 0x7fff]]) {
        let mut post = cluster.runs(&run(attempt, &indices(&set)));
        post.settle(|_| 0);
        cluster.assert_signed(&post);
    }
}

#[test]
fn five_of_nine_of_our_own_key_generation_sign() {
    let outcomes = dkg::tests::complete::<Secp256k1>(RootTag::Id, 5, 9);
    let holders = Arc::new(Holders::of(outcomes[0].sharing()));
    let members: Vec<NodeIndex> = holders.members().collect();
    let share = |(i, outcome): (&NodeIndex, &dkg::Outcome<Secp256k1>)| {
        let locked = Locked::new(outcome.share().expose(|s| dstack_secret::Secret::from_fn(|to| *to = *s)));
        (*i, Dkls23::<Secp256k1>::import_share(*i, Arc::clone(&holders), locked).unwrap())
    };
    // The setup of five of the holders is enough for them, so the test need not make 36 pairs: what it proves is the sharing.
    let five = indices(&[1, 3, 4, 7, 9]);
    let all: BTreeMap<NodeIndex, RootShare<Secp256k1>> = members.iter().zip(&outcomes).map(share).collect();
    let vks = outcomes[0].sharing().verification_keys().into_iter().filter(|(i, _)| five.contains(i)).collect::<Vec<_>>();
    let pk = outcomes[0].sharing().public_key();
    let narrowed = Arc::new(Holders::<Secp256k1>::new(5, &pk, &vks).unwrap());
    let narrow = |i: &NodeIndex| {
        let locked = Locked::new(all[i].scalar().expose(|s| dstack_secret::Secret::from_fn(|to| *to = *s)));
        (*i, RootShare::new(*i, Arc::clone(&narrowed), locked).unwrap())
    };
    let cluster = Cluster { shares: five.iter().map(narrow).collect(), pairwise: set_up::<Secp256k1>(&five) };
    let run = run(0, &five);
    let mut post = cluster.runs(&run);
    post.settle(|_| 0);
    cluster.assert_signed(&post);
    // With all nine as holders, a setup of five is not theirs.
    let error = Dkls23::sign(&all[&NodeIndex(1)], &cluster.pairwise[&NodeIndex(1)], &run, DIGEST).unwrap_err();
    assert_eq!(error, EcdsaError::OtherHolders);
}

#[test]
fn a_signature_is_accepted_by_ecrecover() {
    let cluster = Cluster::<Secp256k1>::new(2, &indices(&[1, 3]));
    // The message of threshold.md §5.1, for one app.
    let digest: [u8; 32] = Keccak256::digest([&b"dstack-kms-issued:"[..], &[0x22; 20], &[2; 33]].concat()).into();
    let run = Run::new(&scope(0), digest, &indices(&[1, 3])).unwrap();
    let mut post = Post::new(run.signers().iter().map(|i| (*i, cluster.begin(*i, &run, digest).unwrap())));
    post.settle(|_| 0);
    let bytes = post.done[&NodeIndex(1)].to_bytes();
    // What Ethereum's precompile does: recover the key of r ‖ s ‖ v, hash it, take 20 bytes. Low s as EIP-2 asks.
    let signature = k256::ecdsa::Signature::from_slice(&bytes[..64]).unwrap();
    assert_eq!(signature.normalize_s(), signature);
    let recid = k256::ecdsa::RecoveryId::from_byte(bytes[64]).unwrap();
    let recovered = k256::ecdsa::VerifyingKey::recover_from_prehash(&digest, &signature, recid).unwrap();
    let address = |key: &k256::ecdsa::VerifyingKey| Keccak256::digest(&key.to_sec1_point(false).as_bytes()[1..])[12..].to_vec();
    let expected = k256::ecdsa::VerifyingKey::from_sec1_bytes(&Secp256k1::encode(&cluster.public_key())).unwrap();
    assert_eq!(address(&recovered), address(&expected));
    let other = k256::ecdsa::RecoveryId::from_byte(bytes[64] ^ 1).unwrap();
    assert_ne!(k256::ecdsa::VerifyingKey::recover_from_prehash(&digest, &signature, other).unwrap(), expected);
    // Our own verification is as strict.
    let good = post.done[&NodeIndex(1)];
    assert!(Secp256k1::verify(&cluster.public_key(), &digest, &good));
    assert!(!Secp256k1::verify(&cluster.public_key(), &DIGEST, &good));
    assert!(!Secp256k1::verify(&cluster.public_key(), &digest, &EcdsaSignature { recid: good.recid ^ 1, ..good }));
    let high = Secp256k1::encode_scalar(&(-Secp256k1::decode_scalar(&good.s).unwrap()));
    assert!(!Secp256k1::verify(&cluster.public_key(), &digest, &EcdsaSignature { s: high, recid: good.recid ^ 1, ..good }));
    assert!(!Secp256k1::verify(&cluster.public_key(), &digest, &EcdsaSignature { s: [0; 32], ..good }));
}

/// A small generator of places, so that failures repeat.
fn places(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed;
    move |bound| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % bound
    }
}

#[test]
fn order_does_not_matter_and_repeats_are_refused() {
    let members = indices(&[1, 2, 3]);
    // The setup newest first: second messages overtake first ones.
    let mut post = setups::<Secp256k1>(1, &members);
    post.settle(|n| n - 1);
    assert_eq!(post.errors, []);
    let shares = dealt(3, &members).into_iter().map(|share: RootShare<Secp256k1>| (share.index(), share)).collect();
    let cluster = Cluster { shares, pairwise: post.done };
    for seed in 0..6 {
        let mut post = cluster.runs(&run(seed, &members));
        let mut shuffled = places(u64::from(seed));
        post.settle(|n| if seed == 0 { n - 1 } else { shuffled(n) });
        assert_eq!(post.errors, []);
        cluster.assert_signed(&post);
    }
    // Everything twice.
    let mut post = cluster.runs(&run(9, &members));
    let mut repeated = 0;
    while let Some(letter) = post.mail.pop_front() {
        post.deliver(&letter).unwrap();
        repeated += 1;
        match post.deliver(&letter).unwrap_err() {
            EcdsaError::Duplicate { peer, .. } => assert_eq!(peer, letter.from),
            EcdsaError::Ended => assert!(post.done.contains_key(&letter.to)),
            other => panic!("{other}"),
        }
    }
    assert_eq!(repeated, 3 * 2 * 3);
    cluster.assert_signed(&post);
}

#[test]
fn what_is_dropped_is_named_and_nothing_comes_out() {
    let members = indices(&[1, 2, 3]);
    let cluster = Cluster::<Secp256k1>::new(3, &members);
    for round in 1..=3u8 {
        let mut post = cluster.runs(&run(u32::from(round), &members));
        assert_eq!(post.machines[&NodeIndex(1)].missing(), indices(&[2, 3]));
        while let Some(letter) = post.mail.pop_front() {
            // Round is the byte after label, version and id.
            if !(letter.from == NodeIndex(2) && letter.to == NodeIndex(1) && letter.bytes[47] == round) {
                post.deliver(&letter).unwrap();
            }
        }
        assert_eq!(post.machines[&NodeIndex(1)].missing(), [NodeIndex(2)]);
        assert!(!post.done.contains_key(&NodeIndex(1)));
        assert!(post.machines[&NodeIndex(1)].involves(NodeIndex(2)) && !post.machines[&NodeIndex(1)].involves(NodeIndex(4)));
    }
    let mut post = setups::<Secp256k1>(1, &members[..2]);
    post.mail.retain(|letter| letter.from != NodeIndex(2));
    post.settle(|_| 0);
    assert_eq!(post.machines[&NodeIndex(1)].missing(), [NodeIndex(2)]);
    assert!(post.done.is_empty());
}

#[test]
fn messages_of_another_run_have_no_effect() {
    let cluster = Cluster::<Secp256k1>::new(2, &indices(&[1, 2]));
    let (this, other) = (run(0, &indices(&[1, 2])), run(1, &indices(&[1, 2])));
    let mut post = cluster.runs(&this);
    let mut strange = cluster.runs(&other);
    let machine = post.machines.get_mut(&NodeIndex(1)).unwrap();
    let good = strange.mail.iter().find(|l| l.to == NodeIndex(1)).unwrap().bytes.clone();
    assert_eq!(machine.receive(NodeIndex(2), &good).unwrap_err(), EcdsaError::OtherRun);
    // Its own message, one for another, one of a node that takes no part, one under another name, none at all.
    let ours = post.mail.iter().find(|l| l.to == NodeIndex(1)).unwrap().bytes.clone();
    assert_eq!(machine.receive(NodeIndex(3), &ours).unwrap_err(), EcdsaError::Sender { peer: NodeIndex(3), claimed: NodeIndex(2) });
    let theirs = post.mail.iter().find(|l| l.to == NodeIndex(2)).unwrap().bytes.clone();
    assert_eq!(machine.receive(NodeIndex(1), &theirs).unwrap_err(), EcdsaError::NotForUs { to: NodeIndex(2) });
    let mut stranger = ours.clone();
    stranger[48..50].copy_from_slice(&[0, 3]);
    assert_eq!(machine.receive(NodeIndex(3), &stranger).unwrap_err(), EcdsaError::Stranger(NodeIndex(3)));
    let mut to_self = ours.clone();
    to_self[48..50].copy_from_slice(&[0, 1]);
    assert_eq!(machine.receive(NodeIndex(1), &to_self).unwrap_err(), EcdsaError::Stranger(NodeIndex(1)));
    for bad in [&[][..], &ours[..60], &[ours.clone(), vec![0]].concat()] {
        let error = machine.receive(NodeIndex(2), bad).unwrap_err();
        assert!(matches!(error, EcdsaError::Envelope(_)) && !error.ends_run(), "{error}");
    }
    let mut no_round = ours.clone();
    no_round[47] = 4;
    assert!(matches!(machine.receive(NodeIndex(2), &no_round).unwrap_err(), EcdsaError::Envelope(_)));
    // After all that both runs still end well.
    post.settle(|_| 0);
    cluster.assert_signed(&post);
    strange.settle(|_| 0);
    cluster.assert_signed(&strange);
    // And an ended one says so.
    let letter = Letter { from: NodeIndex(2), to: NodeIndex(1), bytes: ours };
    assert_eq!(post.deliver(&letter).unwrap_err(), EcdsaError::Ended);
}

#[test]
fn another_digest_or_setup_is_a_mismatch_and_not_cheating() {
    let members = indices(&[1, 2]);
    let cluster = Cluster::<Secp256k1>::new(2, &members);
    let run = run(0, &indices(&[1, 2]));
    let other_digest = [0xee; 32];
    let begun = [(NodeIndex(1), DIGEST), (NodeIndex(2), other_digest)];
    let mut post = Post::new(begun.map(|(i, digest)| (i, cluster.begin(i, &run, digest).unwrap())));
    post.settle(|_| 0);
    assert_eq!(post.errors, [(NodeIndex(2), EcdsaError::Mismatch(NodeIndex(1))), (NodeIndex(1), EcdsaError::Mismatch(NodeIndex(2)))]);
    assert!(post.errors.iter().all(|(_, e)| e.ends_run() && e.must_expel().is_none()));
    // One of them has redone the setup alone.
    let redone = set_up::<Secp256k1>(&members);
    let one = Dkls23::sign(&cluster.shares[&NodeIndex(1)], &redone[&NodeIndex(1)], &run, DIGEST).unwrap();
    let two = cluster.begin(NodeIndex(2), &run, DIGEST).unwrap();
    let mut post = Post::new([(NodeIndex(1), one), (NodeIndex(2), two)]);
    post.settle(|_| 0);
    let pair = [(NodeIndex(2), EcdsaError::OtherPair(NodeIndex(1))), (NodeIndex(1), EcdsaError::OtherPair(NodeIndex(2)))];
    assert_eq!(post.errors, pair);
    assert!(post.errors.iter().all(|(_, e)| e.ends_run() && e.must_expel().is_none() && e.culprit().is_none()));
    assert!(post.done.is_empty());
}

/// The letter of that round from 2 to 1, changed.
fn tampered(cluster: &Cluster<Secp256k1>, attempt: u32, round: u8, change: impl FnOnce(&mut Vec<u8>)) -> Post<Signing<Secp256k1>> {
    let mut post = cluster.runs(&run(attempt, &indices(&[1, 2])));
    let mut change = Some(change);
    while let Some(mut letter) = post.mail.pop_front() {
        if letter.from == NodeIndex(2)
            && letter.bytes[47] == round
            && let Some(change) = change.take()
        {
            change(&mut letter.bytes);
        }
        let _ = post.deliver(&letter);
    }
    post
}

/// Bytes of an envelope before its body.
const HEAD: usize = 14 + 1 + 32 + 1 + 2 + 2 + 4;

#[test]
fn flipped_bits_give_typed_errors_and_never_a_bad_signature() {
    let cluster = Cluster::<Secp256k1>::new(2, &indices(&[1, 2]));
    let mut place = places(7);
    let mut seen = std::collections::BTreeSet::new();
    for attempt in 0..36u32 {
        let round = u8::try_from(attempt % 3 + 1).unwrap();
        let mut at = 0;
        let post = tampered(&cluster, attempt, round, |bytes| {
            // The first ones at the body's head, where lengths and parties are.
            let head = if round == 1 { HEAD + 32 } else { HEAD };
            at = if attempt < 12 { head + usize::try_from(attempt).unwrap() / 3 } else { place(bytes.len()) };
            bytes[at] ^= 1 << place(8);
        });
        assert!(!post.done.contains_key(&NodeIndex(1)), "round {round}, byte {at}");
        let (_, error) = post.errors.iter().find(|(i, _)| *i == NodeIndex(1)).expect("the receiver notices");
        seen.insert(error.to_string().split([':', ' ']).next().unwrap_or_default().to_owned());
        // The other end has no signature either, or a right one.
        if let Some(signature) = post.done.get(&NodeIndex(2)) {
            assert!(Secp256k1::verify(&cluster.public_key(), &DIGEST, signature));
        }
    }
    assert!(seen.len() >= 3, "{seen:?}");
}

#[test]
fn cheating_in_the_transfer_expels() {
    let mut cluster = Cluster::<Secp256k1>::new(2, &indices(&[1, 2, 3]));
    // A bit of the extension's matrix u: after pair(32), parties(2), binding(32), commitment(32), nonce(32) and a length.
    let post = tampered(&cluster, 0, 1, |bytes| bytes[HEAD + 32 + 2 + 96 + 100] ^= 1);
    let (_, error) = post.errors.iter().find(|(i, _)| *i == NodeIndex(1)).unwrap();
    assert!(matches!(error, EcdsaError::Cheated { .. }), "{error}");
    assert_eq!((error.must_expel(), error.culprit(), error.ends_run()), (Some(NodeIndex(2)), Some(NodeIndex(2)), true));
    // A scalar of the multiplication's answer, near its end.
    let post = tampered(&cluster, 1, 2, |bytes| {
        let at = bytes.len() - 40;
        bytes[at] ^= 1;
    });
    let (_, error) = post.errors.iter().find(|(i, _)| *i == NodeIndex(1)).unwrap();
    assert_eq!(error.must_expel(), Some(NodeIndex(2)), "{error}");
    // Its last message: nobody can be named, no signature.
    let post = tampered(&cluster, 2, 3, |bytes| bytes[HEAD + 5] ^= 1);
    assert_eq!(post.errors, [(NodeIndex(1), EcdsaError::BadSignature)]);

    // The peer is expelled: no run with it, runs with others go on. After a restart from sealed bytes the secrets with it are gone.
    let pairwise = cluster.pairwise.get_mut(&NodeIndex(1)).unwrap();
    assert!(pairwise.expel(NodeIndex(2)) && !pairwise.expel(NodeIndex(2)));
    assert_eq!((pairwise.expelled(), pairwise.missing()), (vec![NodeIndex(2)], vec![]));
    let restarted = Pairwise::from_secret(&pairwise.to_secret().unwrap()).unwrap();
    assert_eq!((restarted.expelled(), restarted.missing()), (vec![], vec![NodeIndex(2)]));
    let begun = |cluster: &Cluster<Secp256k1>| cluster.begin(NodeIndex(1), &run(3, &indices(&[1, 2])), DIGEST).unwrap_err();
    assert_eq!(begun(&cluster), EcdsaError::Expelled(NodeIndex(2)));
    cluster.pairwise.insert(NodeIndex(1), restarted);
    assert_eq!(begun(&cluster), EcdsaError::NoPair(NodeIndex(2)));
    let mut post = cluster.runs(&run(4, &indices(&[1, 3])));
    post.settle(|_| 0);
    cluster.assert_signed(&post);
}

#[test]
fn pairwise_state_survives_at_rest_and_only_as_itself() {
    let mut cluster = Cluster::<Secp256k1>::new(2, &indices(&[1, 3]));
    let one = NodeIndex(1);
    let sealed = cluster.pairwise[&one].to_secret().unwrap();
    let digest = cluster.pairwise[&one].digest();
    let opened = Pairwise::<Secp256k1>::from_secret(&sealed).unwrap();
    assert_eq!((opened.digest(), opened.index(), opened.members()), (digest, one, &indices(&[1, 3])[..]));
    assert_eq!(opened.to_secret().unwrap(), sealed);
    cluster.pairwise.insert(one, opened);
    let mut post = cluster.runs(&run(0, &indices(&[1, 3])));
    post.settle(|_| 0);
    cluster.assert_signed(&post);

    let bytes = sealed.expose(<[u8]>::to_vec);
    assert!(bytes.starts_with(b"DKMS-V1-PAIRS\x01\x00\x09secp256k1"));
    let open = |bytes: Vec<u8>| Pairwise::<Secp256k1>::from_secret(&dstack_secret::SecretBytes::take(bytes));
    assert!(matches!(Pairwise::<NistP256>::from_secret(&sealed), Err(EcdsaError::State(_))), "another group");
    assert!(open([bytes.clone(), vec![0]].concat()).is_err());
    for cut in (0..bytes.len()).step_by(997) {
        assert!(matches!(open(bytes[..cut].to_vec()), Err(EcdsaError::State(_))), "{cut}");
    }
    // Version, this holder's index, a member.
    for at in [13, 13 + 1 + 2 + 9 + 64 + 1, 13 + 1 + 2 + 9 + 64 + 2 + 2] {
        let mut bad = bytes.clone();
        bad[at] ^= 0x40;
        assert!(matches!(open(bad), Err(EcdsaError::State(_))), "{at}");
    }
    assert_eq!(format!("{:?}", cluster.pairwise[&one]), format!("Pairwise {{ me: {one:?}, members: {:?}, .. }}", indices(&[1, 3])));
}

#[test]
fn a_faulty_first_message_names_its_author() {
    let two = indices(&[1, 2]);
    let begin = |index: u16| Setup::<Secp256k1>::begin([1; 32], NodeIndex(index), &two).unwrap();
    let (_, send) = begin(2);
    let good = send[0].bytes.expose(<[u8]>::to_vec);
    type Change = fn(&mut Vec<u8>);
    let faults: [Change; 3] = [
        // A response in the proof of the base OT key.
        |bytes| bytes[HEAD + 32 + 34 + 1 + 64 * 34 + 1 + 6] ^= 1,
        // The proof of a base OT choice.
        |bytes| {
            let at = bytes.len() - 33;
            bytes[at] ^= 1;
        },
        // The seed that all choices are proved under.
        |bytes| {
            let at = bytes.len() - 1;
            bytes[at] ^= 1;
        },
    ];
    for change in faults {
        let mut bytes = good.clone();
        change(&mut bytes);
        let (mut one, _) = begin(1);
        let error = one.receive(NodeIndex(2), &bytes).unwrap_err();
        assert!(matches!(error, EcdsaError::SetupFault { peer: NodeIndex(2), .. }) && error.ends_run(), "{error}");
        assert_eq!(one.receive(NodeIndex(2), &good).unwrap_err(), EcdsaError::Ended);
    }
    // A point that is none.
    let mut bytes = good;
    bytes[HEAD + 32 + 1] = 7;
    let (mut one, _) = begin(1);
    assert!(matches!(one.receive(NodeIndex(2), &bytes).unwrap_err(), EcdsaError::Malformed { peer: NodeIndex(2), .. }));
}

#[test]
fn a_faulty_second_message_names_its_author() {
    // The second letter from 2 to 1, changed; what node 1 says.
    let among = |members: &[NodeIndex], change: &dyn Fn(&mut Vec<u8>)| {
        let mut post = setups::<Secp256k1>(1, members);
        while let Some(mut letter) = post.mail.pop_front() {
            if letter.from == NodeIndex(2) && letter.to == NodeIndex(1) && letter.bytes[47] == 2 {
                change(&mut letter.bytes);
            }
            let _ = post.deliver(&letter);
        }
        assert!(!post.done.contains_key(&NodeIndex(1)));
        let (_, error) = post.errors.into_iter().find(|(i, _)| *i == NodeIndex(1)).expect("node 1 notices");
        assert!(error.ends_run(), "{error}");
        error
    };
    let two = indices(&[1, 2]);
    // Another seed than the committed one.
    let error = among(&two, &|bytes| bytes[HEAD] ^= 1);
    assert_eq!(error, EcdsaError::SetupFault { peer: NodeIndex(2), reason: "the opened seed is not the committed one" });
    // Node 2 states another transcript with node 1, then another one with node 3.
    let error = among(&two, &|bytes| bytes[HEAD + 96 + 2 + 2] ^= 1);
    assert_eq!(error, EcdsaError::SetupFault { peer: NodeIndex(2), reason: "it saw other first messages than were sent" });
    let error = among(&indices(&[1, 2, 3]), &|bytes| bytes[HEAD + 96 + 2 + 34 + 2] ^= 1);
    assert_eq!(error, EcdsaError::SetupDiffers(NodeIndex(2), NodeIndex(3)));
}

#[test]
fn runs_and_setups_that_cannot_be_are_refused() {
    let members = indices(&[1, 2, 3]);
    let cluster = Cluster::<Secp256k1>::new(2, &members);
    let begin = |index: u16, signers: &[u16]| cluster.begin(NodeIndex(index), &run(0, &indices(signers)), DIGEST).unwrap_err();
    assert_eq!(begin(1, &[1, 2, 3]), EcdsaError::Signers { threshold: 2, got: 3 });
    assert_eq!(begin(1, &[1, 4]), EcdsaError::Signers { threshold: 2, got: 2 });
    assert_eq!(begin(1, &[2, 3]), EcdsaError::NotAMember(NodeIndex(1)));
    let stolen = Dkls23::sign(&cluster.shares[&NodeIndex(1)], &cluster.pairwise[&NodeIndex(2)], &run(0, &indices(&[1, 2])), DIGEST);
    assert_eq!(stolen.unwrap_err(), EcdsaError::OtherHolders);
    let setup = |index: u16, members: &[u16]| Setup::<Secp256k1>::begin([0; 32], NodeIndex(index), &indices(members)).unwrap_err();
    assert_eq!(setup(1, &[1]), EcdsaError::Members);
    assert_eq!(setup(1, &[2, 1]), EcdsaError::Members);
    assert_eq!(setup(1, &[0, 1]), EcdsaError::Members);
    assert_eq!(setup(1, &[1, 0x8000]), EcdsaError::Members);
    assert_eq!(setup(4, &[1, 2]), EcdsaError::NotAMember(NodeIndex(4)));
}

#[test]
fn any_bytes_to_a_machine_are_refused_and_change_nothing() {
    let cluster = Cluster::<Secp256k1>::new(2, &indices(&[1, 2]));
    let run = run(0, &indices(&[1, 2]));
    let mut post = cluster.runs(&run);
    let mut setup = setups::<Secp256k1>(2, &indices(&[1, 2]));
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(2000));
    let machine = std::cell::RefCell::new(post.machines.remove(&NodeIndex(1)).unwrap());
    let other = std::cell::RefCell::new(setup.machines.remove(&NodeIndex(1)).unwrap());
    runner
        .run(&(any::<u16>(), prop::collection::vec(any::<u8>(), 0..300)), |(from, bytes)| {
            let error = machine.borrow_mut().receive(NodeIndex(from), &bytes).unwrap_err();
            prop_assert!(!error.ends_run());
            let error = other.borrow_mut().receive(NodeIndex(from), &bytes).unwrap_err();
            prop_assert!(!error.ends_run());
            Ok(())
        })
        .unwrap();
    post.machines.insert(NodeIndex(1), machine.into_inner());
    post.settle(|_| 0);
    cluster.assert_signed(&post);
}
