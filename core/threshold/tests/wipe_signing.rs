//! Looks at every heap block when it is freed, through setups and runs of both engines, twice: as the code leaves it, and behind the
//! wiping allocator that nodes run under. Nothing that our own types hold is left by the code; behind the allocator nothing is.
//! Reading a block there is sound, because the allocator is asked before the block is gone.

#![allow(unsafe_code, reason = "a global allocator is an unsafe trait")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use dstack_protocol::ceremony::{InstHolder, MessageKind, Open, What, key_hash};
use dstack_protocol::codec::sha512;
use dstack_protocol::{ClusterId, Epoch, Generation, NodeIndex, RootTag, Wire as _};
use dstack_secret::{Locked, Secret, Wiping};
use dstack_threshold::dkg::{Ceremony, Checked, EncryptionKey, Instance, Participant};
use dstack_threshold::group::{Edwards25519, Group, Secp256k1};
use dstack_threshold::sign::dkls::{Dkls23, Pairwise};
use dstack_threshold::sign::ecdsa::{EcdsaSignature, Outgoing, Rounds, ThresholdEcdsa};
use dstack_threshold::sign::{Holders, RootShare, Run, Scope, frost, tbs_digest};

/// What to search for, 32 bytes each.
static SECRETS: OnceLock<Vec<[u8; 32]>> = OnceLock::new();
static LEFT_BY_CODE: AtomicUsize = AtomicUsize::new(0);
static LEFT_BEHIND: AtomicUsize = AtomicUsize::new(0);
/// Which secret was in a block of how many bytes, for the first finds.
static FINDS: [(AtomicUsize, AtomicUsize); 16] = [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; 16];

/// Counts blocks that hold a secret when they come back.
struct Inspecting<A>(A, &'static AtomicUsize);

// SAFETY: every call is handed to the inner allocator unchanged.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Inspecting<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // Zeroed, so that every byte of a block may be read when it is freed.
        // SAFETY: the caller's layout is passed on.
        unsafe { self.0.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if let Some(secrets) = SECRETS.get() {
            // SAFETY: the block is still allocated, `layout.size()` bytes long, and was zeroed by `alloc`.
            let bytes = unsafe { std::slice::from_raw_parts(block, layout.size()) };
            let found = |w: &[u8]| secrets.iter().position(|s| s[0] == w[0] && s == w);
            if let Some(secret) = bytes.windows(32).find_map(found) {
                let count = self.1.fetch_add(1, Ordering::SeqCst);
                if let Some(find) = FINDS.get(count) {
                    find.0.store(secret, Ordering::SeqCst);
                    find.1.store(layout.size(), Ordering::SeqCst);
                }
            }
        }
        // SAFETY: passed on unchanged.
        unsafe { self.0.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Inspecting<Wiping<Inspecting<System>>> = Inspecting(Wiping::over(Inspecting(System, &LEFT_BEHIND)), &LEFT_BY_CODE);

const CLUSTER: ClusterId = ClusterId([3; 32]);

fn members() -> Vec<NodeIndex> {
    (1..=3).map(NodeIndex).collect()
}

/// Shares of our own key generation, 2 of 3, the same in every pass.
fn generate<G: Group>(root: RootTag, learn: &mut dyn FnMut(&[u8])) -> Vec<RootShare<G>> {
    let seed = |label: u8, i: NodeIndex| Secret::<64>::from_fn(|s| (s[0], s[1], s[62], s[63]) = (label, i.0 as u8, root.byte(), 0x77));
    let key = |i| EncryptionKey::new(seed(1, i));
    let open = Open {
        generation: Generation(0),
        what: What::Dkg,
        old_epoch: Epoch(0),
        new_epoch: Epoch(1),
        attempt: 1,
        t: 2,
        roots: vec![root],
        dealers: members(),
        holders: members(),
    };
    let holders: Vec<InstHolder> =
        members().iter().map(|i| InstHolder { index: *i, key_hash: key_hash(&[1; 32]), ek: key(*i).public() }).collect();
    let instance = Instance::<G>::new(&CLUSTER, &open, root, &holders).unwrap();
    let mut ceremony = Ceremony::new(instance.clone());
    let mut nodes: Vec<_> = members().iter().map(|i| Participant::new(instance.clone(), *i, key(*i), seed(2, *i)).unwrap()).collect();
    for (i, node) in members().iter().zip(&nodes) {
        ceremony.apply(MessageKind::Commit, *i, &node.package().commit).unwrap();
    }
    for (i, node) in members().iter().zip(&nodes) {
        ceremony.apply(MessageKind::Deal, *i, &node.package().body).unwrap();
    }
    for (i, node) in members().iter().zip(&mut nodes) {
        let Checked::Ready(mut ready) = node.check(&ceremony).unwrap() else { panic!("{i} complains") };
        if root == RootTag::Id {
            // What the holders say of a pairwise setup; the one looked at below is made afterwards.
            ready.setup = [1; 32];
        }
        ceremony.apply(MessageKind::Ready, *i, &ready.encode()).unwrap();
    }
    let holders = Arc::new(Holders::of(ceremony.switched().unwrap()));
    let share = |(i, node): (&NodeIndex, Participant<G>)| {
        let outcome = node.finish(&ceremony).unwrap();
        let share = outcome.share().expose(|share| {
            learn(share);
            // The order in which the curve libraries keep a scalar.
            let mut reversed = *share;
            reversed.reverse();
            learn(&reversed);
            Secret::from_fn(|to| *to = *share)
        });
        RootShare::new(*i, Arc::clone(&holders), Locked::new(share)).unwrap()
    };
    members().iter().zip(nodes).map(share).collect()
}

fn run_of(root: RootTag, digest: [u8; 32]) -> Run {
    let scope = Scope { cluster_id: CLUSTER, generation: Generation(0), root, epoch: Epoch(1), attempt: 0 };
    Run::new(&scope, digest, &[NodeIndex(1), NodeIndex(3)]).unwrap()
}

fn sign_with_frost(shares: &[RootShare<Edwards25519>], learn: &mut dyn FnMut(&[u8])) {
    let message = b"certificate";
    let run = run_of(RootTag::Ca, tbs_digest(message));
    let signers = [&shares[0], &shares[2]];
    let mut commitments = Vec::new();
    let mut nonces = Vec::new();
    for share in signers {
        let random = |half: u8| [share.index().0 as u8 ^ half; 32];
        // The nonces, as RFC 9591 derives them.
        for half in [0x40, 0x80] {
            let wide = share.scalar().expose(|s| sha512(&[b"FROST-ED25519-SHA512-v1", b"nonce", &random(half), s]));
            learn(&Edwards25519::encode_scalar(&Edwards25519::scalar_from_uniform(&wide)));
        }
        let rng = Secret::from_fn(|r| {
            r[..32].copy_from_slice(&random(0x40));
            r[32..].copy_from_slice(&random(0x80));
        });
        let (kept, bytes) = frost::commit(share, &run, rng).unwrap();
        nonces.push(kept);
        commitments.push((share.index(), bytes));
    }
    let package = frost::package(&run, &commitments).unwrap();
    let answers: Vec<_> = signers
        .iter()
        .zip(nonces)
        .map(|(share, kept)| (share.index(), frost::sign_share(share, kept, &run, message, &package).unwrap()))
        .collect();
    frost::aggregate(shares[0].holders(), &run, message, &package, &answers).unwrap();
}

/// Delivers every message until all machines have ended.
fn settle<M: Rounds>(begun: Vec<(NodeIndex, (M, Vec<Outgoing>))>) -> BTreeMap<NodeIndex, M::Output> {
    let mut machines = BTreeMap::new();
    let mut mail = Vec::new();
    for (i, (machine, send)) in begun {
        machines.insert(i, machine);
        mail.extend(send.into_iter().map(|o| (i, o)));
    }
    let mut done = BTreeMap::new();
    while !mail.is_empty() {
        let (from, letter) = mail.remove(0);
        let machine: &mut M = machines.get_mut(&letter.to).unwrap();
        let progress = letter.bytes.expose(|bytes| machine.receive(from, bytes)).unwrap();
        mail.extend(progress.send.into_iter().map(|o| (letter.to, o)));
        done.extend(progress.done.map(|output| (letter.to, output)));
    }
    done
}

type Engine = Dkls23<Secp256k1>;

fn sign_with_dkls(
    shares: &[RootShare<Secp256k1>],
    pairwise: &BTreeMap<NodeIndex, Pairwise<Secp256k1>>,
) -> BTreeMap<NodeIndex, EcdsaSignature> {
    let run = run_of(RootTag::Id, [9; 32]);
    let begin = |share: &RootShare<Secp256k1>| (share.index(), Engine::sign(share, &pairwise[&share.index()], &run, [9; 32]).unwrap());
    settle(vec![begin(&shares[0]), begin(&shares[2])])
}

// One test: the search covers the whole process.
#[test]
fn nothing_of_a_share_a_nonce_or_a_pair_is_left() {
    let mut learned: Vec<[u8; 32]> = Vec::new();
    let mut learn = |secret: &[u8]| learned.push(secret.try_into().unwrap());
    let ca = generate::<Edwards25519>(RootTag::Ca, &mut learn);
    let id = generate::<Secp256k1>(RootTag::Id, &mut learn);
    sign_with_frost(&ca, &mut learn);
    // Setups draw their own randomness: what they leave is learned from their form at rest. After the header comes the seed of the
    // first pair; near the end of a pair lie seeds of its oblivious transfers.
    let pairwise = settle(members().iter().map(|i| (*i, Engine::setup([5; 32], *i, &members()).unwrap())).collect());
    for state in pairwise.values() {
        state.to_secret().unwrap().expose(|bytes| {
            let head = 13 + 1 + 2 + 9 + 64 + 2 + 2 + 6 + 2 + 2 + 4;
            learn(&bytes[head + 2..head + 34]);
            learn(&bytes[bytes.len() - 32..]);
            learn(&bytes[bytes.len() - 64..bytes.len() - 32]);
        });
    }
    assert!(learned.len() >= 12 + 4 + 9);
    let planted = learned[0];
    SECRETS.set(learned).unwrap();

    drop(generate::<Edwards25519>(RootTag::Ca, &mut |_| {}));
    sign_with_frost(&ca, &mut |_| {});
    let signed = sign_with_dkls(&id, &pairwise);
    assert_eq!(signed.len(), 2);
    // At rest and back, one more run, then all of it is dropped.
    let restored: BTreeMap<_, _> =
        pairwise.iter().map(|(i, state)| (*i, Pairwise::from_secret(&state.to_secret().unwrap()).unwrap())).collect();
    assert_eq!(sign_with_dkls(&id, &restored).len(), 2);
    drop((pairwise, restored, ca, id));
    let finds: Vec<_> = FINDS.iter().map(|(s, b)| (s.load(Ordering::SeqCst), b.load(Ordering::SeqCst))).filter(|f| f.1 > 0).collect();
    assert_eq!(LEFT_BY_CODE.load(Ordering::SeqCst), 0, "freed unwiped, as secret and size of block: {finds:?}");
    assert_eq!(LEFT_BEHIND.load(Ordering::SeqCst), 0);

    // The instrument sees what it must see, and the wiping allocator wipes what nobody else does.
    drop(std::hint::black_box(planted.to_vec()));
    assert_eq!(LEFT_BY_CODE.load(Ordering::SeqCst), 1);
    assert_eq!(LEFT_BEHIND.load(Ordering::SeqCst), 0);
    // Also where a vector grows.
    let mut growing = Vec::with_capacity(32);
    growing.extend_from_slice(&planted);
    growing.extend_from_slice(&[0; 4096]);
    drop(std::hint::black_box(growing));
    assert_eq!((LEFT_BY_CODE.load(Ordering::SeqCst), LEFT_BEHIND.load(Ordering::SeqCst)), (3, 0));
}
