//! A session: key, evidence over a recent beacon, connections under its certificate, the beacon for the next request.
//! Owns: when a session or a beacon is too old to begin with. Never: outlives its evidence; nodes refuse it after an hour of log time.
//! Source: threshold.md §2.2.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use dstack_protocol::UnixMillis;
use dstack_protocol::rpc::BeaconAnswer;
use dstack_ratls::CertifiedIdentity;
use std::sync::Arc;

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
    beacon: Mutex<Option<(BeaconAnswer, Instant)>>,
}

impl Session {
    pub(crate) fn new(identity: Arc<CertifiedIdentity>, channel: Channel, beacon: BeaconAnswer, fetched: Instant, now: UnixMillis) -> Self {
        Self { identity, channel, made_at: now, beacon: Mutex::new(Some((beacon, fetched))) }
    }

    /// Whether it may begin another request. A clock that jumped back ends it, too.
    pub(crate) fn is_usable(&self, now: UnixMillis) -> bool {
        now >= self.made_at && u128::from(now.since(self.made_at)) < SESSION_USE.as_millis()
    }

    /// The beacon for a request now, if it is young enough.
    pub(crate) fn beacon(&self) -> Option<BeaconAnswer> {
        let kept = *self.beacon.lock().unwrap_or_else(PoisonError::into_inner);
        kept.filter(|(_, fetched)| fetched.elapsed() < BEACON_USE).map(|(beacon, _)| beacon)
    }

    pub(crate) fn keep_beacon(&self, beacon: BeaconAnswer, fetched: Instant) {
        *self.beacon.lock().unwrap_or_else(PoisonError::into_inner) = Some((beacon, fetched));
    }

    pub(crate) fn forget_beacon(&self) {
        *self.beacon.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
