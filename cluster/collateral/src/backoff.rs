//! When to try again. Owns: the exponent and its bounds. Never: sleeps, draws randomness (jitter comes in).

use std::time::Duration;

/// Doubling pauses with jitter, reset by a success.
#[derive(Debug, Clone)]
pub struct Backoff {
    least: Duration,
    most: Duration,
    failures: u32,
}

impl Backoff {
    /// Pauses from `least` to `most`.
    #[must_use]
    pub const fn new(least: Duration, most: Duration) -> Self {
        Self { least, most, failures: 0 }
    }

    /// A success: the next failure pauses for the least time again.
    pub const fn reset(&mut self) {
        self.failures = 0;
    }

    /// The pause after one more failure: between half of the exponential time and all of it, by `jitter` (any value).
    #[must_use]
    pub fn next(&mut self, jitter: u32) -> Duration {
        let doubled = self.least.saturating_mul(1_u32.checked_shl(self.failures.min(31)).unwrap_or(u32::MAX)).min(self.most);
        self.failures = self.failures.saturating_add(1);
        let half = doubled / 2;
        half.saturating_add(half.mul_f64(f64::from(jitter) / f64::from(u32::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_within_bounds_and_start_anew_after_a_success() {
        let s = Duration::from_secs;
        let mut backoff = Backoff::new(s(2), s(60));
        let pauses: Vec<Duration> = (0..8).map(|_| backoff.next(u32::MAX)).collect();
        assert_eq!(pauses, [2, 4, 8, 16, 32, 60, 60, 60].map(s));
        assert_eq!(backoff.next(0), s(30), "no jitter: half");
        (0..100).for_each(|_| assert!(backoff.next(u32::MAX / 3) <= s(60)));
        backoff.reset();
        assert_eq!(backoff.next(u32::MAX), s(2));
    }
}
