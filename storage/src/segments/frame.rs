//! Layouts of audit segment files. Owns: encoding and checking of the file header and the batch frame. Never: does I/O.
//!
//! Version 1, big-endian. File: `"dskaudit" ‖ version(1) ‖ keyed(1) ‖ first position(8) ‖ previous checksum(32) ‖ checksum(32)`, then frames.
//! Frame: `"AUDB" ‖ version(1) ‖ first position(8) ‖ entries(4) ‖ body length(4) ‖ previous checksum(32) ‖ checksum(32) ‖ body`,
//! body: per entry `length(4) ‖ bytes`. A checksum is SHA-256, or HMAC-SHA-256 under a key from the record key, over everything of its
//! header before it and the body; the previous checksum is that of the frame before (of the file header before the first).

use std::fmt;

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use crate::sealed::RecordKey;

/// Computes checksums, with or without a key.
#[derive(Clone)]
pub(super) enum Checksum {
    Plain,
    Keyed(Hmac<Sha256>),
}

impl fmt::Debug for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "Checksum::Plain",
            Self::Keyed(_) => "Checksum::Keyed(redacted)",
        })
    }
}

impl Checksum {
    pub(super) fn new(key: Option<&RecordKey>) -> Self {
        match key {
            None => Self::Plain,
            Some(key) => Self::Keyed(
                key.derive(b"audit segments", b"checksums").expose(|key| Hmac::new_from_slice(key).expect("any length is a valid key")),
            ),
        }
    }

    pub(super) fn is_keyed(&self) -> bool {
        matches!(self, Self::Keyed(_))
    }

    fn of(&self, parts: [&[u8]; 2]) -> [u8; 32] {
        match self {
            Self::Plain => {
                let mut hash = Sha256::new();
                parts.iter().for_each(|part| hash.update(part));
                hash.finalize().into()
            }
            Self::Keyed(mac) => {
                let mut mac = mac.clone();
                parts.iter().for_each(|part| mac.update(part));
                mac.finalize().into_bytes().into()
            }
        }
    }
}

/// First bytes of a segment file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileHeader {
    pub(super) first_position: u64,
    pub(super) previous: [u8; 32],
    pub(super) checksum: [u8; 32],
}

impl FileHeader {
    pub(super) fn new(first_position: u64, previous: [u8; 32], with: &Checksum) -> Self {
        let mut header = Self { first_position, previous, checksum: [0; 32] };
        header.checksum = with.of([&header.start(with), &[]]);
        header
    }

    fn start(&self, with: &Checksum) -> Vec<u8> {
        let mut bytes = FILE_MAGIC.to_vec();
        bytes.push(VERSION);
        bytes.push(u8::from(with.is_keyed()));
        bytes.extend_from_slice(&self.first_position.to_be_bytes());
        bytes.extend_from_slice(&self.previous);
        bytes
    }

    pub(super) fn encode(&self, with: &Checksum) -> Vec<u8> {
        let mut bytes = self.start(with);
        bytes.extend_from_slice(&self.checksum);
        bytes
    }

    /// # Errors
    /// What is wrong, in words.
    pub(super) fn decode(bytes: &[u8; FILE_HEADER_BYTES], with: &Checksum) -> Result<Self, &'static str> {
        let mut rest = bytes.as_slice();
        if take::<8>(&mut rest) != Some(FILE_MAGIC) {
            return Err("not an audit segment file");
        }
        if take::<1>(&mut rest) != Some(&[VERSION]) {
            return Err("unknown segment version");
        }
        if take::<1>(&mut rest) != Some(&[u8::from(with.is_keyed())]) {
            return Err("written with a record key and read without, or the reverse");
        }
        let parse = |rest: &mut &[u8]| Some((u64::from_be_bytes(*take(rest)?), *take::<32>(rest)?, *take::<32>(rest)?));
        let (first_position, previous, checksum) = parse(&mut rest).ok_or("file header is cut")?;
        let header = Self::new(first_position, previous, with);
        if header.checksum != checksum {
            return Err("checksum of the file header");
        }
        Ok(header)
    }
}

/// First bytes of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FrameHeader {
    pub(super) first_position: u64,
    pub(super) entries: u32,
    pub(super) body_bytes: u32,
    pub(super) previous: [u8; 32],
    pub(super) checksum: [u8; 32],
}

impl FrameHeader {
    fn start(&self) -> Vec<u8> {
        let mut bytes = FRAME_MAGIC.to_vec();
        bytes.push(VERSION);
        bytes.extend_from_slice(&self.first_position.to_be_bytes());
        bytes.extend_from_slice(&self.entries.to_be_bytes());
        bytes.extend_from_slice(&self.body_bytes.to_be_bytes());
        bytes.extend_from_slice(&self.previous);
        bytes
    }

    /// A header as it is written, unchecked; none if magic or version differ or a size is over its limit.
    pub(super) fn decode(bytes: &[u8; FRAME_HEADER_BYTES]) -> Option<Self> {
        let mut rest = bytes.as_slice();
        if take::<4>(&mut rest)? != FRAME_MAGIC || take::<1>(&mut rest)? != &[VERSION] {
            return None;
        }
        let header = Self {
            first_position: u64::from_be_bytes(*take(&mut rest)?),
            entries: u32::from_be_bytes(*take(&mut rest)?),
            body_bytes: u32::from_be_bytes(*take(&mut rest)?),
            previous: *take(&mut rest)?,
            checksum: *take(&mut rest)?,
        };
        let fits = u64::from(header.body_bytes) <= BODY_BYTES_MAX && header.entries > 0 && header.entries <= header.body_bytes / 4;
        (fits && header.first_position.checked_add(u64::from(header.entries)).is_some()).then_some(header)
    }

    /// Whether the body belongs to this header.
    pub(super) fn authenticates(&self, body: &[u8], with: &Checksum) -> bool {
        with.of([&self.start(), body]) == self.checksum
    }

    pub(super) fn next_position(&self) -> u64 {
        self.first_position.saturating_add(u64::from(self.entries))
    }

    /// Bytes of the whole frame.
    pub(super) fn frame_bytes(&self) -> u64 {
        FRAME_HEADER_LEN.saturating_add(u64::from(self.body_bytes))
    }
}

/// Encodes one frame: its header and all its bytes. `entries` must not be empty and must fit ([`BODY_BYTES_MAX`]).
pub(super) fn encode_frame<B: AsRef<[u8]>>(
    first_position: u64,
    entries: &[B],
    previous: [u8; 32],
    with: &Checksum,
) -> Option<(FrameHeader, Vec<u8>)> {
    let mut body = Vec::new();
    for entry in entries {
        let entry = entry.as_ref();
        body.extend_from_slice(&u32::try_from(entry.len()).ok()?.to_be_bytes());
        body.extend_from_slice(entry);
    }
    let mut header = FrameHeader {
        first_position,
        entries: u32::try_from(entries.len()).ok()?,
        body_bytes: u32::try_from(body.len()).ok()?,
        previous,
        checksum: [0; 32],
    };
    header.checksum = with.of([&header.start(), &body]);
    let mut bytes = header.start();
    bytes.extend_from_slice(&header.checksum);
    bytes.extend_from_slice(&body);
    Some((header, bytes))
}

/// The entries of a body; none if lengths do not add up.
pub(super) fn decode_body(header: &FrameHeader, body: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut rest = body;
    let mut entries = Vec::new();
    for _ in 0..header.entries {
        let length = usize::try_from(u32::from_be_bytes(*take(&mut rest)?)).ok()?;
        let (entry, after) = rest.split_at_checked(length)?;
        entries.push(entry.to_vec());
        rest = after;
    }
    rest.is_empty().then_some(entries)
}

fn take<'a, const N: usize>(rest: &mut &'a [u8]) -> Option<&'a [u8; N]> {
    let (taken, after) = rest.split_first_chunk::<N>()?;
    *rest = after;
    Some(taken)
}

const FILE_MAGIC: &[u8; 8] = b"dskaudit";
/// What every frame begins with.
pub(super) const FRAME_MAGIC: &[u8; 4] = b"AUDB";
const VERSION: u8 = 1;
pub(super) const FILE_HEADER_BYTES: usize = 8 + 1 + 1 + 8 + 32 + 32;
pub(super) const FRAME_HEADER_BYTES: usize = 4 + 1 + 8 + 4 + 4 + 32 + 32;
pub(super) const FILE_HEADER_LEN: u64 = 82;
pub(super) const FRAME_HEADER_LEN: u64 = 85;
const _: () = assert!(FILE_HEADER_BYTES == 82 && FRAME_HEADER_BYTES == 85);
/// Largest body of a frame.
pub(super) const BODY_BYTES_MAX: u64 = 32 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sealed::hex;

    #[test]
    fn version_1_has_a_stable_layout() {
        let file = FileHeader::new(7, [0xaa; 32], &Checksum::Plain);
        let bytes = file.encode(&Checksum::Plain);
        assert_eq!(hex(&bytes[..18]), "64736b617564697401000000000000000007");
        assert_eq!(bytes.len(), FILE_HEADER_BYTES);
        assert_eq!(FileHeader::decode(bytes.as_slice().try_into().unwrap(), &Checksum::Plain), Ok(file));
        let (header, frame) = encode_frame(7, &[b"ab".as_slice(), b""], [0xbb; 32], &Checksum::Plain).unwrap();
        assert_eq!(hex(&frame[..21]), "4155444201000000000000000700000002".to_owned() + "0000000a");
        assert_eq!(hex(&frame[53..85]), hex(&Sha256::digest([&frame[..53], &frame[85..]].concat())));
        assert_eq!(hex(&frame[85..]), "0000000261620000".to_owned() + "0000");
        assert_eq!(FrameHeader::decode(frame[..85].try_into().unwrap()), Some(header.clone()));
        assert!(header.authenticates(&frame[85..], &Checksum::Plain));
        assert_eq!(decode_body(&header, &frame[85..]), Some(vec![b"ab".to_vec(), vec![]]));
    }

    #[test]
    fn any_flipped_bit_of_a_frame_is_noticed() {
        let key = RecordKey::new(dstack_secret::Secret::from_fn(|bytes| bytes.fill(3)));
        for with in [Checksum::Plain, Checksum::new(Some(&key))] {
            let (header, frame) = encode_frame(7, &[b"entry"], [1; 32], &with).unwrap();
            for bit in 0..frame.len() * 8 {
                let mut damaged = frame.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                let noticed = FrameHeader::decode(damaged[..85].try_into().unwrap())
                    .is_none_or(|header| !header.authenticates(&damaged[85..], &with));
                assert!(noticed, "bit {bit}");
            }
            assert!(
                !header.authenticates(&frame[85..], &Checksum::new(Some(&RecordKey::new(dstack_secret::Secret::from_fn(|b| b.fill(4))))))
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_refused_without_a_panic(mut bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 85..300)) {
            proptest::prop_assert!(FileHeader::decode(bytes[..82].try_into().unwrap(), &Checksum::Plain).is_err());
            bytes[..5].copy_from_slice(b"AUDB\x01");
            if let Some(header) = FrameHeader::decode(bytes[..85].try_into().unwrap()) {
                let _ = decode_body(&header, &bytes[85..]);
                proptest::prop_assert!(!header.authenticates(&bytes[85..], &Checksum::Plain));
            }
        }
    }
}
