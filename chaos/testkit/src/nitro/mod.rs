//! Software Nitro: NSM documents over a root of our own. Owns: root, the certificates below it, documents.
//! Never: pretends to be AWS's; a verifier accepts these only if its trust roots name the root.
//! Source: AWS Nitro Enclaves, "Verifying the root of trust" and "Cryptographic attestation" (COSE_Sign1, ES384).

mod document;
mod pki;

pub use document::NsmDocument;
pub use pki::{EnclaveHost, SigningFiles};
pub(crate) use pki::{NitroPki, extend_pcr};
