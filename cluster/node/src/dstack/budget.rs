//! How often one source, and all together, may ask for what anybody may ask for and nodes have to sign. Owns: the buckets. Never: a
//! clock. Source: threshold.md §5.1: rate limits are per source and in total.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use dstack_policy::rate;
use dstack_protocol::policy::Rate;
use dstack_protocol::{Refusal, RefusalCode, UnixMillis};

/// Of one address; an IPv6 network of 64 bits counts as one.
const PER_SOURCE: Rate = Rate { per_second: 5, burst: 50 };
/// Of all together.
const IN_TOTAL: Rate = Rate { per_second: 200, burst: 1000 };
/// Sources remembered; beyond, those with full buckets are forgotten first.
const SOURCES_MAX: usize = 10_000;

#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens_milli: u64,
    refilled: UnixMillis,
}

impl Bucket {
    fn take(&mut self, rate: Rate, now: UnixMillis) -> Result<(), u64> {
        self.tokens_milli = rate::take_one(self.tokens_milli, self.refilled, now, rate)?;
        self.refilled = now;
        Ok(())
    }
}

/// See the module text.
#[derive(Debug, Default)]
pub(super) struct Budget(Mutex<Buckets>);

#[derive(Debug, Default)]
struct Buckets {
    total: Option<Bucket>,
    sources: HashMap<IpAddr, Bucket>,
}

impl Budget {
    /// Takes one call of `source`.
    pub(super) fn take(&self, source: IpAddr, now: UnixMillis) -> Result<(), Refusal> {
        let full = |rate| Bucket { tokens_milli: rate::full(rate), refilled: now };
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.sources.len() >= SOURCES_MAX {
            let is_full = |bucket: &Bucket| rate::refilled(bucket.tokens_milli, bucket.refilled, now, PER_SOURCE) == rate::full(PER_SOURCE);
            buckets.sources.retain(|_, bucket| !is_full(bucket));
        }
        let refused = |who: &str, rate: Rate, wait_ms: u64| {
            let wait_ms = u32::try_from(wait_ms).unwrap_or(u32::MAX);
            Refusal::new(RefusalCode::RateLimited, format!("{} calls a second {who}", rate.per_second), "more").retry_after(wait_ms)
        };
        if buckets.sources.len() >= SOURCES_MAX && !buckets.sources.contains_key(&network(source)) {
            return Err(refused("of all sources", IN_TOTAL, 1000));
        }
        // The source first: who asks too much takes nothing from the others.
        let own = buckets.sources.entry(network(source)).or_insert_with(|| full(PER_SOURCE));
        own.take(PER_SOURCE, now).map_err(|wait_ms| refused("of one source", PER_SOURCE, wait_ms))?;
        let total = buckets.total.get_or_insert_with(|| full(IN_TOTAL));
        total.take(IN_TOTAL, now).map_err(|wait_ms| refused("of all sources", IN_TOTAL, wait_ms))
    }
}

fn network(source: IpAddr) -> IpAddr {
    match source {
        IpAddr::V6(address) if address.to_ipv4_mapped().is_none() => IpAddr::V6((u128::from(address) >> 64 << 64).into()),
        other => other.to_canonical(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_spends_its_own_and_all_spend_the_total() {
        let budget = Budget::default();
        let source = |number: u32| IpAddr::from((number + 0x0a00_0000).to_be_bytes());
        let at = UnixMillis(1_000_000);
        for _ in 0..PER_SOURCE.burst {
            budget.take(source(1), at).unwrap();
        }
        let refusal = budget.take(source(1), at).unwrap_err();
        assert_eq!((refusal.code, refusal.retry_after_ms), (RefusalCode::RateLimited, 200));
        assert!(budget.take(source(2), at).is_ok());
        assert!(budget.take(source(1), at.plus_ms(200)).is_ok());
        let mut served = 0;
        for number in 10..2000 {
            served += usize::from(budget.take(source(number), at).is_ok());
        }
        assert!((900..1000).contains(&served), "{served}");
    }

    #[test]
    fn a_network_of_64_bits_is_one_source() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(network(address("2001:db8::1")), network(address("2001:db8::ffff:1")));
        assert_ne!(network(address("2001:db8::1")), network(address("2001:db8:0:1::1")));
        assert_eq!(network(address("::ffff:10.0.0.1")), address("10.0.0.1"));
    }
}
