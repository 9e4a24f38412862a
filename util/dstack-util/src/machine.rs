//! The machine this program runs in. Owns: finding its device, measuring into every register it has, the event log of an emulated guest.
//! Never: chooses an emulated device by itself.
//!
//! An emulated guest lives as long as its connection, so its events are kept in a file and measured again when a later program opens the
//! device with the same file: to everyone else it is one guest, as on hardware, where the log is dstack's own.

use std::path::{Path, PathBuf};

use dstack_attest::wire::{EventVersion, RuntimeEvent};
use dstack_tee::runtime_log::{Register, RuntimeLog};
#[cfg(feature = "tpm")]
use dstack_tee::tpm::{Pcr14, Tpm};
use dstack_tee::{Device, Opened, TeeError};

/// Why there is no machine.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MachineError {
    /// No device of a confidential machine. Operator's to fix: another machine, or name one.
    #[error(
        "no TEE here (no /dev/nsm, no /sys/kernel/config/tsm/report): name a device, `tdx`, `gcp`, `nsm` or `software:/path/to/socket`"
    )]
    None,
    /// The device's.
    #[error("{0}")]
    Device(#[from] TeeError),
}

/// An opened device with what belongs to it.
#[derive(Debug)]
pub struct Machine {
    device: Opened,
    /// Of an emulated guest; on hardware the device keeps its own.
    log: Option<RuntimeLog>,
    #[cfg(feature = "tpm")]
    tpm: Option<Tpm>,
}

impl Machine {
    /// Opens the named device, or the one that is here. `events`: the log of an emulated guest; without it an emulated device measures this
    /// program as a node.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn open(device: Option<&str>, events: Option<&Path>) -> Result<Self, MachineError> {
        let found = match device {
            Some(device) => device.to_owned(),
            None => detect(Path::new("/")).ok_or(MachineError::None)?.to_owned(),
        };
        let device = dstack_tee::open(&found)?;
        let log = events.filter(|_| device.is_software()).map(RuntimeLog::at);
        if let Some(log) = &log {
            device.start_app()?;
            for event in log.read()? {
                device.measure(&event)?;
            }
        }
        Ok(Self {
            device,
            log,
            #[cfg(feature = "tpm")]
            tpm: None,
        })
    }

    /// Measures into PCR 14 of this TPM as well: an emulated guest has none of its own.
    #[cfg(feature = "tpm")]
    #[must_use]
    pub fn with_tpm(mut self, tpm: Tpm) -> Self {
        self.tpm = Some(tpm);
        self
    }

    /// The TPM that was given.
    #[cfg(feature = "tpm")]
    #[must_use]
    pub const fn tpm(&self) -> Option<&Tpm> {
        self.tpm.as_ref()
    }

    /// The device.
    #[must_use]
    pub const fn device(&self) -> &Opened {
        &self.device
    }

    /// Measures `event` into every register, then notes it.
    ///
    /// # Errors
    /// The device's.
    pub fn measure(&self, event: &RuntimeEvent) -> Result<(), TeeError> {
        let Some(log) = &self.log else { return self.device.measure(event) };
        let emulated = Emulated(self.device.as_ref());
        #[cfg(feature = "tpm")]
        if let Some(tpm) = &self.tpm {
            return log.append(event, &[&emulated, &Pcr14(tpm)]);
        }
        log.append(event, &[&emulated])
    }

    /// The events measured so far.
    ///
    /// # Errors
    /// The device's.
    pub fn events(&self) -> Result<Vec<RuntimeEvent>, TeeError> {
        match &self.log {
            Some(log) => log.read(),
            None => self.device.runtime_events(),
        }
    }
}

/// The emulated guest's RTMR3.
struct Emulated<'a>(&'a dyn Device);

impl Register for Emulated<'_> {
    fn require(&self, log: &[RuntimeEvent]) -> Result<(), TeeError> {
        if self.0.runtime_events()? == log { Ok(()) } else { Err(TeeError::LogDiverged { register: "RTMR3" }) }
    }

    fn measure(&self, event: &RuntimeEvent) -> Result<(), TeeError> {
        self.0.measure(event)
    }
}

/// The device's name by what the kernel shows below `root`.
fn detect(root: &Path) -> Option<&'static str> {
    let is_there = |path: &str| root.join(path).exists();
    if is_there("dev/nsm") {
        return Some("nsm");
    }
    let product = std::fs::read_to_string(root.join("sys/class/dmi/id/product_name")).unwrap_or_default();
    let is_td = is_there("sys/kernel/config/tsm/report") || is_there("dev/tdx_guest");
    match (is_td, product.trim()) {
        (true, "Google Compute Engine") => Some("gcp"),
        (true, _) => Some("tdx"),
        (false, _) => None,
    }
}

/// Where an emulated guest's events are kept below a work directory.
#[must_use]
pub fn events_below(work_dir: &Path) -> PathBuf {
    work_dir.join("runtime_events.log")
}

/// An event of version 1.
#[must_use]
pub fn event(name: &str, payload: &[u8]) -> RuntimeEvent {
    RuntimeEvent { event: name.to_owned(), payload: payload.to_vec(), version: EventVersion::V1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_is_found_by_its_files() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(detect(root.path()), None);
        std::fs::create_dir_all(root.path().join("sys/kernel/config/tsm/report")).unwrap();
        assert_eq!(detect(root.path()), Some("tdx"));
        std::fs::create_dir_all(root.path().join("sys/class/dmi/id")).unwrap();
        std::fs::write(root.path().join("sys/class/dmi/id/product_name"), "Google Compute Engine\n").unwrap();
        assert_eq!(detect(root.path()), Some("gcp"));
        std::fs::create_dir_all(root.path().join("dev")).unwrap();
        std::fs::write(root.path().join("dev/nsm"), "").unwrap();
        assert_eq!(detect(root.path()), Some("nsm"));
    }

    #[test]
    fn an_emulated_guest_is_one_over_two_openings() {
        let mut world = dstack_testkit::World::new().unwrap();
        let text = world.tdx("m").unwrap();
        let log = world.dir().join("events");
        let first = Machine::open(Some(&text), Some(&log)).unwrap();
        first.measure(&event("app-id", &[1; 20])).unwrap();
        drop(first);
        let second = Machine::open(Some(&text), Some(&log)).unwrap();
        second.measure(&event("compose-hash", &[2; 32])).unwrap();
        assert_eq!(second.events().unwrap(), [event("app-id", &[1; 20]), event("compose-hash", &[2; 32])]);
        let identity = world.verify(&second.device().evidence([0; 64]).unwrap()).unwrap();
        assert_eq!((identity.app_id().unwrap().0, identity.compose_hash()), ([1; 20], Some([2; 32])));
        assert!(matches!(Machine::open(Some("x"), None), Err(MachineError::Device(TeeError::UnknownDevice { .. }))));
    }
}
