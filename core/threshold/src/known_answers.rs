//! Known answers: RFC 9497 appendix A.1.2 and threshold.md §1.5, whole and from every set of shares.

use std::collections::BTreeMap;

use curve25519_dalek::ristretto::RistrettoPoint;
use curve25519_dalek::scalar::Scalar;
use dstack_protocol::release::{KeyClass, PartialPlain, Wish};
use dstack_protocol::{AppId, ClusterId, Epoch, Generation, NodeIndex, Wire as _};

use crate::combine::{AnswerGroup, CombineError, Combiner, PartialFault, finalize};
use crate::dleq::{self, Proof};
use crate::group::{Group as _, Ristretto255, SecretScalar, hash_to_group};
use crate::keys::derive;
use crate::prf::{Batch, PrfShare, evaluate};
use crate::shamir::{Polynomial, lagrange_at_zero};
use crate::testing::{scalar, subsets};

const SK: &str = "e6f73f344b79b379f1a0dd37e07ff62e38d9f71345ce62ae3a9bc60b04ccd909";
const PK: &str = "c803e2cc6b05fc15064549b5920659ca4a77b2cca6f04f6b357009335476ad4e";
const RANDOM_1: &str = "222a5e897cf59db8145db8d16e597e8facb80ae7d4e26d9881aa6f61d645fc0e";
const RANDOM_2: &str = "419c4f4f5052c53c45f3da494d2b67b220d02118e0857cdbcf037f9ea84bbe0c";

/// One vector of RFC 9497 A.1.2: inputs, blinds, blinded, evaluated, proof, nonce, outputs.
struct Vector {
    inputs: &'static [&'static str],
    blinds: &'static [&'static str],
    blinded: &'static [&'static str],
    evaluated: &'static [&'static str],
    proof: &'static str,
    nonce: &'static str,
    outputs: &'static [&'static str],
}

const BLIND_1: &str = "64d37aed22a27f5191de1c1d69fadb899d8862b58eb4220029e036ec4c1f6706";
const OUTPUT_1: &str =
    "b58cfbe118e0cb94d79b5fd6a6dafb98764dff49c14e1770b566e42402da1a7da4d8527693914139caee5bd03903af43a491351d23b430948dd50cde10d32b3c";
const OUTPUT_2: &str =
    "8a9a2f3c7f085b65933594309041fc1898d42d0858e59f90814ae90571a6df60356f4610bf816f27afdd84f47719e480906d27ecd994985890e5f539e7ea74b6";

const VECTORS: [Vector; 3] = [
    Vector {
        inputs: &["00"],
        blinds: &[BLIND_1],
        blinded: &["863f330cc1a1259ed5a5998a23acfd37fb4351a793a5b3c090b642ddc439b945"],
        evaluated: &["aa8fa048764d5623868679402ff6108d2521884fa138cd7f9c7669a9a014267e"],
        proof: "ddef93772692e535d1a53903db24367355cc2cc78de93b3be5a8ffcc6985dd066d4346421d17bf5117a2a1ff0fcb2a759f58a539dfbe857a40bce4cf49ec600d",
        nonce: RANDOM_1,
        outputs: &[OUTPUT_1],
    },
    Vector {
        inputs: &["5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a"],
        blinds: &[BLIND_1],
        blinded: &["cc0b2a350101881d8a4cba4c80241d74fb7dcbfde4a61fde2f91443c2bf9ef0c"],
        evaluated: &["60a59a57208d48aca71e9e850d22674b611f752bed48b36f7a91b372bd7ad468"],
        proof: "401a0da6264f8cf45bb2f5264bc31e109155600babb3cd4e5af7d181a2c9dc0a67154fabf031fd936051dec80b0b6ae29c9503493dde7393b722eafdf5a50b02",
        nonce: RANDOM_1,
        outputs: &[OUTPUT_2],
    },
    Vector {
        inputs: &["00", "5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a"],
        blinds: &[BLIND_1, RANDOM_1],
        blinded: &[
            "863f330cc1a1259ed5a5998a23acfd37fb4351a793a5b3c090b642ddc439b945",
            "90a0145ea9da29254c3a56be4fe185465ebb3bf2a1801f7124bbbadac751e654",
        ],
        evaluated: &[
            "aa8fa048764d5623868679402ff6108d2521884fa138cd7f9c7669a9a014267e",
            "cc5ac221950a49ceaa73c8db41b82c20372a4c8d63e5dded2db920b7eee36a2a",
        ],
        proof: "cc203910175d786927eeb44ea847328047892ddf8590e723c37205cb74600b0a5ab5337c8eb4ceae0494c2cf89529dcf94572ed267473d567aeed6ab873dee08",
        nonce: RANDOM_2,
        outputs: &[OUTPUT_1, OUTPUT_2],
    },
];

fn bytes<const N: usize>(text: &str) -> [u8; N] {
    hex::decode(text).unwrap().try_into().unwrap()
}

fn secret(text: &str) -> SecretScalar<Ristretto255> {
    SecretScalar::new(Ristretto255::decode_scalar(&bytes(text)).unwrap())
}

fn point(text: &str) -> RistrettoPoint {
    Ristretto255::decode(&bytes::<32>(text)).unwrap()
}

fn text(point: &RistrettoPoint) -> String {
    hex::encode(Ristretto255::encode(point))
}

/// The root of the vectors shared among 1..=9 with threshold `t`: constant term SK, the rest arbitrary.
fn shared(t: u16) -> Polynomial<Ristretto255> {
    let mut next = 0;
    Polynomial::deal(t, || {
        next += 1;
        match next {
            1 => secret(SK),
            2 => secret(RANDOM_1),
            _ => scalar(b"known answers", next),
        }
    })
}

fn share(polynomial: &Polynomial<Ristretto255>, index: NodeIndex, epoch: u64) -> PrfShare {
    let value = polynomial.eval(index);
    let vk = Ristretto255::encode(&value.public());
    PrfShare::new(index, Generation(0), Epoch(epoch), value.to_secret(), &vk).unwrap()
}

#[test]
fn rfc_9497_vectors_1_to_3() {
    let (sk, pk) = (secret(SK), point(PK));
    assert_eq!(sk.public(), pk);
    for vector in &VECTORS {
        let blinded: Vec<RistrettoPoint> = vector
            .inputs
            .iter()
            .zip(vector.blinds)
            .map(|(input, blind)| secret(blind).expose(|blind| hash_to_group(&hex::decode(input).unwrap()) * blind))
            .collect();
        assert_eq!(blinded.iter().map(text).collect::<Vec<_>>(), vector.blinded);
        let evaluated: Vec<RistrettoPoint> = blinded.iter().map(|b| sk.expose(|k| b * k)).collect();
        assert_eq!(evaluated.iter().map(text).collect::<Vec<_>>(), vector.evaluated);
        let proof = dleq::prove_with_nonce(&sk, &pk, &blinded, &evaluated, secret(vector.nonce));
        assert_eq!(hex::encode([proof.c(), proof.s()].concat()), vector.proof);
        assert!(dleq::verify(&pk, &blinded, &evaluated, &proof));
        for ((input, blind), (evaluated, output)) in vector.inputs.iter().zip(vector.blinds).zip(evaluated.iter().zip(vector.outputs)) {
            let unblinded = secret(blind).expose(|blind: &Scalar| evaluated * blind.invert());
            let got = finalize(&hex::decode(input).unwrap(), &unblinded).unwrap();
            assert_eq!(got.expose(|z| hex::encode(z)), *output);
        }
    }
}

#[test]
fn rfc_9497_outputs_from_every_set_of_shares() {
    for (t, n) in [(2, 3), (3, 5), (5, 9)] {
        let polynomial = shared(t);
        for (input, output) in [("00", OUTPUT_1), ("5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a", OUTPUT_2)] {
            let input = hex::decode(input).unwrap();
            let p = hash_to_group(&input);
            for set in subsets(n, t) {
                let partials: Vec<RistrettoPoint> = set.iter().map(|i| polynomial.eval(*i).expose(|s| p * s)).collect();
                let weights = lagrange_at_zero::<Ristretto255>(&set).unwrap();
                let y = Ristretto255::sum_of_products_public(&weights, &partials);
                assert_eq!(finalize(&input, &y).unwrap().expose(|z| hex::encode(z)), output, "{t}/{n} {set:?}");
            }
        }
    }
}

#[test]
fn an_independent_voprf_gives_the_same_outputs() {
    use voprf::{Ristretto255 as Suite, VoprfServer};
    let server = VoprfServer::<Suite>::new_with_key(&hex::decode(SK).unwrap()).unwrap();
    for number in 0..50u32 {
        let input: Vec<u8> = (0..number).map(|i| (i * 37 + number) as u8).collect();
        let theirs = server.evaluate(&input).unwrap();
        let y = secret(SK).expose(|k| hash_to_group(&input) * k);
        assert!(finalize(&input, &y).unwrap().expose(|z| z[..] == theirs[..]), "input of {number} bytes");
    }
}

#[test]
fn our_proofs_convince_an_independent_client() {
    use voprf::{Ristretto255 as Suite, VoprfClient};
    // Their client blinds, our share evaluates and proves, their client verifies and unblinds.
    let mut rng = Counting(0);
    let input = b"input of an independent client";
    let blind = VoprfClient::<Suite>::blind(input, &mut rng).unwrap();
    let blinded = Ristretto255::decode(&blind.message.serialize()).unwrap();
    let sk = secret(SK);
    let evaluated = sk.expose(|k| blinded * k);
    let proof = dleq::prove(&sk, &sk.public(), &[blinded], &[evaluated], &[3; 64]);
    let element = voprf::EvaluationElement::<Suite>::deserialize(&Ristretto255::encode(&evaluated)).unwrap();
    let proof = voprf::Proof::<Suite>::deserialize(&[proof.c(), proof.s()].concat()).unwrap();
    let theirs = blind.state.finalize(input, &element, &proof, sk.public()).unwrap();
    let y = sk.expose(|k| hash_to_group(input) * k);
    assert!(finalize(input, &y).unwrap().expose(|z| z[..] == theirs[..]));
}

/// A generator for the oracle's old generation of traits; its quality does not matter here.
struct Counting(u64);

impl rand_core_06::RngCore for Counting {
    fn next_u32(&mut self) -> u32 {
        self.next_u64() as u32
    }
    fn next_u64(&mut self) -> u64 {
        self.0 += 1;
        self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
    fn fill_bytes(&mut self, dest: &mut [u8]) {
        dest.iter_mut().for_each(|b| *b = (self.next_u64() >> 32) as u8);
    }
    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), rand_core_06::Error> {
        self.fill_bytes(dest);
        Ok(())
    }
}

impl rand_core_06::CryptoRng for Counting {}

const CLUSTER: ClusterId = ClusterId([0x11; 32]);
const APP: AppId = AppId([0x22; 20]);

fn wish(class: KeyClass, ctx: &[u8]) -> Wish {
    Wish::new(class, ctx.to_vec()).unwrap()
}

fn section_1_5_wishes() -> Vec<Wish> {
    vec![wish(KeyClass::Disk, &[0x33; 20]), wish(KeyClass::Env, b""), wish(KeyClass::K256, b"")]
}

#[test]
fn section_1_5_shares_points_and_proofs() {
    let polynomial = shared(2);
    let batch = Batch::new(&CLUSTER, &APP, &section_1_5_wishes()).unwrap();
    assert_eq!(text(&batch.points()[0]), "381ef1d8b4be9d8abe6e17f55ed5f0457e1f3f7ebca70bce721cdbb09772b222");
    for (i, s, vk, y, c, z) in [
        (
            1,
            "1b4ea860ad0b3fda2f619e6670df95a9e49102fb19b1d046bc45366dda11d608",
            "d249fcc46ff7b2340980ff6fe0058bdfd6822b3442443be20c8d82d813fa8109",
            "04e6f2934585c09e6841a2d5c08afd306eb8b25339925a7c7edbb3fa98e20c2b",
            "390d8f3c941d0586f7623f097a7a469e81fc0afc5f78466d020daaf7a9c53c0c",
            "eb5ca04ebe84e48767592392360121d1a4ca426e0dfa88c4a0133fc540ba300b",
        ),
        (
            3,
            "85fa78b97130569bace11fc4909ed49e3d0318c9c376ac77bf9a1530879dce06",
            "5a14046f24088b18a7020ede179278a4ba825e134f95d3c2dc7290bb5e8b627b",
            "3201fddedf463418c6037bfbe2738ee4655f305bae0991689ddbef924361ec00",
            "36db4f39d863a3d77d9f808acde04524812894adc73485c6d9d503727ab1c303",
            "fa9f309514e80834bf6347aed48f4a8bd33275db4547e5b766b2a3a26a24330b",
        ),
    ] {
        let value = polynomial.eval(NodeIndex(i));
        assert!(value.to_secret().expose(|b| hex::encode(b) == s), "s_{i}");
        assert_eq!(text(&value.public()), vk);
        let elements: Vec<RistrettoPoint> = batch.points().iter().map(|p| value.expose(|s| p * s)).collect();
        assert_eq!(text(&elements[0]), y);
        let proof = dleq::prove_with_nonce(&value, &value.public(), batch.points(), &elements, secret(RANDOM_2));
        assert_eq!(hex::encode(proof.c()), c);
        assert_eq!(hex::encode(proof.s()), z);
    }
}

/// Answers of `holders` to `wishes` under a root shared with threshold `t`.
fn answers(t: u16, epoch: u64, holders: &[NodeIndex], batch: &Batch) -> Vec<PartialPlain> {
    let polynomial = shared(t);
    holders.iter().map(|i| evaluate(&share(&polynomial, *i, epoch), batch, &[7; 64]).into_plain(5, 6, [9; 32])).collect()
}

/// Partials are no `Clone` on purpose; test values are no secrets.
fn copy(plain: &PartialPlain) -> PartialPlain {
    PartialPlain::decode(&plain.encode()).unwrap()
}

const GROUP: AnswerGroup = AnswerGroup { epoch: Epoch(1), pos: 5, size: 6, log_root: [9; 32] };

#[test]
fn section_1_5_keys() {
    let mut wishes = section_1_5_wishes();
    wishes.push(wish(KeyClass::Disk, b""));
    wishes.push(wish(KeyClass::P256, b""));
    wishes.push(wish(KeyClass::Custom, b"a/b"));
    let batch = Batch::new(&CLUSTER, &APP, &wishes).unwrap();
    assert_eq!(text(&batch.points()[3]), "808c4ff6facbadbb6861f79798eadca5f37ece150d73068b23df99cdc5f7bb46");
    let sk = secret(SK);
    for (at, y) in [
        (0, "5249fe0b2b0644a07a825b5ce9b6b7d12bc8abdc63aa6f9514de8fa692434300"),
        (3, "b68b2a4e6ff36ab5b9004a5abcd546284d25b21307bcd040a2212daace7c171d"),
        (4, "7822067be5887b698f7f2ffb3903671393e95a144544c9ab2ba524f60cf3517c"),
        (5, "8a233fe9faaa97549431091e7abb2d59ecaa0488f3c44e579390d44e076d4f28"),
    ] {
        assert_eq!(text(&sk.expose(|k| batch.points()[at] * k)), y);
    }

    let mut combiner = Combiner::new(batch.clone(), Generation(0), &bytes(PK)).unwrap();
    for answer in answers(2, 1, &[NodeIndex(1), NodeIndex(3)], &batch) {
        assert_eq!(combiner.add(&answer), Ok(GROUP));
    }
    let combined = combiner.combine(&GROUP, 2, None).unwrap();
    assert_eq!(combined.used, [NodeIndex(1), NodeIndex(3)]);
    assert!(combined.failed_sets.is_empty() && combined.culprits.is_empty());
    for (at, key, kcv, public) in [
        (0, "456e3e9eeea9cf4e2c3b8da6aec87606c28e5d52fa0e1d4c2ac4cf97e19586a9", "ea677ba91abca808fe47a7f0cb2ac23e", None),
        (
            1,
            "a89faa62b8e2acb479a6c6404b78350fe3fd37ef8877091c425dbdd542c125e3",
            "b41a354772d9adbcce5eb3a4780aca88",
            Some("71901891a03fcb7702c869ab069822e2d759e602a7509b9f06f7fd8035ad682b"),
        ),
        (
            2,
            "261da6e22ebc221c13a04488b797e9b0aaa3d94ef21965bb76fa71b78828158b",
            "5629982982c867f003c4043a4bbea0f6",
            Some("0389b92e4e66a35735769224e752c8fac62c7015bcc4eba3266170292c3cd836a2"),
        ),
        (3, "cd68c7a54eecf9921bee2c39bd9762493093e8f496021e5e4f3eb603a7929d17", "3b5a013555e489b8db89cd34ad46c5bc", None),
        (5, "1e9570ed91bbe2bbd304ef8c4ac03f5ba74b738c2da59628136b58fa1f4aa550", "d55788f9e714aa3cef4b8a23d999ddcb", None),
    ] {
        let typed = derive(&wishes[at], &APP, &combined.outputs[at]).unwrap();
        assert!(typed.bytes().expose(|b| hex::encode(b) == key), "key {at}");
        assert_eq!(typed.kcv().to_string(), kcv);
        assert_eq!(typed.public_key().map(hex::encode).as_deref(), public);
    }
    let p256 = derive(&wishes[4], &APP, &combined.outputs[4]).unwrap();
    assert!(p256.bytes().expose(|b| hex::encode(b) == "fbe5f00022a341d007fa12fdcff71fe3994efb887a1d5b78daf92e84804d3855"));
    assert_eq!(p256.kcv().to_string(), "44a8a6f41e42cbb2ed2f585ae092d9d9");
    assert_eq!(p256.public_key().unwrap().len(), 33);
}

#[test]
fn every_set_of_holders_gives_the_same_outputs() {
    let batch = Batch::new(&CLUSTER, &APP, &section_1_5_wishes()).unwrap();
    for (t, n) in [(2, 3), (3, 5), (5, 9)] {
        let all: Vec<NodeIndex> = (1..=n).map(NodeIndex).collect();
        let answers = answers(t, 1, &all, &batch);
        let mut first: Option<Vec<String>> = None;
        for set in subsets(n, t) {
            let mut combiner = Combiner::new(batch.clone(), Generation(0), &bytes(PK)).unwrap();
            for index in &set {
                combiner.add(&answers[usize::from(index.0) - 1]).unwrap();
            }
            let combined = combiner.combine(&GROUP, t, None).unwrap();
            assert_eq!(combined.used, set);
            let outputs: Vec<String> = combined.outputs.iter().map(|o| o.expose(|z| hex::encode(z))).collect();
            assert_eq!(first.get_or_insert_with(|| outputs.clone()), &outputs);
        }
    }
}

#[test]
fn flipped_bits_in_an_answer_are_rejected() {
    let batch = Batch::new(&CLUSTER, &APP, &section_1_5_wishes()[..1]).unwrap();
    let good = answers(2, 1, &[NodeIndex(1)], &batch).pop().unwrap();
    let refuse = |change: &dyn Fn(&mut PartialPlain)| {
        let mut bad = copy(&good);
        change(&mut bad);
        let mut combiner = Combiner::new(batch.clone(), Generation(0), &bytes(PK)).unwrap();
        let error = combiner.add(&bad).unwrap_err();
        assert_eq!(error.index, NodeIndex(1));
        assert!(matches!(error.fault, PartialFault::Proof | PartialFault::Encoding), "{error}");
    };
    for bit in 0..256 {
        let flip = |field: &mut [u8; 32]| field[bit / 8] ^= 1 << (bit % 8);
        refuse(&|p| flip(&mut p.vk));
        refuse(&|p| flip(&mut p.elements[0]));
        refuse(&|p| flip(&mut p.c));
        refuse(&|p| flip(&mut p.s));
    }
}

#[test]
fn malformed_answers_are_refused_with_their_reason() {
    let batch = Batch::new(&CLUSTER, &APP, &section_1_5_wishes()).unwrap();
    let good = answers(2, 1, &[NodeIndex(1)], &batch).pop().unwrap();
    let mut combiner = Combiner::new(batch, Generation(0), &bytes(PK)).unwrap();
    let mut refuse = |plain: PartialPlain, fault: PartialFault| {
        assert_eq!(combiner.add(&plain).unwrap_err().fault, fault);
    };
    refuse(PartialPlain { index: NodeIndex(0), ..copy(&good) }, PartialFault::Index);
    refuse(PartialPlain { index: NodeIndex(0x8000), ..copy(&good) }, PartialFault::Index);
    let (want, got) = (Generation(0), Generation(1));
    refuse(PartialPlain { generation: got, ..copy(&good) }, PartialFault::Generation { want, got });
    refuse(PartialPlain { elements: vec![good.elements[0]].into(), ..copy(&good) }, PartialFault::Count { want: 3, got: 1 });
    refuse(PartialPlain { vk: [0; 32], ..copy(&good) }, PartialFault::Encoding);
    refuse(PartialPlain { elements: vec![[0; 32]; 3].into(), ..copy(&good) }, PartialFault::Encoding);
    refuse(PartialPlain { s: [0xff; 32], ..copy(&good) }, PartialFault::Encoding);
    let mut swapped = copy(&good);
    swapped.elements.swap(0, 1);
    refuse(swapped, PartialFault::Proof);
    assert_eq!(combiner.add(&good), Ok(GROUP));
    assert_eq!(combiner.add(&good).unwrap_err().fault, PartialFault::Again);
}

#[test]
fn a_liar_with_a_valid_proof_is_outvoted_and_named_by_certified_keys() {
    // Holder 2 proves for a key of its own: each proof verifies, the sum does not.
    let batch = Batch::new(&CLUSTER, &APP, &section_1_5_wishes()).unwrap();
    let polynomial = shared(3);
    let liar = scalar::<Ristretto255>(b"liar", 0);
    let vk = Ristretto255::encode(&liar.public());
    let liar = PrfShare::new(NodeIndex(2), Generation(0), Epoch(1), liar.to_secret(), &vk).unwrap();
    let mut combiner = Combiner::new(batch.clone(), Generation(0), &bytes(PK)).unwrap();
    combiner.add(&evaluate(&liar, &batch, &[1; 64]).into_plain(5, 6, [9; 32])).unwrap();
    let honest = [1, 3, 5].map(NodeIndex);
    for answer in answers(3, 1, &honest[..2], &batch) {
        combiner.add(&answer).unwrap();
    }
    // Three answers, one a lie: no set works, and the set is reported whole.
    let error = combiner.combine(&GROUP, 3, None).err().unwrap();
    let failed_sets = vec![vec![NodeIndex(1), NodeIndex(2), NodeIndex(3)]];
    assert_eq!(error, CombineError::NoSet { failed_sets, culprits: vec![] });
    // With the certified keys the liar is named before any set is tried.
    let certified: BTreeMap<NodeIndex, [u8; 32]> =
        (1..=5).map(NodeIndex).map(|i| (i, Ristretto255::encode(&polynomial.eval(i).public()))).collect();
    let error = combiner.combine(&GROUP, 3, Some(&certified)).err().unwrap();
    assert_eq!(error.culprits(), [NodeIndex(2)]);
    assert_eq!(error, CombineError::TooFew { have: 2, need: 3, culprits: vec![NodeIndex(2)] });
    // A fourth, honest answer: the search finds the honest set.
    combiner.add(&answers(3, 1, &honest[2..], &batch)[0]).unwrap();
    let combined = combiner.combine(&GROUP, 3, None).unwrap();
    assert_eq!(combined.used, honest);
    assert_eq!(combined.failed_sets.len(), 2);
    let combined = combiner.combine(&GROUP, 3, Some(&certified)).unwrap();
    assert!(combined.failed_sets.is_empty());
    assert_eq!(combined.culprits, [NodeIndex(2)]);
    // A liar dropped by hand leaves its place to an honest answer.
    combiner.remove(NodeIndex(2));
    combiner.add(&answers(3, 1, &[NodeIndex(2)], &batch)[0]).unwrap();
    assert_eq!(combiner.combine(&GROUP, 3, None).unwrap().used, [1, 2, 3].map(NodeIndex));
}

#[test]
fn epochs_and_heads_never_mix() {
    // Epoch 2 shares the same root with another polynomial (another threshold here).
    let batch = Batch::new(&CLUSTER, &APP, &section_1_5_wishes()).unwrap();
    let mut combiner = Combiner::new(batch.clone(), Generation(0), &bytes(PK)).unwrap();
    combiner.add(&answers(2, 1, &[NodeIndex(1)], &batch)[0]).unwrap();
    let other = answers(3, 2, &[NodeIndex(2)], &batch).pop().unwrap();
    let group = combiner.add(&other).unwrap();
    assert_eq!(combiner.groups().len(), 2);
    for group in [GROUP, group] {
        let error = combiner.combine(&group, 2, None).err().unwrap();
        assert_eq!(error, CombineError::TooFew { have: 1, need: 2, culprits: vec![] });
    }
    // A holder that claims epoch 1 with its share of epoch 2: step 4 fails.
    combiner.remove(NodeIndex(2));
    combiner.add(&PartialPlain { epoch: Epoch(1), ..other }).unwrap();
    assert!(matches!(combiner.combine(&GROUP, 2, None).err(), Some(CombineError::NoSet { .. })));
    // A different head is a different group too.
    let moved = PartialPlain { log_root: [8; 32], ..answers(2, 1, &[NodeIndex(3)], &batch).pop().unwrap() };
    assert_ne!(combiner.add(&moved).unwrap(), GROUP);
}

#[test]
fn the_threshold_is_only_a_hint() {
    let batch = Batch::new(&CLUSTER, &APP, &section_1_5_wishes()).unwrap();
    let mut combiner = Combiner::new(batch.clone(), Generation(0), &bytes(PK)).unwrap();
    for answer in answers(3, 1, &[1, 2, 4].map(NodeIndex), &batch) {
        combiner.add(&answer).unwrap();
    }
    assert_eq!(combiner.combine(&GROUP, 1, None).err(), Some(CombineError::Threshold(1)));
    assert!(matches!(combiner.combine(&GROUP, 2, None).err(), Some(CombineError::NoSet { failed_sets, .. }) if failed_sets.len() == 3));
    assert!(combiner.combine(&GROUP, 3, None).is_ok());
    assert!(matches!(combiner.combine(&GROUP, 4, None).err(), Some(CombineError::TooFew { have: 3, need: 4, .. })));
}

#[test]
fn proofs_are_bound_to_the_batch() {
    let all = Batch::new(&CLUSTER, &APP, &section_1_5_wishes()).unwrap();
    let answer = answers(2, 1, &[NodeIndex(1)], &all).pop().unwrap();
    let other = Batch::new(&ClusterId([0x12; 32]), &APP, &section_1_5_wishes()).unwrap();
    let mut combiner = Combiner::new(other, Generation(0), &bytes(PK)).unwrap();
    assert_eq!(combiner.add(&answer).unwrap_err().fault, PartialFault::Proof);
    assert!(Proof::decode(&[0xff; 32], &answer.s).is_none());
    assert_eq!(Combiner::new(all, Generation(0), &[0; 32]).err(), Some(CombineError::PublicKey));
}
