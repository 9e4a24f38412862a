//! Metrics of this crate. Owns: their names, labels and help texts. Never: an id as a label.
//! Source: style.md §9.

use std::time::Duration;

use crate::transport::RpcKind;

/// Names and help texts, for the generated list of metrics.
pub const METRICS: &[(&str, &str, &str, &str)] = &[
    (RPC_REFUSED, "counter", "rpc reason", "Raft RPCs of peers that were refused."),
    (RPC_FAILED, "counter", "rpc", "Raft RPCs to peers that gave no answer."),
    (PROPOSE_SECONDS, "histogram", "outcome", "Time from a proposal to its answer."),
    (TERM, "gauge", "", "Current Raft term."),
    (APPLIED, "gauge", "", "Index of the last applied log entry."),
    (LEADER, "gauge", "", "1 on the leader, 0 elsewhere."),
];

const RPC_REFUSED: &str = "kms_raft_rpc_refused_total";
const RPC_FAILED: &str = "kms_raft_rpc_failed_total";
const PROPOSE_SECONDS: &str = "kms_raft_propose_seconds";
const TERM: &str = "kms_raft_term";
const APPLIED: &str = "kms_raft_applied_index";
const LEADER: &str = "kms_raft_leader";

pub(crate) fn rpc_refused(kind: RpcKind, code: &'static str) {
    metrics::counter!(RPC_REFUSED, "rpc" => kind.name(), "reason" => code).increment(1);
}

pub(crate) fn rpc_failed(kind: RpcKind) {
    metrics::counter!(RPC_FAILED, "rpc" => kind.name()).increment(1);
}

pub(crate) fn proposed(outcome: &'static str, elapsed: Duration) {
    metrics::histogram!(PROPOSE_SECONDS, "outcome" => outcome).record(elapsed.as_secs_f64());
}

pub(crate) fn leadership(term: u64, leader: bool) {
    metrics::gauge!(TERM).set(term as f64);
    metrics::gauge!(LEADER).set(if leader { 1.0 } else { 0.0 });
}

pub(crate) fn applied(index: u64) {
    metrics::gauge!(APPLIED).set(index as f64);
}
