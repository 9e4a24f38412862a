//! A pair's secrets made anew between its two ends (ADR 0029).

use super::*;

#[test]
fn a_lost_pair_is_made_anew_between_its_two_ends() {
    // Node 300 lost what it had; the third holder takes no part, and its pairs stay as they are.
    let members = indices(&[2, 300, 0x7fff]);
    let mut cluster = Cluster::<Secp256k1>::new(2, &members);
    let inst = cluster.pairwise[&NodeIndex(2)].inst();
    cluster.pairwise.insert(NodeIndex(300), Pairwise::lost(inst, NodeIndex(300), &members).unwrap());
    let lost = &cluster.pairwise[&NodeIndex(300)];
    assert_eq!(lost.missing(), indices(&[2, 0x7fff]));
    for peer in [2, 0x7fff] {
        let pair = if peer < 300 { [peer, 300] } else { [300, peer] };
        let error = cluster.begin(NodeIndex(300), &run(0, &indices(&pair)), DIGEST).unwrap_err();
        assert_eq!(error, EcdsaError::NoPair(NodeIndex(peer)));
    }
    let mut redone = setups::<Secp256k1>(0x44, &indices(&[2, 300]));
    redone.settle(|_| 0);
    assert_eq!(redone.errors, []);
    let of = |redone: &mut Post<Setup<Secp256k1>>, i: u16| redone.done.remove(&NodeIndex(i)).unwrap();
    assert_eq!(cluster.pairwise.get_mut(&NodeIndex(300)).unwrap().adopt(of(&mut redone, 300)), Ok(NodeIndex(2)));

    // Between the two moments the one has new secrets and the other old ones: noticed before any is used.
    let begun = [2, 300].map(|i| (NodeIndex(i), cluster.begin(NodeIndex(i), &run(1, &indices(&[2, 300])), DIGEST).unwrap()));
    let mut post = Post::new(begun);
    post.settle(|_| 0);
    assert!(post.done.is_empty() && post.errors.iter().all(|(_, error)| error.must_redo().is_some()), "{:?}", post.errors);

    assert_eq!(cluster.pairwise.get_mut(&NodeIndex(2)).unwrap().adopt(of(&mut redone, 2)), Ok(NodeIndex(300)));
    assert_eq!(cluster.pairwise[&NodeIndex(300)].missing(), indices(&[0x7fff]));
    for (attempt, pair) in [[2, 300], [2, 0x7fff]].into_iter().enumerate() {
        let mut post = cluster.runs(&run(2 + u32::try_from(attempt).unwrap(), &indices(&pair)));
        post.settle(|_| 0);
        assert_eq!(post.errors, []);
        cluster.assert_signed(&post);
    }
    // At rest too, with the pair that is still missing.
    let again = Pairwise::from_secret(&cluster.pairwise[&NodeIndex(300)].to_secret().unwrap()).unwrap();
    assert_eq!(again.missing(), indices(&[0x7fff]));
    cluster.pairwise.insert(NodeIndex(300), again);
    let mut post = cluster.runs(&run(4, &indices(&[2, 300])));
    post.settle(|_| 0);
    cluster.assert_signed(&post);

    // Not of these two, of more than two, with one that is expelled.
    let mut three = set_up::<Secp256k1>(&members);
    let mut foreign = set_up::<Secp256k1>(&indices(&[2, 9]));
    let two = cluster.pairwise.get_mut(&NodeIndex(2)).unwrap();
    assert_eq!(two.adopt(three.remove(&NodeIndex(2)).unwrap()).unwrap_err(), EcdsaError::OtherHolders);
    assert_eq!(two.adopt(foreign.remove(&NodeIndex(9)).unwrap()).unwrap_err(), EcdsaError::OtherHolders);
    assert_eq!(two.adopt(foreign.remove(&NodeIndex(2)).unwrap()).unwrap_err(), EcdsaError::OtherHolders);
    assert!(two.expel(NodeIndex(300)) && !two.expel(NodeIndex(2)) && !two.expel(NodeIndex(9)));
    let mut again = set_up::<Secp256k1>(&indices(&[2, 300]));
    assert_eq!(two.adopt(again.remove(&NodeIndex(2)).unwrap()).unwrap_err(), EcdsaError::Expelled(NodeIndex(300)));
    assert!(two.missing().is_empty());
}
