//! Evidence + collateral + time -> `VerifiedIdentity`; one module per platform.
//! Owns: decoding and judging of attestation evidence. Never: fetches collateral, reads the clock, decides who gets a key.
//! Source: `docs/architecture.md`, the pipeline `bytes -> Request -> VerifiedIdentity`.
#![forbid(unsafe_code)]

pub mod azure;
mod cbor;
mod check;
mod class;
mod collateral;
mod error;
pub mod eventlog;
mod explain;
pub mod gcp;
mod identity;
mod image;
pub mod manifest;
pub mod nitro;
mod pem;
mod reader;
mod roots;
pub mod snp;
mod tcb;
pub mod tdx;
mod times;
pub mod tpm;
mod verify;
mod window;
pub mod wire;
pub mod x509;
pub mod x509ext;
mod x509pool;

pub use check::{Check, Trace, checks};
pub use class::Class;
pub use collateral::{BUNDLE_BYTES_MAX, BUNDLE_PLATFORMS_MAX, COLLATERAL_BYTES_MAX, CollateralBundle, TdxCollateral};
pub use error::AttestError;
pub use explain::Explanation;
pub use identity::VerifiedIdentity;
pub use roots::{Root, TrustRoots, Vendor};
pub use tcb::{TCB_LAG_MS_MAX, TcbFacts, TcbPolicy, TcbStanding};
pub use times::{DATED_PARTS, DatedPart};
pub use verify::{VerifyContext, verify, verify_legacy, verify_legacy_traced, verify_traced};
pub use x509::{PoolFinding, PoolPart};
pub use x509pool::{POOL_CERTIFICATE_BYTES_MAX, POOL_CERTIFICATES_MAX, POOL_CRL_BYTES_MAX, POOL_CRLS_MAX, X509Pool};
