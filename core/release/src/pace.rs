//! When a coordinator asks one holder more: after a time that nearly every answer stays under.
//!
//! Owns: the moving estimate of how long holders take from `go` to their partial. Never: reads a clock; whoever measures says what it took.
//! Source: ADR 0015; the estimate is that of a retransmission timer (RFC 6298 §2): mean plus four mean deviations.

use std::time::Duration;

/// Never less: below this a pause of a scheduler would cost an evaluation.
pub const HEDGE_AFTER_MIN: Duration = Duration::from_millis(50);
/// Never more, however slowly holders answer: what one silent holder costs a release at most.
pub const HEDGE_AFTER_MAX: Duration = Duration::from_millis(500);
/// Before the first answer was seen.
pub const HEDGE_AFTER_FIRST: Duration = Duration::from_millis(100);

const _: () = assert!(HEDGE_AFTER_MIN.as_millis() < HEDGE_AFTER_FIRST.as_millis());
const _: () = assert!(HEDGE_AFTER_FIRST.as_millis() < HEDGE_AFTER_MAX.as_millis());

/// See the module text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pace {
    seen: Option<Seen>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    mean: Duration,
    deviation: Duration,
}

impl Pace {
    /// One answer took this long. A longer time than the longest delay counts as that: a holder that is slow on purpose moves the
    /// estimate no further.
    pub fn answered(&mut self, took: Duration) {
        let took = took.min(HEDGE_AFTER_MAX);
        self.seen = Some(match self.seen {
            None => Seen { mean: took, deviation: took / 2 },
            Some(Seen { mean, deviation }) => Seen { mean: (mean * 7 + took) / 8, deviation: (deviation * 3 + took.abs_diff(mean)) / 4 },
        });
    }

    /// How long to wait for partials before another holder is asked.
    #[must_use]
    pub fn hedge_after(&self) -> Duration {
        let Some(Seen { mean, deviation }) = self.seen else { return HEDGE_AFTER_FIRST };
        (mean + deviation * 4).clamp(HEDGE_AFTER_MIN, HEDGE_AFTER_MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn after(times: impl IntoIterator<Item = u32>) -> Duration {
        let mut pace = Pace::default();
        times.into_iter().for_each(|ms| pace.answered(MS * ms));
        pace.hedge_after()
    }

    #[test]
    fn fast_holders_are_given_the_least_time_and_slow_ones_the_most() {
        assert_eq!(after([]), HEDGE_AFTER_FIRST);
        assert_eq!(after([2; 50]), HEDGE_AFTER_MIN);
        assert_eq!(after([9_000; 50]), HEDGE_AFTER_MAX);
    }

    #[test]
    fn a_loaded_cluster_is_given_more_time_than_nearly_every_answer_takes() {
        // 60 to 140 ms, evenly: a fixed delay of 100 ms would ask a third holder for half of the releases.
        let times: Vec<u32> = (0..400).map(|at| 60 + at * 37 % 81).collect();
        let delay = after(times.iter().copied());
        let late = times.iter().filter(|ms| MS * **ms > delay).count();
        assert!(late * 20 <= times.len(), "{late} of {} answers are later than {delay:?}", times.len());
        assert!(delay <= MS * 260, "{delay:?}");
    }

    #[test]
    fn it_forgets_a_bad_minute() {
        assert!(after([400; 20]) > MS * 380);
        assert_eq!(after([400; 20].into_iter().chain([2; 60])), HEDGE_AFTER_MIN);
    }

    proptest! {
        #[test]
        fn the_delay_stays_between_its_bounds(times in proptest::collection::vec(any::<u64>(), 0..50)) {
            let mut pace = Pace::default();
            for nanoseconds in times {
                pace.answered(Duration::from_nanos(nanoseconds));
                prop_assert!((HEDGE_AFTER_MIN..=HEDGE_AFTER_MAX).contains(&pace.hedge_after()));
            }
        }
    }
}
