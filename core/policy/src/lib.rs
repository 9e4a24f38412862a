//! Identity + rules + log position → [`Grant`], or a [`dstack_protocol::Refusal`] that explains itself.
//!
//! Owns: the decision whether an identity may have a key, the operator quorum's rules, the rate limit. Never: verifies
//! evidence, reads a clock, keeps state of its own. Source: architecture.md §9, threshold.md §2.2.
#![forbid(unsafe_code)]

mod decide;
pub mod governance;
pub mod rate;

pub use decide::{Facts, Grant, Permit, Rules, check_tcb, decide, decide_env, judged_at_boot, not_revoked, still_allowed, tcb_policy};
