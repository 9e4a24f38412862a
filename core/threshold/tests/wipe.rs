//! Looks at every heap block at the moment it is freed, through a key generation, an evaluation, a combination and a key: none may
//! still hold a secret. The run is deterministic, so a first pass learns the secrets and a second one searches for them.
//! Reading a block there is sound, because the allocator is asked before the block is gone.

#![allow(unsafe_code, reason = "a global allocator is an unsafe trait")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use dstack_protocol::ceremony::{InstHolder, MessageKind, Open, What, key_hash};
use dstack_protocol::release::{KeyClass, Wish};
use dstack_protocol::{AppId, ClusterId, Epoch, Generation, NodeIndex, RootTag, Wire as _};
use dstack_secret::Secret;
use dstack_threshold::answer::{AnswerContext, RecipientKey, open_partial, seal_partial};
use dstack_threshold::combine::Combiner;
use dstack_threshold::dkg::{Ceremony, Checked, EncryptionKey, Instance, Participant};
use dstack_threshold::group::Ristretto255;
use dstack_threshold::keys::derive;
use dstack_threshold::prf::{Batch, evaluate};
use dstack_threshold::share_file::{self, SealingKey, ShareName};

/// What to search for: each secret as its 32 (or first 32) bytes.
static SECRETS: OnceLock<Vec<[u8; 32]>> = OnceLock::new();
static BLOCKS_FREED_WITH_SECRET: AtomicUsize = AtomicUsize::new(0);

struct Inspecting;

// SAFETY: every call is handed to the system allocator unchanged.
unsafe impl GlobalAlloc for Inspecting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // Zeroed, so that every byte of a block may be read when it is freed.
        // SAFETY: the caller's layout is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if let Some(secrets) = SECRETS.get() {
            // SAFETY: the block is still allocated, `layout.size()` bytes long, and was zeroed by `alloc`.
            let bytes = unsafe { std::slice::from_raw_parts(block, layout.size()) };
            if bytes.windows(32).any(|w| secrets.iter().any(|s| s[0] == w[0] && s == w)) {
                BLOCKS_FREED_WITH_SECRET.fetch_add(1, Ordering::SeqCst);
            }
        }
        // SAFETY: passed on unchanged.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Inspecting = Inspecting;

const CLUSTER: ClusterId = ClusterId([3; 32]);
const APP: AppId = AppId([4; 20]);

/// Runs everything once. `learn` is shown each secret while it is alive.
fn run(learn: &mut dyn FnMut(&[u8])) {
    let seed = |label: u8, i: NodeIndex| Secret::<64>::from_fn(|s| (s[0], s[1], s[63]) = (label, i.0 as u8, 0x77));
    let key = |i| EncryptionKey::new(seed(1, i));
    let members: Vec<NodeIndex> = (1..=3).map(NodeIndex).collect();
    let open = Open {
        generation: Generation(0),
        what: What::Dkg,
        old_epoch: Epoch(0),
        new_epoch: Epoch(1),
        attempt: 1,
        t: 2,
        roots: vec![RootTag::Prf],
        dealers: members.clone(),
        holders: members.clone(),
    };
    let holders: Vec<InstHolder> =
        members.iter().map(|i| InstHolder { index: *i, key_hash: key_hash(&[1; 32]), ek: key(*i).public() }).collect();
    let instance = Instance::<Ristretto255>::new(&CLUSTER, &open, RootTag::Prf, &holders).unwrap();
    let mut ceremony = Ceremony::new(instance.clone());
    let mut nodes: Vec<_> = members.iter().map(|i| Participant::new(instance.clone(), *i, key(*i), seed(2, *i)).unwrap()).collect();
    for (i, node) in members.iter().zip(&nodes) {
        ceremony.apply(MessageKind::Commit, *i, &node.package().commit).unwrap();
    }
    for (i, node) in members.iter().zip(&nodes) {
        ceremony.apply(MessageKind::Deal, *i, &node.package().body).unwrap();
        #[cfg(feature = "insecure-test-export")]
        node.package().dealer_constant.expose(|constant| learn(constant));
    }
    for (i, node) in members.iter().zip(&mut nodes) {
        let Checked::Ready(ready) = node.check(&ceremony).unwrap() else { panic!("{i} complains") };
        ceremony.apply(MessageKind::Ready, *i, &ready.encode()).unwrap();
    }
    let pk: [u8; 32] = ceremony.switched().unwrap().public_key().try_into().unwrap();
    let shares: Vec<_> = nodes
        .into_iter()
        .map(|node| {
            let outcome = node.finish(&ceremony).unwrap();
            outcome.share().expose(|share| learn(share));
            outcome.into_prf_share().unwrap()
        })
        .collect();

    // A share to disk and back.
    let sealing = SealingKey::derive(&CLUSTER, b"m", None, Some(&Secret::from_fn(|s| s.fill(0x66)))).unwrap();
    let name = ShareName::share(CLUSTER, RootTag::Prf, Generation(0), Epoch(1), NodeIndex(1));
    let file = share_file::seal(&sealing, &name, shares[0].scalar(), [9; 24]);
    drop(share_file::open(&sealing, &name, &file).unwrap());

    // A release.
    let wishes = [Wish::new(KeyClass::Disk, vec![]).unwrap(), Wish::new(KeyClass::K256, vec![]).unwrap()];
    let batch = Batch::new(&CLUSTER, &APP, &wishes).unwrap();
    let recipient = RecipientKey::new(Secret::from_fn(|s| s.fill(0x55)));
    let context = AnswerContext { cluster_id: &CLUSTER, generation: Generation(0), req_hash: &[8; 32] };
    let mut combiner = Combiner::new(batch.clone(), Generation(0), &pk).unwrap();
    let mut group = None;
    for share in &shares[..2] {
        let plain = evaluate(share, &batch, &[5; 64]).into_plain(1, 2, [6; 32]);
        let out = seal_partial(plain, &context, &recipient.public(), Secret::from_fn(|s| s.fill(0x44))).unwrap();
        group = Some(combiner.add(&open_partial(&out, &context, &recipient).unwrap()).unwrap());
    }
    let combined = combiner.combine(&group.unwrap(), 2, None).unwrap();
    for (wish, output) in wishes.iter().zip(&combined.outputs) {
        output.expose(|z| learn(&z[..32]));
        let key = derive(wish, &APP, output).unwrap();
        key.bytes().expose(|bytes| learn(bytes));
        assert_eq!(key.public_key().is_some(), wish.class == KeyClass::K256);
    }
}

// One test: the search covers the whole process.
#[test]
fn no_freed_block_holds_a_share_an_output_or_a_key() {
    let mut learned: Vec<[u8; 32]> = Vec::new();
    run(&mut |secret| learned.push(secret.try_into().unwrap()));
    assert!(learned.len() >= 7);
    let planted = learned[0];
    SECRETS.set(learned).unwrap();

    let mut again = 0;
    run(&mut |secret| again += usize::from(SECRETS.get().unwrap().iter().any(|s| s == secret)));
    assert!(again >= 7, "the second pass makes the same secrets");
    assert_eq!(BLOCKS_FREED_WITH_SECRET.load(Ordering::SeqCst), 0);

    // The instrument sees what it must see.
    drop(std::hint::black_box(planted.to_vec()));
    assert_eq!(BLOCKS_FREED_WITH_SECRET.load(Ordering::SeqCst), 1);
}
