//! How often one source, one app, and all together may ask for what nodes have to sign. Owns: the buckets, in this node's memory. Never:
//! a clock; the log (what it limits is counted in `apply`). Source: threshold.md §5.1: rate limits are per source and in total.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use dstack_policy::rate;
use dstack_protocol::policy::Rate;
use dstack_protocol::{AppId, Refusal, RefusalCode, UnixMillis};

/// Claims of apps to their keys: of one address, of all addresses, of one app. An app makes one in its life.
const CLAIMS_PER_SOURCE: Rate = Rate { per_second: 5, burst: 50 };
const CLAIMS_IN_TOTAL: Rate = Rate { per_second: 50, burst: 500 };
const CLAIMS_OF_APP: Rate = Rate { per_second: 1, burst: 10 };
/// Keys remembered; beyond, those with full buckets are forgotten first.
const KEYS_MAX: usize = 10_000;

#[derive(Debug, Clone, Copy)]
struct Bucket {
    tokens_milli: u64,
    refilled: UnixMillis,
}

impl Bucket {
    fn full(rate: Rate, now: UnixMillis) -> Self {
        Self { tokens_milli: rate::full(rate), refilled: now }
    }

    /// `Err`: the wait, ms.
    fn take(&mut self, rate: Rate, now: UnixMillis) -> Result<(), u64> {
        self.tokens_milli = rate::take_one(self.tokens_milli, self.refilled, now, rate)?;
        self.refilled = now;
        Ok(())
    }
}

/// A bucket for each key.
#[derive(Debug)]
struct PerKey<K> {
    rate: Rate,
    buckets: HashMap<K, Bucket>,
}

impl<K: Hash + Eq> PerKey<K> {
    fn new(rate: Rate) -> Self {
        Self { rate, buckets: HashMap::new() }
    }

    /// `Err`: the wait, ms.
    fn take(&mut self, key: K, now: UnixMillis) -> Result<(), u64> {
        if self.buckets.len() >= KEYS_MAX {
            let rate = self.rate;
            let is_full = |bucket: &Bucket| rate::refilled(bucket.tokens_milli, bucket.refilled, now, rate) == rate::full(rate);
            self.buckets.retain(|_, bucket| !is_full(bucket));
        }
        if self.buckets.len() >= KEYS_MAX && !self.buckets.contains_key(&key) {
            return Err(1000);
        }
        self.buckets.entry(key).or_insert_with(|| Bucket::full(self.rate, now)).take(self.rate, now)
    }
}

fn refused(rate: Rate, who: &str, wait_ms: u64) -> Refusal {
    let wait_ms = u32::try_from(wait_ms).unwrap_or(u32::MAX);
    Refusal::new(RefusalCode::RateLimited, format!("{} calls a second {who}", rate.per_second), "more").retry_after(wait_ms)
}

/// Of strangers: by the address, and all together.
#[derive(Debug)]
pub(crate) struct Budget {
    in_total: Rate,
    buckets: Mutex<Sources>,
}

#[derive(Debug)]
struct Sources {
    total: Option<Bucket>,
    sources: PerKey<IpAddr>,
}

impl Budget {
    /// `per_source`: of one address; an IPv6 network of 64 bits counts as one.
    pub(crate) fn new(per_source: Rate, in_total: Rate) -> Self {
        Self { in_total, buckets: Mutex::new(Sources { total: None, sources: PerKey::new(per_source) }) }
    }

    /// For apps' claims to their keys.
    pub(crate) fn of_claims() -> Self {
        Self::new(CLAIMS_PER_SOURCE, CLAIMS_IN_TOTAL)
    }

    /// Takes one call of `source`.
    pub(crate) fn take(&self, source: IpAddr, now: UnixMillis) -> Result<(), Refusal> {
        let mut buckets = lock(&self.buckets);
        // The source first: who asks too much takes nothing from the others.
        let own = buckets.sources.rate;
        buckets.sources.take(network(source), now).map_err(|wait_ms| refused(own, "of one source", wait_ms))?;
        let total = buckets.total.get_or_insert_with(|| Bucket::full(self.in_total, now));
        total.take(self.in_total, now).map_err(|wait_ms| refused(self.in_total, "of all sources", wait_ms))
    }
}

/// Of apps, each for itself. To be taken from only after the app has proved itself: nobody spends another's.
#[derive(Debug)]
pub(crate) struct AppBudget(Mutex<PerKey<AppId>>);

impl AppBudget {
    fn new(rate: Rate) -> Self {
        Self(Mutex::new(PerKey::new(rate)))
    }

    /// For apps' claims to their keys.
    pub(crate) fn of_claims() -> Self {
        Self::new(CLAIMS_OF_APP)
    }

    /// Takes one call of `app_id`.
    pub(crate) fn take(&self, app_id: AppId, now: UnixMillis) -> Result<(), Refusal> {
        let mut apps = lock(&self.0);
        let rate = apps.rate;
        apps.take(app_id, now).map_err(|wait_ms| refused(rate, "of one app", wait_ms))
    }
}

/// What counts as one source.
pub(crate) fn network(source: IpAddr) -> IpAddr {
    match source {
        IpAddr::V6(address) if address.to_ipv4_mapped().is_none() => IpAddr::V6((u128::from(address) >> 64 << 64).into()),
        other => other.to_canonical(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PER_SOURCE: Rate = Rate { per_second: 5, burst: 50 };
    const IN_TOTAL: Rate = Rate { per_second: 200, burst: 1000 };
    const AT: UnixMillis = UnixMillis(1_000_000);

    #[test]
    fn one_source_spends_its_own_and_all_spend_the_total() {
        let budget = Budget::new(PER_SOURCE, IN_TOTAL);
        let source = |number: u32| IpAddr::from((number + 0x0a00_0000).to_be_bytes());
        for _ in 0..PER_SOURCE.burst {
            budget.take(source(1), AT).unwrap();
        }
        let refusal = budget.take(source(1), AT).unwrap_err();
        assert_eq!((refusal.code, refusal.retry_after_ms), (RefusalCode::RateLimited, 200));
        assert!(budget.take(source(2), AT).is_ok());
        assert!(budget.take(source(1), AT.plus_ms(200)).is_ok());
        let mut served = 0;
        for number in 10..2000 {
            served += usize::from(budget.take(source(number), AT).is_ok());
        }
        assert!((900..1000).contains(&served), "{served}");
    }

    #[test]
    fn an_app_spends_its_own_and_a_full_table_refuses_only_who_is_not_in_it() {
        let budget = AppBudget::new(Rate { per_second: 1, burst: 2 });
        let app = |number: u32| {
            let mut id = [0; 20];
            id[..4].copy_from_slice(&number.to_be_bytes());
            AppId(id)
        };
        for _ in 0..2 {
            budget.take(app(0), AT).unwrap();
        }
        let refusal = budget.take(app(0), AT).unwrap_err();
        assert_eq!((refusal.code, refusal.retry_after_ms), (RefusalCode::RateLimited, 1000));
        for number in 1..u32::try_from(KEYS_MAX).unwrap() {
            budget.take(app(number), AT).unwrap();
        }
        assert_eq!(budget.take(app(77_777), AT).unwrap_err().code, RefusalCode::RateLimited);
        assert!(budget.take(app(5), AT).is_ok(), "known, and something is left");
        // Who has not asked for a while makes room.
        assert!(budget.take(app(77_777), AT.plus_ms(1000)).is_ok());
        assert!(lock(&budget.0).buckets.len() < 10);
    }

    #[test]
    fn a_network_of_64_bits_is_one_source() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(network(address("2001:db8::1")), network(address("2001:db8::ffff:1")));
        assert_ne!(network(address("2001:db8::1")), network(address("2001:db8:0:1::1")));
        assert_eq!(network(address("::ffff:10.0.0.1")), address("10.0.0.1"));
    }
}
