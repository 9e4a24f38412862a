//! Where an app's keys come from. Owns: one module a provider, and what each of them gives. Never: a provider that the measured document
//! does not name.
//! Source: util and deploy reference §4.

pub mod kms;
pub mod local;
pub mod seed;
#[cfg(feature = "tpm")]
pub mod tpm;

use crate::app_keys::AppKeys;
use crate::setup::compose::ProviderKind;

/// Keys, and who gave them.
#[derive(Debug)]
pub struct Provided {
    /// The keys.
    pub keys: AppKeys,
    /// Which provider.
    pub kind: ProviderKind,
    /// Its id, as event `key-provider` carries it in hex; may be empty.
    pub id: Vec<u8>,
    /// What a KMS says of this machine's image.
    pub os_image_hash: Option<Vec<u8>>,
}

impl Provided {
    /// Payload of event `key-provider`.
    #[must_use]
    pub fn event_payload(&self) -> String {
        event_payload(self.kind, &self.id)
    }
}

/// `{"name":"…","id":"…"}`.
#[must_use]
pub fn event_payload(kind: ProviderKind, id: &[u8]) -> String {
    format!("{{\"name\":\"{}\",\"id\":\"{}\"}}", kind.event_name(), hex::encode(id))
}

/// Reads [`event_payload`] back: the id.
#[must_use]
pub fn id_of_event(payload: &[u8]) -> Option<Vec<u8>> {
    let payload: serde_json::Value = serde_json::from_slice(payload).ok()?;
    hex::decode(payload.get("id")?.as_str()?).ok()
}

/// Why there are no keys.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    /// From a seed.
    #[error("{0}")]
    Seed(#[from] seed::SeedError),
    /// Local provider.
    #[error("{0}")]
    Local(#[from] local::LocalError),
    /// KMS.
    #[error("{0:#}")]
    Kms(#[from] kms::KmsError),
    /// TPM.
    #[cfg(feature = "tpm")]
    #[error("{0}")]
    Tpm(#[from] tpm::TpmSeedError),
    /// This build has no TPM.
    #[cfg(not(feature = "tpm"))]
    #[error("key provider tpm needs a build with feature `tpm`; this one has it not")]
    NoTpm,
    /// No randomness.
    #[error("the system gives no randomness")]
    Randomness,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_event_is_the_references_text() {
        assert_eq!(event_payload(ProviderKind::Local, &[0xab]), r#"{"name":"local-sgx","id":"ab"}"#);
        assert_eq!(event_payload(ProviderKind::None, &[]), r#"{"name":"none","id":""}"#);
        assert_eq!(id_of_event(event_payload(ProviderKind::Kms, &[1, 2]).as_bytes()), Some(vec![1, 2]));
        assert_eq!(id_of_event(b"{"), None);
    }
}
