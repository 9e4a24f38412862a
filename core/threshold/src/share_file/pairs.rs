//! Secrets of pairs at rest, beside the share that they are of use with (threshold.md §5.1, §6; ADR 0018).
//!
//! ```text
//! header = "DKMS-V1-PAIRSF" ‖ version(1)=1 ‖ cluster_id(32) ‖ root_tag(1) ‖ generation(4) ‖ epoch(8) ‖ i(2) ‖ nonce(24)
//! file   = header ‖ XChaCha20Poly1305(K_seal, nonce, aad=header, state)
//! ```

use chacha20poly1305::aead::AeadInOut as _;
use dstack_protocol::DecodeError;
use dstack_protocol::codec::Reader;
use dstack_protocol::limits::NODES_MAX;
use dstack_secret::SecretBytes;

use super::{Header, NONCE_BYTES, SealingKey, ShareFileError, ShareName, cipher};

const LABEL: &str = "DKMS-V1-PAIRSF";
const TAG_BYTES: usize = 16;
/// Largest state, bytes: 64 kB a pair.
const STATE_BYTES_MAX: usize = NODES_MAX * 64 * 1024;

/// The sealed file of the state of `name`'s root. `nonce`: 24 fresh bytes from the operating system.
#[must_use]
pub fn seal_pairs(key: &SealingKey, name: &ShareName, state: &SecretBytes, nonce: [u8; NONCE_BYTES]) -> Vec<u8> {
    let mut file = Header { name: *name, nonce }.write(LABEL);
    let mut tag = [0; TAG_BYTES];
    let sealed = SecretBytes::from_fn(state.len(), |buffer| {
        state.expose(|state| buffer.copy_from_slice(state));
        tag = cipher(key).encrypt_inout_detached(&nonce.into(), &file, buffer.into()).expect("some megabytes are within the limit").into();
    });
    sealed.expose(|ciphertext| file.extend_from_slice(ciphertext));
    file.extend_from_slice(&tag);
    file
}

/// Opens the file of `expected`.
///
/// # Errors
/// [`ShareFileError`]; for every one of them the file is of no use and is deleted.
pub fn open_pairs(key: &SealingKey, expected: &ShareName, file: &[u8]) -> Result<SecretBytes, ShareFileError> {
    let mut reader = Reader::new(file);
    let header = Header::read(LABEL, &mut reader)?;
    let aad = header.write(LABEL);
    let sealed = file.get(aad.len()..).unwrap_or_default();
    let too_long = || ShareFileError::Malformed(DecodeError::TooLong { field: "state", max: STATE_BYTES_MAX, got: sealed.len() });
    let cut = || ShareFileError::Malformed(DecodeError::Field { field: "tag", reason: "16 bytes at the end" });
    let length = sealed.len().checked_sub(TAG_BYTES).ok_or_else(cut)?;
    if length > STATE_BYTES_MAX {
        return Err(too_long());
    }
    let (ciphertext, tag) = sealed.split_at_checked(length).ok_or_else(cut)?;
    let tag: [u8; TAG_BYTES] = tag.try_into().map_err(|_| cut())?;
    if header.name != *expected {
        return Err(ShareFileError::OtherShare { found: header.name, expected: *expected });
    }
    SecretBytes::try_from_fn(length, |buffer| {
        buffer.copy_from_slice(ciphertext);
        let opened = cipher(key).decrypt_inout_detached(&header.nonce.into(), &aad, buffer.into(), &tag.into());
        opened.map_err(|_| ShareFileError::DoesNotOpen)
    })
}

#[cfg(test)]
mod tests {
    use dstack_protocol::{ClusterId, Epoch, Generation, NodeIndex, RootTag};
    use dstack_secret::{Locked, Secret};

    use super::*;
    use crate::share_file::{open, seal};

    const CLUSTER: ClusterId = ClusterId([1; 32]);

    fn key(measurement: &[u8]) -> SealingKey {
        SealingKey::derive(&CLUSTER, measurement, None, Some(&Secret::from_fn(|b| b.fill(5)))).unwrap()
    }

    fn name() -> ShareName {
        ShareName::share(CLUSTER, RootTag::Id, Generation(0), Epoch(3), NodeIndex(2))
    }

    #[test]
    fn what_was_sealed_opens_by_its_name_and_key_alone() {
        let state = SecretBytes::from_fn(1000, |b| b.fill(9));
        let file = seal_pairs(&key(b"m"), &name(), &state, [7; 24]);
        assert_eq!(open_pairs(&key(b"m"), &name(), &file), Ok(state));
        assert!(!file.windows(8).any(|window| window == [9; 8]));
        assert_eq!(open_pairs(&key(b"other"), &name(), &file), Err(ShareFileError::DoesNotOpen));
        let other = ShareName { root: Some(RootTag::Ca), ..name() };
        let named = Err(ShareFileError::OtherShare { found: name(), expected: other });
        assert_eq!(open_pairs(&key(b"m"), &other, &file), named);
        for at in [0, 13, 40, 90, 500, file.len() - 1] {
            let mut bad = file.clone();
            bad[at] ^= 1;
            assert!(open_pairs(&key(b"m"), &name(), &bad).is_err(), "byte {at}");
        }
        for length in [0, 20, 85, 90, file.len() - 1] {
            assert!(open_pairs(&key(b"m"), &name(), &file[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_share_file_is_none_of_pairs_and_the_other_way_round() {
        let share = seal(&key(b"m"), &name(), &Locked::new(Secret::from_fn(|b| b.fill(9))), [7; 24]);
        assert!(matches!(open_pairs(&key(b"m"), &name(), &share), Err(ShareFileError::Malformed(_))));
        let pairs = seal_pairs(&key(b"m"), &name(), &SecretBytes::from_fn(32, |b| b.fill(9)), [7; 24]);
        assert!(matches!(open(&key(b"m"), &name(), &pairs), Err(ShareFileError::Malformed(_))));
    }
}
