//! A LUKS2 header in memory. Owns: reading it once from the disk, and the one layout that is taken. Never: repairs one; lets the disk's
//! own header be used after the copy was judged (the host could change it in between).
//! Source: LUKS2 On-Disk Format Specification 1.1.1, §2 (binary header), §3 (JSON area); util and deploy reference §5.
//!
//! What the host could write into a header decides which cipher protects the disk, which key slot is tried and how much work that is.
//! So nothing of it is free: one key slot, one digest, one segment to the end of the disk at 16 MiB, AES-XTS with 512 bits, PBKDF2.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use dstack_protocol::codec::sha256;
use serde::Deserialize;

/// Everything before the data: both headers and the key slots.
pub const HEADER_BYTES: usize = 16 << 20;
/// One of the two headers: binary part and JSON.
const ONE_BYTES: usize = 16 << 10;
const BINARY_BYTES: usize = 4096;
const CHECKSUM_AT: usize = 448;
const CHECKSUM_BYTES: usize = 64;

/// Cipher of data and key slot.
pub const CIPHER: &str = "aes-xts-plain64";
/// Fewest and most rounds of PBKDF2: few are no protection of a short passphrase (ours has 256 bits), many make a boot that never ends.
const ITERATIONS: std::ops::RangeInclusive<u64> = 1000..=100_000_000;

/// Why a header is refused. The host's fault, or a disk of another system: it is not used.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The disk is too small for a header, or cannot be read.
    #[error("cannot read the header: {kind}")]
    Unreadable {
        /// The system's words.
        kind: std::io::ErrorKind,
    },
    /// A part of the binary header is not what it must be.
    #[error("LUKS2 header {which}: {field} is not {expected}")]
    Binary {
        /// `primary` or `secondary`.
        which: &'static str,
        /// The field.
        field: &'static str,
        /// What it must be.
        expected: &'static str,
    },
    /// The JSON area is none of the known form.
    #[error("LUKS2 header: {reason}")]
    Json {
        /// The parser's words.
        reason: String,
    },
    /// A member of the JSON area is not what it must be.
    #[error("LUKS2 header: {member} is {got}, expected {expected}")]
    Member {
        /// Its path.
        member: &'static str,
        /// What it must be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// The two headers differ.
    #[error("LUKS2 header: primary and secondary differ; `cryptsetup repair` on a machine you trust mends an interrupted write")]
    Differ,
    /// No memory file for the copy.
    #[error("cannot hold the header in memory: {kind}")]
    Memory {
        /// The system's words.
        kind: std::io::ErrorKind,
    },
}

/// What a disk begins with.
#[derive(Debug, PartialEq, Eq)]
pub enum Beginning {
    /// Zeros as far as a header reaches: never used.
    Blank,
    /// A LUKS header of any version.
    Luks(Vec<u8>),
    /// Something else.
    Foreign,
}

/// Reads as much of the disk as a header takes.
///
/// # Errors
/// [`HeaderError::Unreadable`].
pub fn read(disk: &Path) -> Result<Beginning, HeaderError> {
    let unreadable = |error: std::io::Error| HeaderError::Unreadable { kind: error.kind() };
    let mut bytes = vec![0; HEADER_BYTES];
    File::open(disk).and_then(|mut disk| disk.read_exact(&mut bytes)).map_err(unreadable)?;
    if bytes.starts_with(MAGIC_PRIMARY) || bytes.get(ONE_BYTES..).is_some_and(|rest| rest.starts_with(MAGIC_SECONDARY)) {
        return Ok(Beginning::Luks(bytes));
    }
    Ok(if bytes.iter().all(|byte| *byte == 0) { Beginning::Blank } else { Beginning::Foreign })
}

/// How much of the data area is looked at: a file system has its marks there.
const DATA_BYTES: usize = 64 << 10;

/// Whether nothing was ever written behind the header: an enciphered block is not all zeros.
///
/// # Errors
/// [`HeaderError::Unreadable`].
pub fn has_no_data(disk: &Path) -> Result<bool, HeaderError> {
    let unreadable = |error: std::io::Error| HeaderError::Unreadable { kind: error.kind() };
    let mut bytes = vec![0; DATA_BYTES];
    let mut disk = File::open(disk).map_err(unreadable)?;
    disk.seek(SeekFrom::Start(HEADER_BYTES as u64)).and_then(|_| disk.read_exact(&mut bytes)).map_err(unreadable)?;
    Ok(bytes.iter().all(|byte| *byte == 0))
}

const MAGIC_PRIMARY: &[u8] = b"LUKS\xba\xbe";
const MAGIC_SECONDARY: &[u8] = b"SKUL\xba\xbe";

/// A header that was judged, in memory of this process.
#[derive(Debug)]
pub struct Header {
    memory: OwnedFd,
}

impl Header {
    /// Judges the first [`HEADER_BYTES`] of a disk and keeps them.
    ///
    /// # Errors
    /// [`HeaderError`].
    pub fn judge(bytes: &[u8]) -> Result<Self, HeaderError> {
        let primary = binary(bytes, 0, "primary", MAGIC_PRIMARY)?;
        let secondary = binary(bytes, ONE_BYTES, "secondary", MAGIC_SECONDARY)?;
        if primary != secondary {
            return Err(HeaderError::Differ);
        }
        let metadata: Metadata = serde_json::from_slice(primary).map_err(|error| HeaderError::Json { reason: error.to_string() })?;
        metadata.judge()?;
        let failed = |error: std::io::Error| HeaderError::Memory { kind: error.kind() };
        let memory = rustix::fs::memfd_create("luks-header", rustix::fs::MemfdFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?;
        let mut file = File::from(memory);
        file.write_all(bytes).and_then(|()| file.seek(SeekFrom::Start(0))).map_err(failed)?;
        Ok(Self { memory: file.into() })
    }

    /// A path that a program we start finds the copy at.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.memory.as_raw_fd()))
    }
}

/// The JSON text of the header at `at`, up to its first zero byte.
fn binary<'a>(bytes: &'a [u8], at: usize, which: &'static str, magic: &[u8]) -> Result<&'a [u8], HeaderError> {
    let wrong = |field, expected| HeaderError::Binary { which, field, expected };
    let whole = bytes
        .get(at..)
        .and_then(|rest| rest.get(..ONE_BYTES))
        .ok_or(HeaderError::Unreadable { kind: std::io::ErrorKind::UnexpectedEof })?;
    let field = |from: usize, length: usize| whole.get(from..).and_then(|rest| rest.get(..length)).unwrap_or_default();
    let number = |from: usize| <[u8; 8]>::try_from(field(from, 8)).map_or(u64::MAX, u64::from_be_bytes);
    if field(0, 6) != magic {
        return Err(wrong("magic", "LUKS's"));
    }
    if field(6, 2) != [0, 2] {
        return Err(wrong("version", "2"));
    }
    if number(8) != ONE_BYTES as u64 {
        return Err(wrong("size", "16384"));
    }
    if field(72, 32).split(|byte| *byte == 0).next() != Some(b"sha256") {
        return Err(wrong("checksum algorithm", "sha256"));
    }
    if number(256) != at as u64 {
        return Err(wrong("offset", "where it stands"));
    }
    let (before, rest) = whole.split_at_checked(CHECKSUM_AT).unwrap_or_default();
    let (checksum, after) = rest.split_at_checked(CHECKSUM_BYTES).unwrap_or_default();
    let digest = sha256(&[before, &[0; CHECKSUM_BYTES], after]);
    let (value, filler) = checksum.split_at_checked(digest.len()).unwrap_or_default();
    if value != digest || filler.iter().any(|byte| *byte != 0) {
        return Err(wrong("checksum", "that of its bytes"));
    }
    let json = whole.get(BINARY_BYTES..).unwrap_or_default();
    let end = json.iter().position(|byte| *byte == 0).ok_or_else(|| wrong("JSON area", "ended by a zero byte"))?;
    let (text, filler) = json.split_at_checked(end).unwrap_or_default();
    if filler.iter().any(|byte| *byte != 0) {
        return Err(wrong("JSON area", "zero after its end"));
    }
    Ok(text)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    keyslots: Only<Keyslot>,
    #[serde(rename = "tokens")]
    _tokens: Empty,
    segments: Only<Segment>,
    digests: Only<DigestOf>,
    config: Config,
}

/// An object with the one member `"0"`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Only<T> {
    #[serde(rename = "0")]
    zero: T,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Empty {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Keyslot {
    r#type: String,
    key_size: u64,
    af: AntiForensic,
    area: Area,
    kdf: Kdf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AntiForensic {
    r#type: String,
    stripes: u64,
    hash: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Area {
    r#type: String,
    offset: String,
    size: String,
    encryption: String,
    key_size: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Kdf {
    r#type: String,
    hash: String,
    iterations: u64,
    salt: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Segment {
    r#type: String,
    offset: String,
    size: String,
    iv_tweak: String,
    encryption: String,
    sector_size: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DigestOf {
    r#type: String,
    keyslots: Vec<String>,
    segments: Vec<String>,
    hash: String,
    iterations: u64,
    salt: String,
    digest: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    json_size: String,
    keyslots_size: String,
}

impl Metadata {
    fn judge(&self) -> Result<(), HeaderError> {
        let Only { zero: slot } = &self.keyslots;
        same("keyslots.0.type", "luks2", &slot.r#type)?;
        same_number("keyslots.0.key_size", 64, slot.key_size)?;
        same("keyslots.0.af.type", "luks1", &slot.af.r#type)?;
        same_number("keyslots.0.af.stripes", 4000, slot.af.stripes)?;
        same("keyslots.0.af.hash", "sha256", &slot.af.hash)?;
        same("keyslots.0.area.type", "raw", &slot.area.r#type)?;
        same("keyslots.0.area.offset", "32768", &slot.area.offset)?;
        same("keyslots.0.area.size", "258048", &slot.area.size)?;
        same("keyslots.0.area.encryption", CIPHER, &slot.area.encryption)?;
        same_number("keyslots.0.area.key_size", 64, slot.area.key_size)?;
        same("keyslots.0.kdf.type", "pbkdf2", &slot.kdf.r#type)?;
        same("keyslots.0.kdf.hash", "sha256", &slot.kdf.hash)?;
        iterations("keyslots.0.kdf.iterations", slot.kdf.iterations)?;
        base64("keyslots.0.kdf.salt", &slot.kdf.salt)?;
        let Only { zero: segment } = &self.segments;
        same("segments.0.type", "crypt", &segment.r#type)?;
        same("segments.0.offset", "16777216", &segment.offset)?;
        same("segments.0.size", "dynamic", &segment.size)?;
        same("segments.0.iv_tweak", "0", &segment.iv_tweak)?;
        same("segments.0.encryption", CIPHER, &segment.encryption)?;
        if ![512, 4096].contains(&segment.sector_size) {
            return Err(member("segments.0.sector_size", "512 or 4096", segment.sector_size));
        }
        let Only { zero: digest } = &self.digests;
        same("digests.0.type", "pbkdf2", &digest.r#type)?;
        same("digests.0.keyslots", "0", &digest.keyslots.join(","))?;
        same("digests.0.segments", "0", &digest.segments.join(","))?;
        same("digests.0.hash", "sha256", &digest.hash)?;
        iterations("digests.0.iterations", digest.iterations)?;
        base64("digests.0.salt", &digest.salt)?;
        base64("digests.0.digest", &digest.digest)?;
        same("config.json_size", "12288", &self.config.json_size)?;
        same("config.keyslots_size", "16744448", &self.config.keyslots_size)
    }
}

fn same(name: &'static str, expected: &str, got: &str) -> Result<(), HeaderError> {
    if expected == got { Ok(()) } else { Err(member(name, expected, format!("{:?}", got.chars().take(80).collect::<String>()))) }
}

fn same_number(name: &'static str, expected: u64, got: u64) -> Result<(), HeaderError> {
    if expected == got { Ok(()) } else { Err(member(name, expected, got)) }
}

fn iterations(name: &'static str, got: u64) -> Result<(), HeaderError> {
    if ITERATIONS.contains(&got) { Ok(()) } else { Err(member(name, format!("{} to {}", ITERATIONS.start(), ITERATIONS.end()), got)) }
}

/// 32 bytes.
fn base64(name: &'static str, got: &str) -> Result<(), HeaderError> {
    use base64::Engine as _;
    let bytes = base64::engine::general_purpose::STANDARD.decode(got).unwrap_or_default();
    if bytes.len() == 32 { Ok(()) } else { Err(member(name, "32 bytes of base64", format!("{} characters", got.len()))) }
}

fn member(member: &'static str, expected: impl ToString, got: impl ToString) -> HeaderError {
    HeaderError::Member { member, expected: expected.to_string(), got: got.to_string() }
}
