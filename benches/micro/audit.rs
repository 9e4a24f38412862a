//! The Merkle log: appending, proving, verifying, at 100,000 leaves.

use std::cell::{LazyCell, RefCell};

use criterion::{BatchSize, Criterion};
use dstack_audit::{Frontier, MemoryTree, inclusion_proof, verify_inclusion};
use dstack_benches::clock::CpuTime;

use crate::measure;

const LEAVES: u64 = 100_000;

pub(crate) fn all(criterion: &mut Criterion<CpuTime>) {
    let tree = LazyCell::new(|| {
        let mut tree = MemoryTree::new();
        for at in 0..LEAVES {
            tree.append(leaf(at)).unwrap();
        }
        tree
    });
    let frontier = RefCell::new(Frontier::new());
    measure(criterion, "audit/append/1", |bencher| {
        let mut frontier = frontier.borrow_mut();
        bencher.iter(|| frontier.append([7; 32]).unwrap());
    });
    let batch: Vec<[u8; 32]> = (0..128).map(leaf).collect();
    measure(criterion, "audit/append_batch/128", |bencher| {
        let frontier = tree.frontier();
        bencher.iter_batched(|| frontier.clone(), |mut frontier| frontier.append_batch(&batch).unwrap(), BatchSize::SmallInput);
    });
    let pos = 77_777;
    measure(criterion, "audit/inclusion_proof/100k", |bencher| {
        let tree = &*tree;
        bencher.iter(|| inclusion_proof(tree, pos, LEAVES).unwrap());
    });
    measure(criterion, "audit/verify_inclusion/100k", |bencher| {
        let (root, proof) = (tree.root(), inclusion_proof(&*tree, pos, LEAVES).unwrap());
        bencher.iter(|| verify_inclusion(&leaf(pos), pos, LEAVES, &proof, &root).unwrap());
    });
}

fn leaf(at: u64) -> [u8; 32] {
    let mut leaf = [3; 32];
    leaf[..8].copy_from_slice(&at.to_be_bytes());
    leaf
}
