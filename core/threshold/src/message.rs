//! Node keys and the signatures of ceremony messages.
//!
//! Owns: Ed25519 signing with a key in locked memory, strict verification. Source: threshold.md §0 (`Sign`), §3 (`sig`).

use std::fmt;

use dstack_protocol::ceremony::{Message, MessageKind};
use dstack_protocol::{ClusterId, NodeIndex};
use dstack_secret::{LockWarning, Locked, Secret};
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};

/// A node's signing key: heads, clock readings, ceremony messages. In locked memory.
pub struct NodeKey {
    seed: Locked<32>,
    public: [u8; 32],
}

impl NodeKey {
    /// The key of a 32-byte seed, fresh from the operating system or out of a sealed file.
    #[must_use]
    pub fn new(seed: Secret<32>) -> Self {
        let public = seed.expose(|seed| SigningKey::from_bytes(seed).verifying_key().to_bytes());
        Self { seed: Locked::new(seed), public }
    }

    /// The public key.
    #[must_use]
    pub fn public(&self) -> [u8; 32] {
        self.public
    }

    /// The seed, for sealing (threshold.md §6).
    #[must_use]
    pub fn seed(&self) -> &Locked<32> {
        &self.seed
    }

    /// Memory protections that the system refused.
    #[must_use]
    pub fn lock_warnings(&self) -> &[LockWarning] {
        self.seed.warnings()
    }

    /// `Sign(node_key, bytes)`.
    #[must_use]
    pub fn sign(&self, bytes: &[u8]) -> [u8; 64] {
        self.seed.expose(|seed| SigningKey::from_bytes(seed).sign(bytes).to_bytes())
    }

    /// A signed ceremony message.
    #[must_use]
    pub fn sign_message(&self, cluster_id: &ClusterId, kind: MessageKind, index: NodeIndex, inst: [u8; 32], body: Vec<u8>) -> Message {
        let mut message = Message { kind, index, inst, body, sig: [0; 64] };
        message.sig = self.sign(&message.signed_bytes(cluster_id));
        message
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeKey").finish_non_exhaustive()
    }
}

/// Strict Ed25519 verification: canonical key and signature, no point of small order.
#[must_use]
pub fn verify(public: &[u8; 32], bytes: &[u8], sig: &[u8; 64]) -> bool {
    canonical(public) && VerifyingKey::from_bytes(public).is_ok_and(|key| key.verify_strict(bytes, &Signature::from_bytes(sig)).is_ok())
}

/// Whether `message` is signed by `node_key` for this cluster.
#[must_use]
pub fn verify_message(message: &Message, cluster_id: &ClusterId, node_key: &[u8; 32]) -> bool {
    verify(node_key, &message.signed_bytes(cluster_id), &message.sig)
}

/// Whether the encoded y coordinate is below p = 2²⁵⁵ − 19; the library also reads the 19 encodings above.
fn canonical(public: &[u8; 32]) -> bool {
    let [lowest, middle @ .., highest] = public;
    highest & 0x7f != 0x7f || *lowest < 0xed || middle.iter().any(|byte| *byte != 0xff)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> NodeKey {
        NodeKey::new(Secret::from_fn(|b| b.fill(byte)))
    }

    const CLUSTER: ClusterId = ClusterId([4; 32]);

    #[test]
    fn rfc_8032_test_2() {
        let mut seed: [u8; 32] =
            hex::decode("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb").unwrap().try_into().unwrap();
        let key = NodeKey::new(Secret::take(&mut seed));
        assert_eq!(hex::encode(key.public()), "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c");
        assert_eq!(
            hex::encode(key.sign(&[0x72])),
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
        );
    }

    #[test]
    fn every_field_of_a_message_is_signed() {
        let good = key(1).sign_message(&CLUSTER, MessageKind::Ready, NodeIndex(2), [3; 32], vec![1, 2]);
        let public = key(1).public();
        assert!(verify_message(&good, &CLUSTER, &public));
        assert!(!verify_message(&good, &ClusterId([5; 32]), &public));
        assert!(!verify_message(&good, &CLUSTER, &key(2).public()));
        for bad in [
            Message { kind: MessageKind::Commit, ..good.clone() },
            Message { index: NodeIndex(3), ..good.clone() },
            Message { inst: [0; 32], ..good.clone() },
            Message { body: vec![1], ..good.clone() },
            Message { sig: [0; 64], ..good.clone() },
        ] {
            assert!(!verify_message(&bad, &CLUSTER, &public));
        }
    }

    #[test]
    fn weak_and_non_canonical_keys_are_refused() {
        // Under the identity as key, (R = identity, s = 0) would satisfy the bare equation for any message.
        let mut identity = [0; 32];
        identity[0] = 1;
        let mut forged = [0; 64];
        forged[0] = 1;
        assert!(!verify(&identity, b"anything", &forged));
        let mut above = [0xff; 32];
        above[0] = 0xee;
        above[31] = 0x7f;
        assert!(!canonical(&above));
        above[0] = 0xec;
        assert!(canonical(&above));
        assert!(canonical(&key(1).public()));
    }

    #[test]
    fn signatures_with_s_above_the_order_are_refused() {
        let key = key(7);
        let good = key.sign(b"m");
        assert!(verify(&key.public(), b"m", &good));
        // s + ℓ: the same residue, another encoding.
        let order = hex::decode("edd3f55c1a631258d69cf7a2def9de1400000000000000000000000000000010").unwrap();
        let mut bad = good;
        let mut carry = 0u16;
        for (byte, add) in bad[32..].iter_mut().zip(order) {
            carry += u16::from(*byte) + u16::from(add);
            *byte = carry as u8;
            carry >>= 8;
        }
        assert!(!verify(&key.public(), b"m", &bad));
    }
}
