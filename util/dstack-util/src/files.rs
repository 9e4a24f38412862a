//! Small files of this program. Owns: bounded reads that follow no link, writes that are whole or not at all. Never: an unbounded read,
//! a secret in a file that others may read.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::de::{DeserializeOwned, Error as _};

/// Why a file cannot be used.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// It is not there. By caller: whoever should have written it.
    #[error("{} is missing", .path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A link, folder, pipe or device where a file has to be. Whoever wrote it is at fault: refuse.
    #[error("{} is no regular file", .path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// Larger than allowed. Whoever wrote it is at fault: refuse.
    #[error("{} has more than the {limit_bytes} bytes allowed", .path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The most there may be.
        limit_bytes: u64,
    },
    /// The system refuses. Operator's to fix: rights, space.
    #[error("cannot {action} {}: {kind}", .path.display())]
    System {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's words.
        kind: io::ErrorKind,
    },
}

impl FileError {
    pub(crate) fn system(action: &'static str, path: &Path, error: &io::Error) -> Self {
        Self::System { action, path: path.to_owned(), kind: error.kind() }
    }
}

/// Reads all of a regular file of at most `limit_bytes`. A link in the last place is refused: the host writes some of these folders.
///
/// # Errors
/// [`FileError`].
pub fn read(path: &Path, limit_bytes: u64) -> Result<Vec<u8>, FileError> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT) => return Err(FileError::Missing { path: path.to_owned() }),
        Err(Errno::LOOP) => return Err(FileError::NotAFile { path: path.to_owned() }),
        Err(errno) => return Err(FileError::system("open", path, &errno.into())),
    };
    let failed = |error: io::Error| FileError::system("read", path, &error);
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(FileError::NotAFile { path: path.to_owned() });
    }
    let mut bytes = Vec::new();
    file.take(limit_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > limit_bytes {
        return Err(FileError::TooLarge { path: path.to_owned(), limit_bytes });
    }
    Ok(bytes)
}

/// As [`read`]; `None` for a file that is not there.
///
/// # Errors
/// [`FileError`] for anything else.
pub fn read_if_there(path: &Path, limit_bytes: u64) -> Result<Option<Vec<u8>>, FileError> {
    match read(path, limit_bytes) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(FileError::Missing { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads a JSON object. A list is none, though the library would take one for a struct.
///
/// # Errors
/// The parser's.
pub fn json_object<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, serde_json::Error> {
    match bytes.trim_ascii_start().first() {
        Some(b'[') => Err(serde_json::Error::custom("a list where an object has to be")),
        _ => serde_json::from_slice(bytes),
    }
}

/// Makes the folder of a file that will be written.
///
/// # Errors
/// [`FileError::System`].
pub fn make_folder_of(path: &Path) -> Result<(), FileError> {
    match path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        Some(folder) => fs::create_dir_all(folder).map_err(|error| FileError::system("make", folder, &error)),
        None => Ok(()),
    }
}

/// Writes `bytes` to a file of mode `mode`, whole or not at all; replaces what was there.
///
/// # Errors
/// [`FileError::System`].
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let replace = || -> io::Result<()> {
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut out = OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
        out.write_all(bytes)?;
        out.sync_all()?;
        fs::rename(&beside, path)?;
        let directory = path.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory)?.sync_all()
    };
    replace().map_err(|error| FileError::system("write", path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn links_folders_pipes_and_large_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        write(&path("file"), b"12345", 0o600).unwrap();
        assert_eq!(fs::metadata(path("file")).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(read(&path("file"), 5).unwrap(), b"12345");
        assert_eq!(read(&path("file"), 4), Err(FileError::TooLarge { path: path("file"), limit_bytes: 4 }));
        std::os::unix::fs::symlink(path("file"), path("link")).unwrap();
        assert_eq!(read(&path("link"), 5), Err(FileError::NotAFile { path: path("link") }));
        assert_eq!(read(dir.path(), 5), Err(FileError::NotAFile { path: dir.path().to_owned() }));
        rustix::fs::mknodat(rustix::fs::CWD, path("pipe"), rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        assert_eq!(read(&path("pipe"), 5), Err(FileError::NotAFile { path: path("pipe") }), "and without waiting for a writer");
        assert_eq!(read_if_there(&path("none"), 5), Ok(None));
        write(&path("file"), b"other", 0o644).unwrap();
        assert_eq!(read(&path("file"), 5).unwrap(), b"other");
    }
}
