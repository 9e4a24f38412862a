//! The state machine that joins grant, intent, partials and receipt; the only door a key leaves by.
//!
//! Owns: what a holder checks before it evaluates ([`clearance`]), how a coordinator drives one request
//! ([`coordination`]) and when it asks a holder more ([`pace`]), the session rule ([`session`]). Never: evaluates, waits, sends; those who step it do.
//! Source: threshold.md §2.2, §2.3; architecture.md §4.
#![forbid(unsafe_code)]

pub mod clearance;
pub mod coordination;
pub mod pace;
pub mod session;

pub use clearance::{Clearance, HolderView, clear};
pub use coordination::{Coordination, Effect, Input, Plan};
pub use pace::Pace;
pub use session::{SignedAsk, check_evidence_hash, check_session};
