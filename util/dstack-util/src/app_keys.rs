//! dstack's `AppKeys` document, `.appkeys.json`. Owns: its form, writing and reading it. Never: leaves a copy of a key behind when writing;
//! a file that others may read.
//! Source: util and deploy reference §2 step 5.
//!
//! Empty where a provider has none: `k256_signature`, `gateway_app_id`, `env_crypt_key`; in mode C, whose release says nothing of a gateway
//! and needs no temp CA, `gateway_app_id`, `tmp_ca_key` and `tmp_ca_cert`. A key that was not asked for is empty, too.

use std::fmt;
use std::path::Path;

use dstack_client::TypedKey;
use dstack_protocol::release::KeyClass;
use dstack_secret::SecretBytes;
use serde::Deserialize;
use serde::de::{Deserializer, Visitor};

use crate::files::{self, FileError};
use crate::published::Published;

/// Largest document that is read.
pub const DOCUMENT_BYTES_MAX: u64 = 1 << 20;

/// The document.
#[derive(Debug)]
pub struct AppKeys {
    /// Passphrase of the data disk, before its hex form.
    pub disk_crypt_key: SecretBytes,
    /// X25519 key of the encrypted environment.
    pub env_crypt_key: SecretBytes,
    /// secp256k1 app key.
    pub k256_key: SecretBytes,
    /// The KMS's signature of it.
    pub k256_signature: Vec<u8>,
    /// Which gateway the app may use.
    pub gateway_app_id: String,
    /// PEM.
    pub ca_cert: String,
    /// Who gave the keys.
    pub key_provider: ProviderKeys,
}

/// Member `key_provider`. PEM text where nothing else is said.
#[derive(Debug)]
pub enum ProviderKeys {
    /// Made for one boot.
    None {
        /// App CA key.
        key: SecretBytes,
    },
    /// Of a provider beside this machine.
    Local {
        /// App CA key.
        key: SecretBytes,
        /// MRENCLAVE of the provider.
        mr: Vec<u8>,
    },
    /// Of this machine's TPM.
    Tpm {
        /// App CA key.
        key: SecretBytes,
        /// Its SPKI, DER.
        pubkey: Vec<u8>,
    },
    /// Of a KMS.
    Kms {
        /// Its address, with `/prpc`.
        url: String,
        /// SPKI of its root CA, DER.
        pubkey: Vec<u8>,
        /// Key of the temp CA: public by design.
        tmp_ca_key: String,
        /// Its certificate.
        tmp_ca_cert: String,
    },
}

impl AppKeys {
    /// Keys of mode C. `url`: the node that `key_provider` names.
    #[must_use]
    pub fn released(keys: &[TypedKey], url: &str, published: Published) -> Self {
        let of = |class: KeyClass| {
            let key = keys.iter().find(|key| key.class() == class);
            key.map_or_else(|| SecretBytes::take(Vec::new()), |key| key.bytes().expose(|bytes| copy(bytes)))
        };
        let url = format!("{}/prpc", url.trim_end_matches('/'));
        Self {
            disk_crypt_key: of(KeyClass::Disk),
            env_crypt_key: of(KeyClass::Env),
            k256_key: of(KeyClass::K256),
            k256_signature: published.k256_signature,
            gateway_app_id: String::new(),
            ca_cert: published.ca_cert,
            key_provider: ProviderKeys::Kms { url, pubkey: published.root_spki, tmp_ca_key: String::new(), tmp_ca_cert: String::new() },
        }
    }

    /// The document as bytes, wiped when dropped.
    ///
    /// # Panics
    /// Never: the buffer is as large as all members can get.
    #[must_use]
    pub fn document(&self) -> SecretBytes {
        let keys = [&self.disk_crypt_key, &self.env_crypt_key, &self.k256_key].map(SecretBytes::len).iter().sum::<usize>();
        let (texts, bytes) = self.key_provider.sizes();
        let texts = [texts, self.gateway_app_id.len(), self.ca_cert.len()].iter().sum::<usize>();
        // Large enough from the start: growing would leave a copy of the keys behind. A character takes at most six bytes.
        let mut out = Writer::with_capacity(1024 + 2 * (keys + bytes + self.k256_signature.len()) + 6 * texts);
        out.raw("{");
        out.hex("\n  \"disk_crypt_key\": ", &self.disk_crypt_key);
        out.hex(",\n  \"env_crypt_key\": ", &self.env_crypt_key);
        out.hex(",\n  \"k256_key\": ", &self.k256_key);
        out.public_hex(",\n  \"k256_signature\": ", &self.k256_signature);
        out.text(",\n  \"gateway_app_id\": ", self.gateway_app_id.as_bytes());
        out.text(",\n  \"ca_cert\": ", self.ca_cert.as_bytes());
        out.raw(",\n  \"key_provider\": {\n    ");
        match &self.key_provider {
            ProviderKeys::None { key } => key.expose(|key| out.text("\"None\": {\n      \"key\": ", key)),
            ProviderKeys::Local { key, mr } => {
                key.expose(|key| out.text("\"Local\": {\n      \"key\": ", key));
                out.public_hex(",\n      \"mr\": ", mr);
            }
            ProviderKeys::Tpm { key, pubkey } => {
                key.expose(|key| out.text("\"Tpm\": {\n      \"key\": ", key));
                out.public_hex(",\n      \"pubkey\": ", pubkey);
            }
            ProviderKeys::Kms { url, pubkey, tmp_ca_key, tmp_ca_cert } => {
                out.text("\"Kms\": {\n      \"url\": ", url.as_bytes());
                out.public_hex(",\n      \"pubkey\": ", pubkey);
                out.text(",\n      \"tmp_ca_key\": ", tmp_ca_key.as_bytes());
                out.text(",\n      \"tmp_ca_cert\": ", tmp_ca_cert.as_bytes());
            }
        }
        out.raw("\n    }\n  }\n}\n");
        out.finish()
    }

    /// Writes the document to a file of mode 0600, whole or not at all; replaces what was there.
    ///
    /// # Errors
    /// [`FileError::System`].
    pub fn write(&self, file: &Path) -> Result<(), FileError> {
        self.document().expose(|bytes| files::write(file, bytes, 0o600))
    }

    /// Reads a document of any of dstack's versions. The words of an error name no content.
    ///
    /// # Errors
    /// Text that says what is wrong with it.
    pub fn parse(document: &SecretBytes) -> Result<Self, String> {
        let raw: Raw = document
            .expose(|bytes| serde_json::from_slice(bytes))
            .map_err(|error| format!("not an AppKeys document (line {}, column {})", error.line(), error.column()))?;
        let unhex = |name: &str, text: SecretText| {
            text.0.expose(|text| {
                let mut bytes = vec![0; text.len() / 2];
                hex::decode_to_slice(text, &mut bytes).map_err(|_| format!("member {name} is not hex"))?;
                Ok::<_, String>(SecretBytes::take(bytes))
            })
        };
        let public = |name: &str, text: &str| hex::decode(text).map_err(|_| format!("member {name} is not hex"));
        Ok(Self {
            disk_crypt_key: unhex("disk_crypt_key", raw.disk_crypt_key)?,
            env_crypt_key: unhex("env_crypt_key", raw.env_crypt_key)?,
            k256_key: unhex("k256_key", raw.k256_key)?,
            k256_signature: public("k256_signature", &raw.k256_signature)?,
            gateway_app_id: raw.gateway_app_id,
            ca_cert: raw.ca_cert,
            key_provider: match raw.key_provider {
                RawProvider::None { key } => ProviderKeys::None { key: key.0 },
                RawProvider::Local { key, mr } => ProviderKeys::Local { key: key.0, mr: public("mr", &mr)? },
                RawProvider::Tpm { key, pubkey } => ProviderKeys::Tpm { key: key.0, pubkey: public("pubkey", &pubkey)? },
                RawProvider::Kms { url, pubkey, tmp_ca_key, tmp_ca_cert } => {
                    ProviderKeys::Kms { url, pubkey: public("pubkey", &pubkey)?, tmp_ca_key, tmp_ca_cert }
                }
            },
        })
    }
}

impl ProviderKeys {
    /// Bytes of text, and bytes that become hex.
    fn sizes(&self) -> (usize, usize) {
        match self {
            Self::None { key } => (key.len(), 0),
            Self::Local { key, mr } => (key.len(), mr.len()),
            Self::Tpm { key, pubkey } => (key.len(), pubkey.len()),
            Self::Kms { url, pubkey, tmp_ca_key, tmp_ca_cert } => {
                (url.len().saturating_add(tmp_ca_key.len()).saturating_add(tmp_ca_cert.len()), pubkey.len())
            }
        }
    }
}

fn copy(bytes: &[u8]) -> SecretBytes {
    SecretBytes::from_fn(bytes.len(), |out| out.copy_from_slice(bytes))
}

/// Appends without ever growing.
struct Writer {
    out: Vec<u8>,
    capacity: usize,
}

impl Writer {
    fn with_capacity(capacity: usize) -> Self {
        let out = Vec::with_capacity(capacity);
        let capacity = out.capacity();
        Self { out, capacity }
    }

    fn raw(&mut self, text: &str) {
        self.out.extend_from_slice(text.as_bytes());
    }

    fn hex(&mut self, name: &str, key: &SecretBytes) {
        key.expose(|bytes| self.public_hex(name, bytes));
    }

    fn public_hex(&mut self, name: &str, bytes: &[u8]) {
        self.raw(name);
        self.raw("\"");
        bytes.iter().for_each(|byte| self.out.extend_from_slice(&digits(*byte)));
        self.raw("\"");
    }

    /// JSON text. What is not UTF-8 never comes here: all of it was text before.
    fn text(&mut self, name: &str, text: &[u8]) {
        self.raw(name);
        self.raw("\"");
        for byte in text {
            match byte {
                b'"' | b'\\' => self.out.extend_from_slice(&[b'\\', *byte]),
                b'\n' => self.raw("\\n"),
                b'\r' => self.raw("\\r"),
                0..=0x1f => {
                    self.raw("\\u00");
                    self.out.extend_from_slice(&digits(*byte));
                }
                _ => self.out.push(*byte),
            }
        }
        self.raw("\"");
    }

    fn finish(self) -> SecretBytes {
        assert_eq!(self.out.capacity(), self.capacity, "the buffer never grew");
        SecretBytes::take(self.out)
    }
}

fn digits(byte: u8) -> [u8; 2] {
    [byte >> 4, byte & 15].map(|nibble| if nibble < 10 { b'0' + nibble } else { b'a' + (nibble - 10) })
}

#[derive(Deserialize)]
struct Raw {
    disk_crypt_key: SecretText,
    #[serde(default)]
    env_crypt_key: SecretText,
    k256_key: SecretText,
    #[serde(default)]
    k256_signature: String,
    #[serde(default)]
    gateway_app_id: String,
    #[serde(default)]
    ca_cert: String,
    key_provider: RawProvider,
}

#[derive(Deserialize)]
enum RawProvider {
    None { key: SecretText },
    Local { key: SecretText, mr: String },
    Tpm { key: SecretText, pubkey: String },
    Kms { url: String, pubkey: String, tmp_ca_key: String, tmp_ca_cert: String },
}

/// Text that is wiped. The parser's own buffer for text with escapes (PEM) is not ours to wipe.
struct SecretText(SecretBytes);

impl Default for SecretText {
    fn default() -> Self {
        Self(SecretBytes::take(Vec::new()))
    }
}

impl<'de> Deserialize<'de> for SecretText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = SecretText;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<SecretText, E> {
                Ok(SecretText(copy(text.as_bytes())))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(bytes: &[u8]) -> SecretBytes {
        copy(bytes)
    }

    #[test]
    fn a_document_without_keys_has_every_member() {
        let text = AppKeys::released(&[], "https://kms:12001/", Published::default())
            .document()
            .expose(|bytes| String::from_utf8(bytes.to_vec()).unwrap());
        let read: serde_json::Value = serde_json::from_str(&text).unwrap();
        for name in ["disk_crypt_key", "env_crypt_key", "k256_key", "k256_signature", "gateway_app_id", "ca_cert"] {
            assert_eq!(read[name], "", "{name}");
        }
        let kms = serde_json::json!({ "url": "https://kms:12001/prpc", "pubkey": "", "tmp_ca_key": "", "tmp_ca_cert": "" });
        assert_eq!(read["key_provider"], serde_json::json!({ "Kms": kms }));
        assert_eq!([0x00, 0x9f, 0xa0].map(|byte| String::from_utf8(digits(byte).to_vec()).unwrap()), ["00", "9f", "a0"]);
    }

    #[test]
    fn every_provider_is_read_as_written() {
        let pem = "-----BEGIN X-----\nAA\"\\\u{1}==\n-----END X-----\n";
        for key_provider in [
            ProviderKeys::None { key: secret(pem.as_bytes()) },
            ProviderKeys::Local { key: secret(pem.as_bytes()), mr: vec![1; 32] },
            ProviderKeys::Tpm { key: secret(pem.as_bytes()), pubkey: vec![2; 91] },
            ProviderKeys::Kms { url: "u".into(), pubkey: vec![3; 91], tmp_ca_key: pem.into(), tmp_ca_cert: pem.into() },
        ] {
            let keys = AppKeys {
                disk_crypt_key: secret(&[0xd1; 32]),
                env_crypt_key: secret(&[]),
                k256_key: secret(&[0x25; 32]),
                k256_signature: vec![9; 65],
                gateway_app_id: "any".into(),
                ca_cert: pem.into(),
                key_provider,
            };
            let document = keys.document();
            let again = AppKeys::parse(&document).unwrap();
            assert!(again.document() == document && again.ca_cert == pem);
            assert!(again.disk_crypt_key == keys.disk_crypt_key);
        }
        let error = AppKeys::parse(&secret(br#"{"disk_crypt_key":"abcd","k256_key":5}"#)).unwrap_err();
        assert!(!error.contains("abcd"), "{error}");
        assert!(AppKeys::parse(&secret(br#"{"disk_crypt_key":"x","k256_key":"","key_provider":{"None":{"key":""}}}"#)).is_err());
    }
}
