//! Mode L: what takes the place of the session where the node that terminates the guest's TLS combines.
//!
//! Owns: dstack's own binding, the rule on the evidence's first sighting. Never: reads a clock; sightings are log time.
//! Source: threshold.md §2.4. That an NSM document is at most an hour old is part of verifying it (crate `attest`).

use dstack_attest::VerifiedIdentity;
use dstack_protocol::limits::SIGHTING_MS_MAX;
use dstack_protocol::release::{Ask, RelReq};
use dstack_protocol::state::State;
use dstack_protocol::{Refusal, RefusalCode, UnixMillis, binding};

/// When the log first saw the evidence of a request in mode L, in whatever encoding (ADR 0033).
#[must_use]
pub fn first_sighting(state: &State, request: &RelReq, identity: &VerifiedIdentity) -> Option<UnixMillis> {
    state.sightings.get(&request.app_id)?.get(&identity.statement_id()).copied()
}

/// Checks that the verified report data commits to the guest's TLS key alone, as dstack's does.
///
/// # Errors
/// [`RefusalCode::BindingMismatch`].
pub fn check_binding(ask: &Ask, report_data: &[u8; 64]) -> Result<(), Refusal> {
    let expected = binding::ratls_certificate(&ask.spki);
    if expected == *report_data {
        return Ok(());
    }
    Err(Refusal::new(RefusalCode::BindingMismatch, hex(&expected), hex(report_data)))
}

/// Checks that the log first saw the evidence at most 24 h before `at`.
///
/// # Errors
/// [`RefusalCode::EvidenceSeen`].
pub fn check_sighting(seen: UnixMillis, at: UnixMillis) -> Result<(), Refusal> {
    let age_ms = at.since(seen);
    if age_ms <= SIGHTING_MS_MAX {
        return Ok(());
    }
    Err(Refusal::new(RefusalCode::EvidenceSeen, format!("at most {SIGHTING_MS_MAX} ms after its first sighting"), format!("{age_ms} ms")))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
