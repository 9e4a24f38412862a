//! The audit log: Merkle tree, proofs, receipts, signed heads, and the offline judge of a whole log.
//!
//! Owns: how records become leaves, how a leaf is shown to be in a tree, how one tree is shown to extend another, what makes a head
//! certificate valid and what a fork is. Never: reads a file, a clock or a socket; decides policy; knows what a body means beyond its hash.
//! Source: threshold.md §2.6 and §2.7; RFC 6962 §2.1; RFC 9162 §2.1.3.2 and §2.1.4.2.
//!
//! ```text
//! record ─leaf_hash→ leaf ─Frontier→ log_root ─HEAD→ signatures ─certificate→ SignerSet::certify → CertifiedHead ─Fork::between→ FORK
//!                      └─Nodes→ inclusion_proof ─Receipt→ verify_receipt → CommittedIntent ─agrees_with→ heads of the holders' partials
//! ```
#![forbid(unsafe_code)]

pub mod error;
pub mod fork;
pub mod frontier;
pub mod log;
pub mod members;
pub mod nodes;
pub mod proof;
pub mod receipt;
pub mod signers;
pub mod tree;

pub use error::AuditError;
pub use fork::Fork;
pub use frontier::{Frontier, RecentNodes};
pub use log::{LogReport, LogVerifier, verify_log};
pub use members::SignerHistory;
pub use nodes::{LeafNodes, MemoryTree, Nodes};
pub use proof::{consistency_proof, inclusion_proof, root_at, verify_consistency, verify_inclusion};
pub use receipt::{CommittedIntent, VouchedHead, make_receipt, verify_receipt};
pub use signers::{CertifiedHead, HeadTally, HeadVote, SignerSet};
pub use tree::{Hash, empty_root, leaf_hash, node_hash};
