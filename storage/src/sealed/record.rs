//! The sealed record: `version(1) ‖ index(8) ‖ term(8) ‖ nonce(24) ‖ ciphertext ‖ tag(16)`, XChaCha20-Poly1305 with a random nonce.
//!
//! Owns: key derivation, associated data, fingerprints. Never: reuses a nonce on purpose; keeps the caller's key.
//! Associated data: domain ‖ tree(1) ‖ key length(2) ‖ key ‖ version ‖ index ‖ term, so a record authenticates at its place only.

use std::fmt;
use std::sync::Arc;

use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use dstack_secret::Secret;
use hkdf::Hkdf;
use hmac::{Hmac, Mac};
use sha2::Sha256;

use super::head::Fingerprint;
use super::{Opened, Stamp};
use crate::engine::Tree;
use crate::error::StoreError;

/// The 32-byte key from which all keys of a node's storage are derived. Sealed or lost with the shares (threshold.md §6): a node
/// that lost it starts with an empty directory.
#[derive(Debug)]
pub struct RecordKey(Arc<Secret<32>>);

impl RecordKey {
    /// Takes the key.
    pub fn new(key: Secret<32>) -> Self {
        Self(Arc::new(key))
    }

    /// Another handle to the same bytes, for the thread that opens.
    pub(crate) fn share(&self) -> Self {
        Self(Arc::clone(&self.0))
    }

    /// A key for one purpose of the store `id`.
    pub(crate) fn derive(&self, id: &[u8], purpose: &[u8]) -> Secret<32> {
        self.0.expose(|key| {
            let hkdf = Hkdf::<Sha256>::new(Some(id), key);
            Secret::from_fn(|okm| hkdf.expand_multi_info(&[DOMAIN, purpose], okm).expect("32 bytes are a valid length"))
        })
    }
}

/// Names one store; part of its keys, so that records of another store never authenticate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StoreId([u8; 16]);

impl StoreId {
    pub(super) fn random() -> Result<Self, StoreError> {
        let mut id = [0; 16];
        getrandom::fill(&mut id).map_err(|_| StoreError::NoRandomness)?;
        Ok(Self(id))
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION];
        bytes.extend_from_slice(&self.0);
        bytes
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, StoreError> {
        let tampered = StoreError::Tampered { tree: Tree::Meta, key: hex(super::KEY_STORE), detail: "header has a wrong size" };
        let (&version, id) = bytes.split_first().ok_or(tampered.clone())?;
        if version != VERSION {
            return Err(StoreError::Version { found: version, supported: VERSION });
        }
        id.try_into().map(Self).map_err(|_| tampered)
    }
}

/// The keys of one store.
pub(super) struct Keys {
    cipher: XChaCha20Poly1305,
    fingerprint: Hmac<Sha256>,
    anchor: Hmac<Sha256>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys(redacted)")
    }
}

impl Keys {
    pub(super) fn derive(key: &RecordKey, id: &StoreId) -> Self {
        let mac = |purpose| key.derive(&id.0, purpose).expose(|key| Hmac::new_from_slice(key).expect("any length is a valid key"));
        Self {
            cipher: key.derive(&id.0, b"records").expose(|key| XChaCha20Poly1305::new(&(*key).into())),
            fingerprint: mac(b"fingerprints"),
            anchor: mac(b"anchor"),
        }
    }

    pub(super) fn seal(&self, tree: Tree, key: &[u8], stamp: Stamp, value: &[u8]) -> Result<Vec<u8>, StoreError> {
        let mut nonce = [0u8; NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(|_| StoreError::NoRandomness)?;
        let aad = associated_data(tree, key, stamp);
        let ciphertext = self.cipher.encrypt(&XNonce::from(nonce), Payload { msg: value, aad: &aad }).map_err(|_| {
            StoreError::TooLarge { what: "value", bytes: u64::try_from(value.len()).unwrap_or(u64::MAX), max_bytes: u64::from(u32::MAX) }
        })?;
        let mut stored = Vec::with_capacity(HEADER_BYTES.saturating_add(ciphertext.len()));
        stored.push(VERSION);
        stored.extend_from_slice(&stamp.index.to_be_bytes());
        stored.extend_from_slice(&stamp.term.to_be_bytes());
        stored.extend_from_slice(&nonce);
        stored.extend_from_slice(&ciphertext);
        Ok(stored)
    }

    pub(super) fn open(&self, tree: Tree, key: &[u8], stored: &[u8]) -> Result<Opened, StoreError> {
        let parts = Parts::of(tree, key, stored)?;
        let stamp = parts.stamp;
        let aad = associated_data(tree, key, stamp);
        let value = self
            .cipher
            .decrypt(&XNonce::from(*parts.nonce), Payload { msg: parts.ciphertext, aad: &aad })
            .map_err(|_| tampered(tree, key, "does not authenticate"))?;
        Ok(Opened { key: key.to_vec(), stamp, value })
    }

    /// A pseudo-random value for this very record at this very place. Nonce and tag stand for the ciphertext: whoever opens the record
    /// has checked that they belong together.
    pub(super) fn fingerprint(&self, tree: Tree, key: &[u8], stored: &[u8]) -> Result<Fingerprint, StoreError> {
        let parts = Parts::of(tree, key, stored)?;
        let mut mac = self.fingerprint.clone();
        mac.update(&associated_data(tree, key, parts.stamp));
        mac.update(parts.nonce);
        mac.update(parts.tag);
        Ok(Fingerprint(mac.finalize().into_bytes().into()))
    }

    /// Authenticates the anchor's content.
    pub(super) fn anchor_tag(&self, content: &[u8]) -> [u8; 32] {
        let mut mac = self.anchor.clone();
        mac.update(content);
        mac.finalize().into_bytes().into()
    }
}

struct Parts<'a> {
    stamp: Stamp,
    nonce: &'a [u8; NONCE_BYTES],
    ciphertext: &'a [u8],
    tag: &'a [u8; TAG_BYTES],
}

impl<'a> Parts<'a> {
    fn of(tree: Tree, key: &[u8], stored: &'a [u8]) -> Result<Self, StoreError> {
        let short = || tampered(tree, key, "too short");
        let (&version, rest) = stored.split_first().ok_or_else(short)?;
        if version != VERSION {
            return Err(tampered(tree, key, "unknown record version"));
        }
        let (index, rest) = rest.split_first_chunk::<8>().ok_or_else(short)?;
        let (term, rest) = rest.split_first_chunk::<8>().ok_or_else(short)?;
        let (nonce, ciphertext) = rest.split_first_chunk::<NONCE_BYTES>().ok_or_else(short)?;
        let tag = ciphertext.last_chunk::<TAG_BYTES>().ok_or_else(short)?;
        let stamp = Stamp { index: u64::from_be_bytes(*index), term: u64::from_be_bytes(*term) };
        Ok(Self { stamp, nonce, ciphertext, tag })
    }
}

fn associated_data(tree: Tree, key: &[u8], stamp: Stamp) -> Vec<u8> {
    let mut aad = Vec::with_capacity(DOMAIN.len().saturating_add(key.len()).saturating_add(20));
    aad.extend_from_slice(DOMAIN);
    aad.push(tree.number());
    aad.extend_from_slice(&u16::try_from(key.len()).unwrap_or(u16::MAX).to_be_bytes());
    aad.extend_from_slice(key);
    aad.push(VERSION);
    aad.extend_from_slice(&stamp.index.to_be_bytes());
    aad.extend_from_slice(&stamp.term.to_be_bytes());
    aad
}

fn tampered(tree: Tree, key: &[u8], detail: &'static str) -> StoreError {
    StoreError::Tampered { tree, key: hex(key), detail }
}

/// Lower-case hex, for errors.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

const DOMAIN: &[u8] = b"dstack-storage-v1/";
/// Version of header, records, head and anchor.
pub(super) const VERSION: u8 = 1;
const NONCE_BYTES: usize = 24;
const TAG_BYTES: usize = 16;
const HEADER_BYTES: usize = 1 + 8 + 8 + NONCE_BYTES;

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> Keys {
        Keys::derive(&RecordKey::new(Secret::from_fn(|bytes| bytes.fill(0x42))), &StoreId([7; 16]))
    }

    const STAMP: Stamp = Stamp { index: 3, term: 2 };

    /// Written by version 1 of this crate with the key 42…42 in the store 07…07; never to be written anew.
    const GOLDEN: &str = "0100000000000000030000000000000002c1f04ee391279b495cba70b0814e54492a509d90e624e9a6726dfcdd2807506fbfc717f10f0b9ad9866d9ee248e615096b88c46b";

    fn unhex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn a_record_of_version_1_can_still_be_opened() {
        let opened = keys().open(Tree::Log, &3u64.to_be_bytes(), &unhex(GOLDEN)).unwrap();
        assert_eq!((opened.stamp, opened.value.as_slice()), (STAMP, b"golden entry".as_slice()));
    }

    #[test]
    fn a_record_opens_at_its_place_only() {
        let keys = keys();
        let stored = keys.seal(Tree::Log, b"key", STAMP, b"value").unwrap();
        assert_eq!(keys.open(Tree::Log, b"key", &stored).unwrap().value, b"value");
        assert_ne!(stored, keys.seal(Tree::Log, b"key", STAMP, b"value").unwrap(), "a nonce is used once");
        let refused = |tree, key: &[u8], stored: &[u8]| keys.open(tree, key, stored).unwrap_err();
        let at = |tree, key: &[u8], detail| StoreError::Tampered { tree, key: hex(key), detail };
        assert_eq!(refused(Tree::Vote, b"key", &stored), at(Tree::Vote, b"key", "does not authenticate"));
        assert_eq!(refused(Tree::Log, b"kez", &stored), at(Tree::Log, b"kez", "does not authenticate"));
        for bit in 0..stored.len() * 8 {
            let mut damaged = stored.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(keys.open(Tree::Log, b"key", &damaged).is_err(), "bit {bit}");
        }
        for cut in 0..stored.len() {
            assert!(keys.open(Tree::Log, b"key", &stored[..cut]).is_err(), "cut at {cut}");
        }
        let other = Keys::derive(&RecordKey::new(Secret::from_fn(|bytes| bytes.fill(0x42))), &StoreId([8; 16]));
        assert!(other.open(Tree::Log, b"key", &stored).is_err(), "another store, the same key");
    }

    #[test]
    fn a_newer_header_is_refused_by_version() {
        let mut header = StoreId([1; 16]).encode();
        assert_eq!(StoreId::parse(&header), Ok(StoreId([1; 16])));
        header[0] = 2;
        assert_eq!(StoreId::parse(&header), Err(StoreError::Version { found: 2, supported: 1 }));
        assert!(StoreId::parse(&header[..5]).is_err());
        assert!(StoreId::parse(&[]).is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_refused_without_a_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let keys = keys();
            let mut versioned = bytes.clone();
            if let Some(first) = versioned.first_mut() {
                *first = VERSION;
            }
            for bytes in [&bytes, &versioned] {
                proptest::prop_assert!(keys.open(Tree::Log, b"key", bytes).is_err());
                let _ = keys.fingerprint(Tree::Log, b"key", bytes);
                let _ = StoreId::parse(bytes);
                let _ = super::super::head::Head::decode(bytes);
            }
        }
    }
}
