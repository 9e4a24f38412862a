//! Quotes by the kernel's configfs-tsm. Owns: one entry per request, its generation, what every errno means. Never: interprets a quote
//! beyond its report data, keeps an entry.
//! Source: Linux, `Documentation/ABI/testing/configfs-tsm-report` and `drivers/virt/coco/tsm.c`, `tdx-guest.c` (6.7 to 7.0).

use crate::attribute::{self, Fault};
use rustix::io::Errno;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the kernel has it once configfs is mounted.
pub const TSM_ROOT: &str = "/sys/kernel/config/tsm";
/// Largest quote that is read. Today's have 5 to 9 KiB; the kernel's own limit rose to 16 MiB for other platforms.
pub const QUOTE_BYTES_MAX: usize = 1 << 20;
/// The provider of a TD.
const PROVIDER: &str = "tdx_guest";
/// How often a request is begun anew after another process used its entry.
const TRIES_MAX: u32 = 5;
/// How often a busy host is asked again, and how long is waited before the first time; each wait is twice the one before.
const BUSY_TRIES_MAX: u32 = 9;
const BUSY_WAIT: Duration = Duration::from_millis(5);
const TEXT_BYTES_MAX: usize = 4096;

/// Why there is no quote. Nothing of it is a remote peer's fault.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TsmError {
    /// No such interface. Operator's to fix.
    #[error("no configfs-tsm at {path}: mount configfs at /sys/kernel/config and load tdx_guest, or name its root as \"tdx:ROOT\"")]
    NotMounted {
        /// Where it was looked for.
        path: String,
    },
    /// The interface is there, no driver behind it. Operator's to fix.
    #[error("no provider behind configfs-tsm: load the driver tdx_guest; is this machine a TD?")]
    NoProvider,
    /// Another kind of machine. Operator's to fix: name the device of this platform.
    #[error("the provider is {got:?}, not \"tdx_guest\": this machine is no TD, name its own device")]
    WrongProvider {
        /// What the kernel says.
        got: String,
    },
    /// Not allowed. Operator's to fix: quotes are for root.
    #[error("no permission for {path}: run as root, or let this user make directories there")]
    Denied {
        /// The path.
        path: String,
    },
    /// A signal came again and again. Retry.
    #[error("the request was interrupted again and again: retry")]
    Interrupted,
    /// Earlier requests are in flight with the host. Retry later.
    #[error("the host still works on earlier requests after {waited_ms} ms: retry later")]
    Busy {
        /// How long was waited.
        waited_ms: u64,
    },
    /// The host's quoting service did not answer the kernel. Retry; the host's operator to fix.
    #[error("the host's quoting service did not answer in the kernel's time: is its QGS running and reachable from the VM? retry")]
    HostTimeout,
    /// The host refused. The host's operator to fix.
    #[error("the host refused to quote: look at its quoting service (QGS, PCK certificate, TDX module)")]
    HostRefused,
    /// The provider went away during the request. Retry once the driver is loaded again.
    #[error("the provider went away during the request: is the driver tdx_guest still loaded?")]
    ProviderGone,
    /// The quote is larger than the kernel or this program takes.
    #[error("the quote is larger than {limit_bytes} bytes or than the kernel takes")]
    TooLarge {
        /// Our cap.
        limit_bytes: usize,
    },
    /// The kernel calls the request malformed. Ours to fix: report it with the kernel's version.
    #[error("the kernel refuses the request as malformed (EINVAL): report this with the kernel's version")]
    Malformed,
    /// An empty quote: how kernels before the EIO fix say that the host failed. The host's operator to fix.
    #[error("the quote is empty: the host failed and this kernel cannot say so; look at the host's quoting service")]
    Empty,
    /// Another process wrote into the entry every time. Operator's to fix: who uses these entries?
    #[error("another process used the request's entry {tries} times in a row: who else writes below {path}?")]
    Disturbed {
        /// How often it was tried.
        tries: u32,
        /// The root.
        path: String,
    },
    /// The generation is no number. The kernel's fault.
    #[error("the generation of a request is {got:?}, not a number")]
    BadGeneration {
        /// What it is.
        got: String,
    },
    /// No random name for an entry. The machine's fault: retry.
    #[error("no randomness for the name of a request")]
    NoRandomness,
    /// Anything else the system says.
    #[error("{path}: {}", std::io::Error::from_raw_os_error(*errno))]
    System {
        /// The file.
        path: String,
        /// The system's code.
        errno: i32,
    },
}

/// The quoting interface below one root.
#[derive(Debug, Clone)]
pub struct Tsm {
    root: PathBuf,
}

impl Tsm {
    /// The interface at `root`, [`TSM_ROOT`] in production. Nothing is touched yet.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Its root.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether a TD's provider answers there.
    ///
    /// # Errors
    /// The first [`TsmError`] that a request would meet.
    pub fn probe(&self) -> Result<(), TsmError> {
        self.entry()?.require_provider()
    }

    /// A quote over `report_data`. Takes milliseconds, or as long as the host needs: the kernel gives it 30 seconds.
    ///
    /// # Errors
    /// See [`TsmError`].
    pub fn quote(&self, report_data: &[u8; 64]) -> Result<Vec<u8>, TsmError> {
        for _ in 0..TRIES_MAX {
            let entry = self.entry()?;
            match entry.quote(report_data) {
                Ok(Some(quote)) if quote.is_empty() => return Err(TsmError::Empty),
                Ok(Some(quote)) => return Ok(quote),
                Ok(None) => tracing::warn!(entry = %entry.path.display(), "another process used the entry of a quote: trying another one"),
                Err(error) => return Err(error),
            }
        }
        Err(TsmError::Disturbed { tries: TRIES_MAX, path: self.root.display().to_string() })
    }

    /// A directory of this request's own.
    fn entry(&self) -> Result<Entry, TsmError> {
        let reports = self.root.join("report");
        for _ in 0..TRIES_MAX {
            let mut name = [0; 16];
            getrandom::fill(&mut name).map_err(|_| TsmError::NoRandomness)?;
            let path = reports.join(format!("dstack-{}", hex::encode(name)));
            match attribute::make_dir(&path) {
                Ok(()) => return Ok(Entry { path }),
                Err(Fault::Errno(Errno::EXIST)) => {}
                Err(Fault::Errno(Errno::NOENT | Errno::NOTDIR)) => {
                    return Err(TsmError::NotMounted { path: self.root.display().to_string() });
                }
                Err(fault) => return Err(meaning(fault, &reports)),
            }
        }
        Err(TsmError::Disturbed { tries: TRIES_MAX, path: self.root.display().to_string() })
    }
}

/// One request. Its directory goes with it.
struct Entry {
    path: PathBuf,
}

impl Entry {
    /// The quote, or `None` when another process had its hands in this entry.
    fn quote(&self, report_data: &[u8; 64]) -> Result<Option<Vec<u8>>, TsmError> {
        let attempt = || {
            self.require_provider()?;
            let before = self.generation()?;
            self.done("inblob", |path| attribute::write(path, report_data))?;
            // the kernel drops an error of the commit: only the generation tells whether it happened, and who else wrote
            let ours = before.wrapping_add(1);
            if self.generation()? != ours {
                return Ok(None);
            }
            let quote = self.outblob()?;
            Ok((self.generation()? == ours).then_some(quote))
        };
        match attempt() {
            // the entry was removed under us
            Err(TsmError::System { errno, .. }) if errno == Errno::NOENT.raw_os_error() => Ok(None),
            result => result,
        }
    }

    fn require_provider(&self) -> Result<(), TsmError> {
        match self.text("provider")? {
            provider if provider == PROVIDER => Ok(()),
            got => Err(TsmError::WrongProvider { got }),
        }
    }

    fn generation(&self) -> Result<u64, TsmError> {
        let text = self.text("generation")?;
        text.parse().map_err(|_| TsmError::BadGeneration { got: text })
    }

    fn outblob(&self) -> Result<Vec<u8>, TsmError> {
        let (mut wait, mut waited) = (BUSY_WAIT, Duration::ZERO);
        for _ in 0..BUSY_TRIES_MAX {
            match self.done("outblob", |path| attribute::read(path, QUOTE_BYTES_MAX)) {
                Err(TsmError::Busy { .. }) => {
                    std::thread::sleep(wait);
                    waited = waited.saturating_add(wait);
                    wait = wait.saturating_mul(2);
                }
                result => return result,
            }
        }
        Err(TsmError::Busy { waited_ms: u64::try_from(waited.as_millis()).unwrap_or(u64::MAX) })
    }

    fn text(&self, name: &str) -> Result<String, TsmError> {
        let bytes = self.done(name, |path| attribute::read(path, TEXT_BYTES_MAX))?;
        // what a kernel writes is ASCII; anything else is shown as it is
        Ok(String::from_utf8_lossy(&bytes).trim_end().chars().take(64).collect())
    }

    fn done<T>(&self, name: &str, act: impl FnOnce(&Path) -> Result<T, Fault>) -> Result<T, TsmError> {
        let path = self.path.join(name);
        act(&path).map_err(|fault| meaning(fault, &path))
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        match attribute::remove_dir(&self.path) {
            Ok(()) | Err(Fault::Errno(Errno::NOENT)) => {}
            Err(fault) => tracing::warn!(entry = %self.path.display(), ?fault, "the entry of a quote stays behind: remove it with rmdir"),
        }
    }
}

/// What the kernel means by an errno in this interface.
fn meaning(fault: Fault, path: &Path) -> TsmError {
    let path = || path.display().to_string();
    let errno = match fault {
        Fault::TooLarge => return TsmError::TooLarge { limit_bytes: QUOTE_BYTES_MAX },
        Fault::Errno(errno) => errno,
    };
    match errno {
        Errno::NXIO => TsmError::NoProvider,
        Errno::ACCESS | Errno::PERM => TsmError::Denied { path: path() },
        Errno::INTR => TsmError::Interrupted,
        Errno::BUSY => TsmError::Busy { waited_ms: 0 },
        Errno::TIMEDOUT => TsmError::HostTimeout,
        Errno::IO => TsmError::HostRefused,
        Errno::NOTTY => TsmError::ProviderGone,
        Errno::FBIG => TsmError::TooLarge { limit_bytes: QUOTE_BYTES_MAX },
        Errno::INVAL => TsmError::Malformed,
        errno => TsmError::System { path: path(), errno: errno.raw_os_error() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_the_interface_is_told_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let refused = Tsm::at(dir.path()).probe().unwrap_err();
        assert_eq!(refused, TsmError::NotMounted { path: dir.path().display().to_string() });
        assert!(refused.to_string().contains("load tdx_guest"), "{refused}");
    }

    #[test]
    fn a_plain_directory_is_no_interface() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("report")).unwrap();
        // a fresh directory has no attributes there, so every try looks as if another process had removed the entry
        let refused = Tsm::at(dir.path()).quote(&[0; 64]).unwrap_err();
        assert!(matches!(refused, TsmError::Disturbed { tries: TRIES_MAX, .. }), "{refused}");
        assert_eq!(std::fs::read_dir(dir.path().join("report")).unwrap().count(), 0, "entries stay behind");
    }
}
