//! What a caller learns when an actor does not take a message.
//!
//! Owns: turning mailbox errors into refusals. Source: style.md §6: a caller distinguishes full, gone, refused.

use std::sync::Arc;

use actix::MailboxError;
use actix::dev::SendError;
use dstack_protocol::{Refusal, RefusalCode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Retry hint of a full mailbox, ms.
pub const FULL_RETRY_MS: u32 = 100;

/// The refusal of a full mailbox.
#[must_use]
pub fn full(actor: &'static str) -> Refusal {
    crate::metrics::overload(actor);
    Refusal::new(RefusalCode::Overloaded, "room in a mailbox", format!("{actor} is full")).retry_after(FULL_RETRY_MS)
}

/// The refusal of an actor that is gone; its supervisor is bringing it back.
#[must_use]
pub fn gone(actor: &'static str) -> Refusal {
    Refusal::new(RefusalCode::Internal, "a running actor", format!("{actor} is not running")).retry_after(FULL_RETRY_MS)
}

/// What [`actix::Addr::try_send`] said.
#[must_use]
pub fn of_send<M>(actor: &'static str, error: &SendError<M>) -> Refusal {
    match error {
        SendError::Full(_) => full(actor),
        SendError::Closed(_) => gone(actor),
    }
}

/// What [`actix::Addr::send`] said.
#[must_use]
pub fn of_mailbox(actor: &'static str, error: MailboxError) -> Refusal {
    match error {
        MailboxError::Closed => gone(actor),
        MailboxError::Timeout => full(actor),
    }
}

/// Bounds what waits at one actor: actix's sync arbiters queue without a bound of their own.
#[derive(Debug, Clone)]
pub struct Gate {
    actor: &'static str,
    places: Arc<Semaphore>,
}

impl Gate {
    /// A gate with `capacity` places.
    #[must_use]
    pub fn new(actor: &'static str, capacity: usize) -> Self {
        Self { actor, places: Arc::new(Semaphore::new(capacity)) }
    }

    /// Takes a place, or refuses at once.
    ///
    /// # Errors
    /// [`RefusalCode::Overloaded`] with a retry hint.
    pub fn enter(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        Arc::clone(&self.places).try_acquire_owned().map_err(|_| full(self.actor))
    }

    /// Places that are free.
    #[must_use]
    pub fn free(&self) -> usize {
        self.places.available_permits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_gate_refuses_with_a_hint_and_opens_again() {
        let gate = Gate::new("verifier", 1);
        let place = gate.enter().unwrap();
        let refusal = gate.enter().unwrap_err();
        assert_eq!((refusal.code, refusal.retry_after_ms), (RefusalCode::Overloaded, FULL_RETRY_MS));
        drop(place);
        assert!(gate.enter().is_ok());
    }
}
