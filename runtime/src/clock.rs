//! Wall and monotonic time. Owns: the one call of `SystemTime::now` in the workspace.
//! Never: decides whether a clock may be trusted; that is judged against log time (threshold.md §2.6).

use std::fmt::Debug;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dstack_protocol::UnixMillis;

/// A source of time, passed to whatever needs one so that tests can choose it.
pub trait Clock: Send + Sync + Debug {
    /// Wall time. May jump in both directions; only ever used to refuse.
    fn now(&self) -> UnixMillis;

    /// Time since an arbitrary origin of this clock. Never goes back; for timeouts and measurements.
    fn monotonic(&self) -> Duration;
}

/// The clock of the machine.
#[derive(Debug)]
pub struct SystemClock {
    origin: Instant,
}

impl SystemClock {
    /// Starts the monotonic part at zero.
    pub fn new() -> Self {
        Self { origin: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "the exception that the lint's message names")]
    fn now(&self) -> UnixMillis {
        // A clock before 1970 counts as 1970: every freshness check then refuses.
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        UnixMillis(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
    }

    fn monotonic(&self) -> Duration {
        self.origin.elapsed()
    }
}

/// A clock that stands still until it is moved.
#[derive(Debug)]
pub struct TestClock {
    state: Mutex<TestTime>,
}

#[derive(Debug, Clone, Copy)]
struct TestTime {
    wall: UnixMillis,
    monotonic: Duration,
}

impl TestClock {
    /// Starts at the given wall time, monotonic zero.
    pub fn new(wall: UnixMillis) -> Self {
        Self { state: Mutex::new(TestTime { wall, monotonic: Duration::ZERO }) }
    }

    /// Moves both times forward.
    pub fn advance(&self, by: Duration) {
        let mut state = self.lock();
        let by_ms = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        state.wall = UnixMillis(state.wall.0.saturating_add(by_ms));
        state.monotonic = state.monotonic.saturating_add(by);
    }

    /// Sets the wall time alone, also backwards: a clock that jumps.
    pub fn jump_to(&self, wall: UnixMillis) {
        self.lock().wall = wall;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, TestTime> {
        // The guarded value is plain data: a holder that panicked left it whole.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Clock for TestClock {
    fn now(&self) -> UnixMillis {
        self.lock().wall
    }

    fn monotonic(&self) -> Duration {
        self.lock().monotonic
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_clock_is_past_2024_and_monotonic_moves() {
        let clock = SystemClock::new();
        assert!(clock.now().0 > 1_704_067_200_000);
        let before = clock.monotonic();
        std::thread::sleep(Duration::from_millis(2));
        assert!(clock.monotonic() > before);
    }

    #[test]
    fn a_jump_back_leaves_monotonic_time_alone() {
        let clock = TestClock::new(UnixMillis(10_000));
        clock.advance(Duration::from_millis(500));
        clock.jump_to(UnixMillis(1));
        assert_eq!(clock.now(), UnixMillis(1));
        assert_eq!(clock.monotonic(), Duration::from_millis(500));
    }
}
