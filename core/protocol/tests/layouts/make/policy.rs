//! Policies of every version.

use std::collections::BTreeSet;

use dstack_protocol::policy::{AppPolicy, PathRule, Rate, TcbRules};
use dstack_protocol::release::KeyClass;

use super::{Make, Source, Variants};

impl Make for PathRule {
    fn make(s: &mut Source<'_>) -> Self {
        if bool::make(s) { Self::Prefix(s.text(0, 20)) } else { Self::Exact(s.text(1, 20)) }
    }
}

impl Make for AppPolicy {
    fn make(s: &mut Source<'_>) -> Self {
        let any_os_image = bool::make(s);
        let classes: Vec<KeyClass> = s.set(5);
        let paths: BTreeSet<PathRule> = if classes.contains(&KeyClass::Custom) { s.set(3).into_iter().collect() } else { BTreeSet::new() };
        let mut policy = Self {
            name: s.text(1, 64),
            platforms: s.set(6),
            compose_hashes: s.set(3),
            any_os_image,
            os_images: if any_os_image { Vec::new() } else { s.set(3) },
            tcb_allowed: s.set(6),
            classes,
            paths: paths.into_iter().collect(),
            rate: Rate { per_second: 1 + u32::from(u16::make(s)), burst: 1 + u32::from(u16::make(s)) },
            session_ms: 1 + u64::from(u32::make(s)) % 3_600_000,
            allow_legacy: Make::make(s),
            tcb: if bool::make(s) { Make::make(s) } else { TcbRules::default() },
            ask_authority: Make::make(s),
        };
        if policy.ask_authority && bool::make(s) {
            policy.compose_hashes.clear();
        }
        policy
    }
}

impl Variants for AppPolicy {
    /// One whose authority is asked.
    fn variant(s: &mut Source<'_>, _which: usize) -> Self {
        Self { ask_authority: true, ..Self::make(s) }
    }
}

impl Make for TcbRules {
    fn make(s: &mut Source<'_>) -> Self {
        let advisories: BTreeSet<u16> = s.set(3).into_iter().collect();
        Self {
            grace_s: 1 + u32::make(s) % 31_000_000,
            min_evaluation: u32::make(s),
            refused_advisories: advisories.into_iter().map(|number| format!("INTEL-SA-{number:05}")).collect(),
            accept_vlek: Make::make(s),
        }
    }
}
