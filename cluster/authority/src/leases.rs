//! Yeses that are still believed. Owns: their bound and their end. Never: keeps a no for longer than a moment.

use std::collections::{HashMap, VecDeque};

use dstack_protocol::UnixMillis;

use crate::Allowed;

/// Yeses kept at once; the oldest goes first.
const LEASES_MAX: usize = 8192;

/// Yeses by the digest of the question.
#[derive(Default)]
pub(crate) struct Leases {
    by_question: HashMap<[u8; 32], Allowed>,
    oldest_first: VecDeque<[u8; 32]>,
}

impl Leases {
    /// A yes in its lease. A clock that was set back ends leases too: one that ends too far in the future is not believed.
    pub(crate) fn get(&self, question: &[u8; 32], now: UnixMillis, lease_ms: u64) -> Option<Allowed> {
        let allowed = self.by_question.get(question)?;
        (now < allowed.until && allowed.until.0 <= now.0.saturating_add(lease_ms)).then(|| allowed.clone())
    }

    pub(crate) fn put(&mut self, question: [u8; 32], allowed: Allowed) {
        if self.by_question.insert(question, allowed).is_none() {
            self.oldest_first.push_back(question);
        }
        while self.oldest_first.len() > LEASES_MAX {
            if let Some(oldest) = self.oldest_first.pop_front() {
                self.by_question.remove(&oldest);
            }
        }
    }

    /// A no ends what was believed before.
    pub(crate) fn end(&mut self, question: &[u8; 32]) {
        self.by_question.remove(question);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(until: u64) -> Allowed {
        Allowed { gateway_app_id: String::new(), until: UnixMillis(until) }
    }

    #[test]
    fn a_lease_ends_and_the_store_is_bounded() {
        let mut leases = Leases::default();
        leases.put([1; 32], allowed(100));
        assert!(leases.get(&[1; 32], UnixMillis(99), 100).is_some());
        assert!(leases.get(&[1; 32], UnixMillis(100), 100).is_none(), "over");
        assert!(leases.get(&[1; 32], UnixMillis(0), 50).is_none(), "the clock was set back");
        leases.end(&[1; 32]);
        assert!(leases.get(&[1; 32], UnixMillis(99), 100).is_none());
        for number in 0..=LEASES_MAX as u64 {
            let mut question = [0; 32];
            question[..8].copy_from_slice(&number.to_be_bytes());
            leases.put(question, allowed(100));
        }
        assert!(leases.by_question.len() <= LEASES_MAX + 1 && leases.oldest_first.len() <= LEASES_MAX);
    }
}
