//! A session: key, evidence over a recent beacon, connections under its certificate, the beacon for the next request.
//! Owns: when a session or a beacon is too old to begin with. Never: outlives its evidence; nodes refuse it after an hour of log time.
//! Source: threshold.md §2.2.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dstack_protocol::UnixMillis;
use dstack_protocol::rpc::BeaconAnswer;
use dstack_ratls::CertifiedIdentity;

use crate::channel::Channel;

/// A session is used this long, of the 3600 s that nodes grant by their log time.
pub(crate) const SESSION_USE: Duration = Duration::from_secs(50 * 60);
/// Validity of a session's certificate.
pub(crate) const SESSION_LIFETIME: Duration = Duration::from_secs(3600);
/// A beacon is used this long after it was fetched. It may be 30 s old then, and more where a node lags; nodes take 120 s.
const BEACON_USE: Duration = Duration::from_secs(45);

/// See the module text.
pub(crate) struct Session {
    pub(crate) identity: Arc<CertifiedIdentity>,
    pub(crate) channel: Channel,
    made_at: UnixMillis,
    beacon: Mutex<Option<KeptBeacon>>,
}

/// A beacon, when and from which node.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeptBeacon {
    pub(crate) beacon: BeaconAnswer,
    pub(crate) fetched: Instant,
    pub(crate) from: usize,
}

impl Session {
    pub(crate) fn new(identity: Arc<CertifiedIdentity>, channel: Channel, beacon: KeptBeacon, now: UnixMillis) -> Self {
        Self { identity, channel, made_at: now, beacon: Mutex::new(Some(beacon)) }
    }

    /// Whether it may begin another request. A clock that jumped back ends it, too.
    pub(crate) fn is_usable(&self, now: UnixMillis) -> bool {
        now >= self.made_at && u128::from(now.since(self.made_at)) < SESSION_USE.as_millis()
    }

    /// The beacon for a request now, if it is young enough.
    pub(crate) fn beacon(&self) -> Option<BeaconAnswer> {
        let kept = *self.kept();
        kept.filter(|kept| kept.fetched.elapsed() < BEACON_USE).map(|kept| kept.beacon)
    }

    pub(crate) fn keep_beacon(&self, beacon: KeptBeacon) {
        *self.kept() = Some(beacon);
    }

    /// Uses another one from now on; answers which node gave it.
    pub(crate) fn forget_beacon(&self) -> Option<usize> {
        self.kept().take().map(|kept| kept.from)
    }

    fn kept(&self) -> MutexGuard<'_, Option<KeptBeacon>> {
        // Plain data: a holder that panicked left it whole.
        self.beacon.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
