//! Dated signatures of env keys, renewed before somebody has to wait for one.
//!
//! Owns: which apps were asked for lately at this node, when their signature is renewed, how much of that is done at a time. Never: takes
//! from the callers' budget (threshold.md §5.1: a refresh is never starved by rate limits), renews for an app that nobody asks for.
//! Source: threshold.md §5.1.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dstack_actors::ports::read;
use dstack_protocol::sign::{Basis, SignKey, SignObject};
use dstack_protocol::{AppId, UnixMillis};
use futures::StreamExt as _;
use futures::stream;
use tracing::debug;

use super::env_key::age_s;
use super::{Dstack, GENERATION};

/// An app counts as asked for during this time.
const ASKED_FOR_MS: u64 = 3_600_000;
/// Apps remembered; further ones are served, and pay for their signature themselves.
const APPS_MAX: usize = 1000;
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// From this age on a signature is renewed: the log takes one in a minute.
const RENEW_S: u64 = 60;
/// Nodes that were asked for the same app do not all renew at once: each waits this much longer than the one before it.
const STAGGER_S: u64 = 5;
/// Signatures of one round, and of them at once.
const OF_ROUND: usize = 16;
const AT_ONCE: usize = 4;
/// Between two tries for one app.
const AGAIN_MS: u64 = 30_000;
const TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy)]
struct Row {
    asked: UnixMillis,
    tried: Option<UnixMillis>,
}

/// Apps whose env key was asked for lately.
#[derive(Debug, Default)]
pub(super) struct Asked(Mutex<HashMap<AppId, Row>>);

impl Asked {
    /// Somebody asked for this registered app.
    pub(super) fn note(&self, app_id: AppId, now: UnixMillis) {
        let mut rows = lock(&self.0);
        if rows.len() >= APPS_MAX {
            rows.retain(|_, row| now.since(row.asked) < ASKED_FOR_MS);
        }
        if rows.len() < APPS_MAX || rows.contains_key(&app_id) {
            rows.entry(app_id).or_insert(Row { asked: now, tried: None }).asked = now;
        }
    }

    /// Those that were asked for lately and not tried just now.
    fn lately(&self, now: UnixMillis) -> Vec<AppId> {
        let mut rows = lock(&self.0);
        rows.retain(|_, row| now.since(row.asked) < ASKED_FOR_MS);
        let due = rows.iter().filter(|(_, row)| row.tried.is_none_or(|at| now.since(at) >= AGAIN_MS));
        due.map(|(app_id, _)| *app_id).collect()
    }

    fn tried(&self, app_id: &AppId, now: UnixMillis) {
        if let Some(row) = lock(&self.0).get_mut(app_id) {
            row.tried = Some(now);
        }
    }
}

/// Renews for the life of the listener.
pub(super) async fn keep(dstack: Arc<Dstack>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        if (dstack.parts.serving)().is_ok() {
            dstack.renew().await;
        }
    }
}

impl Dstack {
    /// One round: the oldest signatures first.
    pub(super) async fn renew(&self) {
        let now = (self.parts.now)();
        let apps = self.asked.lately(now);
        let seat = u64::from(self.parts.seat.0.saturating_sub(1));
        let due = read(&*self.parts.log, |state| {
            let timestamp_s = state.log_time.0 / 1000;
            let mut due: Vec<(u64, SignObject)> = apps
                .iter()
                .filter_map(|app_id| {
                    let envpub = state.env_key(GENERATION, app_id).ok()?;
                    let signed = state.latest_signed(&SignKey::EnvKeyAt(GENERATION, *app_id));
                    let age = signed.map_or(u64::MAX, |row| age_s(row, timestamp_s));
                    let object = SignObject::EnvKeyAt { generation: GENERATION, app_id: *app_id, envpub, timestamp_s };
                    (age >= RENEW_S + STAGGER_S * seat).then_some((age, object))
                })
                .collect();
            due.sort_by_key(|(age, _)| std::cmp::Reverse(*age));
            due
        });
        let work = due.unwrap_or_default().into_iter().take(OF_ROUND).map(|(_, object)| async move {
            let Some(app_id) = object.app_id().copied() else { return };
            self.asked.tried(&app_id, now);
            let signed = tokio::time::timeout(TIMEOUT, self.parts.signatures.sign(object, Basis::State)).await;
            if !matches!(signed, Ok(Ok(_))) {
                // Another node may have been first; a request makes one where nobody was.
                debug!(%app_id, "dated signature of an env key not renewed");
            }
        });
        stream::iter(work).buffer_unordered(AT_ONCE).for_each(|()| std::future::ready(())).await;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: UnixMillis = UnixMillis(50_000_000);

    #[test]
    fn an_app_is_renewed_for_an_hour_after_it_was_asked_for() {
        let (asked, app) = (Asked::default(), AppId([1; 20]));
        asked.note(app, AT);
        assert_eq!(asked.lately(AT), [app]);
        asked.tried(&app, AT);
        assert_eq!(asked.lately(AT.plus_ms(AGAIN_MS - 1)), []);
        assert_eq!(asked.lately(AT.plus_ms(AGAIN_MS)), [app]);
        asked.note(app, AT.plus_ms(1000));
        assert_eq!(asked.lately(AT.plus_ms(ASKED_FOR_MS)), [app]);
        assert_eq!(asked.lately(AT.plus_ms(ASKED_FOR_MS + 1000)), []);
        assert!(lock(&asked.0).is_empty());
    }

    #[test]
    fn a_full_list_keeps_who_is_in_it_and_makes_room_in_time() {
        let asked = Asked::default();
        let app = |number: usize| {
            let mut id = [0; 20];
            id[..8].copy_from_slice(&number.to_be_bytes());
            AppId(id)
        };
        (0..APPS_MAX).for_each(|number| asked.note(app(number), AT));
        asked.note(app(APPS_MAX), AT);
        asked.note(app(3), AT.plus_ms(5));
        assert_eq!(asked.lately(AT.plus_ms(5)).len(), APPS_MAX);
        assert!(!asked.lately(AT.plus_ms(5)).contains(&app(APPS_MAX)));
        asked.note(app(APPS_MAX), AT.plus_ms(ASKED_FOR_MS));
        let mut left = asked.lately(AT.plus_ms(ASKED_FOR_MS));
        left.sort_unstable();
        assert_eq!(left, [app(3), app(APPS_MAX)]);
    }
}
