//! A mounted emulation. Owns: the mount and its end, the knobs of a test. Never: stays mounted after its value is gone.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuser::{BackgroundSession, MountOption};
use rustix::mount::{UnmountFlags, unmount};

use super::filesystem::TsmFs;
use super::kernel::{Fault, Kernel};
use super::td::SoftwareTd;

/// The emulation at one directory, until dropped.
pub struct Mounted {
    dir: PathBuf,
    kernel: Arc<Mutex<Kernel>>,
    session: Option<BackgroundSession>,
}

/// Mounts the files of `td` at `dir`, an empty directory. Needs root and `/dev/fuse`.
///
/// # Errors
/// What the system says of the mount.
pub fn mount(dir: &Path, td: SoftwareTd) -> io::Result<Mounted> {
    let dir = dir.canonicalize()?;
    let kernel = Arc::new(Mutex::new(Kernel::new(td)));
    let options =
        [MountOption::FSName("software-tsm".to_owned()), MountOption::DefaultPermissions, MountOption::NoExec, MountOption::NoSuid];
    let session = fuser::spawn_mount2(TsmFs::new(Arc::clone(&kernel)), &dir, &options)?;
    Ok(Mounted { dir, kernel, session: Some(session) })
}

impl Mounted {
    /// What a real machine has at `/sys/kernel/config/tsm`.
    #[must_use]
    pub fn tsm_root(&self) -> PathBuf {
        self.dir.join("tsm")
    }

    /// What a real machine has at `/sys/devices/virtual/misc/tdx_guest/measurements`.
    #[must_use]
    pub fn measurements(&self) -> PathBuf {
        self.dir.join("measurements")
    }

    /// Lets a later request fail.
    pub fn inject(&self, fault: Fault) {
        self.kernel().faults.push_back(fault);
    }

    /// Faults that did not strike yet.
    #[must_use]
    pub fn pending_faults(&self) -> usize {
        self.kernel().faults.len()
    }

    /// Loads another driver, or none.
    pub fn set_provider(&self, provider: Option<&str>) {
        self.kernel().provider = provider.map(ToOwned::to_owned);
    }

    /// Names of the requests that exist.
    #[must_use]
    pub fn entries(&self) -> Vec<String> {
        self.kernel().entries().map(|(_, name)| name.to_owned()).collect()
    }

    /// Quotes made so far.
    #[must_use]
    pub fn quotes(&self) -> u64 {
        self.kernel().quotes
    }

    /// RTMR0 to RTMR3.
    #[must_use]
    pub fn registers(&self) -> [[u8; 48]; 4] {
        self.kernel().td.report().rtmr
    }

    fn kernel(&self) -> MutexGuard<'_, Kernel> {
        self.kernel.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A process that still holds a file open keeps an ordinary unmount out; this one hides the directory at once.
        if let Err(error) = unmount(&self.dir, UnmountFlags::DETACH) {
            tracing::error!(dir = %self.dir.display(), %error, "the emulated configfs-tsm stays mounted: umount it");
        }
        drop(self.session.take());
    }
}
