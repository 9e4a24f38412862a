//! How far away a peer is: the smoothed time of its answers, and the time that the oldest unanswered request waits by now.
//!
//! Owns: that bookkeeping. Never: reads a clock, decides. A peer that falls silent is far from the moment on in which it is late, not only
//! once its requests have timed out: whoever orders peers by this turns to others after one hedge.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use dstack_protocol::Seat;

/// Smoothing of measured answers: 1/8 of the newest.
const SMOOTHING: u32 = 8;

/// See the module text.
#[derive(Debug, Default)]
pub(crate) struct Latencies {
    by_seat: BTreeMap<Seat, Peer>,
    next: u64,
}

#[derive(Debug, Default)]
struct Peer {
    smoothed: Option<Duration>,
    /// Requests on their way, oldest first.
    waiting: BTreeSet<(Instant, u64)>,
}

/// A request on its way; given back with its end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sent {
    seat: Seat,
    at: Instant,
    number: u64,
}

impl Latencies {
    /// A request leaves.
    pub(crate) fn sent(&mut self, seat: Seat, at: Instant) -> Sent {
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        self.by_seat.entry(seat).or_default().waiting.insert((at, number));
        Sent { seat, at, number }
    }

    /// Its answer is there, or will not come.
    pub(crate) fn ended(&mut self, sent: Sent, now: Instant, answered: bool) {
        let peer = self.by_seat.entry(sent.seat).or_default();
        peer.waiting.remove(&(sent.at, sent.number));
        let took = now.saturating_duration_since(sent.at);
        peer.smoothed = match (answered, peer.smoothed) {
            (true, Some(old)) => Some((old * (SMOOTHING - 1) + took) / SMOOTHING),
            (true, None) => Some(took),
            (false, _) => None,
        };
    }

    /// How far away that peer is; `None` when it was not reached lately.
    pub(crate) fn of(&self, seat: Seat, now: Instant) -> Option<Duration> {
        let peer = self.by_seat.get(&seat)?;
        let waited = peer.waiting.first().map(|(at, _)| now.saturating_duration_since(*at));
        peer.smoothed.map(|smoothed| smoothed.max(waited.unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const PEER: Seat = Seat(2);

    #[test]
    fn answers_are_smoothed_and_a_failure_forgets_them() {
        let (mut latencies, start) = (Latencies::default(), Instant::now());
        assert_eq!(latencies.of(PEER, start), None);
        for (took, expected) in [(8, 8), (16, 9), (1, 8)] {
            let sent = latencies.sent(PEER, start);
            latencies.ended(sent, start + MS * took, true);
            assert_eq!(latencies.of(PEER, start + MS * took), Some(MS * expected));
        }
        let sent = latencies.sent(PEER, start);
        latencies.ended(sent, start + MS, false);
        assert_eq!(latencies.of(PEER, start), None);
    }

    #[test]
    fn a_peer_is_as_far_as_its_oldest_request_waits() {
        let (mut latencies, start) = (Latencies::default(), Instant::now());
        let sent = latencies.sent(PEER, start);
        latencies.ended(sent, start + MS, true);
        let (first, second) = (latencies.sent(PEER, start), latencies.sent(PEER, start + MS * 40));
        assert_eq!(latencies.of(PEER, start + MS / 2), Some(MS), "nothing is late yet");
        assert_eq!(latencies.of(PEER, start + MS * 90), Some(MS * 90));
        latencies.ended(second, start + MS * 41, true);
        assert_eq!(latencies.of(PEER, start + MS * 90), Some(MS * 90), "a younger one was answered");
        latencies.ended(first, start + MS * 91, false);
        assert_eq!(latencies.of(PEER, start + MS * 91), None);
    }
}
