//! The document inside the COSE payload, of an NSM or of a NitroTPM. Owns: its fields, their types and sizes. Never: judges a value beyond its
//! type and size; the fields are claims until the signature is checked.
//! Source: AWS Nitro Enclaves attestation process (document syntax); dstack attestation reference, section 5.3 rule 2;
//! vectors' README (null for absent optional fields, maps of indefinite length).

use super::{PCR_BYTES, PcrMap};
use crate::AttestError;
use crate::cbor::{Head, Length, Reader};
use std::collections::BTreeMap;

const PART: &str = "nsm document";
/// Most PCRs, and the first index that does not exist.
const PCRS_MAX: usize = 32;
/// Largest `user_data` and `nonce`.
const DATA_BYTES_MAX: usize = 512;
/// Largest `public_key`, and largest certificate.
const KEY_BYTES_MAX: usize = 1024;
/// Longest `module_id`; a real one has 39 characters.
const MODULE_ID_BYTES_MAX: usize = 256;
/// Most certificates of a `cabundle`; real ones have 4.
pub(super) const CABUNDLE_MAX: usize = 10;

/// Who made a document. The two name their PCRs differently, so neither passes for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Maker {
    /// The security module of an enclave.
    Nsm,
    /// The TPM of an EC2 instance.
    NitroTpm,
}

impl Maker {
    const fn pcrs(self) -> &'static str {
        match self {
            Self::Nsm => "pcrs",
            Self::NitroTpm => "nitrotpm_pcrs",
        }
    }
}

/// A decoded document; the slices are parts of the payload.
#[derive(Debug)]
pub(super) struct Document<'a> {
    pub(super) module_id: &'a str,
    /// Milliseconds since 1970.
    pub(super) timestamp_ms: u64,
    pub(super) pcrs: PcrMap,
    /// Leaf, DER.
    pub(super) certificate: &'a [u8],
    /// Root first, DER.
    pub(super) cabundle: Vec<&'a [u8]>,
    pub(super) public_key: Option<&'a [u8]>,
    pub(super) user_data: Option<&'a [u8]>,
    pub(super) nonce: Option<&'a [u8]>,
}

impl<'a> Document<'a> {
    /// Decodes the whole payload. Members may come in any order, each once; unknown ones are passed over, for the NSM's
    /// signature covers them.
    pub(super) fn decode(payload: &'a [u8], maker: Maker) -> Result<Self, AttestError> {
        let mut reader = Reader::new(PART, payload);
        let Head::Map(mut length) = reader.head()? else {
            return Err(AttestError::Malformed { part: PART, why: "not a map" });
        };
        let (mut module_id, mut digest, mut timestamp, mut pcrs, mut certificate, mut cabundle) = (None, None, None, None, None, None);
        let (mut public_key, mut user_data, mut nonce) = (None, None, None);
        while reader.more(&mut length)? {
            let Head::Text(name) = reader.head()? else {
                return Err(AttestError::Malformed { part: PART, why: "a member's name is not a text" });
            };
            match reader.text_body(name)? {
                "module_id" => once(&mut module_id, text(&mut reader, "module_id")?)?,
                "digest" => once(&mut digest, text(&mut reader, "digest")?)?,
                "timestamp" => once(&mut timestamp, unsigned(&mut reader, "timestamp")?)?,
                name if name == maker.pcrs() => once(&mut pcrs, pcr_map(&mut reader)?)?,
                "certificate" => once(&mut certificate, sized(reader.bytes("certificate")?, "certificate", KEY_BYTES_MAX)?)?,
                "cabundle" => once(&mut cabundle, bundle(&mut reader)?)?,
                "public_key" => once(&mut public_key, optional(&mut reader, "public_key", KEY_BYTES_MAX)?)?,
                "user_data" => once(&mut user_data, optional(&mut reader, "user_data", DATA_BYTES_MAX)?)?,
                "nonce" => once(&mut nonce, optional(&mut reader, "nonce", DATA_BYTES_MAX)?)?,
                _ => reader.skip()?,
            }
        }
        reader.end()?;

        // §5.3 rule 2: digest == "SHA384"
        if required(digest, "digest")? != "SHA384" {
            return Err(AttestError::Field { field: "digest", why: "not SHA384" });
        }
        let module_id = required(module_id, "module_id")?;
        if module_id.is_empty() || module_id.len() > MODULE_ID_BYTES_MAX {
            return Err(AttestError::Field { field: "module_id", why: "empty or too long" });
        }
        let timestamp_ms = required(timestamp, "timestamp")?;
        if timestamp_ms == 0 {
            return Err(AttestError::Field { field: "timestamp", why: "zero" });
        }
        Ok(Self {
            module_id,
            timestamp_ms,
            pcrs: required(pcrs, maker.pcrs())?,
            certificate: required(certificate, "certificate")?,
            cabundle: required(cabundle, "cabundle")?,
            public_key: public_key.flatten(),
            user_data: user_data.flatten(),
            nonce: nonce.flatten(),
        })
    }
}

fn once<T>(slot: &mut Option<T>, value: T) -> Result<(), AttestError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(AttestError::Malformed { part: PART, why: "a member occurs twice" }),
    }
}

fn required<T>(value: Option<T>, field: &'static str) -> Result<T, AttestError> {
    value.ok_or(AttestError::Field { field, why: "missing" })
}

fn text<'a>(reader: &mut Reader<'a>, field: &'static str) -> Result<&'a str, AttestError> {
    match reader.head()? {
        Head::Text(length) => reader.text_body(length),
        _ => Err(AttestError::Field { field, why: "not a text" }),
    }
}

fn unsigned(reader: &mut Reader<'_>, field: &'static str) -> Result<u64, AttestError> {
    match reader.head()? {
        Head::Unsigned(value) => Ok(value),
        _ => Err(AttestError::Field { field, why: "not an unsigned integer" }),
    }
}

fn sized<'a>(bytes: &'a [u8], field: &'static str, bytes_max: usize) -> Result<&'a [u8], AttestError> {
    let fits = !bytes.is_empty() && bytes.len() <= bytes_max;
    if fits { Ok(bytes) } else { Err(AttestError::Field { field, why: "empty or too long" }) }
}

/// A byte string of up to `bytes_max` bytes, or null for an absent one.
fn optional<'a>(reader: &mut Reader<'a>, field: &'static str, bytes_max: usize) -> Result<Option<&'a [u8]>, AttestError> {
    let bytes = match reader.head()? {
        Head::Null => return Ok(None),
        Head::Bytes(length) => reader.body(length)?,
        _ => return Err(AttestError::Field { field, why: "neither null nor a byte string" }),
    };
    if bytes.len() > bytes_max { Err(AttestError::Field { field, why: "too long" }) } else { Ok(Some(bytes)) }
}

/// §5.3 rule 2: at least one PCR, every PCR 48 bytes; index 0 to 31, each once.
fn pcr_map(reader: &mut Reader<'_>) -> Result<PcrMap, AttestError> {
    let refuse = |why| AttestError::Field { field: "pcrs", why };
    let Head::Map(mut length) = reader.head()? else { return Err(refuse("not a map")) };
    if matches!(length, Length::Of(count) if count > PCRS_MAX as u64) {
        return Err(refuse("more than 32"));
    }
    let mut pcrs = BTreeMap::new();
    while reader.more(&mut length)? {
        let Head::Unsigned(index) = reader.head()? else { return Err(refuse("an index is not an unsigned integer")) };
        let index = u8::try_from(index).ok().filter(|index| usize::from(*index) < PCRS_MAX).ok_or(refuse("an index above 31"))?;
        let value: [u8; PCR_BYTES] = reader.bytes("pcrs")?.try_into().map_err(|_| refuse("a value is not 48 bytes"))?;
        if pcrs.insert(index, value).is_some() {
            return Err(refuse("an index occurs twice"));
        }
    }
    if pcrs.is_empty() { Err(refuse("empty")) } else { Ok(PcrMap(pcrs)) }
}

fn bundle<'a>(reader: &mut Reader<'a>) -> Result<Vec<&'a [u8]>, AttestError> {
    let refuse = |why| AttestError::Field { field: "cabundle", why };
    let Head::Array(mut length) = reader.head()? else { return Err(refuse("not an array")) };
    let mut certificates = Vec::new();
    while reader.more(&mut length)? {
        if certificates.len() == CABUNDLE_MAX {
            return Err(refuse("more than 10 certificates"));
        }
        certificates.push(sized(reader.bytes("cabundle")?, "cabundle", KEY_BYTES_MAX)?);
    }
    if certificates.is_empty() { Err(refuse("empty")) } else { Ok(certificates) }
}
