//! Machines in QEMU, on Debian's kernel: a Nitro enclave (a real image, the kernel's NSM driver, a real vsock), and one with a disk and
//! device-mapper. Owns: starting what it takes, for a limited time. Never: hardware; documents of the NSM are signed under a software root
//! by a patched device.
//!
//! - [`Kit`]: programs, kernel and modules, as `cargo xtask test --tee` puts them together. [`Kit::image`]: an enclave image of it.
//! - [`run`]: one enclave from start to end; its [`Report`]; [`run_and_meet`] speaks with it. [`run_with_disk`]: the same of a machine with a disk.

mod disk;
mod kit;
mod parent;
mod report;
mod run;
mod system;
mod tree;

pub use disk::{DiskMachine, run_with_disk};
pub use kit::Kit;
pub use report::Report;
pub use run::{Enclave, run, run_and_meet};
