//! Fetches collateral from those who publish it. Owns: the HTTP clients and what they may reach.
//! Never: believes what it fetched (`attest` checks it), runs on the path of a request.
//! Source: Intel PCS API v4, AMD KDS, RFC 5280 (AIA, CRL distribution points).
#![forbid(unsafe_code)]

mod address;
mod amd;
mod backoff;
mod endpoint;
mod error;
mod folder;
mod http;
mod intel;
mod links;
mod pool;
mod refresh;

pub use amd::{Kds, KeyOf};
pub use backoff::Backoff;
pub use endpoint::Endpoint;
pub use error::FetchError;
pub use folder::{FolderError, read_folder};
pub use http::{Http, Limits};
pub use intel::Intel;
pub use links::{LinkHosts, follow, links};
pub use pool::{Gathered, PoolSources, gather};
pub use refresh::{Refreshed, merge, refresh};
