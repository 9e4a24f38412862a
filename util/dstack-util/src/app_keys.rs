//! dstack's `AppKeys` document. Owns: its form; writing it where only its owner reads it. Never: leaves a copy of a key behind.
//! Source: util and deploy reference §2 step 5.
//!
//! Empty until the cluster has the roots `ca` and `id`: `k256_signature`, `gateway_app_id`, `ca_cert`, and in `key_provider` everything
//! but the address. A key that was not asked for is empty, too.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use dstack_client::TypedKey;
use dstack_protocol::release::KeyClass;
use dstack_secret::SecretBytes;

/// The document as bytes, wiped when dropped. `url`: the node that `key_provider` names.
#[must_use]
pub fn document(keys: &[TypedKey], url: &str) -> SecretBytes {
    // Large enough from the start: growing would leave a copy of the keys behind.
    let mut out = Vec::with_capacity(DOCUMENT_BYTES_MAX.saturating_add(url.len().saturating_mul(6)));
    let capacity = out.capacity();
    out.extend_from_slice(b"{");
    for (name, class) in [("disk_crypt_key", KeyClass::Disk), ("env_crypt_key", KeyClass::Env), ("k256_key", KeyClass::K256)] {
        out.extend_from_slice(b"\n  \"");
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(b"\": \"");
        if let Some(key) = keys.iter().find(|key| key.class() == class) {
            key.bytes().expose(|bytes| bytes.iter().for_each(|byte| out.extend_from_slice(&digits(*byte))));
        }
        out.extend_from_slice(b"\",");
    }
    let base = serde_json::Value::String(format!("{}/prpc", url.trim_end_matches('/')));
    let rest = format!(
        "\n  \"k256_signature\": \"\",\n  \"gateway_app_id\": \"\",\n  \"ca_cert\": \"\",\n  \"key_provider\": {{\n    \"Kms\": {{\n      \
         \"url\": {base},\n      \"pubkey\": \"\",\n      \"tmp_ca_key\": \"\",\n      \"tmp_ca_cert\": \"\"\n    }}\n  }}\n}}\n"
    );
    out.extend_from_slice(rest.as_bytes());
    assert_eq!(out.capacity(), capacity, "the buffer never grew");
    SecretBytes::take(out)
}

/// Without the address.
const DOCUMENT_BYTES_MAX: usize = 1024;

fn digits(byte: u8) -> [u8; 2] {
    [byte >> 4, byte & 15].map(|nibble| if nibble < 10 { b'0' + nibble } else { b'a' + (nibble - 10) })
}

/// Writes the document to a file of mode 0600, whole or not at all; replaces what was there.
///
/// # Errors
/// The system's.
pub fn write(file: &Path, document: &SecretBytes) -> io::Result<()> {
    let mut beside = file.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut out = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    document.expose(|bytes| out.write_all(bytes))?;
    out.sync_all()?;
    fs::rename(&beside, file)?;
    let directory = file.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_without_keys_has_every_member() {
        let text = document(&[], "https://kms:12001/").expose(|bytes| String::from_utf8(bytes.to_vec()).unwrap());
        let read: serde_json::Value = serde_json::from_str(&text).unwrap();
        for name in ["disk_crypt_key", "env_crypt_key", "k256_key", "k256_signature", "gateway_app_id", "ca_cert"] {
            assert_eq!(read[name], "", "{name}");
        }
        let kms = serde_json::json!({ "url": "https://kms:12001/prpc", "pubkey": "", "tmp_ca_key": "", "tmp_ca_cert": "" });
        assert_eq!(read["key_provider"], serde_json::json!({ "Kms": kms }));
        assert_eq!([0x00, 0x9f, 0xa0].map(|byte| String::from_utf8(digits(byte).to_vec()).unwrap()), ["00", "9f", "a0"]);
    }
}
