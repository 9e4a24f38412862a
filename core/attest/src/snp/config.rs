//! The document that HOST_DATA binds: who the guest is. Owns: MrConfigV3, its digest and its fields. Never: judges who may run.
//! Source: dstack attestation reference, sections 5.5 and 9 (MrConfigV3), 7 (`key_provider_info`).

use dstack_protocol::AppId;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::AttestError;

/// Largest document: real ones have half a KiB.
pub const DOCUMENT_BYTES_MAX: usize = 16 * 1024;

const PART: &str = "mr-config document";
const DOMAIN: &[u8] = b"dstack-mr-config-v3:\0";

/// What the document says. Made only from a document that a report binds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MrConfig {
    pub(crate) app_id: Option<AppId>,
    pub(crate) compose_hash: Option<[u8; 32]>,
    pub(crate) instance_id: Vec<u8>,
    /// `{"name":…,"id":…}`, or empty without a provider.
    pub(crate) key_provider: Vec<u8>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    version: u32,
    app_id: Option<String>,
    compose_hash: Option<String>,
    gpu_policy_hash: Option<String>,
    key_provider: Option<String>,
    key_provider_id: Option<String>,
    instance_id: Option<String>,
    init_script_hashes: Option<Vec<String>>,
}

#[derive(Serialize)]
struct KeyProvider<'a> {
    name: &'a str,
    id: &'a str,
}

/// What HOST_DATA has to be: `SHA-256("dstack-mr-config-v3:" ‖ 0x00 ‖ document)`.
#[must_use]
pub fn host_data(document: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update(DOMAIN).chain_update(document).finalize().into()
}

impl MrConfig {
    /// Reads the document that `bound` (HOST_DATA) binds.
    /// # Errors
    /// [`AttestError::Document`] for another document, [`AttestError::Malformed`], [`AttestError::Field`] and
    /// [`AttestError::UnsupportedVersion`] for one that is not of version 3.
    pub(crate) fn read(document: &str, bound: &[u8; 32]) -> Result<Self, AttestError> {
        if document.len() > DOCUMENT_BYTES_MAX {
            return Err(AttestError::Length { part: PART, length_bytes: document.len(), limit_bytes: DOCUMENT_BYTES_MAX });
        }
        // Section 5.5: HOST_DATA is the digest of the document's bytes, whatever they are.
        if host_data(document.as_bytes()) != *bound {
            return Err(AttestError::Document { document: PART, field: "host_data" });
        }
        Self::parse(document)
    }

    /// Reads one that is bound already.
    pub(crate) fn parse(document: &str) -> Result<Self, AttestError> {
        let raw: Raw =
            serde_json::from_str(document).map_err(|_| AttestError::Malformed { part: PART, why: "not an object of its members" })?;
        if raw.version != 3 {
            return Err(AttestError::UnsupportedVersion { part: PART, got: raw.version.into() });
        }
        for digest in raw.gpu_policy_hash.iter().chain(raw.init_script_hashes.iter().flatten()) {
            fixed::<32>(digest, "hashes of the mr-config document")?;
        }
        let id = raw.key_provider_id.as_deref().unwrap_or_default();
        hex::decode(id).map_err(|_| AttestError::Field { field: "key_provider_id", why: "not hex" })?;
        let key_provider = match raw.key_provider.as_deref() {
            None => Vec::new(),
            Some(name) => serde_json::to_vec(&KeyProvider { name, id })
                .map_err(|_| AttestError::Field { field: "key_provider", why: "cannot be written as json" })?,
        };
        let instance_id = match raw.instance_id.as_deref() {
            None | Some("") => Vec::new(),
            Some(id) => fixed::<20>(id, "instance_id")?.to_vec(),
        };
        Ok(Self {
            app_id: raw.app_id.map(|id| fixed(&id, "app_id").map(AppId)).transpose()?,
            compose_hash: raw.compose_hash.map(|hash| fixed(&hash, "compose_hash")).transpose()?,
            instance_id,
            key_provider,
        })
    }
}

fn fixed<const N: usize>(text: &str, field: &'static str) -> Result<[u8; N], AttestError> {
    let mut bytes = [0; N];
    match hex::decode_to_slice(text, &mut bytes) {
        Ok(()) => Ok(bytes),
        Err(_) => Err(AttestError::Field { field, why: "not hex of its size" }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const APP: &str = "1111111111111111111111111111111111111111";
    const INSTANCE: &str = "2222222222222222222222222222222222222222";
    const COMPOSE: &str = "4444444444444444444444444444444444444444444444444444444444444444";

    fn document() -> String {
        format!(
            r#"{{"app_id":"{APP}","compose_hash":"{COMPOSE}","instance_id":"{INSTANCE}","key_provider":"kms","key_provider_id":"aa01","version":3}}"#
        )
    }

    #[test]
    fn reads_the_document_that_is_bound() {
        let document = document();
        let read = MrConfig::read(&document, &host_data(document.as_bytes())).unwrap();
        assert_eq!(read.app_id, Some(AppId([0x11; 20])));
        assert_eq!((read.compose_hash, read.instance_id), (Some([0x44; 32]), vec![0x22; 20]));
        assert_eq!(read.key_provider, br#"{"name":"kms","id":"aa01"}"#);
        let bare = MrConfig::parse(r#"{"version":3}"#).unwrap();
        assert_eq!(bare, MrConfig { app_id: None, compose_hash: None, instance_id: vec![], key_provider: vec![] });
    }

    #[test]
    fn refuses_a_document_that_is_not_bound() {
        let document = document();
        let other = document.replace("aa01", "aa02");
        let refused = MrConfig::read(&other, &host_data(document.as_bytes()));
        assert_eq!(refused, Err(AttestError::Document { document: PART, field: "host_data" }));
        assert_eq!(MrConfig::read(&document, &[0; 32]), refused);
    }

    #[test]
    fn refuses_documents_of_another_shape() {
        let malformed = Err(AttestError::Malformed { part: PART, why: "not an object of its members" });
        for text in ["", "[]", r#"{"version":3,"x":1}"#, r#"{"app_id":"11"}"#, r#"{"version":3,"version":3}"#, r#"{"version":3} "x""#] {
            assert_eq!(MrConfig::parse(text), malformed, "{text}");
        }
        assert_eq!(MrConfig::parse(r#"{"version":2}"#), Err(AttestError::UnsupportedVersion { part: PART, got: 2 }));
        for (member, value) in [("app_id", "11"), ("compose_hash", APP), ("instance_id", COMPOSE)] {
            let refused = MrConfig::parse(&format!(r#"{{"version":3,"{member}":"{value}"}}"#));
            assert_eq!(refused, Err(AttestError::Field { field: member, why: "not hex of its size" }));
        }
        let refused = MrConfig::parse(r#"{"version":3,"key_provider":"kms","key_provider_id":"zz"}"#);
        assert_eq!(refused, Err(AttestError::Field { field: "key_provider_id", why: "not hex" }));
        let long = " ".repeat(DOCUMENT_BYTES_MAX + 1);
        assert_eq!(MrConfig::read(&long, &[0; 32]).unwrap_err().class().as_str(), "parse.length");
    }

    proptest! {
        #[test]
        fn any_text_ends_in_a_value(text in ".{0,200}") {
            let _ = MrConfig::parse(&text);
        }
    }
}
