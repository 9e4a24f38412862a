//! Runtime registers by sysfs. Owns: reading and extending one register. Never: decides what is measured; keeps the events.
//! Source: Linux, `Documentation/ABI/testing/sysfs-devices-virtual-misc-tdx_guest` (6.16). Before it a kernel has no such files:
//! a normal state, in which nothing can be measured at run time.

use crate::TeeError;
use crate::attribute::{self, Fault};
use crate::runtime_log::Register;
use dstack_attest::eventlog::{Digest384, replay_runtime, runtime_digest};
use dstack_attest::wire::RuntimeEvent;
use rustix::io::Errno;
use std::path::{Path, PathBuf};

/// Where the kernel has the registers.
pub const RTMR_DIR: &str = "/sys/devices/virtual/misc/tdx_guest/measurements";

/// RTMR3, the register of runtime events.
#[derive(Debug, Clone)]
pub struct Rtmr {
    path: PathBuf,
}

impl Rtmr {
    /// RTMR3 below `dir`, [`RTMR_DIR`] in production. Nothing is touched yet.
    #[must_use]
    pub fn below(dir: &Path) -> Self {
        Self { path: dir.join("rtmr3:sha384") }
    }

    /// Its value; `None` on a kernel without these files.
    ///
    /// # Errors
    /// [`TeeError::File`], [`TeeError::BadRegister`].
    pub fn value(&self) -> Result<Option<Digest384>, TeeError> {
        match attribute::read(&self.path, 4096) {
            Ok(bytes) => {
                let have_bytes = bytes.len();
                let bad = TeeError::BadRegister { path: self.path.display().to_string(), have_bytes, want_bytes: 48 };
                Digest384::try_from(bytes).map(Some).map_err(|_| bad)
            }
            Err(Fault::Errno(Errno::NOENT | Errno::NOTDIR | Errno::NODEV)) => Ok(None),
            Err(fault) => Err(TeeError::file(&self.path, fault)),
        }
    }

    /// Extends it by `digest`: 48 bytes in one write.
    ///
    /// # Errors
    /// [`TeeError::NoRegister`] on a kernel without these files, [`TeeError::File`].
    pub fn extend(&self, digest: &Digest384) -> Result<(), TeeError> {
        attribute::write(&self.path, digest).map_err(|fault| match fault {
            Fault::Errno(Errno::NOENT | Errno::NOTDIR | Errno::NODEV) => TeeError::NoRegister { path: self.path.display().to_string() },
            fault => TeeError::file(&self.path, fault),
        })
    }
}

impl Register for Rtmr {
    fn require(&self, log: &[RuntimeEvent]) -> Result<(), TeeError> {
        match self.value()? {
            None => Err(TeeError::NoRegister { path: self.path.display().to_string() }),
            Some(value) if value == replay_runtime(log) => Ok(()),
            Some(_) => Err(TeeError::LogDiverged { register: "RTMR3" }),
        }
    }

    fn measure(&self, event: &RuntimeEvent) -> Result<(), TeeError> {
        self.extend(&runtime_digest(event))
    }
}
