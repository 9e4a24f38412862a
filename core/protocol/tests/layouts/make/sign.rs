//! Values of what roots sign, of claims and env keys.

use std::collections::BTreeSet;

use dstack_protocol::env::{EnvAttempt, EnvPubBody};
use dstack_protocol::sign::{AppPkClaim, Basis, SignAsk, SignKey, SignObject, Signed};
use dstack_protocol::state::{AskRow, EnvRow, SignRow, SignedRow};
use dstack_protocol::{Generation, NodeIndex};

use super::{Make, Source, Variants, plain};

impl<T: Make + Ord> Make for BTreeSet<T> {
    fn make(s: &mut Source<'_>) -> Self {
        s.list(0, 3).into_iter().collect()
    }
}

/// A compressed point by its first byte.
fn point(s: &mut Source<'_>) -> [u8; 33] {
    let mut point = <[u8; 33]>::make(s);
    point[0] = 2 + (point[0] & 1);
    point
}

fn node(s: &mut Source<'_>) -> NodeIndex {
    NodeIndex(u16::make(s) % 0x7fff + 1)
}

fn host(s: &mut Source<'_>) -> String {
    match s.below(3) {
        0 => std::net::IpAddr::from(<[u8; 4]>::make(s)).to_string(),
        1 => std::net::IpAddr::from(<[u8; 16]>::make(s)).to_string(),
        _ => format!("node-{}.example", u16::make(s)),
    }
}

impl Variants for SignObject {
    fn variant(s: &mut Source<'_>, which: usize) -> Self {
        let generation = Generation::make(s);
        match which {
            0 => Self::RootCa { generation },
            1 => Self::AppCa { generation, app_id: Make::make(s), public_key: point(s) },
            2 => {
                let hosts: BTreeSet<String> = (0..=s.below(8)).map(|_| host(s)).collect();
                Self::IssuingCa { generation, index: node(s), public_key: point(s), hosts: hosts.into_iter().collect() }
            }
            3 => Self::Generation { generation, pk_prf: Make::make(s) },
            4 => Self::AppKey { generation, app_id: Make::make(s), app_pk: point(s) },
            5 => Self::EnvKey { generation, app_id: Make::make(s), envpub: Make::make(s) },
            _ => Self::EnvKeyAt { generation, app_id: Make::make(s), envpub: Make::make(s), timestamp_s: Make::make(s) },
        }
    }
}

impl Make for SignObject {
    fn make(s: &mut Source<'_>) -> Self {
        let which = s.below(7);
        Self::variant(s, which)
    }
}

impl Make for SignKey {
    fn make(s: &mut Source<'_>) -> Self {
        SignObject::make(s).key()
    }
}

impl Variants for Basis {
    fn variant(s: &mut Source<'_>, which: usize) -> Self {
        match which {
            0 => Self::State,
            1 => Self::Release { intent_id: Make::make(s) },
            _ => Self::Claim { claim_hash: Make::make(s) },
        }
    }
}

impl Make for Basis {
    fn make(s: &mut Source<'_>) -> Self {
        let which = s.below(3);
        Self::variant(s, which)
    }
}

impl Variants for SignAsk {
    fn variant(s: &mut Source<'_>, which: usize) -> Self {
        Self {
            author: Make::make(s),
            beacon_pos: Make::make(s),
            object: SignObject::variant(s, which),
            basis: Basis::variant(s, which % 3),
            sig: Make::make(s),
        }
    }
}

impl Make for SignAsk {
    fn make(s: &mut Source<'_>) -> Self {
        let which = s.below(7);
        Self::variant(s, which)
    }
}

impl Make for Signed {
    fn make(s: &mut Source<'_>) -> Self {
        Self { ask_pos: Make::make(s), key: Make::make(s), bytes: s.bytes(0, 65) }
    }
}

impl Make for AppPkClaim {
    fn make(s: &mut Source<'_>) -> Self {
        Self {
            generation: Make::make(s),
            app_id: Make::make(s),
            app_pk: point(s),
            beacon_pos: Make::make(s),
            beacon: Make::make(s),
            sig: Make::make(s),
            evidence: s.bytes(0, 60),
        }
    }
}

impl Make for EnvPubBody {
    fn make(s: &mut Source<'_>) -> Self {
        // No low-order key has this first byte.
        let mut envpub = <[u8; 32]>::make(s);
        envpub[0] = 9;
        Self { app_id: Make::make(s), generation: Make::make(s), attempt: Make::make(s), envpub }
    }
}

plain! {
    EnvAttempt { app_id, generation, attempt, operator }
    AskRow { pos, log_time, author, object, basis, attempts }
    SignedRow { ask, pos, bytes }
    EnvRow { attempt, attempt_pos, since, combiner, published }
}

impl Make for SignRow {
    fn make(s: &mut Source<'_>) -> Self {
        Self { open: s.map(2), signed: Make::make(s), recent: s.list(0, 3) }
    }
}
