//! Certificates of a cluster's CA, and the signatures of its identity.
//!
//! Owns: names, extensions, serials and dates of each kind; building what is to be signed; reading it back; whether what the log
//! stores is what was asked for. Never: a clock, randomness, a root key. Source: threshold.md §5; KMS API reference §6, §8.
//!
//! - [`issue`]: what the root signs, rebuilt by every signer from the log's row, and judging what came back.
//! - [`leaf`]: what a node signs: its server's certificate, an app's leaf. [`temp`]: the temp CA and what a client signs with it.
//! - [`read`], [`path`]: typed fields of a certificate, and chains of them.
//! - [`identity`]: recoverable signatures of root `id`. [`key`]: public keys, keys made of scalars. [`pem`].
#![forbid(unsafe_code)]

mod build;
mod error;
pub mod identity;
pub mod issue;
pub mod key;
pub mod leaf;
pub mod names;
pub mod path;
pub mod pem;
pub mod read;
pub mod temp;

pub use error::CertificateError;
pub use key::{P256Key, PublicKey};
