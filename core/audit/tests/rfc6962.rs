//! The eight-leaf tree that Certificate Transparency implementations share as a known answer, and properties against RFC 6962's
//! recursive definitions written down naively.
//!
//! Source of the constants: `merkle_tree_test` of the certificate-transparency project (leaves, roots, audit and consistency paths).
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use dstack_audit::{
    AuditError, Frontier, Hash, LeafNodes, MemoryTree, consistency_proof, empty_root, inclusion_proof, leaf_hash, node_hash, root_at,
    verify_consistency, verify_inclusion,
};
use dstack_protocol::Wire;
use proptest::prelude::*;

const LEAVES: [&str; 8] = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"];

const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

const ROOTS: [&str; 8] = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
];

/// (position from 0, size, path)
const PATHS: [(u64, u64, &[&str]); 5] = [
    (0, 1, &[]),
    (
        0,
        8,
        &[
            "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
        ],
    ),
    (
        5,
        8,
        &[
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ],
    ),
    (2, 3, &["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"]),
    (
        1,
        5,
        &[
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        ],
    ),
];

/// (old size, new size, path)
const EXTENSIONS: [(u64, u64, &[&str]); 4] = [
    (1, 1, &[]),
    (
        1,
        8,
        &[
            "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
        ],
    ),
    (
        6,
        8,
        &[
            "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ],
    ),
    (
        2,
        5,
        &[
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        ],
    ),
];

fn hash(text: &str) -> Hash {
    hex::decode(text).unwrap().try_into().unwrap()
}

fn known_tree() -> MemoryTree {
    let mut tree = MemoryTree::new();
    for leaf in LEAVES {
        tree.append(leaf_hash(&hex::decode(leaf).unwrap())).unwrap();
    }
    tree
}

#[test]
fn roots_equal_the_known_answers() {
    assert_eq!(empty_root(), hash(EMPTY));
    assert_eq!(Frontier::new().root(), hash(EMPTY));
    let mut frontier = Frontier::new();
    let tree = known_tree();
    assert_eq!(root_at(&tree, 0), Ok(hash(EMPTY)));
    for (at, (leaf, root)) in LEAVES.iter().zip(ROOTS).enumerate() {
        frontier.append(leaf_hash(&hex::decode(leaf).unwrap())).unwrap();
        assert_eq!(frontier.root(), hash(root), "size {}", at + 1);
        assert_eq!(root_at(&tree, at as u64 + 1), Ok(hash(root)));
    }
}

#[test]
fn inclusion_paths_equal_the_known_answers() {
    let tree = known_tree();
    for (pos, size, path) in PATHS {
        let path: Vec<Hash> = path.iter().map(|text| hash(text)).collect();
        assert_eq!(inclusion_proof(&tree, pos, size).unwrap(), path, "leaf {pos} of {size}");
        let leaf = leaf_hash(&hex::decode(LEAVES[pos as usize]).unwrap());
        assert_eq!(verify_inclusion(&leaf, pos, size, &path, &hash(ROOTS[size as usize - 1])), Ok(()));
    }
}

#[test]
fn consistency_paths_equal_the_known_answers() {
    let tree = known_tree();
    for (old, new, path) in EXTENSIONS {
        let path: Vec<Hash> = path.iter().map(|text| hash(text)).collect();
        assert_eq!(consistency_proof(&tree, old, new).unwrap(), path, "{old} to {new}");
        let (old_root, new_root) = (hash(ROOTS[old as usize - 1]), hash(ROOTS[new as usize - 1]));
        assert_eq!(verify_consistency(old, new, &path, &old_root, &new_root), Ok(()));
    }
}

#[test]
fn proofs_outside_the_tree_are_refused() {
    let tree = known_tree();
    assert_eq!(inclusion_proof(&tree, 8, 8), Err(AuditError::OutOfTree { pos: 8, size: 8 }));
    assert_eq!(inclusion_proof(&tree, 0, 9), Err(AuditError::MissingNode { level: 0, index: 8 }));
    assert_eq!(consistency_proof(&tree, 9, 8), Err(AuditError::OutOfTree { pos: 9, size: 8 }));
    assert_eq!(verify_inclusion(&[0; 32], 0, 0, &[], &empty_root()), Err(AuditError::OutOfTree { pos: 0, size: 0 }));
    let huge = LeafNodes::new(|_| None);
    assert!(inclusion_proof(&huge, u64::MAX - 1, u64::MAX).is_err());
}

#[test]
fn absurd_sizes_and_proofs_end_in_an_error() {
    let root = [7; 32];
    for size in [1, 2, 3, 1 << 40, u64::MAX] {
        for hashes in [0, 1, 63, 64, 65, 255] {
            let proof = vec![[9; 32]; hashes];
            assert!(verify_inclusion(&[1; 32], size - 1, size, &proof, &root).is_err());
            assert!(verify_inclusion(&[1; 32], 0, size, &proof, &root).is_err());
            assert!(verify_consistency(1, size, &proof, &[1; 32], &root).is_err());
            assert!(verify_consistency(size, u64::MAX, &proof, &[1; 32], &root).is_err());
        }
    }
}

/// RFC 6962 §2.1, word for word.
fn naive_root(leaves: &[Hash]) -> Hash {
    match leaves {
        [] => empty_root(),
        [leaf] => *leaf,
        _ => {
            let (left, right) = leaves.split_at(naive_split(leaves.len()));
            node_hash(&naive_root(left), &naive_root(right))
        }
    }
}

/// RFC 6962 §2.1.1, word for word.
fn naive_path(pos: usize, leaves: &[Hash]) -> Vec<Hash> {
    if leaves.len() <= 1 {
        return Vec::new();
    }
    let k = naive_split(leaves.len());
    let (left, right) = leaves.split_at(k);
    let (mut path, other) =
        if pos < k { (naive_path(pos, left), naive_root(right)) } else { (naive_path(pos - k, right), naive_root(left)) };
    path.push(other);
    path
}

/// RFC 6962 §2.1.2, word for word.
fn naive_subproof(old: usize, leaves: &[Hash], whole: bool) -> Vec<Hash> {
    if old == leaves.len() {
        return if whole { Vec::new() } else { vec![naive_root(leaves)] };
    }
    let k = naive_split(leaves.len());
    let (left, right) = leaves.split_at(k);
    let (mut path, other) = if old <= k {
        (naive_subproof(old, left, whole), naive_root(right))
    } else {
        (naive_subproof(old - k, right, false), naive_root(left))
    };
    path.push(other);
    path
}

fn naive_split(count: usize) -> usize {
    let mut k = 1;
    while k * 2 < count {
        k *= 2;
    }
    k
}

fn leaves(count: usize, seed: u8) -> Vec<Hash> {
    (0..count).map(|at| leaf_hash(&[seed, at as u8, (at >> 8) as u8])).collect()
}

proptest! {
    #[test]
    fn frontier_tree_and_leaves_agree_with_the_definition(count in 0_usize..300, seed: u8) {
        let all = leaves(count, seed);
        let mut frontier = Frontier::new();
        let mut tree = MemoryTree::new();
        for leaf in &all {
            frontier.append(*leaf).unwrap();
            tree.append(*leaf).unwrap();
        }
        let root = naive_root(&all);
        prop_assert_eq!(frontier.root(), root);
        prop_assert_eq!(tree.root(), root);
        let nodes = LeafNodes::new(|pos| all.get(pos as usize).copied());
        prop_assert_eq!(root_at(&nodes, count as u64), Ok(root));
        let again = Frontier::from_parts(frontier.size(), frontier.peaks().to_vec()).unwrap();
        prop_assert_eq!(again, frontier);
    }

    #[test]
    fn inclusion_agrees_with_the_definition_and_every_change_is_noticed(
        count in 1_usize..200, at: prop::sample::Index, seed: u8, bit in 0_usize..256, hit: prop::sample::Index,
    ) {
        let all = leaves(count, seed);
        let pos = at.index(count);
        let mut tree = MemoryTree::new();
        for leaf in &all {
            tree.append(*leaf).unwrap();
        }
        let proof = inclusion_proof(&tree, pos as u64, count as u64).unwrap();
        prop_assert_eq!(&proof, &naive_path(pos, &all));
        let (size, root) = (count as u64, tree.root());
        prop_assert_eq!(verify_inclusion(&all[pos], pos as u64, size, &proof, &root), Ok(()));

        let mut leaf = all[pos];
        leaf[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(verify_inclusion(&leaf, pos as u64, size, &proof, &root).is_err());
        if !proof.is_empty() {
            let mut bent = proof.clone();
            bent[hit.index(proof.len())][bit / 8] ^= 1 << (bit % 8);
            prop_assert!(verify_inclusion(&all[pos], pos as u64, size, &bent, &root).is_err());
            prop_assert!(verify_inclusion(&all[pos], pos as u64, size, &proof[1..], &root).is_err());
        }
        let mut longer = proof.clone();
        longer.push([0; 32]);
        prop_assert!(verify_inclusion(&all[pos], pos as u64, size, &longer, &root).is_err());
        for other in 0..count {
            if other != pos {
                prop_assert!(verify_inclusion(&all[pos], other as u64, size, &proof, &root).is_err());
            }
        }
    }

    #[test]
    fn consistency_agrees_with_the_definition_and_every_change_is_noticed(
        new in 1_usize..200, at: prop::sample::Index, seed: u8, bit in 0_usize..256, hit: prop::sample::Index,
    ) {
        let all = leaves(new, seed);
        let old = at.index(new) + 1;
        let nodes = LeafNodes::new(|pos| all.get(pos as usize).copied());
        let proof = consistency_proof(&nodes, old as u64, new as u64).unwrap();
        prop_assert_eq!(&proof, &naive_subproof(old, &all, true));
        let (old_root, new_root) = (naive_root(&all[..old]), naive_root(&all));
        let judge = |proof: &[Hash], old_root, new_root| verify_consistency(old as u64, new as u64, proof, old_root, new_root);
        prop_assert_eq!(judge(&proof, &old_root, &new_root), Ok(()));

        let mut bent_root = old_root;
        bent_root[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(judge(&proof, &bent_root, &new_root).is_err());
        if !proof.is_empty() {
            let mut bent = proof.clone();
            bent[hit.index(proof.len())][bit / 8] ^= 1 << (bit % 8);
            prop_assert!(judge(&bent, &old_root, &new_root).is_err());
            prop_assert!(judge(&proof[1..], &old_root, &new_root).is_err());
        }
        let mut longer = proof.clone();
        longer.push([0; 32]);
        prop_assert!(judge(&longer, &old_root, &new_root).is_err());
    }

    #[test]
    fn a_frontier_has_one_encoding(count in 0_usize..300, seed: u8, extra in proptest::collection::vec(any::<u8>(), 1..40)) {
        let mut frontier = Frontier::new();
        frontier.append_batch(&leaves(count, seed)).unwrap();
        let bytes = frontier.encode();
        prop_assert_eq!(bytes.len(), 8 + 32 * frontier.peaks().len());
        prop_assert_eq!(Frontier::decode(&bytes), Ok(frontier));
        prop_assert!(Frontier::decode(&bytes[..bytes.len() - 1]).is_err());
        prop_assert!(Frontier::decode(&[&bytes[..], &extra].concat()).is_err());
    }

    #[test]
    fn any_bytes_decode_to_a_frontier_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
        if let Ok(frontier) = Frontier::decode(&bytes) {
            prop_assert_eq!(frontier.encode(), bytes);
        }
    }

    #[test]
    fn a_batch_proves_its_own_leaves_without_a_store(before in 0_usize..150, batch in 1_usize..60, seed: u8) {
        let all = leaves(before + batch, seed);
        let mut frontier = Frontier::new();
        frontier.append_batch(&all[..before]).unwrap();
        let recent = frontier.append_batch(&all[before..]).unwrap();
        prop_assert_eq!(recent.first(), before as u64);
        prop_assert_eq!(recent.size(), all.len() as u64);
        for pos in before..all.len() {
            prop_assert_eq!(inclusion_proof(&recent, pos as u64, recent.size()).unwrap(), naive_path(pos, &all));
        }
    }
}
