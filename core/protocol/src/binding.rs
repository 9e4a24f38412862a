//! What evidence commits to: the report data of each use.
//!
//! Source: threshold.md §1.6, §2.2, §3; dstack's own binding from the attestation reference §3.

use crate::codec::{Writer, sha256, sha512};
use crate::ids::{AppId, ClusterId, Epoch, Generation, NodeIndex, RootTag, Seat};
use crate::sign::keccak256;

/// 64 bytes that a platform signs with the measurement.
pub type ReportData = [u8; 64];

/// dstack's own binding of a TLS key: `SHA-512("ratls-cert:" ‖ SPKI)`.
#[must_use]
pub fn ratls_certificate(spki_der: &[u8]) -> ReportData {
    sha512(&[b"ratls-cert:", spki_der])
}

/// dstack's binding of a KMS's public keys, as `Bootstrap` shows them (KMS API reference §11): `Keccak256("dstack-kms-genereted-keys-v1:" ‖
/// hex(SPKI of the root CA) ‖ ";" ‖ hex(identity) ‖ ";") ‖ 0³²`. The misspelling is the protocol's.
#[must_use]
pub fn bootstrapped(ca_spki_der: &[u8], k256_pubkey: &[u8]) -> ReportData {
    let (ca, identity) = (hex::encode(ca_spki_der), hex::encode(k256_pubkey));
    let digest = keccak256(&[b"dstack-kms-genereted-keys-v1:", ca.as_bytes(), b";", identity.as_bytes(), b";"]);
    let mut data = [0; 64];
    data.iter_mut().zip(digest).for_each(|(to, from)| *to = from);
    data
}

/// Session of a client in mode C (threshold.md §2.2).
#[must_use]
pub fn session(cluster_id: &ClusterId, beacon_pos: u64, beacon: &[u8; 32], spki_der: &[u8]) -> ReportData {
    let mut w = Writer::labelled("DKMS-V1-SESSION");
    w.raw(&cluster_id.0).u64(beacon_pos).raw(beacon).lp(spki_der);
    sha512(&[&w.into_bytes()])
}

/// A node's Admit (threshold.md §3).
#[must_use]
pub fn admit(cluster_id: &ClusterId, seat: Seat, node_key: &[u8; 32], incarnation: u64, beacon_pos: u64, beacon: &[u8; 32]) -> ReportData {
    let mut w = Writer::labelled("DKMS-V1-ADMIT");
    w.raw(&cluster_id.0).u16(seat.0).raw(node_key).u64(incarnation).u64(beacon_pos).raw(beacon);
    sha512(&[&w.into_bytes()])
}

/// What a [`join`] commits to.
#[derive(Debug, Clone, Copy)]
pub struct JoinBinding<'a> {
    /// Cluster.
    pub cluster_id: &'a ClusterId,
    /// Generation of the roots.
    pub generation: Generation,
    /// `'D'`, `'R'`, `'B'` or `'V'`.
    pub what: u8,
    /// Epoch the ceremony leads to.
    pub new_epoch: Epoch,
    /// Attempt number.
    pub attempt: u32,
    /// Index of the node.
    pub index: NodeIndex,
    /// Recent beacon.
    pub beacon_pos: u64,
    /// Its value.
    pub beacon: &'a [u8; 32],
    /// The node's signing key.
    pub node_key: &'a [u8; 32],
    /// Encryption key of each root, ascending by root.
    pub keys: &'a [(RootTag, [u8; 32])],
}

/// A node's Join (threshold.md §3).
#[must_use]
pub fn join(b: &JoinBinding<'_>) -> ReportData {
    let mut w = Writer::labelled("DKMS-V1-JOIN");
    w.raw(&b.cluster_id.0)
        .u32(b.generation.0)
        .u8(b.what)
        .u64(b.new_epoch.0)
        .u32(b.attempt)
        .u16(b.index.0)
        .u64(b.beacon_pos)
        .raw(b.beacon)
        .raw(b.node_key);
    for (root, key) in b.keys {
        w.u8(root.byte()).raw(key);
    }
    sha512(&[&w.into_bytes()])
}

/// The genesis certificate of one root (threshold.md §1.6).
#[must_use]
pub fn genesis_certificate(
    cluster_id: &ClusterId,
    generation: Generation,
    root: RootTag,
    public_key: &[u8],
    transcript: &[u8; 32],
) -> ReportData {
    let mut w = Writer::labelled("DKMS-V1-GENESIS");
    w.raw(&cluster_id.0).u32(generation.0).u8(root.byte()).lp(public_key).raw(transcript);
    sha512(&[&w.into_bytes()])
}

/// An app's claim to its secp256k1 key in mode C (threshold.md §5.1).
#[must_use]
pub fn app_pk(
    cluster_id: &ClusterId,
    generation: Generation,
    app_id: &AppId,
    app_pk: &[u8; 33],
    beacon_pos: u64,
    beacon: &[u8; 32],
) -> ReportData {
    let mut w = Writer::labelled("DKMS-V1-APPPK");
    w.raw(&cluster_id.0).u32(generation.0).raw(&app_id.0).raw(app_pk).u64(beacon_pos).raw(beacon);
    sha512(&[&w.into_bytes()])
}

/// `SHA-256("DKMS-V1-EVIDENCE" ‖ evidence)`: the name of a piece of evidence.
#[must_use]
pub fn evidence_hash(evidence: &[u8]) -> [u8; 32] {
    sha256(&[b"DKMS-V1-EVIDENCE", evidence])
}

/// What kind of statement a platform's key signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Statement<'a> {
    /// A TDX quote: header and TD report, and `r` of the quote's signature.
    TdxQuote(&'a [u8], &'a [u8; 32]),
    /// A document of the Nitro security module or of a NitroTPM: its payload, which has a date.
    NsmDocument(&'a [u8]),
    /// A SEV-SNP report, and `r` of its signature, big-endian.
    SnpReport(&'a [u8], &'a [u8; 48]),
}

/// `SHA-256("DKMS-V1-STATEMENT" ‖ kind(1) ‖ SHA-256(signed) ‖ r)`: the name of what a platform signed once, however it is encoded and
/// whatever stands beside it (ADR 0033). `kind`: 1, 2, 3 in the order of [`Statement`]. `r` tells a new quote over the same report from
/// the old one; `s` is left out, because anybody can turn its sign.
#[must_use]
pub fn statement_id(statement: Statement<'_>) -> [u8; 32] {
    let (kind, signed, r) = match statement {
        Statement::TdxQuote(signed, r) => (1, signed, &r[..]),
        Statement::NsmDocument(signed) => (2, signed, &[][..]),
        Statement::SnpReport(signed, r) => (3, signed, &r[..]),
    };
    sha256(&[b"DKMS-V1-STATEMENT", &[kind], &sha256(&[signed]), r])
}

/// Evidence of dstack's legacy extension pair as one byte string.
#[must_use]
pub fn legacy_evidence(quote: &[u8], event_log: &[u8]) -> Vec<u8> {
    let mut w = Writer::labelled("DKMS-V1-LEGACY");
    w.lp4(quote).lp4(event_log);
    w.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The public keys are those of the KMS API reference §15; the digest was computed by another implementation of Keccak.
    #[test]
    fn binds_a_bootstrapped_kms_as_upstream_does() {
        let ca = "3059301306072a8648ce3d020106082a8648ce3d0301070342000491f50522407ce29dce3ed7d31a15d80c1c42f13a23552d2b33a0ce09ee11e47b\
                  ce95936f3e7f80d195f879e28e1b144ef37ac9ab8e36a690cbf930b775897b27";
        let identity = "023c72addb4fdf09af94f0c94d7fe92a386a7e70cf8a1d85916386bb2535c7b1b1";
        let data = bootstrapped(&hex::decode(ca).unwrap(), &hex::decode(identity).unwrap());
        assert_eq!(hex::encode(&data[..32]), "b91917c1f7ace0cc2ac44a6ae99187c6bcf7a0b9fe021c142c974940d516bdd1");
        assert_eq!(data[32..], [0; 32]);
    }

    #[test]
    fn a_statement_is_named_by_what_is_signed_and_by_the_signing() {
        let names = [
            Statement::TdxQuote(b"report", &[1; 32]),
            Statement::TdxQuote(b"report", &[2; 32]),
            Statement::TdxQuote(b"other", &[1; 32]),
            Statement::NsmDocument(b"report"),
            Statement::SnpReport(b"report", &[1; 48]),
        ]
        .map(statement_id);
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
        // SHA-256("DKMS-V1-STATEMENT" ‖ 01 ‖ SHA-256("report") ‖ 01 * 32), by another implementation.
        let hex: String = names[0].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "04f3767cd38fe8a16383e79b7f9d3dbc0d93bc0b0970913f5552e5116ab94087");
    }
}
