//! The groups of roots `ca` and `id`: known answers, proofs of possession by other code, complaints.

use sha2::{Digest as _, Sha256, Sha512};
use shamir_secret_sharing::num_bigint::BigUint;

use super::*;

/// `H_s` of one group, by other code than ours; canonical encoding.
type Challenge = fn(&[u8]) -> [u8; 32];

fn of_edwards25519(message: &[u8]) -> [u8; 32] {
    curve25519_dalek::scalar::Scalar::from_bytes_mod_order_wide(&Sha512::digest(message).into()).to_bytes()
}

/// RFC 9380 `hash_to_field` written out: m = 1, count = 1, L = 48, expand_message_xmd with SHA-256; then long division.
fn field(message: &[u8], dst: &[u8], order: &str) -> [u8; 32] {
    let dst = [dst, &[u8::try_from(dst.len()).unwrap()]].concat();
    let b0 = Sha256::digest([&[0; 64], message, &[0, 48, 0], &dst].concat());
    let b1 = Sha256::digest([&b0[..], &[1], &dst].concat());
    let mixed: Vec<u8> = b0.iter().zip(&b1).map(|(x, y)| x ^ y).collect();
    let b2 = Sha256::digest([&mixed[..], &[2], &dst].concat());
    let wide = BigUint::from_bytes_be(&[&b1[..], &b2[..16]].concat());
    let reduced = (wide % BigUint::parse_bytes(order.as_bytes(), 16).unwrap()).to_bytes_be();
    let mut out = [0; 32];
    out[32 - reduced.len()..].copy_from_slice(&reduced);
    out
}

fn of_secp256k1(message: &[u8]) -> [u8; 32] {
    field(message, b"DKMS-V1-POP-secp256k1", "fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141")
}

fn of_p256(message: &[u8]) -> [u8; 32] {
    field(message, b"DKMS-V1-POP-P256", "ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551")
}

/// The proof of possession in a Deal of node 1, checked as the text of threshold.md §3 step 2 says.
fn possession<G: Group>(root: RootTag, challenge: Challenge) {
    let (run, bodies) = committed::<G>(root, 2, 3);
    let e = G::ELEMENT_BYTES;
    let body = &bodies[0];
    assert_eq!(body.len(), 2 + 2 * e + 64 + 2 + 3 * 82);
    let constant = &body[2..2 + e];
    let scalar_at = |at: usize| -> [u8; 32] { body[at..at + 32].try_into().unwrap() };
    let (c, z) = (scalar_at(2 + 2 * e), scalar_at(2 + 2 * e + 32));
    let decoded = |bytes: &[u8; 32]| G::decode_scalar(bytes).unwrap();
    let r = G::mul_base(&decoded(&z)) - G::mul(&G::decode(constant).unwrap(), &decoded(&c));
    let inst = run.ceremony.instance().inst();
    let text = [&b"DKMS-V1-POP"[..], &inst, &[0, 1], constant, G::encode(&r).as_ref()].concat();
    assert_eq!(c, challenge(&text), "{}", G::NAME);
}

#[test]
fn proofs_of_possession_are_those_of_the_specification() {
    possession::<Edwards25519>(RootTag::Ca, of_edwards25519);
    possession::<NistP256>(RootTag::Ca, of_p256);
    possession::<Secp256k1>(RootTag::Id, of_secp256k1);
}

/// Public key, verification key of holder 1 and transcript of the run of three with the seeds of these tests.
fn answers<G: Group>(root: RootTag) -> [String; 3] {
    let outcomes = complete::<G>(root, 2, 3);
    let sharing = outcomes[0].sharing();
    [hex::encode(sharing.public_key()), hex::encode(&sharing.verification_keys()[0].1), hex::encode(sharing.transcript())]
}

#[test]
fn known_answers_of_a_run_in_each_group() {
    // A change here is a change of the protocol.
    let all = [answers::<Edwards25519>(RootTag::Ca), answers::<NistP256>(RootTag::Ca), answers::<Secp256k1>(RootTag::Id)];
    assert_eq!(
        all,
        [
            [
                "3b28fb44105731b977ebac9f091cace10910664ba9d2dbb6e614c86f9eeaf031",
                "4c49151543a4d100c40c37036f537c1c297d940ea5f7b536d5d84807e4558b1c",
                "8089f872df6728adcba35544bce1de79328c0385d8eb1d72a08364a441f6ef4d"
            ],
            [
                "03461da1b03f8a32f07af5e574b90a1a4c3c851a2971848e67d29d93432e0419cc",
                "029dad9683aa375ea0c7f9d6760f10fa0fd053625f6d5bb1471e829f623a39270e",
                "bff23f50298050537c52a9492b32dd5c444f31518f6f57e62bd6d6fbac152136"
            ],
            [
                "0223b34b89683a7539313d6d3098612f45a8f640d69ba5bb62e1208d0b096fe4b4",
                "03a948889453f275c46eb1db0cfe276de8584e31e0e9c469da7d02512ab4e8e0aa",
                "f639a0a981c5730145f93136e112f25a2fdcbb993278a83dc45d391899732e78"
            ],
        ]
    );
}

fn faults<G: Group>(root: RootTag) {
    let other = || G::encode(&scalar::<G>(b"other", 0).public()).as_ref().to_vec();
    let refused = |fault: DealFault, change: &dyn Fn(&mut DealBody)| {
        let (_, last) = dealt_in::<G>(root, change);
        assert_eq!(last, ended(2, Guilt::Deal(fault)), "{}", G::NAME);
    };
    let identity = || G::encode(&G::identity()).as_ref().to_vec();
    refused(DealFault::Commitment(0), &|d| d.commitments[0] = vec![0xff; G::ELEMENT_BYTES]);
    refused(DealFault::Commitment(1), &|d| d.commitments[1] = identity());
    refused(DealFault::Possession, &|d| d.commitments[0] = other());
    refused(DealFault::Possession, &|d| d.possession.as_mut().unwrap().1[7] ^= 1);
    refused(DealFault::Possession, &|d| d.possession.as_mut().unwrap().1 = [0xff; 32]);

    // A deal of node 1 as node 2's own: the challenge binds the dealer.
    let (run, bodies) = committed::<G>(root, 2, 3);
    let commit = commit_hash(&run.ceremony.instance().inst(), NodeIndex(2), &bodies[0]);
    assert_eq!(check_deal(run.ceremony.instance(), NodeIndex(2), &commit, &bodies[0]).unwrap_err(), DealFault::Possession);

    // Bad sub-shares convict their dealer by complaint.
    let inst = instance::<G>(root, 2, 3).inst();
    let mut nine = [0; 32];
    nine[if root == RootTag::Ca && G::ELEMENT_BYTES == 32 { 0 } else { 31 }] = 9;
    type Change<'a> = Box<dyn Fn(&mut DealBody) + 'a>;
    let cases: [(SubshareFault, Change<'_>); 3] = [
        (SubshareFault::DoesNotOpen, Box::new(|deal| deal.shares[2].ct[0] ^= 1)),
        (SubshareFault::NotCommitted, Box::new(|deal| reseal_in(&inst, deal, NodeIndex(2), NodeIndex(3), nine))),
        (SubshareFault::NotCanonical, Box::new(|deal| reseal_in(&inst, deal, NodeIndex(2), NodeIndex(3), [0xff; 32]))),
    ];
    for (fault, change) in cases {
        let (mut run, last) = dealt_in::<G>(root, change);
        assert_eq!(last, Ok(Progress::Moved(Stage::AwaitingReady)));
        assert!(matches!(run.nodes[0].check(&run.ceremony), Ok(Checked::Ready(_))));
        let Ok(Checked::Complaints(complaints)) = run.nodes[2].check(&run.ceremony) else { panic!("3 is content") };
        let verdict = run.ceremony.apply(MessageKind::Complain, NodeIndex(3), &complaints[0].encode());
        assert_eq!(verdict, ended(2, Guilt::Subshare { recipient: NodeIndex(3), fault }), "{}", G::NAME);
    }

    // A complaint about a right sub-share convicts its author.
    let (mut run, _) = dealt_in::<G>(root, |_| {});
    let ephemeral = run.ceremony.deals().unwrap().0[&NodeIndex(1)].shares[&NodeIndex(3)].ephemeral;
    let false_one = complain(NodeIndex(1), &key(NodeIndex(3)), &ephemeral, &seed("rng", NodeIndex(3)));
    let verdict = run.ceremony.apply(MessageKind::Complain, NodeIndex(3), &false_one.encode());
    assert_eq!(verdict, ended(3, Guilt::FalseComplaint { dealer: NodeIndex(1) }));
}

#[test]
fn faults_convict_in_every_group() {
    faults::<Edwards25519>(RootTag::Ca);
    faults::<NistP256>(RootTag::Ca);
    faults::<Secp256k1>(RootTag::Id);
}
