//! Software TDX: Intel's formats over a PKI of our own. Owns: root, PCK and TCB signing certificates, collateral, quotes.
//! Never: pretends to be Intel's; every name says "Software", and only a verifier whose trust roots name the root accepts it.
//! Source: Intel SGX PCK Certificate and CRL Profile Specification; Intel SGX and TDX PCS API v4 (TCB info v3,
//! QE identity v2); Intel TDX DCAP Quoting Library API, appendix A (quote v4 and v5).

mod collateral;
mod pck;
mod pki;
mod quote;

pub use collateral::{Collateral, CollateralSpec, ModuleLevel, TcbLevel, bundle_json};
pub use pck::PlatformSpec;
pub(crate) use pki::TdxPki;
pub use quote::{QuoteFormat, QuotingEnclave, TdReport};
