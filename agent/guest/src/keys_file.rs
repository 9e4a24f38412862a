//! Keys that the boot left for the agent: `.appkeys.json`. Owns: reading it, wiping what was read. Never: writes it.
//! Source: util and deploy reference §2 step 5; §4 for the forms of `key_provider`.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context as _, bail};
use dstack_secret::{Secret, SecretBytes};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, Visitor};

use crate::keys::{AppKeys, locked};

/// Largest file that is read, bytes.
const FILE_BYTES_MAX: u64 = 256 * 1024;

/// The document.
#[derive(Debug, Deserialize)]
pub struct KeysFile {
    disk_crypt_key: HexKey,
    #[serde(default)]
    env_crypt_key: HexKey,
    k256_key: HexKey,
    #[serde(default)]
    k256_signature: String,
    /// Certificate of the CA, PEM; may be empty.
    #[serde(default)]
    pub ca_cert: String,
    /// Where the keys came from.
    pub key_provider: Provider,
}

/// `key_provider` of the document.
#[derive(Debug, Deserialize)]
pub enum Provider {
    /// A KMS.
    Kms {
        /// Ends in `/prpc`.
        url: String,
        /// SubjectPublicKeyInfo of `ca_cert`, hex; may be empty.
        #[serde(default)]
        pubkey: String,
        /// Key of the temp CA, PEM, public by design; may be empty.
        #[serde(default)]
        tmp_ca_key: String,
        /// The temp CA, PEM; may be empty.
        #[serde(default)]
        tmp_ca_cert: String,
    },
    /// Random keys.
    None {
        /// Of the local CA.
        key: PemKey,
    },
    /// A local key provider.
    Local {
        /// Of the local CA.
        key: PemKey,
        /// Measurement of the provider, hex.
        #[serde(default)]
        mr: String,
    },
    /// Sealed by a TPM.
    Tpm {
        /// Of the local CA.
        key: PemKey,
        /// Public half, hex.
        #[serde(default)]
        pubkey: String,
    },
}

impl Provider {
    /// Name and id as event `key-provider` has them.
    #[must_use]
    pub fn name_and_id(&self) -> (&'static str, &str) {
        match self {
            Self::Kms { pubkey, .. } => ("kms", pubkey),
            Self::None { .. } => ("none", ""),
            Self::Local { mr, .. } => ("local-sgx", mr),
            Self::Tpm { pubkey, .. } => ("tpm", pubkey),
        }
    }
}

/// 32 bytes in hex, or nothing.
#[derive(Debug, Default)]
struct HexKey(Option<Secret<32>>);

impl<'de> Deserialize<'de> for HexKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(HexVisitor)
    }
}

struct HexVisitor;

impl Visitor<'_> for HexVisitor {
    type Value = HexKey;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("64 hex digits or nothing")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<HexKey, E> {
        if text.is_empty() {
            return Ok(HexKey(None));
        }
        let digits = text.strip_prefix("0x").unwrap_or(text);
        // No word of the text in the error: it is a key.
        let key = Secret::try_from_fn(|bytes: &mut [u8; 32]| hex::decode_to_slice(digits, bytes).map_err(|_| ()));
        key.map(|key| HexKey(Some(key))).map_err(|()| E::custom("expected 64 hex digits or nothing"))
    }
}

/// A private key, PEM.
pub struct PemKey(pub SecretBytes);

impl<'de> Deserialize<'de> for PemKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)
            .map(|text| Self(SecretBytes::take(text.into_bytes())))
            .map_err(|_| D::Error::custom("expected a key in PEM"))
    }
}

impl fmt::Debug for PemKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("PemKey(<redacted>)")
    }
}

impl KeysFile {
    /// Reads the file.
    ///
    /// # Errors
    /// What is wrong with it, without a word of its content.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        let file = File::open(path).with_context(|| format!("cannot read the keys in {shown}: did `dstack-util setup` run?"))?;
        let mut bytes = Vec::with_capacity(
            usize::try_from(file.metadata().map_or(0, |meta| meta.len()).min(FILE_BYTES_MAX)).unwrap_or(0).saturating_add(1),
        );
        let outcome = file.take(FILE_BYTES_MAX.saturating_add(1)).read_to_end(&mut bytes);
        let text = SecretBytes::take(bytes);
        outcome.with_context(|| format!("cannot read the keys in {shown}"))?;
        let length = text.expose(<[u8]>::len);
        if u64::try_from(length).is_ok_and(|length| length > FILE_BYTES_MAX) {
            bail!("{shown} has more than {FILE_BYTES_MAX} bytes: no keys file");
        }
        text.expose(|text| serde_json::from_slice(text)).map_err(|error| {
            // The reader's own words may repeat a value.
            anyhow::anyhow!("{shown} line {} column {}: not the AppKeys document of dstack", error.line(), error.column())
        })
    }

    /// Takes the keys out, into locked memory.
    ///
    /// # Errors
    /// A signature that is not hex.
    pub fn take_keys(&mut self) -> anyhow::Result<AppKeys> {
        let k256_signature = hex::decode(self.k256_signature.trim_start_matches("0x")).context("keys file: k256_signature is not hex")?;
        let take = |key: &mut HexKey| key.0.take().map(locked);
        Ok(AppKeys {
            disk: take(&mut self.disk_crypt_key),
            env: take(&mut self.env_crypt_key),
            k256: take(&mut self.k256_key),
            p256: None,
            k256_signature: if k256_signature.is_empty() { OnceLock::new() } else { OnceLock::from(k256_signature) },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> anyhow::Result<KeysFile> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(".appkeys.json");
        std::fs::write(&file, text).unwrap();
        KeysFile::read(&file)
    }

    fn document(provider: &str) -> String {
        format!(
            r#"{{"disk_crypt_key":"{d}","k256_key":"{k}","k256_signature":"{s}","gateway_app_id":"","ca_cert":"x","key_provider":{provider},"more":1}}"#,
            d = "11".repeat(32),
            k = "22".repeat(32),
            s = "33".repeat(65)
        )
    }

    #[test]
    fn reads_the_forms_of_every_provider() {
        for (provider, name, id) in [
            (r#"{"Kms":{"url":"https://k:1/prpc","pubkey":"aa","tmp_ca_key":"","tmp_ca_cert":""}}"#, "kms", "aa"),
            (r#"{"None":{"key":"pem"}}"#, "none", ""),
            (r#"{"Local":{"key":"pem","mr":"bb"}}"#, "local-sgx", "bb"),
            (r#"{"Tpm":{"key":"pem","pubkey":"cc"}}"#, "tpm", "cc"),
        ] {
            let mut file = read(&document(provider)).unwrap();
            assert_eq!(file.key_provider.name_and_id(), (name, id));
            let keys = file.take_keys().unwrap();
            assert_eq!(keys.names(), ["disk", "k256"], "no env key in the document");
            assert_eq!(keys.identity_signature(), [0x33; 65]);
            assert!(!format!("{file:?}{keys:?}").contains("1111"));
        }
    }

    #[test]
    fn errors_repeat_nothing_of_the_file() {
        let secret = "5ec2e7".repeat(11);
        for text in [
            "",
            "{}",
            "[]",
            &document(r#"{"Sgx":{}}"#),
            &document(r#""None""#),
            &document(r#"{"None":{"key":7}}"#),
            &format!(r#"{{"k256_key":"{secret}"}}"#),
        ] {
            let error = format!("{:#}", read(text).unwrap_err());
            assert!(error.contains("AppKeys document") && !error.contains("5ec2e7"), "{error}");
        }
        let dir = tempfile::tempdir().unwrap();
        assert!(format!("{:#}", KeysFile::read(&dir.path().join("none")).unwrap_err()).contains("dstack-util setup"));
    }
}
