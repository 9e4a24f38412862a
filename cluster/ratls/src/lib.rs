//! Rustls with evidence in certificates; peer verification; HTTP edges.
//!
//! Owns: certificates that carry evidence, the handshakes that verify it, HELLO between nodes, listeners that survive
//! floods, clients. Never: decides what a verified peer may do, reads the clock, holds a share.
//! Source: threshold.md §2.2 (session certificates), architecture.md §2 (HELLO), dependencies.md §3.5, §3.6.
//!
//! - [`certificate`], [`key`], [`source`]: our own side: key, evidence, rotation.
//! - [`peer`], [`judge`], [`attest_judge`]: the other side: what it showed and who says that it holds.
//! - [`hello`]: which seat and node key a node connection speaks for.
//! - [`server`], [`plain`], [`limits`]: listeners; [`dstack_server`]: that of dstack's KMS protocol.
//! - [`peer_client`], [`client`]: connections to nodes, as a node and as a client; [`probe`]: a look at a server's certificate.
//! - [`prpc`], [`prpc_client`]: dstack's RPC over HTTP: forms, limits, statuses; a guest's side of it over TLS.

#![forbid(unsafe_code)]

mod accepting;
mod admission;
mod any_issuer;
pub mod attest_judge;
pub mod certificate;
pub mod client;
mod dial;
pub mod dstack_server;
pub mod error;
#[doc(hidden)]
pub mod fuzzing;
pub mod hello;
mod http;
pub mod judge;
pub mod key;
pub mod limits;
pub mod metrics;
pub mod peer;
pub mod peer_client;
pub mod plain;
mod pool;
pub mod probe;
pub mod prpc;
pub mod prpc_client;
pub mod server;
pub mod source;
mod tls;
mod verdicts;
mod verifier;

use std::sync::Arc;

use dstack_protocol::UnixMillis;

pub use any_issuer::ShownEvidence;
pub use attest_judge::AttestJudge;
pub use certificate::CertifiedIdentity;
pub use error::{PeerError, RatlsError};
pub use hello::{HelloIdentity, HelloSigner, PeerHello};
pub use judge::{EvidenceJudge, JudgeError};
pub use limits::Limits;
pub use peer::{Binding, PeerCertificate, PeerRole};
pub use server::{ClientPeer, NodePeer, Server};
pub use source::CertificateSource;

/// Where the time comes from. Binaries pass their clock's reading, tests a fixed one.
pub type Now = Arc<dyn Fn() -> UnixMillis + Send + Sync>;

/// Object identifier of the extension that carries evidence; its content is a DER OCTET STRING around the versioned
/// attestation (attestation reference §1).
pub const EVIDENCE_OID: &[u64] = &[1, 3, 6, 1, 4, 1, 62397, 1, 8];
/// Protocol of node connections: HELLO, then HTTP/2.
pub const ALPN_NODE: &[u8] = b"dkms-node/1";
/// Common name that selects the session binding (threshold.md §2.2).
pub const SESSION_COMMON_NAME: &str = "DKMS-V1-SESSION";
/// Largest certificate accepted or made, bytes. A TLS handshake message holds 64 KiB, so this also bounds evidence.
pub const CERTIFICATE_BYTES_MAX: usize = 56 * 1024;
