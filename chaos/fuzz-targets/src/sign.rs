//! Messages of signing runs from foreign bytes: FROST's formats, envelopes of setups and runs, what nodes say to each other about runs and
//! about pairs made anew, pairwise state at rest; and real messages of a run with bytes changed, which reach the engine's own decoders and checks. What must hold beyond "no panic": no signature comes
//! out that does not verify, and what is no message leaves a run as it was.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, OnceLock};

use dstack_actors::signing::wire;
use dstack_protocol::{ClusterId, Epoch, Generation, NodeIndex, RootTag, Wire};
use dstack_secret::{Locked, Secret, SecretBytes};
use dstack_threshold::group::{Edwards25519, Group, Secp256k1};
use dstack_threshold::sign::dkls::{Dkls23, Pairwise, Setup, Signing};
use dstack_threshold::sign::ecdsa::{EcdsaGroup, Outgoing, Rounds, ThresholdEcdsa};
use dstack_threshold::sign::{Holders, RootShare, Run, Scope, frost, tbs_digest};

const MESSAGE: &[u8] = b"to be signed";
const DIGEST: [u8; 32] = [9; 32];
const SIGNERS: [NodeIndex; 2] = [NodeIndex(1), NodeIndex(2)];
const ROUND_AT: usize = 14 + 1 + 32;

/// See the module text.
pub(crate) fn run(data: &[u8]) {
    let Some((selector, data)) = data.split_first() else { return };
    match selector % 6 {
        0 => frost_messages(data),
        1 => frost_package(data),
        2 => envelopes(data),
        3 => drop(Pairwise::<Secp256k1>::from_secret(&SecretBytes::take(data.to_vec()))),
        4 => changed_messages(data),
        _ => between_nodes(data),
    }
}

/// The second byte selects the format. What decodes encodes to the same bytes: one encoding for each message.
fn between_nodes(data: &[u8]) {
    fn judge<F: Wire>(bytes: &[u8]) {
        if let Ok(message) = F::decode(bytes) {
            assert_eq!(message.encode(), bytes, "one encoding for each message");
        }
    }
    let Some((selector, data)) = data.split_first() else { return };
    match selector % 5 {
        0 => judge::<wire::PairAsk>(data),
        1 => judge::<wire::PairDone>(data),
        2 => judge::<wire::RunAsk>(data),
        3 => judge::<wire::ShareAsk>(data),
        _ => judge::<wire::RoundMessage>(data),
    }
}

fn of(root: RootTag, digest: [u8; 32]) -> Run {
    let scope = Scope { cluster_id: ClusterId([1; 32]), generation: Generation(0), root, epoch: Epoch(1), attempt: 0 };
    Run::new(&scope, digest, &SIGNERS).expect("two signers")
}

/// Two shares of a root, both needed.
fn shares<G: Group>() -> Vec<RootShare<G>> {
    let value = |at: u64| G::scalar_from_u64(1_000_003) + G::scalar_from_u64(77 * at);
    let encoded = |at: u64| G::encode(&G::mul_base(&value(at))).as_ref().to_vec();
    let vks: Vec<_> = SIGNERS.map(|i| (i, encoded(u64::from(i.0)))).to_vec();
    let holders = Arc::new(Holders::<G>::new(2, &encoded(0), &vks).expect("a line"));
    let share = |i: NodeIndex| {
        let secret = Secret::take(&mut G::encode_scalar(&value(u64::from(i.0))));
        RootShare::new(i, Arc::clone(&holders), Locked::new(secret)).expect("on the line")
    };
    SIGNERS.map(share).into()
}

fn frost_messages(data: &[u8]) {
    let run = of(RootTag::Ca, tbs_digest(MESSAGE));
    assert!(frost::package(&run, &[(SIGNERS[0], data.to_vec())]).is_err(), "a second signer is missing");
    let all = shares::<Edwards25519>();
    let commitments: Vec<_> =
        all.iter().map(|share| (share.index(), frost::commit(share, &run, Secret::from_fn(|r| r.fill(5))).expect("a signer").1)).collect();
    let package = frost::package(&run, &commitments).expect("both are there");
    let answers: Vec<_> = SIGNERS.iter().map(|i| (*i, data.to_vec())).collect();
    assert!(frost::aggregate(all[0].holders(), &run, MESSAGE, &package, &answers).is_err(), "nobody signed");
}

fn frost_package(data: &[u8]) {
    let run = of(RootTag::Ca, tbs_digest(MESSAGE));
    let all = shares::<Edwards25519>();
    let (nonces, _) = frost::commit(&all[0], &run, Secret::from_fn(|r| r.fill(5))).expect("a signer");
    assert!(frost::sign_share(&all[0], nonces, &run, MESSAGE, data).is_err(), "not with these nonces");
}

/// Any bytes to a setup and to a run: they are no message of either, so both go on.
fn envelopes(data: &[u8]) {
    static MACHINES: OnceLock<Mutex<(Setup<Secp256k1>, Signing<Secp256k1>)>> = OnceLock::new();
    let machines = MACHINES.get_or_init(|| {
        let (setup, _) = Dkls23::<Secp256k1>::setup([3; 32], SIGNERS[0], &SIGNERS).expect("two members");
        Mutex::new((setup, begin(0).0))
    });
    let mut machines = machines.lock().expect("no panic before");
    let setup = machines.0.receive(SIGNERS[1], data).expect_err("no message of a setup");
    let signing = machines.1.receive(SIGNERS[1], data).expect_err("no message of a run");
    // A body that is none ends a machine; without its name nobody gets there.
    assert!(!setup.ends_run() && !signing.ends_run());
}

type Cluster = (Vec<RootShare<Secp256k1>>, BTreeMap<NodeIndex, Pairwise<Secp256k1>>);

/// Two holders after their setup: made once, it takes a second or more.
fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| {
        let begun = SIGNERS.map(|i| (i, Dkls23::<Secp256k1>::setup([7; 32], i, &SIGNERS).expect("two members")));
        (shares(), settle(begun, |_| {}))
    })
}

fn begin(place: usize) -> (Signing<Secp256k1>, Vec<Outgoing>) {
    let (shares, pairwise) = cluster();
    let run = of(RootTag::Id, DIGEST);
    Dkls23::sign(&shares[place], &pairwise[&SIGNERS[place]], &run, DIGEST).expect("both are holders")
}

/// Delivers messages, each after `change` has seen it, until nothing is on the way.
fn settle<M: Rounds>(
    begun: impl IntoIterator<Item = (NodeIndex, (M, Vec<Outgoing>))>,
    mut change: impl FnMut(&mut Vec<u8>),
) -> BTreeMap<NodeIndex, M::Output> {
    let (mut machines, mut mail, mut done) = (BTreeMap::new(), VecDeque::new(), BTreeMap::new());
    for (i, (machine, send)) in begun {
        machines.insert(i, machine);
        mail.extend(send.into_iter().map(|o| (i, o)));
    }
    while let Some((from, letter)) = mail.pop_front() {
        let mut bytes = letter.bytes.expose(<[u8]>::to_vec);
        change(&mut bytes);
        let machine: &mut M = machines.get_mut(&letter.to).expect("letters go to participants");
        if let Ok(progress) = machine.receive(from, &bytes) {
            mail.extend(progress.send.into_iter().map(|o| (letter.to, o)));
            done.extend(progress.done.map(|output| (letter.to, output)));
        }
    }
    done
}

/// `round ‖ { place(2) ‖ xor(1) }*` over the first message of that round.
fn changed_messages(data: &[u8]) {
    let Some((round, patches)) = data.split_first() else { return };
    let round = round % 3 + 1;
    let mut once = true;
    let done = settle(SIGNERS.iter().zip([0, 1]).map(|(i, place)| (*i, begin(place))), |bytes| {
        if once && bytes[ROUND_AT] == round {
            once = false;
            for patch in patches.chunks_exact(3) {
                let place = usize::from(u16::from_be_bytes([patch[0], patch[1]])) % bytes.len();
                bytes[place] ^= patch[2];
            }
        }
    });
    let key = shares::<Secp256k1>()[0].holders().public_key();
    let key = Secp256k1::decode(&key).expect("a public key");
    assert!(done.values().all(|signature| Secp256k1::verify(&key, &DIGEST, signature)), "a wrong signature came out");
}
