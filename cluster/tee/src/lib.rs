//! Evidence producers: the software device and, later, hardware. Owns: the [`Device`] trait, its implementations, opening one by
//! its name in a config. Never: judges evidence (crate `attest`), seals anything (crate `threshold`), decides which root to trust.
//! Source: architecture.md §5, threshold.md §6 (`platform_key`).
#![forbid(unsafe_code)]

mod device;
mod error;
pub mod software;

pub use device::{Device, Opened, Quote, open};
pub use error::TeeError;
pub use software::SoftwareDevice;
pub use software::protocol::{Boot, Booted, Description, KeyProvider};
