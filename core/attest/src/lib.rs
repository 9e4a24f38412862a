//! Evidence + collateral + time -> `VerifiedIdentity`; one module per platform.
//! Owns: decoding and judging of attestation evidence. Never: fetches collateral, reads the clock, decides who gets a key.
//! Source: `docs/architecture.md`, the pipeline `bytes -> Request -> VerifiedIdentity`.
#![forbid(unsafe_code)]

mod error;
mod roots;

pub use error::{AttestError, Class};
pub use roots::{Root, TrustRoots};
