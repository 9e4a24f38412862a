//! Mode E: whether the state's open env attempt names who asks.
//!
//! Owns: that rule. Never: names a combiner (`apply` does). Source: threshold.md §2.5.

use dstack_protocol::release::RelReq;
use dstack_protocol::state::State;
use dstack_protocol::{NodeIndex, Refusal, RefusalCode, env};

/// Checks that the app's open attempt names `coordinator`, and is the one that the request names.
///
/// # Errors
/// [`RefusalCode::EnvNotNamed`].
pub fn check(state: &State, request: &RelReq, coordinator: NodeIndex) -> Result<(), Refusal> {
    let refuse = |got: String| Err(Refusal::new(RefusalCode::EnvNotNamed, format!("an open attempt that names node {coordinator}"), got));
    let Some(row) = state.env_keys.get(&(request.generation, request.app_id)) else {
        return refuse("no attempt".to_owned());
    };
    if !row.is_open(state.log_time) {
        return refuse(format!("attempt {} is over", row.attempt));
    }
    if row.combiner != coordinator {
        return refuse(format!("attempt {} names node {}", row.attempt, row.combiner));
    }
    if env::evidence_hash(row.attempt_pos) != request.evidence_hash {
        return refuse(format!("attempt {} at {}, another was named", row.attempt, row.attempt_pos));
    }
    Ok(())
}
