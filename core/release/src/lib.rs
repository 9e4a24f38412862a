//! The state machine that joins grant, intent, partials and receipt; the only door a key leaves by.
//!
//! Owns: what a holder checks before it evaluates ([`clearance`]), who may ask ([`asker`]), what the evidence must be bound to
//! ([`session`] in mode C, [`legacy`] in mode L), how a coordinator drives one request ([`coordination`]) and when it asks a holder more
//! ([`pace`]). Never: evaluates, waits, sends; those who step it do.
//! Source: threshold.md §2.2 to §2.5; architecture.md §4.
#![forbid(unsafe_code)]

pub mod asker;
pub mod attempt;
pub mod claim;
pub mod clearance;
pub mod coordination;
pub mod legacy;
pub mod pace;
pub mod session;

pub use asker::AttributedAsk;
pub use clearance::{Clearance, HolderView, clear};
pub use coordination::{Coordination, Effect, Input, Plan};
pub use pace::Pace;
pub use session::{check_evidence_hash, check_session};
