//! Reads and writes of files that a kernel driver answers (configfs, sysfs, securityfs). Owns: bounded retries of `EINTR`, a cap
//! on what is read, whole writes. Never: retries anything else; what an error means is for the caller.
//! Own calls, because `std::fs::read` retries `EINTR` without an end and a driver may answer it for ever.

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::Path;

/// How often one call may be interrupted.
const INTERRUPTIONS_MAX: u32 = 32;
/// First size of a read buffer; text attributes fit.
const CHUNK_BYTES: usize = 16 << 10;

/// Why an attribute was not read or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The system's answer, [`Errno::INTR`] when it came [`INTERRUPTIONS_MAX`] times.
    Errno(Errno),
    /// More bytes than the caller allows.
    TooLarge,
}

/// Reads all of `path`, at most `limit_bytes`.
pub(crate) fn read(path: &Path, limit_bytes: usize) -> Result<Vec<u8>, Fault> {
    let file = open(path, OFlags::RDONLY)?;
    let (mut content, mut chunk) = (Vec::new(), vec![0; CHUNK_BYTES]);
    loop {
        let count = patiently(|| rustix::io::read(&file, &mut chunk[..]))?;
        let Some(new) = chunk.get(..count).filter(|new| !new.is_empty()) else {
            return Ok(content);
        };
        if content.len().saturating_add(new.len()) > limit_bytes {
            return Err(Fault::TooLarge);
        }
        content.extend_from_slice(new);
    }
}

/// Writes all of `bytes` from the start of `path` and closes it: configfs commits at the close.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), Fault> {
    let file = open(path, OFlags::WRONLY)?;
    let mut rest = bytes;
    while !rest.is_empty() {
        match patiently(|| rustix::io::write(&file, rest))? {
            0 => return Err(Fault::Errno(Errno::IO)),
            count => rest = rest.get(count..).unwrap_or_default(),
        }
    }
    Ok(())
}

/// Makes the directory `path`.
pub(crate) fn make_dir(path: &Path) -> Result<(), Fault> {
    patiently(|| rustix::fs::mkdir(path, Mode::from_raw_mode(0o700)))
}

/// Removes the directory `path`.
pub(crate) fn remove_dir(path: &Path) -> Result<(), Fault> {
    patiently(|| rustix::fs::rmdir(path))
}

fn open(path: &Path, access: OFlags) -> Result<OwnedFd, Fault> {
    patiently(|| rustix::fs::open(path, access | OFlags::CLOEXEC, Mode::empty()))
}

fn patiently<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Fault> {
    let mut interruptions = 0;
    loop {
        match call() {
            Err(Errno::INTR) if interruptions < INTERRUPTIONS_MAX => interruptions += 1,
            result => return result.map_err(Fault::Errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interruption_without_end_ends() {
        let mut calls = 0;
        let result: Result<(), Fault> = patiently(|| {
            calls += 1;
            Err(Errno::INTR)
        });
        assert_eq!((result, calls), (Err(Fault::Errno(Errno::INTR)), INTERRUPTIONS_MAX + 1));
    }

    #[test]
    fn a_file_is_read_whole_up_to_the_cap() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("attribute");
        assert_eq!(read(&path, 10), Err(Fault::Errno(Errno::NOENT)));
        std::fs::write(&path, vec![7; 3 * CHUNK_BYTES + 1]).unwrap();
        assert_eq!(read(&path, 3 * CHUNK_BYTES + 1).unwrap().len(), 3 * CHUNK_BYTES + 1);
        assert_eq!(read(&path, 3 * CHUNK_BYTES), Err(Fault::TooLarge));
        assert_eq!(write(&path, b"ab"), Ok(()));
        assert_eq!(read(&path, 1 << 20).unwrap()[..3], *b"ab\x07");
    }
}
