//! Collateral from a folder, as it crosses an air gap. Owns: which files are read and as what. Never: verifies, follows a link.
//!
//! | file | read as |
//! | --- | --- |
//! | `*.json` | a bundle, or one TDX platform's collateral (nine members, as the published vectors have it) |
//! | `*.pem` | certificates and revocation lists, by their labels |
//! | `*.der` `*.crt` `*.cer` | one certificate, DER or PEM |
//! | `*.crl` | one revocation list, DER or PEM |

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use dstack_attest::{BUNDLE_BYTES_MAX, CollateralBundle, TdxCollateral, X509Pool};

/// Most files looked at.
const FILES_MAX: usize = 4096;

/// Why a folder is no collateral. Whoever filled it mends it.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FolderError {
    /// A file or the folder cannot be read.
    #[error("{path}: {why}")]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        why: String,
    },
    /// A file is not what its name says.
    #[error("{path}: {why}")]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Nothing in the folder is collateral.
    #[error("{path}: no file of collateral (*.json *.pem *.der *.crt *.cer *.crl)")]
    Empty {
        /// Which.
        path: PathBuf,
    },
}

/// Reads every file of a folder, by name; a platform that stands in two files is taken from the later name.
/// # Errors
/// [`FolderError`] names the file. Files of other kinds are passed over.
pub fn read_folder(dir: &Path) -> Result<(BTreeMap<[u8; 6], TdxCollateral>, X509Pool), FolderError> {
    let unreadable = |path: &Path| {
        let path = path.to_path_buf();
        move |error: std::io::Error| FolderError::Read { path, why: error.to_string() }
    };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(unreadable(dir))? {
        let entry = entry.map_err(unreadable(dir))?;
        if entry.file_type().map_err(unreadable(&entry.path()))?.is_file() {
            paths.push(entry.path());
        }
        if paths.len() > FILES_MAX {
            return Err(FolderError::Read { path: dir.to_path_buf(), why: format!("more than {FILES_MAX} files") });
        }
    }
    paths.sort();
    let mut found = Found::default();
    for path in &paths {
        let kind = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default().to_ascii_lowercase();
        if !matches!(kind.as_str(), "json" | "pem" | "der" | "crt" | "cer" | "crl") {
            continue;
        }
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path).map_err(unreadable(path))?;
        let limit = u64::try_from(BUNDLE_BYTES_MAX).unwrap_or(u64::MAX).saturating_add(1);
        file.take(limit).read_to_end(&mut bytes).map_err(unreadable(path))?;
        found.add(&kind, &bytes).map_err(|why| FolderError::File { path: path.clone(), why })?;
    }
    let Found { tdx, certificates, crls } = found;
    let pool = X509Pool::new(certificates, crls).map_err(|error| FolderError::File { path: dir.to_path_buf(), why: error.to_string() })?;
    match tdx.is_empty() && pool.is_empty() {
        true => Err(FolderError::Empty { path: dir.to_path_buf() }),
        false => Ok((tdx, pool)),
    }
}

#[derive(Default)]
struct Found {
    tdx: BTreeMap<[u8; 6], TdxCollateral>,
    certificates: Vec<Vec<u8>>,
    crls: Vec<Vec<u8>>,
}

impl Found {
    fn add(&mut self, kind: &str, bytes: &[u8]) -> Result<(), String> {
        match kind {
            "json" => self.json(bytes),
            _ if bytes.starts_with(b"-----BEGIN") || kind == "pem" => self.pem(bytes),
            "crl" => {
                self.crls.push(bytes.to_vec());
                Ok(())
            }
            _ => {
                self.certificates.push(bytes.to_vec());
                Ok(())
            }
        }
    }

    fn json(&mut self, bytes: &[u8]) -> Result<(), String> {
        let bundle = CollateralBundle::parse_any(bytes).map_err(|error| error.to_string())?;
        self.tdx.extend(bundle.tdx_platforms().clone());
        self.certificates.extend(bundle.x509().certificates.iter().cloned());
        self.crls.extend(bundle.x509().crls.iter().cloned());
        Ok(())
    }

    fn pem(&mut self, bytes: &[u8]) -> Result<(), String> {
        let blocks = pem_blocks(std::str::from_utf8(bytes).map_err(|_| "not text".to_owned())?)?;
        if blocks.is_empty() {
            return Err("no PEM block".to_owned());
        }
        for (label, der) in blocks {
            match label.as_str() {
                "CERTIFICATE" => self.certificates.push(der),
                "X509 CRL" => self.crls.push(der),
                other => return Err(format!("a block `{}`", crate::error::shown(other))),
            }
        }
        Ok(())
    }
}

/// Labels and contents of a PEM text, in order.
pub(crate) fn pem_blocks(text: &str) -> Result<Vec<(String, Vec<u8>)>, String> {
    let (mut rest, mut blocks) = (text, Vec::new());
    while let Some((_, begun)) = rest.split_once("-----BEGIN ") {
        let (label, inside) = begun.split_once("-----").ok_or("a label without an end")?;
        let (body, after) = inside.split_once(&format!("-----END {label}-----")).ok_or("a block without an end")?;
        blocks.push((label.to_owned(), base64_lines(body).ok_or("a block that is not base64")?));
        rest = after;
    }
    Ok(blocks)
}

/// Base64 over any number of lines.
pub(crate) fn base64_lines(text: &str) -> Option<Vec<u8>> {
    let joined: String = text.split_whitespace().collect();
    base64::engine::general_purpose::STANDARD.decode(joined).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pem_and_der_are_read_by_label_and_name() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
        write(
            "a.pem",
            b"note\n-----BEGIN CERTIFICATE-----\nMAEB\n-----END CERTIFICATE-----\n-----BEGIN X509 CRL-----\nMAEC\n-----END X509 CRL-----\n",
        );
        write("b.der", &[0x30, 1, 3]);
        write("c.crl", &[0x30, 1, 4]);
        write("readme.txt", b"passed over");
        let (tdx, pool) = read_folder(dir.path()).unwrap();
        assert!(tdx.is_empty());
        assert_eq!(pool.certificates, [vec![0x30, 1, 1], vec![0x30, 1, 3]]);
        assert_eq!(pool.crls, [vec![0x30, 1, 2], vec![0x30, 1, 4]]);
    }

    #[test]
    fn wrong_files_are_named() {
        for (name, bytes) in [
            ("a.json", &b"{}"[..]),
            ("a.json", b"\xff"),
            ("a.pem", b"nothing"),
            ("a.pem", b"-----BEGIN CERTIFICATE-----\nMAEB\n"),
            ("a.pem", b"-----BEGIN PRIVATE KEY-----\nMAEB\n-----END PRIVATE KEY-----"),
            ("a.der", b"no der"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join(name), bytes).unwrap();
            assert!(matches!(read_folder(dir.path()), Err(FolderError::File { .. })), "{name} {bytes:?}");
        }
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(read_folder(dir.path()), Err(FolderError::Empty { .. })));
        assert!(matches!(read_folder(&dir.path().join("absent")), Err(FolderError::Read { .. })));
    }

    proptest! {
        #[test]
        fn any_file_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300), kind in 0usize..4, pem in any::<bool>()) {
            let kinds = ["json", "pem", "der", "crl"];
            let bytes = if pem { [b"-----BEGIN CERTIFICATE-----".as_slice(), &bytes].concat() } else { bytes };
            let _ = Found::default().add(kinds[kind], &bytes);
        }
    }
}
