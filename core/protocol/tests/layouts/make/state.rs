//! Values of the replicated state.

use dstack_protocol::state::{AdmitRow, AttemptRow, BucketRow, Governance, Members, Operators, PendingRow, ProofRow, RootRow, State};

use super::{Make, Source};

impl Make for BucketRow {
    fn make(s: &mut Source<'_>) -> Self {
        Self { tokens_milli: Make::make(s), refilled: Make::make(s) }
    }
}

impl Make for Members {
    fn make(s: &mut Source<'_>) -> Self {
        Self { from_size: Make::make(s), signers: s.map(3) }
    }
}

impl Make for AdmitRow {
    fn make(s: &mut Source<'_>) -> Self {
        Self { admit: Make::make(s), since: Make::make(s), vouches: s.map(2) }
    }
}

impl Make for AttemptRow {
    fn make(s: &mut Source<'_>) -> Self {
        Self {
            open: Make::make(s),
            round_since: Make::make(s),
            joins: s.map(2),
            messages: s.list(0, 2),
            ended: Make::make(s),
            convicted: s.list(0, 2).into_iter().collect(),
        }
    }
}

impl Make for RootRow {
    fn make(s: &mut Source<'_>) -> Self {
        Self {
            epoch: Make::make(s),
            t: Make::make(s),
            public_key: Make::make(s),
            vks: s.map(2),
            transcript: Make::make(s),
            inst: Make::make(s),
            attempt: Make::make(s),
        }
    }
}

impl Make for PendingRow {
    fn make(s: &mut Source<'_>) -> Self {
        Self { action: Make::make(s), approvals: s.list(0, 2), ready_since: Make::make(s) }
    }
}

impl Make for ProofRow {
    fn make(s: &mut Source<'_>) -> Self {
        Self { action: Make::make(s), approvals: s.list(0, 2), monos: s.list(0, 2) }
    }
}

impl Make for Governance {
    fn make(s: &mut Source<'_>) -> Self {
        Self {
            operators: Operators { k: Make::make(s), r: Make::make(s), keys: s.list(0, 3).into_iter().collect() },
            timelock_s: Make::make(s),
            versions: s.map(2),
            revoked: s.list(0, 2).into_iter().collect(),
            pending: s.map(2),
            used: s.map(2),
            proofs: s.map(2),
            revocations: s.map(1),
            allowed_nodes: (0..s.below(3)).map(|_| (u8::make(s), s.bytes(0, 20))).collect(),
        }
    }
}

impl Make for State {
    fn make(s: &mut Source<'_>) -> Self {
        Self {
            genesis: Make::make(s),
            collaterals: s.map(2),
            collateral_id: Make::make(s),
            tcb_known: s.map(2),
            size: Make::make(s),
            peaks: s.list(0, 3),
            log_time: Make::make(s),
            epoch: Make::make(s),
            beacons: s.map(2),
            latest_beacon: Make::make(s),
            members: s.map(2),
            members_version: Make::make(s),
            seats: s.map(2),
            admits: s.map(1),
            admissions: s.map(2),
            next_index: Make::make(s),
            attempt: Make::make(s),
            attempts: Make::make(s),
            roots: s.map(1),
            ceremonies: s.map(1),
            governance: Make::make(s),
            apps: s.map(2),
            policies: s.map(2),
            intents: s.map(2),
            signatures: s.map(3),
            env_keys: s.map(2),
            sightings: (0..s.below(3)).map(|_| (Make::make(s), s.map(2))).collect(),
            legacy_rates: s.map(2),
            delegation: Make::make(s),
            adopt_rates: s.map(2),
        }
    }
}
