//! The device a program runs in, as the program sees it. Owns: the trait, opening by a config's text.
//! Never: knows how a device does it.

use crate::TeeError;
use crate::software::SoftwareDevice;
use crate::software::protocol::{Boot, Booted, Description};
use dstack_protocol::Platform;
use dstack_secret::Secret;
use std::path::Path;
use std::sync::Arc;

/// A producer of evidence. Calls block, some for tens of milliseconds: an async caller uses a worker thread.
pub trait Device: Send + Sync + std::fmt::Debug {
    /// What the evidence is of.
    fn platform(&self) -> Platform;

    /// The versioned attestation (SCALE V0) of what runs here, bound to `report_data`: content of X.509 extension `.8`.
    ///
    /// # Errors
    /// The device's; see [`TeeError`].
    fn evidence(&self, report_data: [u8; 64]) -> Result<Vec<u8>, TeeError>;

    /// The raw quote and its log, bound to `report_data`, as dstack's guest API hands them out.
    ///
    /// # Errors
    /// The device's; see [`TeeError`].
    fn quote(&self, report_data: [u8; 64]) -> Result<Quote, TeeError>;

    /// A key that only this code on this platform gets, the same each time for one `purpose`; `None` where the platform has
    /// none (plain TDX, GCP, AWS), so that nothing can be sealed there.
    ///
    /// # Errors
    /// The device's; see [`TeeError`].
    fn platform_key(&self, purpose: &[u8]) -> Result<Option<Secret<32>>, TeeError>;

    /// Boots an emulated guest: from here on evidence and keys are the guest's. Once per device value; hardware refuses
    /// with [`TeeError::NoGuests`], for there the program is part of the guest that was booted.
    ///
    /// # Errors
    /// The device's; see [`TeeError`].
    fn boot_app(&self, boot: Boot) -> Result<Booted, TeeError>;

    /// What this device is, for people, and for `software` devices its root and collateral.
    ///
    /// # Errors
    /// The device's; see [`TeeError`].
    fn describe(&self) -> Result<Description, TeeError>;

    /// Whether no hardware stands behind the evidence. Programs say so in log and status.
    fn is_software(&self) -> bool;
}

/// A raw quote and what is needed to replay it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quote {
    /// The DCAP quote (TDX) or the NSM document (Nitro).
    pub quote: Vec<u8>,
    /// JSON array of events; `[]` on Nitro.
    pub event_log: String,
    /// VmConfig JSON; may be empty.
    pub vm_config: String,
}

/// A device that was opened, to be shared between tasks.
pub type Opened = Arc<dyn Device>;

/// Opens the device that a config names: `software:/path/to/socket`.
///
/// # Errors
/// [`TeeError::UnknownDevice`] for any other text; what [`SoftwareDevice::open`] answers.
pub fn open(config: &str) -> Result<Opened, TeeError> {
    match config.strip_prefix("software:") {
        Some(path) if !path.is_empty() => Ok(Arc::new(SoftwareDevice::open(Path::new(path))?)),
        _ => Err(TeeError::UnknownDevice { config: config.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_devices_are_refused_by_name() {
        for config in ["", "software:", "tdx", "tdx:/sys/kernel/config/tsm", "/run/tee.sock"] {
            let refused = open(config).unwrap_err();
            assert_eq!(refused, TeeError::UnknownDevice { config: config.to_owned() });
            assert!(refused.to_string().contains("hardware devices come with a later version"));
        }
    }

    #[test]
    fn a_missing_socket_is_named() {
        let refused = open("software:/nonexistent/tee.sock").unwrap_err();
        assert_eq!(refused, TeeError::Connect { path: "/nonexistent/tee.sock".into(), kind: std::io::ErrorKind::NotFound });
    }
}
