//! Evidence producers: the software device and, later, hardware. Owns: the `Device` trait and its implementations.
//! Never: judges evidence (crate `attest`), seals anything (crate `threshold`), decides which root to trust.

pub mod software;
