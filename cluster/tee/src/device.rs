//! The device a program runs in, as the program sees it. Owns: the trait, what a device says of itself, opening by a config's text.
//! Never: knows how a device does it.

use crate::TeeError;
use crate::options::{Kind, Options};
use crate::software::SoftwareDevice;
use crate::software::protocol::{self, Boot, Booted};
use crate::tdx::TdxDevice;
use dstack_attest::wire::{Attestation, RuntimeEvent};
use dstack_protocol::Platform;
use dstack_secret::Secret;
use std::path::Path;
use std::sync::Arc;

/// A producer of evidence. Calls block, some for tens of milliseconds and a busy TDX host for seconds: an async caller uses a worker
/// thread.
pub trait Device: Send + Sync + std::fmt::Debug {
    /// What the evidence is of.
    fn platform(&self) -> Platform;

    /// The versioned attestation of what runs here, bound to `report_data`: content of X.509 extension `.8`. SCALE V0, stripped; msgpack
    /// V1 where a runtime event of version 2 was measured, which V0 cannot carry.
    ///
    /// # Errors
    /// The device's; see [`TeeError`].
    fn evidence(&self, report_data: [u8; 64]) -> Result<Vec<u8>, TeeError>;

    /// As [`Self::evidence`], nothing stripped: the whole event log with its digests, for those who show it to verifiers. The same
    /// where there is no event log.
    ///
    /// # Errors
    /// The device's; see [`TeeError`].
    fn whole_evidence(&self, report_data: [u8; 64]) -> Result<Vec<u8>, TeeError> {
        self.evidence(report_data)
    }

    /// The raw quote and its log, bound to `report_data`, as dstack's guest API hands them out.
    ///
    /// # Errors
    /// The device's; see [`TeeError`].
    fn quote(&self, report_data: [u8; 64]) -> Result<Quote, TeeError>;

    /// A key that only this code on this platform gets, the same each time for one `purpose`; `None` where the platform has
    /// none (plain TDX, GCP, AWS: a vTPM run by the host is outside the trust boundary), so that nothing can be sealed there.
    ///
    /// # Errors
    /// The device's; see [`TeeError`].
    fn platform_key(&self, purpose: &[u8]) -> Result<Option<Secret<32>>, TeeError>;

    /// Boots an emulated guest: from here on evidence and keys are the guest's. Once per device value; hardware refuses
    /// with [`TeeError::NoGuests`], for there the program is part of the guest that was booted. An enclave's NSM, which
    /// measures no app id, takes from it the one that evidence claims.
    ///
    /// # Errors
    /// The device's; see [`TeeError`].
    fn boot_app(&self, boot: Boot) -> Result<Booted, TeeError>;

    /// Starts an emulated guest of which nothing is measured yet, in the place of [`Self::boot_app`]: its events follow by
    /// [`Self::measure`]. Once per device value. On hardware the guest was started before this program: nothing happens.
    ///
    /// # Errors
    /// The device's; see [`TeeError`].
    fn start_app(&self) -> Result<(), TeeError> {
        Ok(())
    }

    /// Measures `event` into every register of runtime events and notes it where evidence takes its events from.
    ///
    /// # Errors
    /// [`TeeError::NoEvents`] where nothing can be measured at run time; see [`crate::runtime_log::RuntimeLog::append`] for hardware.
    fn measure(&self, event: &RuntimeEvent) -> Result<(), TeeError> {
        let _ = event;
        Err(TeeError::NoEvents)
    }

    /// The runtime events measured so far, in order.
    ///
    /// # Errors
    /// The device's; see [`TeeError`].
    fn runtime_events(&self) -> Result<Vec<RuntimeEvent>, TeeError> {
        let evidence = self.evidence([0; 64])?;
        Ok(Attestation::decode(&evidence).map_err(TeeError::UndecodableEvidence)?.runtime_events)
    }

    /// What an instance id is bound to beside its seed: the hash of a key that this machine alone has. `None` where it has none (plain
    /// TDX).
    ///
    /// # Errors
    /// The device's; see [`TeeError`].
    fn instance_binding(&self) -> Result<Option<[u8; 32]>, TeeError> {
        Ok(None)
    }

    /// What this device is and measures now.
    ///
    /// # Errors
    /// The device's; see [`TeeError`].
    fn describe(&self) -> Result<Description, TeeError>;

    /// Whether no hardware stands behind the evidence. Programs say so in log and status.
    fn is_software(&self) -> bool;
}

/// What a device is. For people and for setting up a cluster; never a reason to trust anything in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// What its evidence is of.
    pub platform: Platform,
    /// Canonical measurement of what runs here, in the platform's form.
    pub measurement: Vec<u8>,
    /// Which machine it is (PPID, PCR4); empty where only a verifier can tell.
    pub platform_identity: Vec<u8>,
    /// What evidence of a software device is judged with; `None` for hardware.
    pub software: Option<SoftwareTrust>,
}

/// What a verifier of a software device's evidence has to be given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SoftwareTrust {
    /// DER of the software root the evidence chains to.
    pub root_der: Vec<u8>,
    /// Collateral bundle JSON; `None` where the platform has none (Nitro).
    pub collateral: Option<String>,
}

impl From<protocol::Description> for Description {
    fn from(said: protocol::Description) -> Self {
        Self {
            platform: said.platform.platform(),
            measurement: said.measurement.0,
            platform_identity: said.platform_identity.0,
            software: Some(SoftwareTrust { root_der: said.root_der.0, collateral: said.collateral }),
        }
    }
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

/// Opens the device that a config names: `software:/path/to/socket`, `tdx`, `tdx:ROOT`, `gcp`, `nsm` or `nsm:/dev/nsm`; see [`crate::options`] for what may
/// follow.
///
/// # Errors
/// [`TeeError::UnknownDevice`] for any other text, [`TeeError::BadOption`], [`TeeError::NotBuilt`] for a device that this build
/// lacks, and what the device answers.
pub fn open(config: &str) -> Result<Opened, TeeError> {
    let options = Options::parse(config)?;
    match options.kind {
        Kind::Software => Ok(Arc::new(SoftwareDevice::open(Path::new(&options.root))?)),
        Kind::Tdx => Ok(Arc::new(TdxDevice::open(&options)?)),
        #[cfg(feature = "tpm")]
        Kind::Gcp => Ok(Arc::new(crate::tpm::GcpDevice::open(&options)?)),
        #[cfg(not(feature = "tpm"))]
        Kind::Gcp => Err(TeeError::NotBuilt { config: config.to_owned(), feature: "tpm" }),
        #[cfg(feature = "nsm")]
        Kind::Nsm => Ok(Arc::new(crate::nsm::NsmDevice::open(&options.root)?)),
        #[cfg(not(feature = "nsm"))]
        Kind::Nsm => Err(TeeError::NotBuilt { config: config.to_owned(), feature: "nsm" }),
    }
}

/// Evidence with this VmConfig where it carries none. Nothing signs a VmConfig: verifiers tie what it claims to the registers.
///
/// # Errors
/// [`TeeError::UndecodableEvidence`].
pub fn with_vm_config(evidence: Vec<u8>, vm_config: &str) -> Result<Vec<u8>, TeeError> {
    if vm_config.is_empty() {
        return Ok(evidence);
    }
    let mut attestation = Attestation::decode(&evidence).map_err(TeeError::UndecodableEvidence)?;
    if !attestation.config.is_empty() {
        return Ok(evidence);
    }
    vm_config.clone_into(&mut attestation.config);
    Ok(attestation.encode())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_devices_are_refused_by_name() {
        for config in ["", "software:", "sgx", "tdxx", "/run/tee.sock"] {
            let refused = open(config).unwrap_err();
            assert_eq!(refused, TeeError::UnknownDevice { config: config.to_owned() });
            assert!(refused.to_string().contains("\"tdx\""));
        }
    }

    #[test]
    fn an_nsm_that_is_not_there_is_named() {
        let refused = open("nsm:/nonexistent/nsm").unwrap_err();
        let expected = if cfg!(feature = "nsm") {
            TeeError::DeviceFile { path: "/nonexistent/nsm".into(), kind: std::io::ErrorKind::NotFound }
        } else {
            TeeError::NotBuilt { config: "nsm:/nonexistent/nsm".into(), feature: "nsm" }
        };
        assert_eq!(refused, expected);
    }

    #[test]
    fn a_missing_socket_is_named() {
        let refused = open("software:/nonexistent/tee.sock").unwrap_err();
        assert_eq!(refused, TeeError::Connect { path: "/nonexistent/tee.sock".into(), kind: std::io::ErrorKind::NotFound });
    }

    #[test]
    fn hardware_that_is_not_there_is_refused_with_what_to_do() {
        let refused = open("tdx:/nonexistent/tsm").unwrap_err();
        assert!(refused.to_string().contains("no configfs-tsm at /nonexistent/tsm"), "{refused}");
    }

    #[cfg(not(feature = "tpm"))]
    #[test]
    fn a_device_of_another_build_is_refused_by_its_feature() {
        let refused = open("gcp").unwrap_err();
        assert_eq!(refused, TeeError::NotBuilt { config: "gcp".to_owned(), feature: "tpm" });
    }
}
