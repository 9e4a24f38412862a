//! Distributed key generation over a broadcast channel, generic over the group.
//!
//! Owns: the public ceremony that every node applies in log order ([`Ceremony`]) and the private side of one node
//! ([`Participant`]). Both are deterministic: randomness is one 64-byte seed a participant, time is an argument.
//! Never: verifies signatures or evidence of messages (the caller does, before [`Ceremony::apply`]), persists anything, or excludes
//! anybody: at genesis a verdict ends the attempt and names the culprit. Source: threshold.md §3.
//!
//! ```text
//!   Commit (h_i) from all ─▶ Deal from all ─▶ Ready from all ─▶ complete: `Switched` is valid
//!                               │                 └ Complain ─▶ verdict ─▶ ended, culprit named
//!                               └ bad deal ─▶ ended, dealer named
//! ```

mod ceremony;
mod complaint;
mod deal;
mod encryption;
mod instance;
mod participant;
mod root;
mod sharing;
#[cfg(test)]
pub(crate) mod tests;

pub use ceremony::{Ceremony, CeremonyError, End, Guilt, Progress, Stage};
pub use complaint::{Verdict, judge};
pub use deal::{CheckedDeal, DealFault, DealPackage, check_deal, commit_hash};
pub use encryption::{EncryptionKey, SubshareFault};
pub use instance::{Instance, InstanceError};
pub use participant::{Checked, Outcome, Participant, ParticipantError};
pub use root::{PublicSharing, RootParticipant, RootRun};
pub use sharing::{ReadyFault, Sharing};
