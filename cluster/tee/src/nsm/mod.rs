//! The Nitro Secure Module of the enclave that this program runs in. Owns: the [`Device`] over `/dev/nsm`, the evidence it writes.
//! Never: seals anything (an enclave has no key that survives it), measures, or judges its own evidence.
//! Source: AWS Nitro Enclaves, "Cryptographic attestation" and the NSM API; dstack attestation reference, sections 2.1 and 7.
//!
//! An enclave is measured whole before it starts, so nothing is booted here: [`Device::boot_app`] only notes the app id that evidence
//! then claims in an `app-id` event. The NSM signs registers and report data, never that claim; policy ties the two together.

mod ask;
mod driver;

use crate::software::protocol::{Boot, Booted, HexArray, HexBytes};
use crate::{Description, Device, Quote, TeeError};
pub use ask::{Ask, NONCE_BYTES_MAX, PUBLIC_KEY_BYTES_MAX, USER_DATA_BYTES_MAX};
use driver::Driver;
pub use driver::Facts;
use dstack_attest::wire::{Attestation, EventVersion, PlatformEvidence, RuntimeEvent};
use dstack_protocol::Platform;
use dstack_protocol::codec::sha256;
use dstack_secret::Secret;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Bytes of a register (SHA-384).
const PCR_BYTES: usize = 48;

/// The enclave's NSM. Calls from several threads are queued by the driver.
#[derive(Debug)]
pub struct NsmDevice {
    driver: Driver,
    facts: Facts,
    /// PCR0 ‖ PCR1 ‖ PCR2, locked before the enclave starts.
    image: [[u8; PCR_BYTES]; 3],
    /// Hash over the parent instance's id.
    parent: [u8; PCR_BYTES],
    claim: Mutex<Option<[u8; 20]>>,
}

impl NsmDevice {
    /// Opens the device and reads what does not change: the module's description and the locked registers.
    ///
    /// # Errors
    /// [`TeeError::DeviceFile`], [`TeeError::Nsm`], [`TeeError::NsmDigest`].
    pub fn open(path: &Path) -> Result<Self, TeeError> {
        let driver = Driver::open(path)?;
        let facts = driver.describe()?;
        if facts.digest != "SHA384" {
            return Err(TeeError::NsmDigest { got: facts.digest });
        }
        let image = [driver.register(0)?, driver.register(1)?, driver.register(2)?];
        let parent = driver.register(4)?;
        tracing::info!(module_id = facts.module_id, "enclave's nsm opened");
        Ok(Self { driver, facts, image, parent, claim: Mutex::new(None) })
    }

    /// What the module says about itself.
    #[must_use]
    pub const fn facts(&self) -> &Facts {
        &self.facts
    }

    /// SHA-256 of PCR0 ‖ PCR1 ‖ PCR2: OS image and compose hash of this enclave.
    #[must_use]
    pub fn image_hash(&self) -> [u8; 32] {
        sha256(&[self.image.as_flattened()])
    }

    /// An attestation document over `ask`: COSE_Sign1, not judged here.
    ///
    /// # Errors
    /// [`TeeError::TooLarge`] before the module is asked; [`TeeError::DebugEnclave`]; [`TeeError::Nsm`].
    pub fn document(&self, ask: Ask) -> Result<Vec<u8>, TeeError> {
        ask.check()?;
        // every verifier refuses it: say here, where it can be mended, why
        if self.image.contains(&[0; PCR_BYTES]) {
            return Err(TeeError::DebugEnclave);
        }
        self.driver.attest(ask)
    }

    /// Bytes of the module's random generator, at most 256.
    ///
    /// # Errors
    /// [`TeeError::Nsm`].
    pub fn random(&self) -> Result<Vec<u8>, TeeError> {
        self.driver.random()
    }

    fn bound_to(&self, report_data: [u8; 64]) -> Result<Vec<u8>, TeeError> {
        self.document(Ask { user_data: Some(report_data.to_vec()), nonce: None, public_key: None })
    }

    /// VmConfig as dstack's attester writes it in an enclave.
    fn config(&self) -> String {
        format!("{{\"os_image_hash\":\"{}\"}}", hex::encode(self.image_hash()))
    }

    fn events(&self) -> Vec<RuntimeEvent> {
        let claim = *self.claim.lock().unwrap_or_else(PoisonError::into_inner);
        let event = |id: [u8; 20]| RuntimeEvent { event: "app-id".to_owned(), payload: id.to_vec(), version: EventVersion::V1 };
        claim.map(event).into_iter().collect()
    }
}

impl Device for NsmDevice {
    fn platform(&self) -> Platform {
        Platform::Nitro
    }

    fn evidence(&self, report_data: [u8; 64]) -> Result<Vec<u8>, TeeError> {
        let attestation = Attestation {
            platform: PlatformEvidence::NitroEnclave { nsm_quote: self.bound_to(report_data)? },
            report_data,
            runtime_events: self.events(),
            config: self.config(),
            report_data_payload: None,
        };
        attestation.encode_v0().ok_or(TeeError::BadEvidence { why: "does not fit SCALE V0" })
    }

    fn quote(&self, report_data: [u8; 64]) -> Result<Quote, TeeError> {
        Ok(Quote { quote: self.bound_to(report_data)?, event_log: "[]".to_owned(), vm_config: self.config() })
    }

    fn platform_key(&self, _purpose: &[u8]) -> Result<Option<Secret<32>>, TeeError> {
        Ok(None)
    }

    /// Notes the claim alone: the app id of `boot`, else the first 20 bytes of its compose document's hash.
    fn boot_app(&self, boot: Boot) -> Result<Booted, TeeError> {
        let first_20 = |hash: [u8; 32]| std::array::from_fn(|at| hash.get(at).copied().unwrap_or_default());
        let id = boot.app_id.map_or_else(|| first_20(sha256(&[&boot.compose.0])), |HexArray(id)| id);
        *self.claim.lock().unwrap_or_else(PoisonError::into_inner) = Some(id);
        Ok(Booted { app_id: HexArray(id), compose_hash: HexArray(self.image_hash()), instance_id: HexBytes::default() })
    }

    fn describe(&self) -> Result<Description, TeeError> {
        Ok(Description {
            platform: Platform::Nitro,
            measurement: self.image.concat(),
            platform_identity: self.parent.to_vec(),
            software: None,
        })
    }

    fn is_software(&self) -> bool {
        false
    }
}
