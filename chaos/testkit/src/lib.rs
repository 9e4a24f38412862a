//! Software TEEs for tests and demos: byte-true TDX quotes and NSM documents under roots of their own, so that production
//! code verifies them unchanged once its configuration names those roots.
//!
//! Owns: producers of evidence, collateral and event logs, the device process that serves them. Never: is linked by a
//! production binary; runs without its names saying that it is software.
#![forbid(unsafe_code)]

pub mod bad_requests;
pub mod cluster;
mod der;
pub mod device;
pub mod eif;
mod error;
pub mod eventlog;
pub mod evidence;
mod host;
pub mod http2;
mod key;
mod listening;
pub mod local_provider;
mod machine;
mod measure;
pub mod nitro;
pub mod qemu;
pub mod raw_http;
pub mod raw_tls;
mod roots;
pub mod tdx;
pub mod tsm;
mod validity;
mod world;
mod x509;

pub mod auth_simple;
pub mod pccs;

pub use error::TestkitError;
pub use host::{Attested, Host};
pub use machine::Machine;
pub use measure::{Guest, Measured, TdRegisters};
pub use roots::{SoftwareRoots, Summary, public_files};
pub use validity::{Validity, rfc3339};
pub use world::World;
