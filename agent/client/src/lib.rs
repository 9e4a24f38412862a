//! Find a node, verify it, ask, combine: the native client of the cluster (mode C).
//!
//! Owns: the pin, the list of nodes with their health, the session and its evidence, the release of keys, their check values.
//! Never: trusts a node for more than availability. Keys are combined here, proven against the pinned `PK_prf`, and used only with a
//! receipt that every contributing holder vouches for. Never: sends a check value or a key anywhere.
//! Source: threshold.md §1.3, §1.4, §1.6, §2.2, §2.3, §2.7; architecture.md §4.
//!
//! | module | what |
//! | --- | --- |
//! | [`pin`] | `{cluster_id, PK_prf}` out of the measured app-compose.json |
//! | [`url`] | addresses of nodes |
//! | [`nodes`] | nodes configured and learnt, health, order |
//! | `discovery` | other nodes of the cluster, learnt from its nodes |
//! | [`client`] | [`KmsClient`]: sessions, requests, failover |
//! | [`app_key`] | the identity's signature over an app's key |
//! | [`root_ca`] | the root CA's certificate, held against the pin |
//! | [`dstack`] | one question to dstack's listener of a node |
//! | [`release`] | what a release answers |
//! | [`route`] | direct, or through a proxy, out of an enclave over vsock |
//! | [`kcv`] | check values kept beside what the keys protect |
//! | [`trust`] | what nodes' evidence is judged by |

#![forbid(unsafe_code)]

pub mod app_key;
mod channel;
pub mod client;
mod discovery;
pub mod dstack;
pub mod error;
mod gather;
pub mod kcv;
pub mod metrics;
pub mod nodes;
pub mod pin;
mod race;
pub mod release;
pub mod root_ca;
pub mod route;
mod session;
pub mod trust;
pub mod url;

pub use client::{EvidenceOf, KmsClient, Settings};
pub use dstack_threshold::keys::{KeyCheckValue, TypedKey};
pub use error::{BadPartial, ClientError, NodeFault};
pub use kcv::{KcvError, KcvStore};
pub use nodes::{Nodes, Tally};
pub use pin::{CaPub, Pin, PinError};
pub use release::ReleasedKeys;
pub use root_ca::RootCertificate;
pub use route::{Route, RouteError};
pub use trust::{Trust, TrustError};
pub use url::{NodeUrl, UrlError};
