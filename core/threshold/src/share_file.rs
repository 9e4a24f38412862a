//! Shares, node keys and the pairwise secrets of a signing root at rest.
//!
//! Owns: the layouts of both kinds of files, the sealing key, sealing and opening. Never: touches a disk, or decides whether a share may be loaded (the
//! caller compares epoch and index with the log first; a sealed file is presumed copied). Source: threshold.md §6.

use chacha20poly1305::aead::AeadInOut as _;
use chacha20poly1305::{KeyInit as _, XChaCha20Poly1305};
use dstack_protocol::codec::{Reader, Writer};
use dstack_protocol::{ClusterId, DecodeError, Epoch, Generation, NodeIndex, RootTag};
use dstack_secret::{LockWarning, Locked, Secret};
use hkdf::Hkdf;
use sha2::Sha256;

/// Bytes of a file: header and nonce 85, secret 32, tag 16.
pub const FILE_BYTES: usize = HEADER_BYTES + 48;
const HEADER_BYTES: usize = 13 + 1 + 32 + 1 + 4 + 8 + 2 + NONCE_BYTES;
const NONCE_BYTES: usize = 24;
const LABEL: &str = "DKMS-V1-SHARE";

/// Why a file cannot be sealed or opened.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShareFileError {
    /// Neither a TPM secret nor a platform key: this platform keeps shares in memory only. Not a fault.
    #[error("no sealing secret: shares stay in memory")]
    NoSealingSecret,
    /// A measurement or secret too long for its length field. Caller's fault.
    #[error("{0} is too long")]
    TooLong(&'static str),
    /// The bytes are no share file. The disk is at fault: delete the file and wait for a repair of the share.
    #[error("share file: {0}")]
    Malformed(#[from] DecodeError),
    /// The file is of another cluster, root, generation, epoch or holder. Delete it and wait for the next reshare.
    #[error("share file names {found:?}, expected {expected:?}")]
    OtherShare {
        /// What the file says.
        found: ShareName,
        /// What was asked for.
        expected: ShareName,
    },
    /// Altered, or sealed by other code or hardware. Delete it and wait for a repair of the share.
    #[error("share file does not open under this platform's sealing key")]
    DoesNotOpen,
}

/// What a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShareName {
    /// Cluster of the share.
    pub cluster_id: ClusterId,
    /// Root of the share; none for the node key.
    pub root: Option<RootTag>,
    /// Generation of the root; 0 for the node key.
    pub generation: Generation,
    /// Epoch of the share; 0 for the node key.
    pub epoch: Epoch,
    /// Holder.
    pub index: NodeIndex,
}

impl ShareName {
    /// The name of a node key's file.
    #[must_use]
    pub fn node_key(cluster_id: ClusterId, index: NodeIndex) -> Self {
        Self { cluster_id, root: None, generation: Generation(0), epoch: Epoch(0), index }
    }

    /// The name of a root's share.
    #[must_use]
    pub fn share(cluster_id: ClusterId, root: RootTag, generation: Generation, epoch: Epoch, index: NodeIndex) -> Self {
        Self { cluster_id, root: Some(root), generation, epoch, index }
    }
}

/// `K_seal`: bound to cluster, measurement and the platform's secrets. In locked memory.
pub struct SealingKey {
    key: Locked<32>,
}

impl SealingKey {
    /// Derives the key. `tpm_secret`: only where the TPM is inside the trust boundary. Either may be absent, not both.
    ///
    /// # Errors
    /// [`ShareFileError::NoSealingSecret`], [`ShareFileError::TooLong`].
    pub fn derive(
        cluster_id: &ClusterId,
        measurement: &[u8],
        tpm_secret: Option<&Secret<32>>,
        platform_key: Option<&Secret<32>>,
    ) -> Result<Self, ShareFileError> {
        if tpm_secret.is_none() && platform_key.is_none() {
            return Err(ShareFileError::NoSealingSecret);
        }
        let measurement_len = u16::try_from(measurement.len()).map_err(|_| ShareFileError::TooLong("measurement"))?;
        // ikm = lp(tpm_secret) ‖ lp(platform_key), at most 2·(2 + 32) bytes.
        let mut used = 0;
        let ikm = Secret::<68>::from_fn(|ikm| {
            for part in [tpm_secret, platform_key] {
                let len = if part.is_some() { 32u16 } else { 0 };
                put(ikm, &mut used, &len.to_be_bytes());
                if let Some(secret) = part {
                    secret.expose(|secret| put(ikm, &mut used, secret));
                }
            }
        });
        let hkdf = ikm.expose(|ikm| Hkdf::<Sha256>::new(Some(b"DKMS-V1-SEAL"), ikm.get(..used).unwrap_or(ikm)));
        let key = Secret::from_fn(|key| {
            hkdf.expand_multi_info(&[&cluster_id.0, &measurement_len.to_be_bytes(), measurement], key)
                .expect("32 bytes are within the limit");
        });
        Ok(Self { key: Locked::new(key) })
    }

    /// Memory protections that the system refused.
    #[must_use]
    pub fn lock_warnings(&self) -> &[LockWarning] {
        self.key.warnings()
    }
}

fn put(to: &mut [u8], at: &mut usize, bytes: &[u8]) {
    to.iter_mut().skip(*at).zip(bytes).for_each(|(to, from)| *to = *from);
    *at += bytes.len();
}

/// The sealed file of `name`. `nonce`: 24 fresh bytes from the operating system.
#[must_use]
pub fn seal(key: &SealingKey, name: &ShareName, secret: &Locked<32>, nonce: [u8; NONCE_BYTES]) -> Vec<u8> {
    let header = Header { name: *name, nonce }.write(LABEL);
    let mut sealed = Secret::<32>::from_fn(|to| secret.expose(|from| to.copy_from_slice(from)));
    let tag = sealed.expose_mut(|buffer| {
        cipher(key).encrypt_inout_detached(&nonce.into(), &header, buffer.as_mut_slice().into()).expect("32 bytes are within the limit")
    });
    let mut file = header;
    sealed.expose(|ciphertext| file.extend_from_slice(ciphertext));
    file.extend_from_slice(&tag);
    file
}

/// What a file says it holds, before anything of it is trusted.
///
/// # Errors
/// [`ShareFileError::Malformed`].
pub fn name_of(file: &[u8]) -> Result<ShareName, ShareFileError> {
    parse(file).map(|(header, _, _)| header.name)
}

/// Opens the file of `expected`.
///
/// # Errors
/// [`ShareFileError`]; for every one of them the file is of no use and is deleted.
pub fn open(key: &SealingKey, expected: &ShareName, file: &[u8]) -> Result<Secret<32>, ShareFileError> {
    let (header, ciphertext, tag) = parse(file)?;
    if header.name != *expected {
        return Err(ShareFileError::OtherShare { found: header.name, expected: *expected });
    }
    Secret::try_from_fn(|secret| {
        secret.copy_from_slice(&ciphertext);
        cipher(key)
            .decrypt_inout_detached(&header.nonce.into(), &header.write(LABEL), secret.as_mut_slice().into(), &tag.into())
            .map_err(|_| ShareFileError::DoesNotOpen)
    })
}

fn cipher(key: &SealingKey) -> XChaCha20Poly1305 {
    key.key.expose(|key| XChaCha20Poly1305::new(key.into()))
}

fn parse(file: &[u8]) -> Result<(Header, [u8; 32], [u8; 16]), ShareFileError> {
    let mut reader = Reader::new(file);
    let header = Header::read(LABEL, &mut reader)?;
    let (ciphertext, tag) = (reader.array("ciphertext")?, reader.array("tag")?);
    reader.finish()?;
    Ok((header, ciphertext, tag))
}

mod pairs;

pub use pairs::{open_pairs, seal_pairs};

struct Header {
    name: ShareName,
    nonce: [u8; NONCE_BYTES],
}

impl Header {
    fn write(&self, label: &'static str) -> Vec<u8> {
        let mut w = Writer::default();
        w.label_v1(label)
            .raw(&self.name.cluster_id.0)
            .u8(self.name.root.map_or(0, RootTag::byte))
            .u32(self.name.generation.0)
            .u64(self.name.epoch.0)
            .u16(self.name.index.0)
            .raw(&self.nonce);
        w.into_bytes()
    }

    fn read(label: &'static str, r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1(label)?;
        let cluster_id = ClusterId::read("cluster_id", r)?;
        let root = match r.u8("root_tag")? {
            0 => None,
            1 => Some(RootTag::Prf),
            2 => Some(RootTag::Ca),
            3 => Some(RootTag::Id),
            _ => return Err(DecodeError::Field { field: "root_tag", reason: "unknown root" }),
        };
        let generation = Generation::read("generation", r)?;
        let epoch = Epoch::read("epoch", r)?;
        let index = NodeIndex::read("i", r)?;
        if index.0 == 0 || index.0 >= 0x8000 {
            return Err(DecodeError::Field { field: "i", reason: "node index is 1..0x8000" });
        }
        if root.is_none() && (generation.0, epoch.0) != (0, 0) {
            return Err(DecodeError::Field { field: "epoch", reason: "a node key has neither generation nor epoch" });
        }
        let name = ShareName { cluster_id, root, generation, epoch, index };
        Ok(Self { name, nonce: r.array("nonce")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(byte: u8) -> Secret<32> {
        Secret::from_fn(|b| b.fill(byte))
    }

    fn key(measurement: &[u8]) -> SealingKey {
        SealingKey::derive(&CLUSTER, measurement, None, Some(&secret(5))).unwrap()
    }

    const CLUSTER: ClusterId = ClusterId([1; 32]);

    fn name() -> ShareName {
        ShareName::share(CLUSTER, RootTag::Prf, Generation(0), Epoch(3), NodeIndex(2))
    }

    #[test]
    fn opens_what_was_sealed() {
        let file = seal(&key(b"m"), &name(), &Locked::new(secret(9)), [7; 24]);
        assert_eq!(file.len(), FILE_BYTES);
        assert_eq!(name_of(&file), Ok(name()));
        assert_eq!(open(&key(b"m"), &name(), &file), Ok(secret(9)));
        let own = ShareName::node_key(CLUSTER, NodeIndex(2));
        let file = seal(&key(b"m"), &own, &Locked::new(secret(9)), [7; 24]);
        assert_eq!(open(&key(b"m"), &own, &file), Ok(secret(9)));
    }

    #[test]
    fn golden_bytes() {
        let file = seal(&key(b"m"), &name(), &Locked::new(secret(9)), [7; 24]);
        let header = concat!(
            "444b4d532d56312d5348415245",
            "01",
            "0101010101010101010101010101010101010101010101010101010101010101",
            "01",
            "00000000",
            "0000000000000003",
            "0002",
            "070707070707070707070707070707070707070707070707"
        );
        assert_eq!(hex::encode(&file[..HEADER_BYTES]), header);
        // K_seal by hand, over plain byte strings.
        let ikm = [&[0u8, 0, 0, 32][..], &[5; 32]].concat();
        let info = [&[1u8; 32][..], &[0, 1], b"m"].concat();
        let mut expected = [0; 32];
        Hkdf::<Sha256>::new(Some(b"DKMS-V1-SEAL"), &ikm).expand(&info, &mut expected).unwrap();
        assert!(key(b"m").key.expose(|k| *k == expected));
        let both = SealingKey::derive(&CLUSTER, b"m", Some(&secret(6)), Some(&secret(5))).unwrap();
        let ikm = [&[0u8, 32][..], &[6; 32], &[0, 32], &[5; 32]].concat();
        Hkdf::<Sha256>::new(Some(b"DKMS-V1-SEAL"), &ikm).expand(&info, &mut expected).unwrap();
        assert!(both.key.expose(|k| *k == expected));
    }

    #[test]
    fn another_measurement_or_platform_cannot_open() {
        let file = seal(&key(b"m"), &name(), &Locked::new(secret(9)), [7; 24]);
        assert_eq!(open(&key(b"other"), &name(), &file), Err(ShareFileError::DoesNotOpen));
        let tpm = SealingKey::derive(&CLUSTER, b"m", Some(&secret(5)), None).unwrap();
        assert_eq!(open(&tpm, &name(), &file), Err(ShareFileError::DoesNotOpen), "the two secrets are told apart");
        assert_eq!(SealingKey::derive(&CLUSTER, b"m", None, None).err(), Some(ShareFileError::NoSealingSecret));
    }

    #[test]
    fn a_file_of_another_share_is_named() {
        let old = ShareName { epoch: Epoch(2), ..name() };
        let file = seal(&key(b"m"), &old, &Locked::new(secret(9)), [7; 24]);
        let error = open(&key(b"m"), &name(), &file).unwrap_err();
        assert_eq!(error, ShareFileError::OtherShare { found: old, expected: name() });
    }

    #[test]
    fn every_altered_byte_and_every_length_is_noticed() {
        let file = seal(&key(b"m"), &name(), &Locked::new(secret(9)), [7; 24]);
        for at in 0..file.len() {
            let mut bad = file.clone();
            bad[at] ^= 1;
            assert!(open(&key(b"m"), &name(), &bad).is_err(), "byte {at}");
            assert!(matches!(open(&key(b"m"), &name(), &file[..at]), Err(ShareFileError::Malformed(_))));
        }
        let long = [file.as_slice(), &[0]].concat();
        assert_eq!(open(&key(b"m"), &name(), &long), Err(ShareFileError::Malformed(DecodeError::Trailing { extra: 1 })));
    }
}
