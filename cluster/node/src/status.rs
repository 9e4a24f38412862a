//! What a node says of itself: status JSON and gauges.
//!
//! Owns: their content. Never: a secret, an id of a guest.

use std::time::Duration;

use dstack_actors::ports::read;
use dstack_actors::standings::Subject;
use dstack_attest::TcbStanding;
use dstack_protocol::adopt::AdoptBasis;
use dstack_protocol::genesis::Genesis;
use dstack_protocol::governance::Object;
use dstack_protocol::sign::SignKey;
use dstack_protocol::state::State;
use dstack_protocol::{Generation, RefusalCode, RootTag};
use dstack_raft::Voting;
use dstack_raft::machine::{Formation, view};
use serde_json::{Value, json};

use crate::collateral::pinned::Dates;
use crate::node::Services;

/// How long a health check waits for a majority.
const QUORUM_PATIENCE: Duration = Duration::from_secs(2);

/// `(name, kind, labels, meaning)` of every metric here.
pub(crate) const METRICS: &[(&str, &str, &str, &str)] = &[
    ("kms_node_refused_total", "counter", "code", "Requests refused, by code."),
    ("kms_node_threshold_margin", "gauge", "", "Holders reachable now beyond the threshold; below 0 nothing is released."),
    ("kms_node_share_epoch", "gauge", "", "Epoch of the share in use; 0 without one."),
    ("kms_node_log_clock_skew_ms", "gauge", "", "Own clock minus log time, ms. Beyond 90 s this node does not serve."),
    ("kms_node_collateral_age_seconds", "gauge", "", "Age of the collateral in force: since its oldest issue date."),
    (
        "kms_node_collateral_expires_seconds",
        "gauge",
        "",
        "Time until the collateral in force ends or reaches its hard maximum age; negative after. Alarm well before 0.",
    ),
    (
        "kms_node_collateral_fetches_total",
        "counter",
        "outcome",
        "Rounds of asking for collateral: renewed, unchanged, staged (good, not pinned yet) or failed.",
    ),
    ("kms_node_log_leaves", "gauge", "", "Leaves of the log applied here."),
    ("kms_node_certified_leaves", "gauge", "", "Highest certified size."),
    (
        "kms_node_head_deviations_total",
        "counter",
        "",
        "Heads that deviate from this node's log, or that one signer signed twice. Alarm on any.",
    ),
    (
        "kms_node_app_keys_replaced_total",
        "counter",
        "",
        "Pinned app keys that the app's own claim replaced: a node lied at the app's first legacy release. Alarm on any.",
    ),
    (
        "kms_node_tcb_apps",
        "gauge",
        "standing",
        "Apps released to here within two hours whose TCB is accepted and not up to date: warn or grace.",
    ),
    ("kms_node_tcb_nodes", "gauge", "standing", "Nodes whose TCB is accepted and not up to date: warn or grace."),
    (
        "kms_node_admin_denied_total",
        "counter",
        "reason",
        "Requests to dstack's admin service that did not pass: unauthorized, or too_many where a password was not even looked at.",
    ),
    ("kms_node_ready", "gauge", "", "1 when this node serves releases."),
];

/// Counts a refusal.
pub(crate) fn refused(code: RefusalCode) {
    metrics::counter!("kms_node_refused_total", "code" => code.text()).increment(1);
}

/// Counts a request to dstack's admin service that did not pass.
pub(crate) fn admin_denied(reason: &'static str) {
    metrics::counter!("kms_node_admin_denied_total", "reason" => reason).increment(1);
}

/// Counts a deviating head.
pub(crate) fn deviation() {
    metrics::counter!("kms_node_head_deviations_total").increment(1);
}

/// Counts an app's key that its own claim replaced, and says which node vouched for the old one.
pub(crate) fn app_key_replaced(replaced: &dstack_raft::machine::sign::Replaced) {
    metrics::counter!("kms_node_app_keys_replaced_total").increment(1);
    let hex = |key: &[u8]| key.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let (from, to) = (hex(&replaced.from), hex(&replaced.to));
    tracing::error!(app_id = %replaced.app_id, peer_id = replaced.author.0, from, to, "an app's pinned key was replaced by its own claim");
}

fn voting_text(voting: Voting) -> String {
    match voting {
        Voting::Votes => "votes".to_owned(),
        Voting::AwaitingConfirmation => "does not vote: asks the others where it must have been".to_owned(),
        Voting::CatchingUp { until_index } => format!("does not vote: catches up to entry {until_index}"),
    }
}

fn formation_name(formation: Formation) -> &'static str {
    match formation {
        Formation::AwaitingGenesis => "awaiting-genesis",
        Formation::AwaitingAdmissions => "awaiting-admissions",
        Formation::AwaitingBeacon => "awaiting-beacon",
        Formation::AwaitingRoot => "awaiting-root",
        Formation::Formed => "formed",
    }
}

/// Why this node does not serve releases; `None` when it does.
pub(crate) fn not_ready(services: &Services) -> Option<String> {
    if let Some(fork) = services.heads.watch_fork().borrow().clone() {
        return Some(format!("FORK: {fork}"));
    }
    let raft = services.raft.status();
    if let Err(reason) = &raft.running {
        return Some(format!("raft stopped: {reason}"));
    }
    if raft.leadership.leader.is_none() {
        return Some("no leader".to_owned());
    }
    let formation = read(&*services.log, |state| view::formation(Some(state))).unwrap_or(Formation::AwaitingGenesis);
    if formation != Formation::Formed {
        return Some(formation_name(formation).to_owned());
    }
    if !services.confirmed() {
        return Some("awaiting a certificate of this node's snapshot".to_owned());
    }
    if services.birth.genesis().has_roots() && services.holder.shares().in_use().is_none() {
        let lost = services.share_lost().map(|why| format!(": {why}; it comes back with a resharing"));
        return Some(format!("no share of the active epoch{}", lost.unwrap_or_default()));
    }
    let log_time = read(&*services.log, |state| state.log_time).unwrap_or_default();
    dstack_release::clearance::check_clock(log_time, (services.now)()).err().map(|refusal| refusal.to_string())
}

/// Why a majority does not answer now; `None` when it does. A follower of a dead leader learns of it here first.
pub(crate) async fn without_quorum(services: &Services) -> Option<String> {
    let asked = services.raft.linearizable_read(QUORUM_PATIENCE).await;
    asked.err().map(|error| format!("{}: {error}", RefusalCode::NoQuorum.text()))
}

/// The status document.
pub(crate) fn json(services: &Services) -> Value {
    let raft = services.raft.status();
    let share = services.holder.shares().in_use();
    let applied = read(&*services.log, |state| state_json(state, services)).unwrap_or_else(|_| json!({ "formation": "awaiting-genesis" }));
    let not_ready = not_ready(services);
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "cluster_id": services.birth.cluster_id().to_string(),
        "seat": services.seat.0,
        "software_tee": services.trust.software,
        "ready": not_ready.is_none(),
        "not_ready": not_ready,
        "raft": {
            "term": raft.leadership.term,
            "leader": raft.leadership.leader.map(|seat| seat.0),
            "is_leader": raft.leadership.is_leader,
            "votes": raft.voting == Voting::Votes,
            "voting": voting_text(raft.voting),
            "last_index": raft.last_index,
            "committed_index": raft.committed_index,
            "applied_index": raft.applied_index,
            "snapshot_index": raft.snapshot_index,
            "voters": raft.voters.iter().map(|seat| seat.0).collect::<Vec<_>>(),
        },
        "share": share.map(|share| json!({ "index": share.index.0, "generation": share.generation.0, "epoch": share.epoch.0 })),
        "share_lost": services.share_lost(),
        "shares": shares_json(services),
        "dstack": services.for_guests.json(),
        "signing_runs": services.signing.running(),
        "seals": services.seals,
        "certified_size": services.heads.certified_size(),
        "fork": services.heads.watch_fork().borrow().clone(),
        "tcb": services.trust.standings.listed((services.now)()).into_iter().map(standing_json).collect::<Vec<_>>(),
        "node_policy": hex::encode(services.trust.node_policy()),
        "collateral": collateral_json(services),
        "authority": authority_json(services),
        "state": applied,
    })
}

/// Of each root: whether this node's share is in use, and why not where it is gone.
fn shares_json(services: &Services) -> Value {
    let of = |root: RootTag| {
        let share = services.holder.shares().in_use_of(root);
        let row = json!({
            "index": share.map(|share| share.index.0),
            "epoch": share.map(|share| share.epoch.0),
            "lost": services.share_lost_of(root),
            "signs": services.signing.can_sign(root),
            // Holders with whom the secrets for ECDSA runs were lost: a setup with each of them makes new ones.
            "pairs_missing": services.signing.pairs_missing(root).iter().map(|index| index.0).collect::<Vec<_>>(),
            // Named by this node as cheating in the oblivious transfer: it makes no more runs with them until it is started again.
            "expelled": services.signing.expelled(root).iter().map(|index| index.0).collect::<Vec<_>>(),
        });
        (root.name().to_owned(), row)
    };
    Value::Object(RootTag::ALL.into_iter().map(of).collect())
}

fn standing_json((subject, standing): (Subject, TcbStanding)) -> Value {
    let (kind, id) = match subject {
        Subject::App(app) => ("app", app.to_string()),
        Subject::Node(seat) => ("node", seat.to_string()),
    };
    json!({ "kind": kind, "id": id, "standing": standing.name(), "grace_until_ms": standing.grace_until().map(|until| until.0) })
}

/// The moment from which nothing is released with this collateral, unix ms.
#[expect(clippy::cast_precision_loss, reason = "milliseconds since 1970 stay below 2^52")]
fn usable_until(services: &Services, dates: &Dates) -> f64 {
    dates.next_update.min(dates.renewed_issue.plus_ms(services.collateral.age_ms_max)).0 as f64
}

/// This node's webhook authority; `null` where it has none, and refuses what would ask it.
fn authority_json(services: &Services) -> Value {
    let Some(authority) = services.holder.authority() else { return Value::Null };
    let health = authority.health();
    json!({
        "answers": health.failed.is_none() && health.answered.is_some(),
        "answered_ms": health.answered.map(|at| at.0),
        "failed_ms": health.failed.as_ref().map(|(at, _)| at.0),
        "failure": health.failed.map(|(_, why)| why),
    })
}

fn collateral_json(services: &Services) -> Value {
    let pinned = &services.trust.pinned;
    let Some(bundle) = pinned.current() else { return Value::Null };
    let now = (services.now)();
    let platforms: Vec<Value> = bundle
        .facts()
        .iter()
        .map(|(fmspc, facts)| {
            json!({
                "fmspc": hex::encode(fmspc),
                "tcb_evaluation": facts.tcb_evaluation,
                "qe_evaluation": facts.qe_evaluation,
                "issued_ms": facts.issued().0,
                "next_update_ms": facts.next_update.0,
            })
        })
        .collect();
    #[expect(clippy::cast_possible_truncation, reason = "seconds, for people")]
    let expires = pinned.dates().map(|dates| ((usable_until(services, &dates) - now.0 as f64) / 1000.0) as i64);
    json!({
        "id": hex::encode(bundle.id()),
        "mode": if services.collateral.fetch { "fetch" } else { "pinned" },
        "expires_s": expires,
        "age_s_max": services.collateral.age_ms_max / 1000,
        "platforms": platforms,
        "x509_certificates": bundle.x509().certificates.len(),
        "x509_crls": bundle.x509().crls.len(),
        "staged": pinned.staged().map(|staged| hex::encode(staged.id())),
    })
}

fn state_json(state: &State, services: &Services) -> Value {
    let public_key = |root| state.roots.get(&(Generation(0), root)).map(|row| hex::encode(&row.public_key.0));
    let now = (services.now)();
    json!({
        "formation": formation_name(view::formation(Some(state))),
        "size": state.size,
        "log_time_ms": state.log_time.0,
        "clock_skew_ms": i64::try_from(now.0).unwrap_or(i64::MAX).saturating_sub(i64::try_from(state.log_time.0).unwrap_or(i64::MAX)),
        "n": state.genesis.n,
        "t": state.genesis.t,
        "f": state.genesis.f,
        "members_version": state.members_version,
        "certificate_quorum": Genesis::certificate_quorum(state.seats.len(), state.genesis.f),
        "seats": state.seats.iter().map(|(seat, row)| json!({ "seat": seat.0, "index": row.index.0, "incarnation": row.incarnation })).collect::<Vec<_>>(),
        "epoch": state.epoch.0,
        "pk_prf": public_key(RootTag::Prf),
        "ca_pub": public_key(RootTag::Ca),
        "id_pub": public_key(RootTag::Id),
        "root_certificate": state.latest_signed(&SignKey::RootCa(Generation(0))).is_some(),
        "signatures": state.signatures.values().filter(|row| row.signed.is_some()).count(),
        "signatures_asked": state.signatures.values().map(|row| row.open.len()).sum::<usize>(),
        "ceremony_attempts": state.attempts,
        "ceremony_open": state.attempt.as_ref().map(|attempt| attempt.open.attempt),
        "apps": state.apps.len(),
        "env_keys": state.env_keys.values().filter(|row| row.published.is_some()).count(),
        "delegation": state.delegation.map(|hash| json!({
            "policy_hash": hex::encode(hash),
            "revoked": state.governance.revoked.contains(&Object::Delegation),
            "adopted": state.adopted(AdoptBasis::Booted),
            "asked": state.adopted(AdoptBasis::Asked),
        })),
        "open_intents": state.intents.len(),
        "collateral_id": hex::encode(state.collateral_id),
        "revoked": state.governance.revoked.len(),
        "pending_actions": state.governance.pending.len(),
        "timelock_s": state.governance.timelock_s,
    })
}

/// Refreshes the gauges; called before each scrape.
#[expect(clippy::cast_precision_loss, reason = "gauges are read by people; counts stay far below 2^52")]
pub(crate) fn gauges(services: &Services) {
    let share = services.holder.shares().in_use();
    metrics::gauge!("kms_node_share_epoch").set(share.map_or(0.0, |share| share.epoch.0 as f64));
    metrics::gauge!("kms_node_certified_leaves").set(services.heads.certified_size() as f64);
    metrics::gauge!("kms_node_ready").set(if not_ready(services).is_none() { 1.0 } else { 0.0 });
    let now = (services.now)();
    for standing in ["warn", "grace"] {
        let counts = services.trust.standings.count(standing, now);
        metrics::gauge!("kms_node_tcb_apps", "standing" => standing).set(f64::from(counts.apps));
        metrics::gauge!("kms_node_tcb_nodes", "standing" => standing).set(f64::from(counts.nodes));
    }
    if let Some(dates) = services.trust.pinned.dates() {
        metrics::gauge!("kms_node_collateral_age_seconds").set(now.since(dates.oldest_issue) as f64 / 1000.0);
        metrics::gauge!("kms_node_collateral_expires_seconds").set((usable_until(services, &dates) - now.0 as f64) / 1000.0);
    }
    let _before_genesis = read(&*services.log, |state| {
        let skew = now.0 as f64 - state.log_time.0 as f64;
        metrics::gauge!("kms_node_log_clock_skew_ms").set(skew);
        metrics::gauge!("kms_node_log_leaves").set(state.size as f64);
        let reachable =
            services.others.iter().filter(|seat| dstack_actors::ports::Peers::latency(&*services.peers, **seat).is_some()).count();
        let holders = reachable + usize::from(share.is_some());
        metrics::gauge!("kms_node_threshold_margin").set(holders as f64 - f64::from(state.genesis.t));
    });
}
