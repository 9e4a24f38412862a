//! How the TCBs stand of those that were judged here: apps under their policies, nodes under the node's own rule.
//!
//! Owns: the last standing of each, bounded; saying once in the log when one changes. Never: judges. Source: docs/attestation.md,
//! "TCB policy": warn, grace, refuse.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use dstack_attest::TcbStanding;
use dstack_protocol::{AppId, Seat, UnixMillis};

/// Apps remembered at most.
const APPS_MAX: usize = 4096;
/// Standings are forgotten this long after they were last seen: a session's evidence is judged again within an hour.
const SEEN_MS_MAX: u64 = 2 * 3_600_000;

/// Who was judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// An app: the worst of its instances since the last change.
    App(AppId),
    /// A node.
    Node(Seat),
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    standing: TcbStanding,
    at: UnixMillis,
}

/// See the module text.
#[derive(Debug, Default)]
pub struct Standings(Mutex<BTreeMap<Subject, Seen>>);

/// How many stand in one way, of apps and of nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Apps.
    pub apps: u32,
    /// Nodes.
    pub nodes: u32,
}

impl Standings {
    /// Notes what was judged at `now`. What is current is not kept, and a worse standing stays until it was not seen for two hours:
    /// an app has many instances.
    pub fn note(&self, subject: Subject, standing: TcbStanding, now: UnixMillis) {
        if standing == TcbStanding::Current {
            return;
        }
        let mut seen = self.seen(now);
        let before = seen.get(&subject).map(|seen| seen.standing);
        let full = before.is_none() && matches!(subject, Subject::App(_)) && seen.len() >= APPS_MAX;
        if full || before.is_some_and(|before| worse(before, standing)) {
            return;
        }
        seen.insert(subject, Seen { standing, at: now });
        drop(seen);
        if before == Some(standing) {
            return;
        }
        let who = name(subject);
        match standing.grace_until() {
            None => tracing::warn!(who, "tcb is not up to date, and allowed by policy"),
            Some(UnixMillis(grace_until_ms)) => {
                tracing::warn!(who, grace_until_ms, "tcb is out of date: refused when its grace ends; update the machine's firmware");
            }
        }
    }

    /// Those that are not current, in order.
    pub fn listed(&self, now: UnixMillis) -> Vec<(Subject, TcbStanding)> {
        let seen = self.seen(now);
        seen.iter().map(|(subject, seen)| (*subject, seen.standing)).collect()
    }

    /// How many stand as `standing` is named.
    pub fn count(&self, standing: &str, now: UnixMillis) -> Counts {
        let mut counts = Counts::default();
        for (subject, _) in self.seen(now).iter().filter(|(_, seen)| seen.standing.name() == standing) {
            let counter = match subject {
                Subject::App(_) => &mut counts.apps,
                Subject::Node(_) => &mut counts.nodes,
            };
            *counter = counter.saturating_add(1);
        }
        counts
    }

    fn seen(&self, now: UnixMillis) -> MutexGuard<'_, BTreeMap<Subject, Seen>> {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.retain(|_, seen| now.since(seen.at) <= SEEN_MS_MAX);
        seen
    }
}

fn name(subject: Subject) -> String {
    match subject {
        Subject::App(app) => format!("app {app}"),
        Subject::Node(seat) => format!("node {seat}"),
    }
}

/// Whether `one` needs more attention than `other`.
fn worse(one: TcbStanding, other: TcbStanding) -> bool {
    let rank = |standing: TcbStanding| match standing {
        TcbStanding::Current => (0, 0),
        TcbStanding::Warn => (1, 0),
        TcbStanding::Grace { until } => (2, u64::MAX - until.0),
    };
    rank(one) > rank(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    const APP: Subject = Subject::App(AppId([1; 20]));
    const NODE: Subject = Subject::Node(Seat(2));

    #[test]
    fn the_worst_of_an_app_stays_until_it_is_not_seen_any_more() {
        let standings = Standings::default();
        let grace = TcbStanding::Grace { until: UnixMillis(9_000_000) };
        standings.note(APP, TcbStanding::Current, UnixMillis(1));
        assert!(standings.listed(UnixMillis(1)).is_empty());
        standings.note(APP, grace, UnixMillis(2));
        // Another instance of the app runs on a machine that is up to date.
        standings.note(APP, TcbStanding::Current, UnixMillis(3));
        standings.note(NODE, TcbStanding::Warn, UnixMillis(3));
        assert_eq!(standings.listed(UnixMillis(3)), [(APP, grace), (NODE, TcbStanding::Warn)]);
        assert_eq!(standings.count("grace", UnixMillis(3)), Counts { apps: 1, nodes: 0 });
        assert_eq!(standings.count("warn", UnixMillis(3)), Counts { apps: 0, nodes: 1 });
        assert!(standings.listed(UnixMillis(4 + SEEN_MS_MAX)).is_empty());
    }

    #[test]
    fn it_is_bounded() {
        let standings = Standings::default();
        for number in 0..5000_u32 {
            let mut app = [0; 20];
            app[..4].copy_from_slice(&number.to_be_bytes());
            standings.note(Subject::App(AppId(app)), TcbStanding::Warn, UnixMillis(1));
        }
        assert_eq!(standings.count("warn", UnixMillis(1)).apps, 4096);
    }
}
