//! Files of this program. Owns: caps on what is read, permissions of what is secret, no overwriting by accident.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use dstack_secret::SecretBytes;

use crate::failure::Failure;

/// Reads a whole file of at most `bytes_max`.
pub(crate) fn read(path: &Path, bytes_max: usize) -> Result<Vec<u8>, Failure> {
    let unreadable = |error: std::io::Error| Failure::unable(format!("cannot read {}: {error}", path.display()), "check the path");
    let file = File::open(path).map_err(unreadable)?;
    let mut bytes = Vec::new();
    // One byte more than allowed tells too long from just fitting, also where the size is not known beforehand.
    let limit = u64::try_from(bytes_max).unwrap_or(u64::MAX).saturating_add(1);
    file.take(limit).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() > bytes_max {
        let what = format!("{} has more than {bytes_max} bytes", path.display());
        return Err(Failure::unable(what, "is it the right file?"));
    }
    Ok(bytes)
}

/// As [`read`], UTF-8.
pub(crate) fn read_text(path: &Path, bytes_max: usize) -> Result<String, Failure> {
    String::from_utf8(read(path, bytes_max)?)
        .map_err(|_| Failure::unable(format!("{} is not UTF-8 text", path.display()), "is it the right file?"))
}

/// Reads a secret that only its owner may read.
pub(crate) fn read_secret(path: &Path, bytes_max: usize) -> Result<SecretBytes, Failure> {
    let unreadable = |error: std::io::Error| Failure::unable(format!("cannot read {}: {error}", path.display()), "check the path");
    let mode = std::fs::metadata(path).map_err(unreadable)?.mode();
    if mode & 0o077 != 0 {
        let what = format!("{} can be read by others (mode {:o})", path.display(), mode & 0o777);
        return Err(Failure::unable(what, format!("chmod 600 {}, and think who may have read it", path.display())));
    }
    read(path, bytes_max).map(SecretBytes::take)
}

/// Writes a new file; refuses to replace one.
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    write_with_mode(path, bytes, 0o644)
}

/// Writes a new file that only its owner may read.
pub(crate) fn write_secret(path: &Path, bytes: &SecretBytes) -> Result<(), Failure> {
    bytes.expose(|bytes| write_with_mode(path, bytes, 0o600))
}

/// Writes a file, replacing what was there.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    std::fs::write(path, bytes)
        .map_err(|error| Failure::unable(format!("cannot write {}: {error}", path.display()), "check the folder and its permissions"))
}

fn write_with_mode(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Failure> {
    let made = OpenOptions::new().write(true).create_new(true).mode(mode).open(path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    made.map_err(|error| {
        let hint = match error.kind() {
            std::io::ErrorKind::AlreadyExists => "name a new file; nothing is overwritten",
            _ => "check the folder and its permissions",
        };
        Failure::unable(format!("cannot write {}: {error}", path.display()), hint)
    })
}
