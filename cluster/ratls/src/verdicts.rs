//! Verdicts on evidence that was judged before. Owns: how many are kept, and until when. Never: keeps a refusal: it is cheap to repeat
//! for us and must not outlive new collateral. What a verdict was judged with is part of its key (`attest_judge`).
//! Source: threshold.md §2.2 (verdicts cached until earliest expiry or a change of collateral).

use std::collections::HashMap;
use std::sync::Arc;

use dstack_protocol::UnixMillis;

/// Verdicts kept at most. An identity takes a few KiB.
pub const VERDICTS_MAX: usize = 1024;

type Key = [u8; 32];

/// Two generations: what was used since the last change of generation, and what was used in the one before. What was used in neither
/// is forgotten.
pub(crate) struct Verdicts<V> {
    young: HashMap<Key, Kept<V>>,
    old: HashMap<Key, Kept<V>>,
}

struct Kept<V> {
    verdict: Arc<V>,
    expiry: UnixMillis,
}

impl<V> Default for Verdicts<V> {
    fn default() -> Self {
        Self { young: HashMap::new(), old: HashMap::new() }
    }
}

impl<V> Verdicts<V> {
    /// The verdict of `key`, if it still holds. The end of a TCB's grace is one of the expiries.
    pub(crate) fn find(&mut self, key: &Key, now: UnixMillis) -> Option<Arc<V>> {
        if !self.young.contains_key(key) {
            let Kept { verdict, expiry } = self.old.remove(key)?;
            self.keep(*key, &verdict, expiry);
        }
        let kept = self.young.get(key)?;
        if kept.expiry > now {
            return Some(Arc::clone(&kept.verdict));
        }
        self.young.remove(key);
        None
    }

    /// Keeps a verdict until `expiry`; the least lately used give way. Answers how many are kept.
    pub(crate) fn keep(&mut self, key: Key, verdict: &Arc<V>, expiry: UnixMillis) -> usize {
        if self.young.len() >= VERDICTS_MAX / 2 {
            self.old = std::mem::take(&mut self.young);
        }
        self.old.remove(&key);
        self.young.insert(key, Kept { verdict: Arc::clone(verdict), expiry });
        self.young.len().saturating_add(self.old.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: usize) -> Key {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&number.to_be_bytes());
        key
    }

    #[test]
    fn a_verdict_is_kept_to_its_expiry_and_not_beyond() {
        let mut verdicts = Verdicts::default();
        verdicts.keep(key(1), &Arc::new(7), UnixMillis(100));
        assert_eq!(verdicts.find(&key(1), UnixMillis(99)).as_deref(), Some(&7));
        assert_eq!(verdicts.find(&key(2), UnixMillis(99)), None);
        assert_eq!(verdicts.find(&key(1), UnixMillis(100)), None);
        assert_eq!(verdicts.find(&key(1), UnixMillis(99)), None, "what expired is gone");
    }

    #[test]
    fn what_is_used_stays_and_the_rest_gives_way() {
        let mut verdicts = Verdicts::default();
        let most = (0..10 * VERDICTS_MAX).map(|number| {
            let kept = verdicts.keep(key(number), &Arc::new(number), UnixMillis(100));
            assert!(verdicts.find(&key(0), UnixMillis(1)).is_some(), "{number}");
            kept
        });
        let most = most.max().unwrap_or_default();
        assert!((VERDICTS_MAX / 2..=VERDICTS_MAX).contains(&most), "{most}");
        assert!(verdicts.find(&key(1), UnixMillis(1)).is_none());
        assert!(verdicts.find(&key(10 * VERDICTS_MAX - 1), UnixMillis(1)).is_some());
    }
}
