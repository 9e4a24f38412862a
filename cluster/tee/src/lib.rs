//! Evidence producers: TDX by the kernel's configfs-tsm, Google's vTPM, a Nitro enclave's NSM, the software device. Owns: the [`Device`] trait, its
//! implementations, opening one by its name in a config, the guest's runtime event log. Never: judges evidence (crate `attest`), decides
//! which root to trust.
//! Source: architecture.md §5, threshold.md §6 (`platform_key`).
#![forbid(unsafe_code)]

mod attribute;
mod device;
mod error;
#[cfg(feature = "nsm")]
pub mod nsm;
pub mod options;
pub mod runtime_log;
pub mod software;
pub mod tdx;
#[cfg(feature = "tpm")]
pub mod tpm;

pub use device::{Description, Device, Opened, Quote, SoftwareTrust, open, with_vm_config};
pub use error::TeeError;
#[cfg(feature = "nsm")]
pub use nsm::NsmDevice;
pub use software::SoftwareDevice;
pub use software::protocol::{Boot, Booted, KeyProvider};
