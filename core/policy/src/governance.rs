//! The operator quorum: approvals, timelock, versions, revocations.
//!
//! Owns: what a governance entry does to the governance state, deterministically. Never: a clock (log time and signed
//! monotonic readings come in), a policy's meaning. Source: architecture.md §9.

use std::collections::{BTreeMap, BTreeSet};

use dstack_protocol::codec::Wire as _;
use dstack_protocol::genesis::Genesis;
use dstack_protocol::governance::{Action, ActionKind, Approval, Entry, Mono, Object, OperatorsBody};
use dstack_protocol::limits::ACTION_AHEAD_MS_MAX;
use dstack_protocol::policy::AppPolicy;
use dstack_protocol::state::{Governance, Operators, PendingRow, ProofRow};
use dstack_protocol::{ClusterId, NodeIndex, Platform, RefusalCode, UnixMillis};

/// What the rest of the state must know of an applied action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// An action waits for approvals or its timelock.
    Pending {
        /// The action.
        action_id: [u8; 16],
        /// Whether it has its approvals and waits for the timelock only.
        ready: bool,
    },
    /// An action was applied.
    Applied(Action),
}

/// What an entry is judged against.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Cluster.
    pub cluster_id: &'a ClusterId,
    /// Log time.
    pub log_time: UnixMillis,
    /// Node keys whose monotonic readings count: holders, before the first root voters.
    pub clocks: &'a BTreeMap<NodeIndex, [u8; 32]>,
    /// How many of them end a timelock.
    pub threshold: usize,
}

/// Most actions that may wait at one time; more would let one operator fill the state.
pub const PENDING_MAX: usize = 256;

/// Governance at genesis.
#[must_use]
pub fn at_genesis(genesis: &Genesis) -> Governance {
    Governance {
        operators: Operators { k: genesis.k, r: genesis.r, keys: genesis.operators.iter().copied().collect() },
        timelock_s: genesis.timelock_s,
        versions: BTreeMap::new(),
        revoked: BTreeSet::new(),
        pending: BTreeMap::new(),
        used: BTreeMap::new(),
        proofs: BTreeMap::new(),
        revocations: BTreeMap::new(),
        allowed_nodes: genesis.allowed_nodes.iter().map(|node| (node.platform.byte(), node.measurement.clone())).collect(),
    }
}

/// Current version of an object; 0 where it was never touched.
#[must_use]
pub fn version(state: &Governance, object: &Object) -> u64 {
    state.versions.get(object).copied().unwrap_or(0)
}

/// Applies one entry. On a refusal the state is as before.
///
/// # Errors
/// The code that the record of this entry carries.
pub fn apply(state: &mut Governance, entry: &Entry, context: Context<'_>) -> Result<Effect, RefusalCode> {
    match entry {
        Entry::Propose { action, approvals } => propose(state, action, approvals, context),
        Entry::Approve { action_id, approvals } => approve(state, action_id, approvals, context),
        Entry::Activate { action_id, monos } => activate(state, action_id, monos, context),
    }
}

/// Forgets what has expired: pending actions and used ids past their `not_after`.
pub fn prune(state: &mut Governance, log_time: UnixMillis) {
    state.pending.retain(|_, row| row.action.not_after >= log_time);
    state.used.retain(|_, not_after| *not_after >= log_time);
}

fn propose(state: &mut Governance, action: &Action, approvals: &[Approval], context: Context<'_>) -> Result<Effect, RefusalCode> {
    if action.cluster_id != *context.cluster_id {
        return Err(RefusalCode::WrongCluster);
    }
    check_body(action)?;
    if state.used.contains_key(&action.action_id) {
        return Err(RefusalCode::ActionRepeated);
    }
    if action.not_after < context.log_time || action.not_after.since(context.log_time) > ACTION_AHEAD_MS_MAX {
        return Err(RefusalCode::ActionExpired);
    }
    if action.base_version != version(state, &action.object) {
        return Err(RefusalCode::StaleVersion);
    }
    let approvals = merged(&state.operators, action, &[], approvals)?;
    if approvals.is_empty() {
        return Err(RefusalCode::NotEnoughApprovals);
    }
    if state.pending.len() >= PENDING_MAX {
        return Err(RefusalCode::Overloaded);
    }
    state.used.insert(action.action_id, action.not_after);
    let row = PendingRow { action: action.clone(), approvals, ready_since: None };
    Ok(progress(state, row, context.log_time))
}

fn approve(state: &mut Governance, action_id: &[u8; 16], approvals: &[Approval], context: Context<'_>) -> Result<Effect, RefusalCode> {
    let row = state.pending.get(action_id).ok_or(RefusalCode::UnknownAction)?;
    still_valid(state, row, context.log_time)?;
    let approvals = merged(&state.operators, &row.action, &row.approvals, approvals)?;
    let row = PendingRow { approvals, ..row.clone() };
    state.pending.remove(action_id);
    Ok(progress(state, row, context.log_time))
}

fn activate(state: &mut Governance, action_id: &[u8; 16], monos: &[Mono], context: Context<'_>) -> Result<Effect, RefusalCode> {
    let row = state.pending.get(action_id).ok_or(RefusalCode::UnknownAction)?;
    still_valid(state, row, context.log_time)?;
    let since = row.ready_since.ok_or(RefusalCode::NotEnoughApprovals)?;
    // architecture.md §9: keys are those in force at activation.
    if approvals_in_force(&state.operators, &row.approvals) < needed(&state.operators, row.action.kind) {
        return Err(RefusalCode::NotEnoughApprovals);
    }
    let timelock_ms = state.timelock_s.saturating_mul(1000);
    if context.log_time.since(since) < timelock_ms {
        return Err(RefusalCode::TimelockRunning);
    }
    let mut seen = BTreeSet::new();
    for mono in monos {
        let key = context.clocks.get(&mono.index).ok_or(RefusalCode::BadReading)?;
        if !verifies(key, &mono.signed_bytes(context.cluster_id, action_id), &mono.sig) {
            return Err(RefusalCode::BadReading);
        }
        if mono.elapsed_ms >= timelock_ms {
            seen.insert(mono.index);
        }
    }
    if seen.len() < context.threshold {
        return Err(RefusalCode::TimelockRunning);
    }
    let row = row.clone();
    state.pending.remove(action_id);
    carry_out(state, &row, monos);
    Ok(Effect::Applied(row.action))
}

fn still_valid(state: &Governance, row: &PendingRow, log_time: UnixMillis) -> Result<(), RefusalCode> {
    if row.action.not_after < log_time {
        return Err(RefusalCode::ActionExpired);
    }
    if row.action.base_version != version(state, &row.action.object) {
        return Err(RefusalCode::StaleVersion);
    }
    Ok(())
}

/// Puts a row where it belongs now: applied, waiting for the timelock, or waiting for approvals.
fn progress(state: &mut Governance, mut row: PendingRow, log_time: UnixMillis) -> Effect {
    let action_id = row.action.action_id;
    let enough = approvals_in_force(&state.operators, &row.approvals) >= needed(&state.operators, row.action.kind);
    if enough && (!row.action.kind.has_timelock() || state.timelock_s == 0) {
        carry_out(state, &row, &[]);
        return Effect::Applied(row.action);
    }
    if enough && row.ready_since.is_none() {
        row.ready_since = Some(log_time);
    }
    let ready = row.ready_since.is_some();
    state.pending.insert(action_id, row);
    Effect::Pending { action_id, ready }
}

fn carry_out(state: &mut Governance, row: &PendingRow, monos: &[Mono]) {
    let action = &row.action;
    let proof = ProofRow { action: action.clone(), approvals: row.approvals.clone(), monos: monos.to_vec() };
    match action.kind {
        ActionKind::Revoke => {
            state.revoked.insert(action.object.clone());
            state.revocations.insert(action.object.clone(), proof);
        }
        ActionKind::Unrevoke => {
            state.revoked.remove(&action.object);
            state.revocations.remove(&action.object);
        }
        ActionKind::SetOperators => {
            if let Ok(body) = OperatorsBody::decode(&action.body) {
                state.operators = Operators { k: body.k, r: body.r, keys: body.operators.into_iter().collect() };
            }
            state.proofs.insert(action.object.clone(), proof);
        }
        ActionKind::AllowNodeMeasurement => {
            if let (Object::Measurement(bytes), Some(platform)) = (&action.object, action.body.first()) {
                state.allowed_nodes.insert((*platform, bytes.clone()));
            }
            state.proofs.insert(action.object.clone(), proof);
        }
        ActionKind::SetAppPolicy
        | ActionKind::GrantSeat
        | ActionKind::SetSettings
        | ActionKind::NewGeneration
        | ActionKind::DestroyGeneration
        | ActionKind::Resume
        | ActionKind::SetDelegation => {
            state.proofs.insert(action.object.clone(), proof);
        }
    }
    // Each applied action raises the version, which voids everything pending on that object.
    let raised = version(state, &action.object).saturating_add(1);
    state.versions.insert(action.object.clone(), raised);
    state.pending.retain(|_, other| other.action.object != action.object);
}

fn check_body(action: &Action) -> Result<(), RefusalCode> {
    let fits = match action.kind {
        ActionKind::SetAppPolicy => AppPolicy::decode(&action.body).is_ok(),
        // ADR 0024: under a delegation nothing but the authority knows an app, so a policy that asks none would admit anybody.
        ActionKind::SetDelegation => AppPolicy::decode(&action.body).is_ok_and(|policy| policy.ask_authority),
        ActionKind::Revoke | ActionKind::Unrevoke => action.body.is_empty(),
        ActionKind::SetOperators => OperatorsBody::decode(&action.body)
            .is_ok_and(|body| body.operators.iter().all(|key| ed25519_dalek::VerifyingKey::from_bytes(key).is_ok_and(|k| !k.is_weak()))),
        ActionKind::AllowNodeMeasurement => {
            matches!(action.body.as_slice(), [byte] if Platform::from_byte(*byte).is_some())
        }
        // Membership, settings, generations and resumption come with the cluster's later life.
        ActionKind::GrantSeat
        | ActionKind::SetSettings
        | ActionKind::NewGeneration
        | ActionKind::DestroyGeneration
        | ActionKind::Resume => return Err(RefusalCode::ActionUnsupported),
    };
    if fits { Ok(()) } else { Err(RefusalCode::BadActionBody) }
}

fn needed(operators: &Operators, kind: ActionKind) -> usize {
    match kind {
        ActionKind::Revoke => usize::from(operators.r),
        _ => usize::from(operators.k),
    }
}

fn approvals_in_force(operators: &Operators, approvals: &[Approval]) -> usize {
    approvals.iter().filter(|approval| operators.keys.contains(&approval.operator)).count()
}

/// Old and new approvals, one for each operator; every new one must verify.
fn merged(operators: &Operators, action: &Action, old: &[Approval], new: &[Approval]) -> Result<Vec<Approval>, RefusalCode> {
    let bytes = action.encode();
    let mut by_operator: BTreeMap<[u8; 32], Approval> = old.iter().map(|a| (a.operator, *a)).collect();
    for approval in new {
        if !operators.keys.contains(&approval.operator) || !verifies(&approval.operator, &bytes, &approval.sig) {
            return Err(RefusalCode::BadApproval);
        }
        by_operator.entry(approval.operator).or_insert(*approval);
    }
    Ok(by_operator.into_values().collect())
}

/// Checks the signatures that the governance part of a snapshot rests on: every approval kept beside an object verifies.
///
/// # Errors
/// [`RefusalCode::BadApproval`] or [`RefusalCode::BadReading`].
pub fn check_signatures(
    state: &Governance,
    cluster_id: &ClusterId,
    clock_keys: &BTreeMap<NodeIndex, BTreeSet<[u8; 32]>>,
) -> Result<(), RefusalCode> {
    for proof in state.proofs.values().chain(state.revocations.values()) {
        let bytes = proof.action.encode();
        if proof.approvals.is_empty() || !proof.approvals.iter().all(|a| verifies(&a.operator, &bytes, &a.sig)) {
            return Err(RefusalCode::BadApproval);
        }
        for mono in &proof.monos {
            let signed = mono.signed_bytes(cluster_id, &proof.action.action_id);
            let known = clock_keys.get(&mono.index).is_some_and(|keys| keys.iter().any(|key| verifies(key, &signed, &mono.sig)));
            if !known {
                return Err(RefusalCode::BadReading);
            }
        }
    }
    for row in state.pending.values() {
        let bytes = row.action.encode();
        if !row.approvals.iter().all(|a| verifies(&a.operator, &bytes, &a.sig)) {
            return Err(RefusalCode::BadApproval);
        }
    }
    Ok(())
}

/// RFC 8032 strict verification.
fn verifies(key: &[u8; 32], message: &[u8], sig: &[u8; 64]) -> bool {
    ed25519_dalek::VerifyingKey::from_bytes(key)
        .is_ok_and(|key| key.verify_strict(message, &ed25519_dalek::Signature::from_bytes(sig)).is_ok())
}

#[cfg(test)]
mod tests {
    use dstack_protocol::AppId;
    use dstack_protocol::policy::Rate;
    use dstack_protocol::release::KeyClass;
    use dstack_protocol::{Generation, TcbStatus};
    use ed25519_dalek::{Signer as _, SigningKey};

    use super::*;

    const CLUSTER: ClusterId = ClusterId([8; 32]);
    const NOW: UnixMillis = UnixMillis(1_000_000);

    struct World {
        state: Governance,
        operators: Vec<SigningKey>,
        nodes: Vec<SigningKey>,
        clocks: BTreeMap<NodeIndex, [u8; 32]>,
    }

    impl World {
        /// 2 of 3 operators, revocation by 1, three node clocks with threshold 2.
        fn new(timelock_s: u64) -> Self {
            let operators: Vec<SigningKey> = (1..=3).map(|i| SigningKey::from_bytes(&[i; 32])).collect();
            let nodes: Vec<SigningKey> = (11..=13).map(|i| SigningKey::from_bytes(&[i; 32])).collect();
            let clocks = (1..).map(NodeIndex).zip(nodes.iter().map(|k| k.verifying_key().to_bytes())).collect();
            let state = Governance {
                operators: Operators { k: 2, r: 1, keys: operators.iter().map(|k| k.verifying_key().to_bytes()).collect() },
                timelock_s,
                versions: BTreeMap::new(),
                revoked: BTreeSet::new(),
                pending: BTreeMap::new(),
                used: BTreeMap::new(),
                proofs: BTreeMap::new(),
                revocations: BTreeMap::new(),
                allowed_nodes: BTreeSet::new(),
            };
            Self { state, operators, nodes, clocks }
        }

        fn approvals(&self, action: &Action, who: &[usize]) -> Vec<Approval> {
            who.iter()
                .map(|i| Approval {
                    operator: self.operators[*i].verifying_key().to_bytes(),
                    sig: self.operators[*i].sign(&action.encode()).to_bytes(),
                })
                .collect()
        }

        fn at(&mut self, log_time: UnixMillis, entry: &Entry) -> Result<Effect, RefusalCode> {
            let clocks = self.clocks.clone();
            apply(&mut self.state, entry, Context { cluster_id: &CLUSTER, log_time, clocks: &clocks, threshold: 2 })
        }

        fn propose(&mut self, action: &Action, who: &[usize]) -> Result<Effect, RefusalCode> {
            let approvals = self.approvals(action, who);
            self.at(NOW, &Entry::Propose { action: action.clone(), approvals })
        }

        fn mono(&self, node: usize, action: &Action, elapsed_ms: u64) -> Mono {
            let mut mono = Mono { index: NodeIndex(node as u16 + 1), elapsed_ms, sig: [0; 64] };
            mono.sig = self.nodes[node].sign(&mono.signed_bytes(&CLUSTER, &action.action_id)).to_bytes();
            mono
        }
    }

    fn policy_action(id: u8, base_version: u64) -> Action {
        let policy = AppPolicy {
            name: "web".into(),
            platforms: vec![Platform::Tdx],
            compose_hashes: vec![[4; 32]],
            any_os_image: true,
            os_images: vec![],
            tcb_allowed: vec![TcbStatus::UpToDate],
            classes: vec![KeyClass::Disk],
            paths: vec![],
            rate: Rate::DEFAULT,
            session_ms: 3_600_000,
            allow_legacy: false,
            tcb: dstack_protocol::policy::TcbRules::default(),
            ask_authority: false,
        };
        action(id, ActionKind::SetAppPolicy, Object::App(AppId([1; 20])), base_version, policy.encode())
    }

    fn action(id: u8, kind: ActionKind, object: Object, base_version: u64, body: Vec<u8>) -> Action {
        Action { cluster_id: CLUSTER, action_id: [id; 16], kind, object, base_version, body, not_after: NOW.plus_ms(3_600_000) }
    }

    #[test]
    fn without_timelock_the_last_needed_approval_applies() {
        let mut w = World::new(0);
        let a = policy_action(1, 0);
        assert_eq!(w.propose(&a, &[0]), Ok(Effect::Pending { action_id: [1; 16], ready: false }));
        let again = w.approvals(&a, &[0]);
        assert_eq!(
            w.at(NOW, &Entry::Approve { action_id: [1; 16], approvals: again }),
            Ok(Effect::Pending { action_id: [1; 16], ready: false }),
            "approvals by one key count once"
        );
        let second = w.approvals(&a, &[2]);
        assert_eq!(w.at(NOW, &Entry::Approve { action_id: [1; 16], approvals: second }), Ok(Effect::Applied(a.clone())));
        assert_eq!(version(&w.state, &a.object), 1);
        assert!(w.state.pending.is_empty());
        assert_eq!(w.propose(&a, &[0, 1]), Err(RefusalCode::ActionRepeated));
    }

    #[test]
    fn timelock_needs_log_time_and_t_monotonic_clocks() {
        let mut w = World::new(10);
        let a = policy_action(1, 0);
        assert_eq!(w.propose(&a, &[0, 1]), Ok(Effect::Pending { action_id: [1; 16], ready: true }));
        let later = NOW.plus_ms(10_000);
        let activate = |monos: Vec<Mono>| Entry::Activate { action_id: [1; 16], monos };
        let both = vec![w.mono(0, &a, 10_000), w.mono(1, &a, 12_000)];
        assert_eq!(w.at(NOW.plus_ms(9_999), &activate(both.clone())), Err(RefusalCode::TimelockRunning));
        let one = vec![w.mono(0, &a, 10_000), w.mono(0, &a, 11_000)];
        assert_eq!(w.at(later, &activate(one)), Err(RefusalCode::TimelockRunning), "one clock twice is one clock");
        let short = vec![w.mono(0, &a, 10_000), w.mono(1, &a, 9_999)];
        assert_eq!(w.at(later, &activate(short)), Err(RefusalCode::TimelockRunning));
        let mut forged = both.clone();
        forged[1].elapsed_ms += 1;
        assert_eq!(w.at(later, &activate(forged)), Err(RefusalCode::BadReading));
        assert_eq!(w.at(later, &activate(both)), Ok(Effect::Applied(a)));
    }

    #[test]
    fn a_revocation_is_immediate_and_voids_what_is_pending() {
        let mut w = World::new(3600);
        let pending = policy_action(1, 0);
        w.propose(&pending, &[0, 1]).unwrap();
        let revoke = action(2, ActionKind::Revoke, pending.object.clone(), 0, vec![]);
        assert_eq!(w.propose(&revoke, &[2]), Ok(Effect::Applied(revoke.clone())));
        assert!(w.state.revoked.contains(&pending.object));
        assert!(w.state.pending.is_empty());
        let undo = action(3, ActionKind::Unrevoke, pending.object.clone(), 1, vec![]);
        assert_eq!(w.propose(&undo, &[0, 1]), Ok(Effect::Pending { action_id: [3; 16], ready: true }), "undoing waits");
        assert!(w.state.revoked.contains(&pending.object));
    }

    #[test]
    fn bad_actions_change_nothing() {
        let mut w = World::new(0);
        let before = w.state.clone();
        let good = policy_action(1, 0);
        let mut wrong_cluster = good.clone();
        wrong_cluster.cluster_id = ClusterId([9; 32]);
        let mut stale = good.clone();
        stale.base_version = 1;
        let mut expired = good.clone();
        expired.not_after = UnixMillis(1);
        let mut far = good.clone();
        far.not_after = NOW.plus_ms(ACTION_AHEAD_MS_MAX + 1);
        let mut body = good.clone();
        body.body = vec![1, 2, 3];
        let unsupported = action(1, ActionKind::NewGeneration, Object::Generation(Generation(1)), 0, vec![]);
        for (a, code) in [
            (wrong_cluster, RefusalCode::WrongCluster),
            (stale, RefusalCode::StaleVersion),
            (expired, RefusalCode::ActionExpired),
            (far, RefusalCode::ActionExpired),
            (body, RefusalCode::BadActionBody),
            (unsupported, RefusalCode::ActionUnsupported),
        ] {
            assert_eq!(w.propose(&a, &[0, 1]), Err(code));
        }
        assert_eq!(w.propose(&good, &[]), Err(RefusalCode::NotEnoughApprovals));
        let mut forged = w.approvals(&good, &[0]);
        forged[0].sig[3] ^= 1;
        assert_eq!(w.at(NOW, &Entry::Propose { action: good.clone(), approvals: forged }), Err(RefusalCode::BadApproval));
        let stranger = SigningKey::from_bytes(&[77; 32]);
        let foreign = Approval { operator: stranger.verifying_key().to_bytes(), sig: stranger.sign(&good.encode()).to_bytes() };
        assert_eq!(w.at(NOW, &Entry::Propose { action: good, approvals: vec![foreign] }), Err(RefusalCode::BadApproval));
        assert_eq!(w.at(NOW, &Entry::Approve { action_id: [5; 16], approvals: vec![] }), Err(RefusalCode::UnknownAction));
        assert_eq!(w.state, before);
    }

    #[test]
    fn replaced_operators_no_longer_count_at_activation() {
        let mut w = World::new(10);
        let a = policy_action(1, 0);
        w.propose(&a, &[0, 1]).unwrap();
        w.state.operators.keys.remove(&w.operators[1].verifying_key().to_bytes());
        let monos = vec![w.mono(0, &a, 10_000), w.mono(1, &a, 10_000)];
        assert_eq!(w.at(NOW.plus_ms(10_000), &Entry::Activate { action_id: [1; 16], monos }), Err(RefusalCode::NotEnoughApprovals));
    }

    #[test]
    fn snapshots_with_a_forged_approval_are_noticed() {
        let mut w = World::new(0);
        let a = policy_action(1, 0);
        w.propose(&a, &[0, 1]).unwrap();
        let keys = w.clocks.iter().map(|(i, k)| (*i, BTreeSet::from([*k]))).collect();
        assert_eq!(check_signatures(&w.state, &CLUSTER, &keys), Ok(()));
        let proof = w.state.proofs.get_mut(&a.object).unwrap();
        proof.approvals[0].sig[0] ^= 1;
        assert_eq!(check_signatures(&w.state, &CLUSTER, &keys), Err(RefusalCode::BadApproval));
    }

    #[test]
    fn expired_rows_are_forgotten() {
        let mut w = World::new(10);
        w.propose(&policy_action(1, 0), &[0]).unwrap();
        prune(&mut w.state, NOW.plus_ms(3_600_001));
        assert!(w.state.pending.is_empty() && w.state.used.is_empty());
    }
}
