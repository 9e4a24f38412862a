//! RFC 9591's vectors, every subset of signers, and every way to go wrong.

use std::sync::Arc;

use dstack_protocol::{ClusterId, Epoch, Generation, RootTag};
use dstack_secret::Locked;
use proptest::prelude::*;

use super::*;
use crate::group::SecretScalar;
use crate::shamir::Polynomial;
use crate::sign::Scope;
use crate::testing::{scalar, subsets};

const TBS: &[u8] = b"to be signed";
const SCOPE: Scope = Scope { cluster_id: ClusterId([0x51; 32]), generation: Generation(0), root: RootTag::Ca, epoch: Epoch(1), attempt: 0 };

fn shares(t: u16, indices: &[u16]) -> Vec<RootShare<Edwards25519>> {
    let mut counter = 0;
    let polynomial = Polynomial::<Edwards25519>::deal(t, || {
        counter += 1;
        scalar(b"frost", counter)
    });
    let pk = Edwards25519::encode(&polynomial.commit().constant());
    let secrets: Vec<SecretScalar<Edwards25519>> = indices.iter().map(|i| polynomial.eval(NodeIndex(*i))).collect();
    let vks: Vec<_> = indices.iter().zip(&secrets).map(|(i, s)| (NodeIndex(*i), Edwards25519::encode(&s.public()).to_vec())).collect();
    let holders = Arc::new(Holders::new(t, &pk, &vks).unwrap());
    let locked = secrets.iter().map(|s| Locked::new(s.to_secret()));
    indices.iter().zip(locked).map(|(i, s)| RootShare::new(NodeIndex(*i), Arc::clone(&holders), s).unwrap()).collect()
}

fn rng(label: u64) -> Secret<64> {
    Secret::from_fn(|b| *b = dstack_protocol::codec::sha512(&[b"frost rng", &label.to_be_bytes()]))
}

fn run(scope: &Scope, signers: &[NodeIndex]) -> Run {
    Run::new(scope, tbs_digest(TBS), signers).unwrap()
}

/// Nonces and commitments of each signer.
type Committed = (Vec<Nonces>, Vec<(NodeIndex, Vec<u8>)>);

fn committed(signers: &[&RootShare<Edwards25519>], run: &Run, salt: u64) -> Committed {
    let one = |share: &&RootShare<Edwards25519>| {
        let (nonces, bytes) = commit(share, run, rng(u64::from(share.index().0) + salt)).unwrap();
        (nonces, (share.index(), bytes))
    };
    signers.iter().map(one).unzip()
}

fn signed(signers: &[&RootShare<Edwards25519>], run: &Run, message: &[u8]) -> (Vec<u8>, Vec<(NodeIndex, Vec<u8>)>) {
    let (nonces, commitments) = committed(signers, run, 0);
    let package = package(run, &commitments).unwrap();
    let one =
        |(share, nonces): (&&RootShare<Edwards25519>, Nonces)| (share.index(), sign_share(share, nonces, run, message, &package).unwrap());
    let shares = signers.iter().zip(nonces).map(one).collect();
    (package, shares)
}

#[test]
fn the_vectors_of_rfc_9591() {
    // Appendix E.1: signers 1 and 3 of 3, threshold 2, message "test".
    let bytes = |text: &str| -> [u8; 32] { hex::decode(text).unwrap().try_into().unwrap() };
    let secret = |text: &str| SecretScalar::<Edwards25519>::from_secret(&Secret::take(&mut bytes(text))).unwrap();
    let keys = [
        "929dcc590407aae7d388761cddb0c0db6f5627aea8e217f4a033f2ec83d93509",
        "a91e66e012e4364ac9aaa405fcafd370402d9859f7b6685c07eed76bf409e80d",
        "d3cb090a075eb154e82fdb4b3cb507f110040905468bb9c46da8bdea643a9a02",
    ]
    .map(secret);
    let vks: Vec<_> = (1..).zip(&keys).map(|(i, s)| (NodeIndex(i), Edwards25519::encode(&s.public()).to_vec())).collect();
    let pk = bytes("15d21ccd7ee42959562fc8aa63224c8851fb3ec85a3faf66040d380fb9738673");
    let holders = Arc::new(Holders::new(2, &pk, &vks).unwrap());
    let share = |i: u16| {
        let locked = Locked::new(keys[usize::from(i) - 1].to_secret());
        RootShare::new(NodeIndex(i), Arc::clone(&holders), locked).unwrap()
    };
    let message = b"test";
    let run = Run::new(&SCOPE, tbs_digest(message), &[NodeIndex(1), NodeIndex(3)]).unwrap();
    let randomness = |hiding: &str, binding: &str| Secret::<64>::from_fn(|b| b.copy_from_slice(&[bytes(hiding), bytes(binding)].concat()));
    let first = share(1);
    let third = share(3);
    let (nonces_1, commitments_1) = commit(
        &first,
        &run,
        randomness(
            "06894e04ee4aceec8619d5f6a0a180e2f47194d2ac306cba586b555e7c48d765",
            "40d6f879ff22e22409f7d808fed81f37118e7d3e4af71c0f44c60207553bcbce",
        ),
    )
    .unwrap();
    let (nonces_3, commitments_3) = commit(
        &third,
        &run,
        randomness(
            "fa5d950626782aade9e33fa781376d4888c2d1de7c37518bc248eb818ed0cdde",
            "7459a4d14ded0e365b085271be8dc6600d5b88f3978a2174297ffa32001a5afc",
        ),
    )
    .unwrap();
    // Our layout: label, version, sign_id, index, then the RFC's two encodings.
    assert_eq!(
        hex::encode(&commitments_1),
        [
            &hex::encode("DKMS-V1-FROSTC"),
            "01",
            &hex::encode(run.id()),
            "0001",
            "9b116f12589591a7e23fe8048059ab10ab48e67739e7a2fb3890f61a7999478c",
            "c39b66b7dfccb122da24f13587f9a08c4347cae70046ca15169adf90ba65854d",
        ]
        .concat()
    );
    assert_eq!(
        hex::encode(&commitments_3[49..]),
        "e679a2a971748ccfaabead4dbe8ac1def61275c186c79d471e1e45091ad1e687b2a942478453fabb6bd3181c56ba657413447b4136e1daea2484d396d1a516b3"
    );
    let package = package(&run, &[(NodeIndex(1), commitments_1), (NodeIndex(3), commitments_3)]).unwrap();
    let share_1 = sign_share(&first, nonces_1, &run, message, &package).unwrap();
    let share_3 = sign_share(&third, nonces_3, &run, message, &package).unwrap();
    assert_eq!(hex::encode(&share_1[49..]), "60997f0142e43e8005027fe5ab7447dac00d22c2d7ddd9571a02613ba7d81c08");
    assert_eq!(hex::encode(&share_3[49..]), "79390e78bc59699c7af831f8f5fb478ec871a85f561a8641b5670ac4443f720f");
    let signature = aggregate(&holders, &run, message, &package, &[(NodeIndex(1), share_1), (NodeIndex(3), share_3)]).unwrap();
    assert_eq!(
        hex::encode(signature),
        "154fb694ee7fcb37bf2381d94488c2a84b03b3352ad085feca81ad26d45852b7ecfe971ce4da95c4a95db93ac376b053897fca212ef85f99cf696bffeb178f07"
    );
}

#[test]
fn every_t_holders_sign_under_one_key() {
    for (t, n) in [(2, 3), (3, 5), (5, 9)] {
        let indices: Vec<u16> = (1..=n).collect();
        let all = shares(t, &indices);
        let pk: [u8; 32] = all[0].holders().public_key().try_into().unwrap();
        for set in subsets(n, t) {
            let signers: Vec<_> = set.iter().map(|i| &all[usize::from(i.0) - 1]).collect();
            let run = run(&SCOPE, &set);
            let (package, shares) = signed(&signers, &run, TBS);
            let signature = aggregate(all[0].holders(), &run, TBS, &package, &shares).unwrap();
            assert!(message::verify(&pk, TBS, &signature), "{t}/{n} {set:?}");
        }
    }
}

#[test]
fn indices_need_not_be_small_or_dense() {
    let all = shares(2, &[7, 0x0100, 0x7fff]);
    let set = [NodeIndex(7), NodeIndex(0x7fff)];
    let run = run(&SCOPE, &set);
    let (package, shares) = signed(&[&all[0], &all[2]], &run, TBS);
    assert!(aggregate(all[0].holders(), &run, TBS, &package, &shares).is_ok());
}

#[test]
fn a_wrong_share_names_its_author() {
    let all = shares(3, &[1, 2, 3, 4, 5]);
    let set = [NodeIndex(1), NodeIndex(3), NodeIndex(5)];
    let run = run(&SCOPE, &set);
    let signers = [&all[0], &all[2], &all[4]];
    let (package, good) = signed(&signers, &run, TBS);
    for place in 0..3 {
        let mut shares = good.clone();
        shares[place].1[50] ^= 1;
        let error = aggregate(all[0].holders(), &run, TBS, &package, &shares).unwrap_err();
        assert_eq!((error.culprit(), error), (Some(set[place]), FrostError::BadShare(set[place])));
        shares[place].1[49..].fill(0xff);
        let error = aggregate(all[0].holders(), &run, TBS, &package, &shares).unwrap_err();
        assert!(matches!(error, FrostError::Malformed { .. }) && error.culprit() == Some(set[place]), "{error}");
    }
    // Of two signers, swapped: each sent the other's message.
    let mut shares = good.clone();
    shares[0].1 = good[1].1.clone();
    let error = aggregate(all[0].holders(), &run, TBS, &package, &shares).unwrap_err();
    assert_eq!(error, FrostError::Sender { peer: NodeIndex(1), claimed: NodeIndex(3) });
    // Missing, repeated, of a stranger.
    assert_eq!(aggregate(all[0].holders(), &run, TBS, &package, &good[1..]).unwrap_err(), FrostError::Missing(NodeIndex(1)));
    shares = good.clone();
    shares.push(good[2].clone());
    assert_eq!(aggregate(all[0].holders(), &run, TBS, &package, &shares).unwrap_err(), FrostError::Duplicate(NodeIndex(5)));
}

#[test]
fn replaced_commitments_are_noticed() {
    let all = shares(2, &[1, 2, 3]);
    let run = run(&SCOPE, &[NodeIndex(1), NodeIndex(2)]);
    let signers = [&all[0], &all[1]];
    let (mut nonces, commitments) = committed(&signers, &run, 0);
    let (_, others) = committed(&signers, &run, 1000);
    // The coordinator shows node 1 other commitments of node 1.
    let swapped = package(&run, &[others[0].clone(), commitments[1].clone()]).unwrap();
    let error = sign_share(&all[0], nonces.remove(0), &run, TBS, &swapped).unwrap_err();
    assert_eq!(error, FrostError::CommitmentReplaced);
    // It shows node 2 what it will not aggregate with: the shares do not fit, and no signature comes out.
    let (nonces, _) = committed(&signers, &run, 0);
    let honest = package(&run, &commitments).unwrap();
    let lied = package(&run, &[others[0].clone(), commitments[1].clone()]).unwrap();
    let packages = [&honest, &lied];
    let shares: Vec<_> = signers
        .iter()
        .zip(nonces)
        .zip(packages)
        .map(|((share, nonces), package)| (share.index(), sign_share(share, nonces, &run, TBS, package).unwrap()))
        .collect();
    assert_eq!(aggregate(all[0].holders(), &run, TBS, &honest, &shares).unwrap_err(), FrostError::BadShare(NodeIndex(2)));
}

#[test]
fn messages_of_another_run_are_refused() {
    let all = shares(2, &[1, 2, 3]);
    let set = [NodeIndex(1), NodeIndex(2)];
    let signers = [&all[0], &all[1]];
    let this = run(&SCOPE, &set);
    let other = run(&Scope { attempt: 1, ..SCOPE }, &set);
    let (mut nonces, commitments) = committed(&signers, &this, 0);
    let (mut other_nonces, other_commitments) = committed(&signers, &other, 5);
    assert_eq!(package(&this, &other_commitments).unwrap_err(), FrostError::OtherRun);
    let here = package(&this, &commitments).unwrap();
    let there = package(&other, &other_commitments).unwrap();
    // Nonces of one run serve no other one.
    assert_eq!(sign_share(&all[0], other_nonces.remove(0), &this, TBS, &here).unwrap_err(), FrostError::OtherNonces);
    assert_eq!(sign_share(&all[0], nonces.remove(0), &this, TBS, &there).unwrap_err(), FrostError::OtherRun);
    // Another message than the one the run is bound to.
    assert_eq!(sign_share(&all[1], nonces.remove(0), &this, b"another", &here).unwrap_err(), FrostError::Message);
    assert_eq!(aggregate(all[0].holders(), &this, b"another", &here, &[]).unwrap_err(), FrostError::Message);
    // Signature shares of one run in another.
    let (package, shares) = signed(&signers, &this, TBS);
    let (_, other_shares) = signed(&signers, &other, TBS);
    assert_eq!(aggregate(all[0].holders(), &this, TBS, &package, &other_shares).unwrap_err(), FrostError::OtherRun);
    assert_eq!(aggregate(all[0].holders(), &other, TBS, &package, &shares).unwrap_err(), FrostError::OtherRun);
}

#[test]
fn the_signers_are_exactly_t_holders() {
    let all = shares(2, &[1, 2, 3]);
    let three = run(&SCOPE, &[NodeIndex(1), NodeIndex(2), NodeIndex(3)]);
    let refused = FrostError::Signers { threshold: 2, got: 3 };
    assert_eq!(commit(&all[0], &three, rng(0)).unwrap_err(), refused);
    assert_eq!(aggregate(all[0].holders(), &three, TBS, &[], &[]).unwrap_err(), refused);
    let stranger = run(&SCOPE, &[NodeIndex(1), NodeIndex(4)]);
    assert_eq!(commit(&all[0], &stranger, rng(0)).unwrap_err(), FrostError::Signers { threshold: 2, got: 2 });
    let others = run(&SCOPE, &[NodeIndex(2), NodeIndex(3)]);
    assert_eq!(commit(&all[0], &others, rng(0)).unwrap_err(), FrostError::NotASigner(NodeIndex(1)));
    // A package without one of the signers.
    let two = run(&SCOPE, &[NodeIndex(1), NodeIndex(2)]);
    let (mut nonces, commitments) = committed(&[&all[0], &all[1]], &two, 0);
    assert_eq!(package(&two, &commitments[..1]).unwrap_err(), FrostError::Missing(NodeIndex(2)));
    let mut short = Package::decode(&package(&two, &commitments).unwrap()).unwrap();
    short.commitments.pop();
    assert_eq!(sign_share(&all[0], nonces.remove(0), &two, TBS, &short.encode()).unwrap_err(), FrostError::PackageSigners);
}

#[test]
fn nonces_differ_per_randomness_and_print_nothing() {
    let all = shares(2, &[1, 2, 3]);
    let run = run(&SCOPE, &[NodeIndex(1), NodeIndex(2)]);
    let (nonces, one) = commit(&all[0], &run, rng(1)).unwrap();
    assert_ne!(one, commit(&all[0], &run, rng(2)).unwrap().1);
    assert_eq!(one, commit(&all[0], &run, rng(1)).unwrap().1);
    assert_eq!(format!("{nonces:?}"), "Nonces { index: NodeIndex(1), .. }");
    assert_eq!(format!("{:?}", all[0]), "RootShare { group: \"edwards25519\", index: NodeIndex(1), .. }");
}

/// `fn(Nonces)` twice would not compile: the value is moved and has no `Clone`.
#[test]
fn trailing_bytes_identities_and_small_orders_are_refused() {
    let all = shares(2, &[1, 2, 3]);
    let run = run(&SCOPE, &[NodeIndex(1), NodeIndex(2)]);
    let (_, good) = commit(&all[0], &run, rng(1)).unwrap();
    assert_eq!(Commitments::decode(&good).unwrap().encode(), good);
    let mut long = good.clone();
    long.push(0);
    assert!(matches!(Commitments::decode(&long), Err(DecodeError::TooLong { .. })));
    let mut identity = [0; 32];
    identity[0] = 1;
    let mut order_two = [0xff; 32];
    (order_two[0], order_two[31]) = (0xec, 0x7f);
    for bad in [identity, order_two, [0xff; 32]] {
        let mut bytes = good.clone();
        bytes[49..81].copy_from_slice(&bad);
        let error = package(&run, &[(NodeIndex(1), bytes)]).unwrap_err();
        assert_eq!(error.culprit(), Some(NodeIndex(1)));
    }
}

proptest! {
    #[test]
    fn any_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), index in any::<u16>()) {
        let all = shares(2, &[1, 2, 3]);
        let run = run(&SCOPE, &[NodeIndex(1), NodeIndex(2)]);
        let peer = NodeIndex(index);
        prop_assert!(package(&run, &[(peer, bytes.clone())]).is_err());
        let (nonces, _) = commit(&all[0], &run, rng(1)).unwrap();
        prop_assert!(sign_share(&all[0], nonces, &run, TBS, &bytes).is_err());
        let refused = aggregate(all[0].holders(), &run, TBS, &bytes, &[(peer, bytes.clone())]).is_err();
        prop_assert!(refused);
    }

    #[test]
    fn any_flipped_bit_gives_an_error_and_no_signature(place in 0usize..1000, bit in 0u8..8) {
        let all = shares(2, &[1, 2, 3]);
        let run = run(&SCOPE, &[NodeIndex(1), NodeIndex(2)]);
        let (mut package, mut shares) = signed(&[&all[0], &all[1]], &run, TBS);
        // One of the three messages, at any place.
        let lengths = [package.len(), shares[0].1.len(), shares[1].1.len()];
        let mut at = place % lengths.iter().sum::<usize>();
        if at < lengths[0] {
            package[at] ^= 1 << bit;
        } else if at - lengths[0] < lengths[1] {
            at -= lengths[0];
            shares[0].1[at] ^= 1 << bit;
        } else {
            at -= lengths[0] + lengths[1];
            shares[1].1[at] ^= 1 << bit;
        }
        prop_assert!(aggregate(all[0].holders(), &run, TBS, &package, &shares).is_err());
    }
}
