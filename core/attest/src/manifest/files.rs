//! Files of a manifest. Owns: that a path stays in the manifest's folder and that size and SHA-256 are the manifest's.

use std::{
    io::Read,
    path::{Component, Path, PathBuf},
};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::ManifestError;

/// Largest file read.
const FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// A file as the manifest names it.
#[derive(Deserialize)]
pub(super) struct FileRef {
    path: String,
    size: u64,
    sha256: String,
}

impl FileRef {
    /// Whether its name says that it is DER.
    pub(super) fn is_der(&self) -> bool {
        Path::new(&self.path).extension().is_some_and(|extension| extension == "der")
    }
}

/// Why a file was not read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum FileError {
    /// It is not there.
    #[error("file is absent")]
    Absent,
    /// Its path leads out of the folder.
    #[error("path {path} leads out of the manifest's folder")]
    Outside { path: String },
    /// It is not the file the manifest means.
    #[error("file {path} is not of the manifest's size and hash")]
    Different { path: String },
    /// The system refused.
    #[error("file {path} cannot be read: {why}")]
    Unreadable { path: String, why: String },
}

/// The folder of a manifest, links resolved.
pub(super) struct Folder(PathBuf);

impl Folder {
    pub(super) fn of(manifest: &Path) -> Result<Self, ManifestError> {
        let resolved = manifest.canonicalize();
        let resolved =
            resolved.map_err(|error| ManifestError::Unreadable { path: manifest.display().to_string(), why: error.to_string() })?;
        Ok(Self(resolved.parent().unwrap_or(Path::new("/")).to_path_buf()))
    }

    /// The bytes of `file`.
    pub(super) fn read(&self, file: &FileRef) -> Result<Vec<u8>, FileError> {
        let path = || file.path.clone();
        let unreadable = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::NotFound => FileError::Absent,
            _ => FileError::Unreadable { path: path(), why: error.to_string() },
        };
        let plain = Path::new(&file.path).components().all(|component| matches!(component, Component::Normal(_)));
        if !plain || file.path.is_empty() {
            return Err(FileError::Outside { path: path() });
        }
        let resolved = self.0.join(&file.path).canonicalize().map_err(unreadable)?;
        if !resolved.starts_with(&self.0) {
            return Err(FileError::Outside { path: path() });
        }
        if file.size > FILE_BYTES_MAX {
            return Err(FileError::Different { path: path() });
        }
        let mut bytes = Vec::new();
        let opened = std::fs::File::open(resolved).map_err(unreadable)?;
        opened.take(file.size.saturating_add(1)).read_to_end(&mut bytes).map_err(unreadable)?;
        let same = bytes.len() as u64 == file.size && hex::encode(Sha256::digest(&bytes)) == file.sha256;
        match same {
            true => Ok(bytes),
            false => Err(FileError::Different { path: path() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str) -> FileRef {
        FileRef { path: path.to_owned(), size: 0, sha256: hex::encode(Sha256::digest([])) }
    }

    #[test]
    fn no_path_leads_out_of_the_folder() {
        let folder = Folder(std::env::temp_dir().canonicalize().unwrap());
        for path in ["../x", "/etc/passwd", "a/../../x", "./x", ""] {
            assert_eq!(folder.read(&file(path)), Err(FileError::Outside { path: path.to_owned() }), "{path}");
        }
        assert_eq!(folder.read(&file("no-such-file-of-the-vectors")), Err(FileError::Absent));
    }
}
