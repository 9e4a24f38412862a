//! Proofs, receipts and whole logs of foreign bytes: they end in a value or an error, and what is proven by itself is accepted.

use dstack_audit::{
    Hash, MemoryTree, consistency_proof, inclusion_proof, leaf_hash, verify_consistency, verify_inclusion, verify_log, verify_receipt,
};
use dstack_protocol::codec::Reader;
use dstack_protocol::log::HeadCert;
use dstack_protocol::receipt::Receipt;
use dstack_protocol::{ClusterId, DecodeError, Wire};

/// See the module text.
pub(crate) fn run(data: &[u8]) {
    let Some((way, bytes)) = data.split_first() else { return };
    let _: Result<(), DecodeError> = match way % 4 {
        0 => foreign_proof(bytes),
        1 => own_proof(bytes),
        2 => foreign_receipt(bytes),
        _ => foreign_log(bytes),
    };
}

fn hashes(r: &mut Reader<'_>) -> Result<Vec<Hash>, DecodeError> {
    let count = r.remaining() / 32;
    r.list("hashes", count, 32, |r| r.array("hash"))
}

fn foreign_proof(bytes: &[u8]) -> Result<(), DecodeError> {
    let mut r = Reader::new(bytes);
    let (pos, size) = (r.u64("pos")?, r.u64("size")?);
    let (leaf, root) = (r.array("leaf")?, r.array("root")?);
    let proof = hashes(&mut r)?;
    let _ = verify_inclusion(&leaf, pos, size, &proof, &root);
    let _ = verify_consistency(pos, size, &proof, &leaf, &root);
    Ok(())
}

fn own_proof(bytes: &[u8]) -> Result<(), DecodeError> {
    let mut r = Reader::new(bytes);
    let (pos, old) = (u64::from(r.u8("pos")?), u64::from(r.u8("old")?));
    let mut tree = MemoryTree::new();
    let mut old_root = tree.root();
    for byte in r.rest().iter().take(256) {
        tree.append(leaf_hash(&[*byte])).expect("256 leaves fit");
        if tree.size() == old {
            old_root = tree.root();
        }
    }
    let (size, root) = (tree.size(), tree.root());
    if let Ok(proof) = inclusion_proof(&tree, pos, size) {
        let leaf = leaf_hash(&bytes[2 + pos as usize..][..1]);
        verify_inclusion(&leaf, pos, size, &proof, &root).expect("our own proof holds");
    }
    if let Ok(proof) = consistency_proof(&tree, old, size) {
        verify_consistency(old, size, &proof, &old_root, &root).expect("our own proof holds");
    }
    Ok(())
}

fn foreign_receipt(bytes: &[u8]) -> Result<(), DecodeError> {
    let receipt = Receipt::decode(bytes)?;
    let _ = verify_receipt(&receipt, &receipt.intent);
    Ok(())
}

fn foreign_log(bytes: &[u8]) -> Result<(), DecodeError> {
    let mut r = Reader::new(bytes);
    let cluster_id = ClusterId(r.array("cluster_id")?);
    let mut certificates = Vec::new();
    for _ in 0..r.u8("certificates")? {
        certificates.push(HeadCert::decode(r.lp("certificate", HeadCert::BYTES_MAX)?)?);
    }
    let mut records = Vec::new();
    while r.remaining() > 0 {
        let record = r.lp("record", 1 << 10)?;
        let body = if r.flag("has body")? { Some(r.lp("body", 1 << 15)?) } else { None };
        records.push((record, body));
    }
    let _ = verify_log(cluster_id, certificates, records);
    Ok(())
}
