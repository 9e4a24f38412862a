//! One emulated machine: hardware of either platform, and what it says about whatever runs on it. Owns: the machine's
//! identity, its quotes, its platform keys. Never: finds out what runs on it, reads the clock.

use dstack_protocol::{Platform, UnixMillis};
use dstack_secret::Secret;
use dstack_tee::software::protocol::{Boot, Booted, Description, EmulatedPlatform, HexBytes, PROTOCOL_VERSION};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::error::TestkitError;
use crate::eventlog::{RuntimeEvent, json_log};
use crate::evidence;
use crate::key::derive_secret;
use crate::measure::{Guest, Measured};
use crate::nitro::EnclaveHost;
use crate::roots::SoftwareRoots;
use crate::tdx::{PlatformSpec, QuoteFormat, QuotingEnclave};

/// An emulated machine. The same roots and name give the same identity and the same platform keys.
pub struct Host {
    name: String,
    hardware: Hardware,
    /// None on a machine without a measurement-bound key.
    sealing: Option<Secret<32>>,
    root_der: Vec<u8>,
    collateral: Option<String>,
}

enum Hardware {
    Tdx { enclave: Box<QuotingEnclave>, format: QuoteFormat },
    Nitro(Box<EnclaveHost>),
}

/// A quote with what belongs to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attested {
    /// TDX quote or NSM document.
    pub quote: Vec<u8>,
    /// Runtime events: measured on TDX, claimed on Nitro.
    pub events: Vec<RuntimeEvent>,
    /// The log of the guest API: a JSON array, empty on Nitro.
    pub event_log: String,
    /// VmConfig JSON; empty for a node on TDX.
    pub vm_config: String,
}

impl Host {
    /// A TDX machine, up to date, quotes of version 4.
    ///
    /// # Errors
    /// [`TestkitError::Certificate`].
    pub fn tdx(name: &str, roots: &SoftwareRoots) -> Result<Self, TestkitError> {
        Self::tdx_with(name, roots, roots.platform(name), QuoteFormat::V4)
    }

    /// A TDX machine of the given platform and quote format.
    ///
    /// # Errors
    /// [`TestkitError::Certificate`].
    pub fn tdx_with(name: &str, roots: &SoftwareRoots, platform: PlatformSpec, format: QuoteFormat) -> Result<Self, TestkitError> {
        let enclave = Box::new(roots.quoting_enclave(name, platform, roots.validity())?);
        Ok(Self {
            name: name.to_owned(),
            hardware: Hardware::Tdx { enclave, format },
            sealing: Some(roots.sealing_secret(name)),
            root_der: roots.tdx_root_der().to_vec(),
            collateral: Some(String::from_utf8_lossy(roots.bundle()).into_owned()),
        })
    }

    /// A Nitro machine.
    ///
    /// # Errors
    /// [`TestkitError::Certificate`].
    pub fn nitro(name: &str, roots: &SoftwareRoots) -> Result<Self, TestkitError> {
        Ok(Self {
            name: name.to_owned(),
            hardware: Hardware::Nitro(Box::new(roots.enclave_host(name)?)),
            sealing: Some(roots.sealing_secret(name)),
            root_der: roots.nitro_root_der().to_vec(),
            collateral: None,
        })
    }

    /// Name of the machine.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Platform, as the device protocol names it.
    pub fn emulated(&self) -> EmulatedPlatform {
        match self.hardware {
            Hardware::Tdx { .. } => EmulatedPlatform::Tdx,
            Hardware::Nitro(_) => EmulatedPlatform::Nitro,
        }
    }

    /// Platform, as evidence names it.
    pub fn platform(&self) -> Platform {
        match self.hardware {
            Hardware::Tdx { .. } => Platform::Tdx,
            Hardware::Nitro(_) => Platform::Nitro,
        }
    }

    /// PPID or PCR4.
    pub fn identity(&self) -> Vec<u8> {
        match &self.hardware {
            Hardware::Tdx { enclave, .. } => enclave.platform().ppid.to_vec(),
            Hardware::Nitro(host) => host.pcr4().to_vec(),
        }
    }

    /// DER of the software root that this machine's evidence chains to.
    pub fn root_der(&self) -> &[u8] {
        &self.root_der
    }

    /// Collateral bundle JSON; `None` on Nitro.
    pub fn collateral(&self) -> Option<&str> {
        self.collateral.as_deref()
    }

    /// Canonical measurement of what runs here: 224 bytes on TDX, 144 on Nitro.
    pub fn measurement(&self, measured: &Measured) -> Vec<u8> {
        match self.hardware {
            Hardware::Tdx { .. } => measured.tdx_measurement(),
            Hardware::Nitro(_) => measured.nitro_measurement(),
        }
    }

    /// The identity that a verifier will see; `None` for a node.
    pub fn booted(&self, measured: &Measured) -> Option<Booted> {
        match measured {
            Measured::Executable(_) | Measured::Started(_) => None,
            Measured::Guest(guest) => Some(self.identity_of(guest)),
        }
    }

    /// Boots a guest: what is measured from here on, and the identity that a verifier will see.
    pub fn boot(&self, boot: &Boot) -> (Measured, Booted) {
        let guest = Guest::new(boot);
        let booted = self.identity_of(&guest);
        (Measured::Guest(Box::new(guest)), booted)
    }

    fn identity_of(&self, guest: &Guest) -> Booted {
        match self.hardware {
            Hardware::Tdx { .. } => guest.booted_tdx(),
            Hardware::Nitro(_) => guest.booted_nitro(),
        }
    }

    /// What the device protocol says of this machine while `measured` runs on it.
    pub fn description(&self, measured: &Measured) -> Description {
        Description {
            version: PROTOCOL_VERSION,
            platform: self.emulated(),
            root_der: HexBytes(self.root_der.clone()),
            measurement: HexBytes(self.measurement(measured)),
            platform_identity: HexBytes(self.identity()),
            collateral: self.collateral.clone(),
        }
    }

    /// Quotes what runs here.
    ///
    /// # Errors
    /// [`TestkitError::Certificate`] when the leaf of a Nitro document cannot be written.
    pub fn attest(&self, measured: &Measured, report_data: &[u8; 64], now: UnixMillis) -> Result<Attested, TestkitError> {
        match &self.hardware {
            Hardware::Tdx { enclave, format } => {
                let registers = measured.td_registers();
                let mut report = enclave.report();
                report.mrtd = registers.mrtd;
                report.rtmr = registers.rtmr;
                report.report_data = *report_data;
                Ok(Attested {
                    quote: enclave.quote(&report, *format),
                    event_log: json_log(&registers.events),
                    vm_config: match measured {
                        Measured::Executable(_) => String::new(),
                        Measured::Guest(_) | Measured::Started(_) => tdx_config(&registers.mrtd),
                    },
                    events: registers.events,
                })
            }
            Hardware::Nitro(host) => {
                let mut document = host.blank(now.0).measured(measured.pcrs());
                document.user_data = Some(report_data.to_vec());
                Ok(Attested {
                    quote: host.sign(&document, now.0)?,
                    events: measured.nitro_events(),
                    event_log: "[]".to_owned(),
                    vm_config: json!({"os_image_hash": hex::encode(measured.nitro_image_hash())}).to_string(),
                })
            }
        }
    }

    /// The versioned attestation (SCALE V0) of what runs here.
    ///
    /// # Errors
    /// As [`Host::attest`].
    pub fn evidence(&self, measured: &Measured, report_data: &[u8; 64], now: UnixMillis) -> Result<Vec<u8>, TestkitError> {
        let attested = self.attest(measured, report_data, now)?;
        let wrap = match self.hardware {
            Hardware::Tdx { .. } => evidence::tdx,
            Hardware::Nitro(_) => evidence::nitro,
        };
        Ok(wrap(&attested.quote, &attested.events, report_data, &attested.vm_config))
    }

    /// The same machine without a measurement-bound key, as plain TDX, GCP and AWS are.
    #[must_use]
    pub fn without_platform_key(self) -> Self {
        Self { sealing: None, ..self }
    }

    /// The key of this machine, this measurement and this purpose; the same for every call. `None` where it has none.
    pub fn platform_key(&self, measured: &Measured, purpose: &[u8]) -> Option<Secret<32>> {
        self.sealing.as_ref().map(|sealing| derive_secret(sealing, &[&self.measurement(measured), purpose]))
    }
}

/// What the constant guest image says about its virtual machine.
fn tdx_config(mrtd: &[u8; 48]) -> String {
    let image: [u8; 32] = Sha256::digest(mrtd).into();
    json!({"os_image_hash": hex::encode(image), "cpu_count": 1, "memory_size": 2_147_483_648u64, "image": "software-tee"}).to_string()
}
