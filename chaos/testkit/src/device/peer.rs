//! Who asks: the executable behind the other end of a socket, from the kernel's peer credentials. Never: believes a request.
//!
//! Limits of an emulation: the process id is that of `connect`, so a process that connects and then executes another program
//! is measured as whichever runs when its connection is accepted; a script is measured as its interpreter. Hardware measures
//! before anything runs and has neither gap.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use sha2::{Digest as _, Sha384};

use crate::error::TestkitError;

/// SHA-384 of executables, remembered by identity and times of the file.
#[derive(Debug, Default)]
pub struct Executables {
    known: Mutex<HashMap<FileKey, [u8; 48]>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct FileKey {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    /// Cannot be set back, unlike the modification time.
    changed: (i64, i64),
}

impl Executables {
    /// Measures the process that connected `stream`.
    ///
    /// # Errors
    /// [`TestkitError::Unmeasurable`]: the process ended, or this process may not read its executable.
    pub fn of_peer(&self, stream: &UnixStream) -> Result<[u8; 48], TestkitError> {
        let peer = rustix::net::sockopt::socket_peercred(stream)
            .map_err(|error| TestkitError::Unmeasurable { pid: 0, reason: format!("no peer credentials: {error}") })?;
        self.of_process(peer.pid.as_raw_nonzero().get())
    }

    /// Measures the process `pid` by the file it executes, also when that file was unlinked since.
    ///
    /// # Errors
    /// [`TestkitError::Unmeasurable`].
    pub fn of_process(&self, pid: i32) -> Result<[u8; 48], TestkitError> {
        let unmeasurable = |error: std::io::Error| TestkitError::Unmeasurable { pid, reason: error.to_string() };
        let mut file = File::open(format!("/proc/{pid}/exe")).map_err(unmeasurable)?;
        let key = FileKey::of(&file.metadata().map_err(unmeasurable)?);
        // Held while it is read: nodes that start together are one executable.
        let mut known = self.lock();
        if let Some(digest) = known.get(&key) {
            return Ok(*digest);
        }
        let digest = digest(&mut file).map_err(unmeasurable)?;
        if FileKey::of(&file.metadata().map_err(unmeasurable)?) != key {
            return Err(TestkitError::Unmeasurable { pid, reason: "its executable changed while it was read".to_owned() });
        }
        if known.len() >= KNOWN_MAX {
            known.clear();
        }
        known.insert(key, digest);
        Ok(digest)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<FileKey, [u8; 48]>> {
        // Plain data: a thread that panicked left it whole.
        self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl FileKey {
    fn of(file: &Metadata) -> Self {
        Self {
            device: file.dev(),
            inode: file.ino(),
            size: file.size(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        }
    }
}

/// SHA-384 of all bytes of `file`.
pub(crate) fn digest(file: &mut File) -> std::io::Result<[u8; 48]> {
    let mut hash = Sha384::new();
    let mut chunk = vec![0; 1 << 16];
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return Ok(hash.finalize().into()),
            Ok(count) => hash.update(chunk.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

const KNOWN_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_its_executable() {
        let executables = Executables::default();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let expected: [u8; 48] = Sha384::digest(&own).into();
        assert_eq!(executables.of_peer(&ours).unwrap(), expected);
        assert_eq!(executables.lock().len(), 1);
        assert_eq!(executables.of_peer(&ours).unwrap(), expected);
    }

    #[test]
    fn a_replaced_file_is_measured_anew() {
        // Two programs one after the other under one path: the inode or its times differ, so the memory does not mix them.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        let executables = Executables::default();
        let mut digests = Vec::new();
        for tail in [b"one".as_slice(), b"two".as_slice()] {
            let mut bytes = std::fs::read("/bin/sleep").unwrap();
            bytes.extend(tail);
            let _ = std::fs::remove_file(&path);
            std::fs::write(&path, &bytes).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
            let mut child = std::process::Command::new(&path).arg("30").spawn().unwrap();
            let digest = executables.of_process(i32::try_from(child.id()).unwrap()).unwrap();
            child.kill().unwrap();
            child.wait().unwrap();
            assert_eq!(digest, <[u8; 48]>::from(Sha384::digest(&bytes)));
            digests.push(digest);
        }
        assert_ne!(digests[0], digests[1]);
    }

    #[test]
    fn an_ended_process_cannot_be_measured() {
        let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        child.wait().unwrap();
        assert!(matches!(Executables::default().of_process(pid), Err(TestkitError::Unmeasurable { .. })));
    }
}
