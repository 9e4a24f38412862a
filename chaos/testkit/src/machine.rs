//! A software TEE inside the test's own process, for unit tests of other crates. Owns: what runs on it.
//! Never: differs from a served one in what it signs; only nobody measures the caller here, the test says what runs.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dstack_attest::wire::{EventVersion, RuntimeEvent};
use dstack_protocol::Platform;
use dstack_runtime::clock::{Clock, SystemClock};
use dstack_secret::Secret;
use dstack_tee::software::protocol::{COMPOSE_BYTES_MAX, PURPOSE_BYTES_MAX, RefusedCode};
use dstack_tee::{Boot, Booted, Description, Device, Quote, TeeError};

use crate::error::TestkitError;
use crate::host::Host;
use crate::measure::Measured;
use crate::roots::SoftwareRoots;

/// An emulated machine with what runs on it.
pub struct Machine {
    host: Host,
    clock: Arc<dyn Clock>,
    measured: Mutex<Measured>,
}

impl Machine {
    /// A TDX machine running a node, at the system's time.
    ///
    /// # Errors
    /// [`TestkitError::Certificate`].
    pub fn tdx(name: &str, roots: &SoftwareRoots) -> Result<Self, TestkitError> {
        Ok(Self::new(Host::tdx(name, roots)?))
    }

    /// A Nitro machine running a node, at the system's time.
    ///
    /// # Errors
    /// [`TestkitError::Certificate`].
    pub fn nitro(name: &str, roots: &SoftwareRoots) -> Result<Self, TestkitError> {
        Ok(Self::new(Host::nitro(name, roots)?))
    }

    /// Any machine, running a node: all machines made so run the same executable until [`Machine::running`] says otherwise.
    pub fn new(host: Host) -> Self {
        let node = Measured::executable(b"dstack software TEE 1: a test's node");
        Self { host, clock: Arc::new(SystemClock::new()), measured: Mutex::new(node) }
    }

    /// Runs something else.
    #[must_use]
    pub fn running(mut self, measured: Measured) -> Self {
        self.measured = Mutex::new(measured);
        self
    }

    /// Lives at another time.
    #[must_use]
    pub fn at(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// The hardware.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Canonical measurement of what runs here.
    pub fn measurement(&self) -> Vec<u8> {
        self.host.measurement(&self.measured())
    }

    fn measured(&self) -> MutexGuard<'_, Measured> {
        // Replaced in one step: a thread that panicked left it whole.
        self.measured.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Machine {
    fn platform(&self) -> Platform {
        self.host.platform()
    }

    fn evidence(&self, report_data: [u8; 64]) -> Result<Vec<u8>, TeeError> {
        self.host.evidence(&self.measured(), &report_data, self.clock.now()).map_err(failed)
    }

    fn quote(&self, report_data: [u8; 64]) -> Result<Quote, TeeError> {
        let attested = self.host.attest(&self.measured(), &report_data, self.clock.now()).map_err(failed)?;
        Ok(Quote { quote: attested.quote, event_log: attested.event_log, vm_config: attested.vm_config })
    }

    fn platform_key(&self, purpose: &[u8]) -> Result<Option<Secret<32>>, TeeError> {
        bounded("the purpose", purpose.len(), PURPOSE_BYTES_MAX)?;
        Ok(self.host.platform_key(&self.measured(), purpose))
    }

    fn boot_app(&self, boot: Boot) -> Result<Booted, TeeError> {
        bounded("the compose document", boot.compose.0.len(), COMPOSE_BYTES_MAX)?;
        let mut measured = self.measured();
        if matches!(*measured, Measured::Guest(_) | Measured::Started(_)) {
            let message = "a guest was booted on this machine already".to_owned();
            return Err(TeeError::Refused { code: RefusedCode::AlreadyBooted, message });
        }
        let (guest, booted) = self.host.boot(&boot);
        *measured = guest;
        Ok(booted)
    }

    fn start_app(&self) -> Result<(), TeeError> {
        let mut measured = self.measured();
        if matches!(*measured, Measured::Guest(_) | Measured::Started(_)) {
            let message = "a guest runs on this machine already".to_owned();
            return Err(TeeError::Refused { code: RefusedCode::AlreadyBooted, message });
        }
        if self.host.platform() != Platform::Tdx {
            return Err(TeeError::NoEvents);
        }
        *measured = Measured::Started(Vec::new());
        Ok(())
    }

    fn measure(&self, event: &RuntimeEvent) -> Result<(), TeeError> {
        if event.version != EventVersion::V1 {
            return Err(TeeError::BadEvent { why: "is of version 2, which an emulated guest does not measure" });
        }
        let extended = self.host.platform() == Platform::Tdx
            && self.measured().extend(crate::eventlog::RuntimeEvent::new(&event.event, event.payload.clone()));
        extended.then_some(()).ok_or(TeeError::NoEvents)
    }

    fn describe(&self) -> Result<Description, TeeError> {
        Ok(self.host.description(&self.measured()).into())
    }

    fn is_software(&self) -> bool {
        true
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine").field("name", &self.host.name()).field("platform", &self.host.platform()).finish_non_exhaustive()
    }
}

fn bounded(what: &'static str, have_bytes: usize, limit_bytes: usize) -> Result<(), TeeError> {
    if have_bytes > limit_bytes { Err(TeeError::TooLarge { what, have_bytes, limit_bytes }) } else { Ok(()) }
}

fn failed(error: TestkitError) -> TeeError {
    TeeError::Refused { code: RefusedCode::Internal, message: error.to_string() }
}

#[cfg(test)]
mod tests {
    use dstack_runtime::clock::TestClock;
    use dstack_tee::software::protocol::HexBytes;

    use super::*;

    #[test]
    fn machines_are_devices() {
        let now = dstack_protocol::UnixMillis(1_790_000_000_000);
        let roots = SoftwareRoots::generate(now).unwrap();
        let clock = Arc::new(TestClock::new(now));
        for machine in [Machine::tdx("m", &roots).unwrap(), Machine::nitro("m", &roots).unwrap()] {
            let machine = machine.at(clock.clone());
            let node = machine.describe().unwrap();
            assert_eq!(node.measurement, machine.measurement());
            let sealed = machine.platform_key(b"seal").unwrap().unwrap();
            let boot = Boot { compose: HexBytes(b"{}".to_vec()), app_id: None, instance_seed: None, key_provider: None };
            let booted = machine.boot_app(boot.clone()).unwrap();
            assert_eq!(Some(booted), machine.host().booted(&Measured::compose(b"{}")));
            assert_ne!(machine.measurement(), node.measurement);
            assert!(machine.platform_key(b"seal").unwrap().unwrap() != sealed);
            assert!(matches!(machine.boot_app(boot), Err(TeeError::Refused { code: RefusedCode::AlreadyBooted, .. })));
            assert!(matches!(machine.platform_key(&[0; 257]), Err(TeeError::TooLarge { .. })));
            assert!(!machine.evidence([1; 64]).unwrap().is_empty());
        }
    }
}
