//! Rate limit of an app, counted over committed intents in log time, so that every node counts alike.
//!
//! Owns: the token arithmetic. Never: a clock; log time moves only by beacons, so the bucket is refilled by its advance.
//! Source: threshold.md §2.4 (tokens refill by the advance of log time), issue "policy".

use dstack_protocol::UnixMillis;
use dstack_protocol::policy::Rate;

const TOKEN: u64 = 1000;

/// A full bucket, in thousandths of a token.
#[must_use]
pub fn full(rate: Rate) -> u64 {
    u64::from(rate.burst) * TOKEN
}

/// What the bucket holds at `now`, in thousandths of a token.
#[must_use]
pub fn refilled(tokens_milli: u64, refilled: UnixMillis, now: UnixMillis, rate: Rate) -> u64 {
    // per_second tokens per second are per_second thousandths per millisecond.
    let gained = now.since(refilled).saturating_mul(u64::from(rate.per_second));
    tokens_milli.saturating_add(gained).min(full(rate))
}

/// Takes one token after refilling for the log time passed since `refilled`.
///
/// Returns the tokens left, in thousandths. `Err` is the wait in ms of log time until one token is there.
///
/// # Errors
/// The bucket is empty; nothing was taken.
pub fn take_one(tokens_milli: u64, refilled: UnixMillis, now: UnixMillis, rate: Rate) -> Result<u64, u64> {
    take(1, tokens_milli, refilled, now, rate)
}

/// The same with `count` tokens at once.
///
/// # Errors
/// As [`take_one`].
pub fn take(count: u32, tokens_milli: u64, refilled: UnixMillis, now: UnixMillis, rate: Rate) -> Result<u64, u64> {
    let (have, need) = (self::refilled(tokens_milli, refilled, now, rate), u64::from(count).saturating_mul(TOKEN));
    match have.checked_sub(need) {
        Some(left) => Ok(left),
        None => Err(need.saturating_sub(have).div_ceil(u64::from(rate.per_second.max(1)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate { per_second: 2, burst: 3 };

    #[test]
    fn burst_is_spent_then_refilled_by_log_time() {
        let start = UnixMillis(1_000);
        let mut tokens = full(RATE);
        for _ in 0..3 {
            tokens = take_one(tokens, start, start, RATE).unwrap();
        }
        assert_eq!(take_one(tokens, start, start, RATE), Err(500));
        assert_eq!(take_one(tokens, start, UnixMillis(1_500), RATE), Ok(0));
        assert_eq!(take(2, tokens, start, UnixMillis(1_500), RATE), Err(500), "two cost twice");
        assert_eq!(take(2, tokens, start, UnixMillis(2_000), RATE), Ok(0));
    }

    #[test]
    fn never_holds_more_than_the_burst_and_ignores_time_running_back() {
        assert_eq!(take_one(0, UnixMillis(0), UnixMillis(u64::MAX), RATE), Ok(2_000));
        assert_eq!(take_one(0, UnixMillis(9), UnixMillis(3), RATE), Err(500));
    }
}
