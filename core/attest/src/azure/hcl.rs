//! The report of Azure's paravisor (HCL). Owns: its layout, and the attestation key in its runtime data.
//! Never: verifies it; the TD quote binds the runtime data, the hardware report inside is not a signed one and proves nothing.
//! Source: Microsoft, "Guest attestation for confidential VMs: design and reference": header, hardware report, runtime data as JSON.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::Deserialize;
use serde_json::Value;

use crate::{AttestError, reader::Reader};

/// Largest report taken: the TPM's index has 2600 bytes.
const REPORT_BYTES_MAX: usize = 16 * 1024;
const PART: &str = "hcl report";
const RUNTIME: &str = "hcl runtime data";
/// `HCLA`.
const MAGIC: [u8; 4] = *b"HCLA";
/// Bytes after the magic number up to the hardware report: version, size, type, status, three reserved words.
const HEADER_REST_BYTES: usize = 28;
/// Bytes of the hardware report's field.
const HARDWARE_REPORT_BYTES: usize = 1184;
/// Versions of the header that are known.
const VERSIONS: std::ops::RangeInclusive<u32> = 1..=2;
/// Hardware report of a TD.
const REPORT_TYPE_TDX: u32 = 4;
/// Runtime data is hashed with SHA-256.
const HASH_SHA256: u32 = 1;
/// Bytes of the runtime data's header, which its size counts.
const RUNTIME_HEADER_BYTES: u32 = 20;
/// RSA moduli of 2048 to 4096 bits.
const MODULUS_BYTES: std::ops::RangeInclusive<usize> = 256..=512;

/// Runtime data of a report, as it is bound.
pub(super) fn runtime_data(report: &[u8]) -> Result<&[u8], AttestError> {
    if report.len() > REPORT_BYTES_MAX {
        return Err(AttestError::Length { part: PART, length_bytes: report.len(), limit_bytes: REPORT_BYTES_MAX });
    }
    let mut reader = Reader::new(report, PART);
    if reader.array()? != MAGIC {
        return Err(AttestError::Malformed { part: PART, why: "it does not begin with HCLA" });
    }
    let mut header = Reader::new(reader.take(HEADER_REST_BYTES)?, PART);
    let version = header.u32()?;
    if !VERSIONS.contains(&version) {
        return Err(AttestError::UnsupportedVersion { part: PART, got: version.into() });
    }
    reader.take(HARDWARE_REPORT_BYTES)?;
    let data_bytes = reader.u32()?;
    let runtime_version = reader.u32()?;
    if runtime_version != 1 {
        return Err(AttestError::UnsupportedVersion { part: RUNTIME, got: runtime_version.into() });
    }
    let report_type = reader.u32()?;
    if report_type != REPORT_TYPE_TDX {
        return Err(AttestError::WrongTee { got: report_type.into() });
    }
    if reader.u32()? != HASH_SHA256 {
        return Err(AttestError::Field { field: "hash of the runtime data", why: "not SHA-256" });
    }
    let size = reader.u32()?;
    if size.checked_add(RUNTIME_HEADER_BYTES) != Some(data_bytes) {
        return Err(AttestError::Field { field: "size of the runtime data", why: "two sizes contradict each other" });
    }
    let size = usize::try_from(size).map_err(|_| AttestError::Field { field: "size of the runtime data", why: "beyond this machine" })?;
    let data = reader.claimed(size, RUNTIME)?;
    // the TPM's index is longer than its content
    match reader.rest().iter().all(|byte| *byte == 0) {
        true => Ok(data),
        false => Err(AttestError::TrailingBytes { part: PART, count_bytes: reader.remaining() }),
    }
}

/// What the runtime data says, as far as it is looked at.
#[derive(Deserialize)]
struct Runtime {
    keys: Vec<Jwk>,
    #[serde(rename = "vm-configuration")]
    vm_configuration: Option<Value>,
}

/// A JSON web key. Members that say nothing about an RSA key are not looked at.
#[derive(Deserialize)]
struct Jwk {
    kid: String,
    kty: String,
    e: Option<String>,
    n: Option<String>,
    key_ops: Option<Vec<String>>,
}

/// The attestation key of the virtual TPM, and what the host says of the machine.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Bound {
    /// RSAPublicKey, DER.
    pub(super) key: Vec<u8>,
    pub(super) vm_configuration: Option<Value>,
}

/// Reads runtime data.
pub(super) fn bound(data: &[u8]) -> Result<Bound, AttestError> {
    let wrong = |why| AttestError::Field { field: "HCLAkPub", why };
    let runtime: Runtime =
        serde_json::from_slice(data).map_err(|_| AttestError::Malformed { part: RUNTIME, why: "not an object with keys" })?;
    let mut named = runtime.keys.iter().filter(|key| key.kid == "HCLAkPub");
    let (Some(key), None) = (named.next(), named.next()) else { return Err(wrong("not there, or twice")) };
    let signs = key.key_ops.as_ref().is_some_and(|uses| uses.iter().all(|name| name == "sign") && !uses.is_empty());
    if key.kty != "RSA" || !signs {
        return Err(wrong("not an RSA key for signing alone"));
    }
    let number = |text: &Option<String>| {
        let decoded = URL_SAFE_NO_PAD.decode(text.as_deref().unwrap_or_default());
        decoded.ok().filter(|bytes| bytes.first().is_some_and(|byte| *byte != 0)).ok_or_else(|| wrong("a number is missing or malformed"))
    };
    let (modulus, exponent) = (number(&key.n)?, number(&key.e)?);
    if !MODULUS_BYTES.contains(&modulus.len()) || exponent.len() > 8 {
        return Err(wrong("of a size that is not served"));
    }
    let numbers = [integer(&modulus), integer(&exponent)].concat();
    Ok(Bound { key: tlv(0x30, &numbers), vm_configuration: runtime.vm_configuration })
}

/// A positive DER INTEGER.
fn integer(bytes: &[u8]) -> Vec<u8> {
    match bytes.first() {
        Some(0x80..) => tlv(2, &[&[0], bytes].concat()),
        _ => tlv(2, bytes),
    }
}

/// Tag, length in its shortest form, content of less than 64 KiB.
fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let [.., high, low] = content.len().to_be_bytes();
    let head = match (high, low) {
        (0, 0..=0x7f) => vec![tag, low],
        (0, _) => vec![tag, 0x81, low],
        _ => vec![tag, 0x82, high, low],
    };
    [&head, content].concat()
}
