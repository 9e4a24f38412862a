//! A TPM 2.0 through the TSS: quotes with an attestation key, PCR 14, sealing under a PCR policy, Google Cloud's device. Owns: every
//! TPM command this program sends. Never: judges a quote; offers a sealed key as a platform key (a vTPM run by the host is outside the
//! trust boundary: threshold.md §6).
//! Source: TCG TPM 2.0 Library, parts 2 and 3; dstack attestation reference, §5.2; Google's go-tpm-tools (NV indices of the AK).

mod context;
mod error;
mod gcp;
mod key;
mod nv;
mod quote;
mod seal;

pub use context::Tpm;
pub use error::TpmError;
pub use gcp::{GcpDevice, QUOTED_PCRS};
pub use key::{AkKind, NV_AK_ECC, NV_AK_RSA};
pub use nv::NV_SEED;
pub use quote::{Pcr14, Quoted};
pub use seal::SEALED_BYTES_MAX;
