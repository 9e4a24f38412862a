//! A Nitro enclave in QEMU's machine of that name: a real image, Debian's kernel with its NSM driver, a real vsock. Owns: starting what
//! it takes, for a limited time. Never: hardware; documents are signed under a software root by a patched device.
//!
//! - [`Kit`]: programs, kernel and modules, as `cargo xtask test --tee` puts them together. [`Kit::image`]: an enclave image of it.
//! - [`run`]: one enclave from start to end; its [`Report`].

mod kit;
mod report;
mod run;

pub use kit::Kit;
pub use report::Report;
pub use run::{Enclave, run};
