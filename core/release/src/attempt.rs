//! Mode E: whether the state's open env attempt names who asks.
//!
//! Owns: that rule. Never: names a combiner (`apply` does). Source: threshold.md §2.5.

use dstack_protocol::release::RelReq;
use dstack_protocol::state::State;
use dstack_protocol::{NodeIndex, Refusal, RefusalCode};

/// Checks that an open attempt names `coordinator` for this request.
///
/// # Errors
/// [`RefusalCode::EnvAttempt`].
pub fn check(_state: &State, _request: &RelReq, coordinator: NodeIndex) -> Result<(), Refusal> {
    Err(Refusal::new(RefusalCode::EnvAttempt, "an open env attempt", format!("none for node {coordinator}")))
}
