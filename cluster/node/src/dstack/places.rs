//! How many requests are read and answered at once. Owns: places, apart for callers with evidence and without; turns of one source. Never:
//! who may call, how often (`budget`).
//!
//! A body may be sent slowly. What one source has under way waits for its own turns, so that nobody holds all places with bodies that never
//! end; and strangers take no place of guests that have proved themselves. Source: KMS API reference §1 ("Body limit").

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dstack_actors::mailbox::Gate;
use dstack_protocol::Refusal;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::budget::network;

/// Requests of callers with evidence, and of those without: bounds what they make this node hold.
const ATTESTED_MAX: usize = 96;
const ANONYMOUS_MAX: usize = 96;
/// Requests of one source that are read at once; of callers without evidence until they are answered. Further ones wait.
const OF_SOURCE_MAX: usize = 32;
/// Sources remembered before those with nothing under way are forgotten.
const SOURCES_KEPT: usize = 1024;
/// A body is here within this time, or the request is over.
pub(super) const BODY_WITHIN: Duration = Duration::from_secs(20);

/// See the module text.
pub(super) struct Places {
    attested: Gate,
    anonymous: Gate,
    sources: Mutex<HashMap<IpAddr, Arc<Semaphore>>>,
}

impl Default for Places {
    fn default() -> Self {
        let (attested, anonymous) = (Gate::new("dstack", ATTESTED_MAX), Gate::new("dstack without evidence", ANONYMOUS_MAX));
        Self { attested, anonymous, sources: Mutex::default() }
    }
}

impl Places {
    /// Waits until this source has less under way; `None` never comes: nobody closes the semaphore.
    pub(super) async fn turn(&self, source: IpAddr) -> Option<OwnedSemaphorePermit> {
        let turns = self.turns(network(source));
        turns.acquire_owned().await.ok()
    }

    /// A place until it is dropped.
    ///
    /// # Errors
    /// `OVERLOADED`, with a retry hint.
    pub(super) fn enter(&self, is_attested: bool) -> Result<OwnedSemaphorePermit, Refusal> {
        if is_attested { self.attested.enter() } else { self.anonymous.enter() }
    }

    fn turns(&self, source: IpAddr) -> Arc<Semaphore> {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if sources.len() >= SOURCES_KEPT {
            // Whoever waits or is served holds another handle.
            sources.retain(|_, turns| Arc::strong_count(turns) > 1);
        }
        Arc::clone(sources.entry(source).or_insert_with(|| Arc::new(Semaphore::new(OF_SOURCE_MAX))))
    }
}

#[cfg(test)]
mod tests {
    use futures::poll;

    use super::*;

    fn source(number: u32) -> IpAddr {
        IpAddr::from((number + 0x0a00_0000).to_be_bytes())
    }

    #[tokio::test]
    async fn one_source_waits_for_itself_and_strangers_take_nothing_from_guests() {
        let places = Places::default();
        let mut held = Vec::new();
        for _ in 0..OF_SOURCE_MAX {
            held.push((places.turn(source(1)).await, places.enter(false).unwrap()));
        }
        let mut waiting = Box::pin(places.turn(source(1)));
        assert!(poll!(&mut waiting).is_pending());
        for _ in OF_SOURCE_MAX..ANONYMOUS_MAX {
            held.push((places.turn(source(2 + u32::try_from(held.len()).unwrap())).await, places.enter(false).unwrap()));
        }
        assert!(places.enter(false).is_err() && places.enter(true).is_ok());
        drop(held.remove(0));
        assert!(poll!(&mut waiting).is_ready() && places.enter(false).is_ok());
    }

    #[tokio::test]
    async fn sources_with_nothing_under_way_are_forgotten_and_the_others_keep_their_turns() {
        let places = Places::default();
        let mut held = Vec::new();
        for _ in 0..OF_SOURCE_MAX {
            held.push(places.turn(source(0)).await);
        }
        for number in 1..=u32::try_from(2 * SOURCES_KEPT).unwrap() {
            drop(places.turn(source(number)).await);
        }
        assert!(places.sources.lock().unwrap().len() <= SOURCES_KEPT);
        let mut waiting = Box::pin(places.turn(source(0)));
        assert!(poll!(&mut waiting).is_pending(), "it still waits for its own");
    }
}
