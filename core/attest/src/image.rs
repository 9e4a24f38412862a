//! The OS image a guest claims, and the measurement documents that tie the claim to what was measured. Owns: the members of VmConfig
//! that say so, and the documents' form. Never: lets another member of that text reach anyone: nothing else in it is proven.
//! Source: dstack attestation reference, sections 6 and 8.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::{
    AttestError,
    cbor::{Head, Reader},
};

/// Largest checksum file and largest measurement of a document; real ones have a few hundred bytes.
const DOCUMENT_BYTES_MAX: usize = 64 * 1024;
const PART: &str = "measurement document";

/// What VmConfig claims of the OS image.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct ImageClaim {
    /// Hash of the image, where one is claimed.
    pub(crate) os_image_hash: Option<[u8; 32]>,
    /// The document for Google Cloud.
    pub(crate) gcp: Option<Document>,
    /// The document for AWS.
    pub(crate) aws: Option<Document>,
}

#[derive(Deserialize)]
struct RawConfig {
    os_image_hash: Option<String>,
    gcp_measurement: Option<RawDocument>,
    aws_measurement: Option<RawDocument>,
}

/// An object, or the text of one: both are written.
#[derive(Deserialize)]
#[serde(untagged)]
enum RawDocument {
    Object(Parts),
    Text(String),
}

#[derive(Deserialize)]
struct Parts {
    checksum_file: String,
    measurement: String,
}

/// A measurement document: a list of files and their hashes, and the measurement that is one of them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Document {
    checksum_file: Vec<u8>,
    measurement: Vec<u8>,
}

impl ImageClaim {
    /// Reads VmConfig; an empty text claims nothing.
    pub(crate) fn parse(config: &str) -> Result<Self, AttestError> {
        if config.trim().is_empty() {
            return Ok(Self::default());
        }
        let raw: RawConfig =
            serde_json::from_str(config).map_err(|_| AttestError::Malformed { part: "vm config", why: "not an object of its members" })?;
        let hash = raw.os_image_hash.filter(|text| !text.is_empty()).map(|text| {
            let mut hash = [0; 32];
            let wrong = AttestError::Field { field: "os_image_hash", why: "not 64 hex digits" };
            hex::decode_to_slice(text, &mut hash).map(|()| hash).map_err(|_| wrong)
        });
        let document = |raw: Option<RawDocument>| raw.map(Document::read).transpose();
        Ok(Self { os_image_hash: hash.transpose()?, gcp: document(raw.gcp_measurement)?, aws: document(raw.aws_measurement)? })
    }
}

impl Document {
    fn read(raw: RawDocument) -> Result<Self, AttestError> {
        let malformed = |why| AttestError::Malformed { part: PART, why };
        let parts = match raw {
            RawDocument::Object(parts) => parts,
            RawDocument::Text(text) => serde_json::from_str(&text).map_err(|_| malformed("not an object of its members"))?,
        };
        let bytes = |text: String| match text.len() > DOCUMENT_BYTES_MAX {
            true => Err(AttestError::Length { part: PART, length_bytes: text.len(), limit_bytes: DOCUMENT_BYTES_MAX }),
            false => STANDARD.decode(text).map_err(|_| malformed("not base64")),
        };
        Ok(Self { checksum_file: bytes(parts.checksum_file)?, measurement: bytes(parts.measurement)? })
    }

    /// The measurement, proven to be the file `name` of the image `os_image_hash`.
    pub(crate) fn prove(&self, os_image_hash: &[u8; 32], name: &str) -> Result<&[u8], AttestError> {
        if Sha256::digest(&self.checksum_file).as_slice() != os_image_hash {
            return Err(AttestError::Measurement { register: "os image: the checksum file is of another image" });
        }
        let text = std::str::from_utf8(&self.checksum_file).map_err(|_| AttestError::Malformed { part: PART, why: "not text" })?;
        let entry = text.lines().find_map(|line| {
            let (hash, file) = line.split_once(char::is_whitespace)?;
            (file.trim_start().trim_start_matches('*').trim_end() == name).then_some(hash)
        });
        let measured = hex::encode(Sha256::digest(&self.measurement));
        match entry {
            Some(hash) if hash.eq_ignore_ascii_case(&measured) => Ok(&self.measurement),
            _ => Err(AttestError::Measurement { register: "os image: the measurement is not the image's" }),
        }
    }
}

/// `uki_auth` of `measurement.gcp.cbor`: the Authenticode hash of the image's unified kernel.
pub(crate) fn gcp_uki(cbor: &[u8]) -> Result<[u8; 32], AttestError> {
    let (version, hash) = members(cbor, "uki_auth")?;
    match version {
        Some(1) => Ok(hash),
        Some(got) => Err(AttestError::UnsupportedVersion { part: PART, got }),
        None => Err(AttestError::Field { field: "version", why: "missing" }),
    }
}

/// `boot_pcr_digest` of `measurement.aws.cbor`.
pub(crate) fn aws_boot(cbor: &[u8]) -> Result<[u8; 32], AttestError> {
    members(cbor, "boot_pcr_digest").map(|(_, hash)| hash)
}

/// The version and the hash called `field` of a map; other members are passed over, each member stands once.
fn members(cbor: &[u8], field: &'static str) -> Result<(Option<u64>, [u8; 32]), AttestError> {
    let malformed = |why| AttestError::Malformed { part: PART, why };
    let mut reader = Reader::new(PART, cbor);
    let Head::Map(mut length) = reader.head()? else { return Err(malformed("not a map")) };
    let (mut version, mut hash) = (None, None);
    while reader.more(&mut length)? {
        let Head::Text(name) = reader.head()? else { return Err(malformed("a member's name is not a text")) };
        let name = reader.text_body(name)?;
        let twice = match name {
            "version" => match reader.head()? {
                Head::Unsigned(value) => version.replace(value).is_some(),
                _ => return Err(AttestError::Field { field: "version", why: "not an unsigned integer" }),
            },
            name if name == field => {
                let bytes = reader.bytes(field)?;
                hash.replace(bytes.try_into().map_err(|_| AttestError::Field { field, why: "not 32 bytes" })?).is_some()
            }
            _ => {
                reader.skip()?;
                false
            }
        };
        if twice {
            return Err(malformed("a member occurs twice"));
        }
    }
    reader.end()?;
    Ok((version, hash.ok_or(AttestError::Field { field, why: "missing" })?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn gcp_cbor(version: u8, uki: &[u8]) -> Vec<u8> {
        let head = [&[0xa3, 0x67][..], b"version", &[version], &[0x68], b"uki_auth", &[0x58, u8::try_from(uki.len()).unwrap()]].concat();
        [&head[..], uki, &[0x61, b'x', 0x81, 0x00]].concat()
    }

    fn config(measurement: &[u8], listed: &[u8]) -> (String, [u8; 32]) {
        let checksums = format!("{}  other\n{} *measurement.gcp.cbor\n", "00".repeat(32), hex::encode(Sha256::digest(listed)));
        let hash: [u8; 32] = Sha256::digest(&checksums).into();
        let (checksums, measurement) = (STANDARD.encode(checksums), STANDARD.encode(measurement));
        let document = serde_json::json!({ "checksum_file": checksums, "measurement": measurement });
        (serde_json::json!({ "os_image_hash": hex::encode(hash), "gcp_measurement": document, "cpu_count": 4 }).to_string(), hash)
    }

    #[test]
    fn a_document_is_tied_to_its_image() {
        let cbor = gcp_cbor(1, &[7; 32]);
        let (config, hash) = config(&cbor, &cbor);
        let claim = ImageClaim::parse(&config).unwrap();
        assert_eq!(claim.os_image_hash, Some(hash));
        let document = claim.gcp.unwrap();
        assert_eq!(gcp_uki(document.prove(&hash, "measurement.gcp.cbor").unwrap()), Ok([7; 32]));
        assert_eq!(document.prove(&[0; 32], "measurement.gcp.cbor").unwrap_err().class().as_str(), "policy.measurement");
        assert_eq!(document.prove(&hash, "measurement.aws.cbor").unwrap_err().class().as_str(), "policy.measurement");
        let nested: serde_json::Value = serde_json::from_str(&config).unwrap();
        let as_text = serde_json::json!({ "gcp_measurement": nested["gcp_measurement"].to_string() }).to_string();
        assert_eq!(ImageClaim::parse(&as_text).unwrap().gcp, Some(document));
    }

    #[test]
    fn a_measurement_that_the_image_does_not_list_is_refused() {
        let (config, hash) = config(&gcp_cbor(1, &[7; 32]), &gcp_cbor(1, &[8; 32]));
        let document = ImageClaim::parse(&config).unwrap().gcp.unwrap();
        assert_eq!(document.prove(&hash, "measurement.gcp.cbor").unwrap_err().class().as_str(), "policy.measurement");
    }

    #[test]
    fn other_versions_sizes_and_texts_are_refused() {
        assert_eq!(gcp_uki(&gcp_cbor(2, &[7; 32])).unwrap_err().class().as_str(), "type.unsupported_version");
        assert_eq!(gcp_uki(&gcp_cbor(1, &[7; 31])).unwrap_err().class().as_str(), "parse.field");
        assert_eq!(aws_boot(&gcp_cbor(1, &[7; 32])).unwrap_err().class().as_str(), "parse.field");
        assert_eq!(ImageClaim::parse("{\"os_image_hash\":\"aa\"}").unwrap_err().class().as_str(), "parse.field");
        assert_eq!(ImageClaim::parse("[").unwrap_err().class().as_str(), "parse.malformed");
        assert_eq!(ImageClaim::parse(" "), Ok(ImageClaim::default()));
    }

    proptest! {
        #[test]
        fn any_text_and_any_bytes_are_read_or_refused(text in ".{0,200}", bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = ImageClaim::parse(&text);
            let _ = (gcp_uki(&bytes), aws_boot(&bytes));
        }
    }
}
