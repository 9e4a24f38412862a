//! Section `[authority]`: the webhook authority that this node asks.
//!
//! Owns: its keys, ranges, the files it names. Never: shows the token. Source: ADR 0024; KMS API reference §9.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use dstack_actors::authority::OsImages;
use dstack_authority::{Authority, LEASE_MAX, Settings};
use dstack_secret::SecretBytes;
use serde::Deserialize;

/// Longest wait for an answer, ms: below what a coordinator waits for a holder (3 s).
const TIMEOUT_MS_MAX: u64 = 2500;
/// Largest token file, bytes.
const TOKEN_BYTES_MAX: usize = 4096;
/// Most rows of `os_images`: an image has one for each size of machine that it boots on.
const OS_IMAGES_MAX: usize = 4096;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawAuthority {
    url: String,
    #[serde(default = "default_timeout_ms")]
    timeout_ms: u64,
    #[serde(default = "default_lease_s")]
    lease_s: u64,
    #[serde(default)]
    token_file: Option<PathBuf>,
    #[serde(default)]
    ca_file: Option<PathBuf>,
    #[serde(default)]
    plain_http: bool,
    #[serde(default)]
    os_images: BTreeMap<String, String>,
}

const fn default_timeout_ms() -> u64 {
    2000
}

const fn default_lease_s() -> u64 {
    60
}

/// The webhook authority of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AuthorityConfig {
    url: String,
    timeout: Duration,
    lease: Duration,
    token_file: Option<PathBuf>,
    ca_file: Option<PathBuf>,
    plain_http: bool,
    os_images: OsImages,
}

impl AuthorityConfig {
    /// Checks ranges and address; the files are read by [`AuthorityConfig::open`].
    pub(crate) fn checked(raw: RawAuthority) -> anyhow::Result<Self> {
        let RawAuthority { url, timeout_ms, lease_s, token_file, ca_file, plain_http, os_images } = raw;
        let os_images = images(&os_images)?;
        if !(1..=TIMEOUT_MS_MAX).contains(&timeout_ms) {
            bail!("authority.timeout_ms: 1 to {TIMEOUT_MS_MAX}, got {timeout_ms}");
        }
        // Shorter, a release would outlive the yes that it began with.
        if !(1..=LEASE_MAX.as_secs()).contains(&lease_s) {
            bail!("authority.lease_s: 1 to {}, got {lease_s}", LEASE_MAX.as_secs());
        }
        let (timeout, lease) = (Duration::from_millis(timeout_ms), Duration::from_secs(lease_s));
        let config = Self { url, timeout, lease, token_file, ca_file, plain_http, os_images };
        Authority::new(config.settings(None, Vec::new())).map_err(|error| anyhow::anyhow!("authority.url: {error}"))?;
        Ok(config)
    }

    fn settings(&self, token: Option<SecretBytes>, roots: Vec<Vec<u8>>) -> Settings {
        Settings { url: self.url.clone(), timeout: self.timeout, lease: self.lease, token, roots, plain_http: self.plain_http }
    }

    /// Boot registers and the image that they are of, as the operator says.
    pub(crate) fn os_images(&self) -> &OsImages {
        &self.os_images
    }

    /// The client.
    ///
    /// # Errors
    /// A file that cannot be read, or holds something else.
    pub(crate) fn open(&self) -> anyhow::Result<Authority> {
        let token = self.token_file.as_deref().map(token).transpose().context("authority.token_file")?;
        let roots = self.ca_file.as_deref().map(roots).transpose().context("authority.ca_file")?;
        Authority::new(self.settings(token, roots.unwrap_or_default())).context("authority.url")
    }
}

/// Rows of two hashes, each set of registers once.
fn images(rows: &BTreeMap<String, String>) -> anyhow::Result<OsImages> {
    let hash = |text: &str| {
        let mut hash = [0; 32];
        let wrong = || {
            format!(
                "authority.os_images: expected \"<64 hex digits>\" = \"<64 hex digits>\", got {:?}",
                &text.chars().take(80).collect::<String>()
            )
        };
        hex::decode_to_slice(text, &mut hash).map(|()| hash).with_context(wrong)
    };
    if rows.len() > OS_IMAGES_MAX {
        bail!("authority.os_images: at most {OS_IMAGES_MAX} rows, got {}", rows.len());
    }
    let mut images = OsImages::new();
    for (registers, image) in rows {
        if images.insert(hash(registers)?, hash(image)?).is_some() {
            bail!("authority.os_images: {registers} stands there twice");
        }
    }
    Ok(images)
}

/// A token: one line of printable ASCII.
fn token(path: &Path) -> anyhow::Result<SecretBytes> {
    let mut bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let length = bytes.trim_ascii_end().len();
    bytes.truncate(length);
    let count = bytes.len();
    let printable = bytes.iter().all(u8::is_ascii_graphic);
    let token = SecretBytes::take(bytes);
    if count == 0 || count > TOKEN_BYTES_MAX || !printable {
        bail!("{}: one line of 1 to {TOKEN_BYTES_MAX} printable characters without a space, got {count} bytes", path.display());
    }
    Ok(token)
}

/// Certificates of a PEM file, DER.
fn roots(path: &Path) -> anyhow::Result<Vec<Vec<u8>>> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut found = Vec::new();
    for block in x509_parser::pem::Pem::iter_from_buffer(&bytes) {
        let block = block.map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
        if block.label == "CERTIFICATE" {
            found.push(block.contents);
        }
    }
    if found.is_empty() {
        bail!("{}: at least one certificate in PEM", path.display());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(token_file: Option<PathBuf>, ca_file: Option<PathBuf>) -> AuthorityConfig {
        let raw = RawAuthority {
            url: "http://127.0.0.1:1".into(),
            timeout_ms: 2000,
            lease_s: 60,
            token_file,
            ca_file,
            plain_http: false,
            os_images: BTreeMap::new(),
        };
        AuthorityConfig::checked(raw).unwrap()
    }

    #[test]
    fn files_hold_a_token_and_certificates_or_the_node_does_not_start() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            Some(path)
        };
        assert!(config(None, None).open().is_ok());
        assert!(config(file("token", "of-the-cluster\n"), None).open().is_ok());
        let certificate = rcgen::generate_simple_self_signed(vec!["auth.example".to_owned()]).unwrap().cert.pem();
        assert!(config(None, file("ca", &certificate)).open().is_ok());
        for (token, ca, names) in [
            (Some(dir.path().join("absent")), None, "token_file"),
            (file("empty", "\n"), None, "token_file"),
            (file("two", "a\nb"), None, "token_file"),
            (None, Some(dir.path().join("absent")), "ca_file"),
            (None, file("none", "no pem"), "ca_file"),
            (None, file("cut", certificate.get(..200).unwrap()), "ca_file"),
        ] {
            let Err(error) = config(token, ca).open() else { panic!("{names}") };
            let error = format!("{error:#}");
            assert!(error.contains(names) && !error.contains("of-the-cluster"), "{error}");
        }
    }
}
