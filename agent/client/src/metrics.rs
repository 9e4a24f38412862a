//! Metrics of this crate. Owns: their names and closed label sets.

use std::time::Duration;

use crate::error::{ClientError, NodeFault};

/// `(name, kind, labels, meaning)` of every metric here.
pub const METRICS: &[(&str, &str, &str, &str)] = &[
    ("kms_client_releases_total", "counter", "outcome", "Releases asked for; outcome is ok or the error's code."),
    ("kms_client_release_seconds", "histogram", "", "Releases that gave keys, from the wish to the keys."),
    ("kms_client_node_faults_total", "counter", "fault", "Requests that a node did not serve, by what was wrong."),
    ("kms_client_bad_partials_total", "counter", "", "Partials dropped because they were wrong. Alarm on any: a holder or a relay lies."),
    ("kms_client_looks_total", "counter", "outcome", "Looks for the cluster's nodes; outcome is ok, or no_answer where no node told them."),
    ("kms_client_nodes", "gauge", "", "Nodes in use: the configured ones and those learnt."),
    ("kms_client_sessions_total", "counter", "", "Sessions begun: a new key and new evidence each."),
];

pub(crate) fn released(outcome: Result<Duration, &ClientError>) {
    let label = outcome.as_ref().err().map_or("ok", |error| error.code());
    metrics::counter!("kms_client_releases_total", "outcome" => label).increment(1);
    if let Ok(took) = outcome {
        metrics::histogram!("kms_client_release_seconds").record(took.as_secs_f64());
    }
}

pub(crate) fn node_fault(fault: &NodeFault) {
    metrics::counter!("kms_client_node_faults_total", "fault" => fault.label()).increment(1);
}

pub(crate) fn looked(is_answered: bool, nodes: usize) {
    metrics::counter!("kms_client_looks_total", "outcome" => if is_answered { "ok" } else { "no_answer" }).increment(1);
    metrics::gauge!("kms_client_nodes").set(u32::try_from(nodes).map_or(f64::MAX, f64::from));
}

pub(crate) fn bad_partials(count: usize) {
    metrics::counter!("kms_client_bad_partials_total").increment(count as u64);
}

pub(crate) fn session() {
    metrics::counter!("kms_client_sessions_total").increment(1);
}
