//! The text by which a config names a device. Owns: its grammar and every default path. Never: opens anything.
//!
//! `NAME[:WHERE][;KEY=VALUE]…`, for one `tdx`, `tdx:/sys/kernel/config/tsm;events=/run/log/events`, `gcp;tpm=device:/dev/tpmrm0`.
//! `software:PATH` takes no options: everything after the colon is the socket's path. `nsm[:PATH]` takes none either.
//!
//! | key | of | default |
//! |---|---|---|
//! | `events` | tdx, gcp | [`RUNTIME_EVENTS`]: the guest's runtime event log |
//! | `ccel` | tdx, gcp | [`CCEL`], the firmware's event log; `none` leaves it out |
//! | `rtmr` | tdx, gcp | [`RTMR_DIR`]: runtime registers by sysfs |
//! | `vm-config` | tdx, gcp | none: a file whose text goes into evidence as VmConfig |
//! | `tpm` | gcp | [`TPM`]: a TCTI, `device:PATH` or `swtpm:host=ADDRESS,port=PORT` |
//! | `tpm-log` | gcp | [`TPM_LOG`], the firmware's event log of the TPM; `none` leaves it out |

use crate::TeeError;
use crate::runtime_log::RUNTIME_EVENTS;
use crate::tdx::{RTMR_DIR, TSM_ROOT};
use std::path::PathBuf;

/// Where Linux shows the log that the ACPI table CCEL points to.
pub const CCEL: &str = "/sys/firmware/acpi/tables/data/CCEL";
/// Where Linux shows a TPM with its own resource manager, as a TCTI.
pub const TPM: &str = "device:/dev/tpmrm0";
/// Where Linux shows the event log of the first TPM.
pub const TPM_LOG: &str = "/sys/kernel/security/tpm0/binary_bios_measurements";

/// Where the kernel's driver puts an enclave's NSM.
pub const NSM: &str = "/dev/nsm";

/// Which device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A software device behind a socket.
    Software,
    /// A TD.
    Tdx,
    /// A TD of Google Cloud with its vTPM.
    Gcp,
    /// A Nitro enclave's NSM.
    Nsm,
}

/// A file that a machine may lack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Nobody named it: read it where it is there.
    Default(PathBuf),
    /// The config names it: it has to be there.
    Named(PathBuf),
    /// The config leaves it out.
    None,
}

/// The text, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// Which device.
    pub kind: Kind,
    /// Socket, root of configfs-tsm, or the NSM's file.
    pub root: PathBuf,
    /// Runtime event log.
    pub events: PathBuf,
    /// Firmware's event log.
    pub ccel: Source,
    /// Folder of the runtime registers.
    pub rtmr: PathBuf,
    /// File with the VmConfig text.
    pub vm_config: Option<PathBuf>,
    /// TCTI of the TPM.
    pub tpm: String,
    /// Firmware's event log of the TPM.
    pub tpm_log: Source,
}

impl Options {
    /// Reads the text.
    ///
    /// # Errors
    /// [`TeeError::UnknownDevice`], [`TeeError::BadOption`].
    pub fn parse(config: &str) -> Result<Self, TeeError> {
        let unknown = || TeeError::UnknownDevice { config: config.to_owned() };
        if let Some(path) = config.strip_prefix("software:") {
            return if path.is_empty() { Err(unknown()) } else { Ok(Self::of(Kind::Software, path)) };
        }
        if let Some(rest) = config.strip_prefix("nsm") {
            return match rest.strip_prefix(':') {
                None if rest.is_empty() => Ok(Self::of(Kind::Nsm, NSM)),
                Some(path) if !path.is_empty() => Ok(Self::of(Kind::Nsm, path)),
                _ => Err(unknown()),
            };
        }
        let mut parts = config.split(';');
        let device = parts.next().unwrap_or_default();
        let (name, root) = device.split_once(':').unwrap_or((device, TSM_ROOT));
        let kind = match name {
            "tdx" => Kind::Tdx,
            "gcp" => Kind::Gcp,
            _ => return Err(unknown()),
        };
        let bad = |why| TeeError::BadOption { config: config.to_owned(), why };
        if root.is_empty() {
            return Err(bad("after the colon there has to be the root of configfs-tsm, or leave the colon out"));
        }
        let mut options = Self::of(kind, root);
        for part in parts {
            let (key, value) = part.split_once('=').filter(|(_, value)| !value.is_empty()).ok_or_else(|| bad("an option is KEY=VALUE"))?;
            options.set(key, value).map_err(bad)?;
        }
        Ok(options)
    }

    fn of(kind: Kind, root: &str) -> Self {
        Self {
            kind,
            root: PathBuf::from(root),
            events: PathBuf::from(RUNTIME_EVENTS),
            ccel: Source::Default(PathBuf::from(CCEL)),
            rtmr: PathBuf::from(RTMR_DIR),
            vm_config: None,
            tpm: TPM.to_owned(),
            tpm_log: Source::Default(PathBuf::from(TPM_LOG)),
        }
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), &'static str> {
        let source = || if value == "none" { Source::None } else { Source::Named(PathBuf::from(value)) };
        match (key, self.kind) {
            ("events", _) => self.events = PathBuf::from(value),
            ("ccel", _) => self.ccel = source(),
            ("rtmr", _) => self.rtmr = PathBuf::from(value),
            ("vm-config", _) => self.vm_config = Some(PathBuf::from(value)),
            ("tpm", Kind::Gcp) => value.clone_into(&mut self.tpm),
            ("tpm-log", Kind::Gcp) => self.tpm_log = source(),
            ("tpm" | "tpm-log", _) => return Err("only \"gcp\" has a TPM"),
            _ => return Err("its options are events, ccel, rtmr, vm-config and, of \"gcp\", tpm and tpm-log"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_defaults() {
        let plain = Options::parse("tdx").unwrap();
        assert_eq!((plain.kind, plain.root.to_str()), (Kind::Tdx, Some("/sys/kernel/config/tsm")));
        assert_eq!(plain.events, PathBuf::from("/run/log/dstack/runtime_events.log"));
        assert_eq!(Options::parse("tdx:/mnt/tsm").unwrap(), Options { root: PathBuf::from("/mnt/tsm"), ..plain });
        let socket = Options::parse("software:/run/a;b=c:d").unwrap();
        assert_eq!((socket.kind, socket.root), (Kind::Software, PathBuf::from("/run/a;b=c:d")));
    }

    #[test]
    fn options_are_read() {
        let options = Options::parse("gcp:/r;tpm=swtpm:host=127.0.0.1,port=4;events=/e;ccel=none;tpm-log=/l;rtmr=/m;vm-config=/v").unwrap();
        let expected = Options {
            kind: Kind::Gcp,
            root: "/r".into(),
            events: "/e".into(),
            ccel: Source::None,
            rtmr: "/m".into(),
            vm_config: Some("/v".into()),
            tpm: "swtpm:host=127.0.0.1,port=4".to_owned(),
            tpm_log: Source::Named("/l".into()),
        };
        assert_eq!(options, expected);
    }

    #[test]
    fn mistakes_are_named() {
        for (config, why) in [
            ("tdx:", "after the colon there has to be the root of configfs-tsm, or leave the colon out"),
            ("tdx;events", "an option is KEY=VALUE"),
            ("tdx;events=", "an option is KEY=VALUE"),
            ("tdx;", "an option is KEY=VALUE"),
            ("tdx;tpm=device:/dev/tpm0", "only \"gcp\" has a TPM"),
            ("gcp;color=red", "its options are events, ccel, rtmr, vm-config and, of \"gcp\", tpm and tpm-log"),
        ] {
            assert_eq!(Options::parse(config), Err(TeeError::BadOption { config: config.to_owned(), why }));
        }
    }
}
