//! Metrics of this crate. Owns: their names and closed label sets.

use std::time::Duration;

use crate::admission::Stage;
use crate::judge::JudgeError;
use crate::peer::PeerRole;

/// `(name, kind, labels, meaning)` of every metric here.
pub const METRICS: &[(&str, &str, &str, &str)] = &[
    ("kms_ratls_connections", "gauge", "stage", "Open connections by how far they have come."),
    ("kms_ratls_evicted_total", "counter", "stage", "Connections that gave way because their stage was full."),
    ("kms_ratls_refused_total", "counter", "reason", "Connections refused before or after their handshake."),
    ("kms_ratls_judged_total", "counter", "role outcome", "Certificates judged; outcome is ok or the refusal's code."),
    ("kms_ratls_verdicts_total", "counter", "outcome", "Evidence judged: verified is a miss of the cache, cached a hit."),
    ("kms_ratls_verdicts_kept", "gauge", "", "Verdicts on evidence in the cache."),
    ("kms_ratls_parser_panics_total", "counter", "", "Panics while parsing or judging a certificate. Alarm on any."),
    ("kms_ratls_handshake_seconds", "histogram", "", "Server handshakes that succeeded, from ClientHello to the end."),
    ("kms_ratls_rotations_total", "counter", "", "Certificates taken into use after the first."),
    ("kms_ratls_accept_errors_total", "counter", "", "Failures to accept, mostly for want of descriptors."),
    ("kms_ratls_peer_requests_total", "counter", "outcome", "Requests to other nodes; outcome is ok or the error's code."),
];

pub(crate) fn connections(stage: Stage, count: usize) {
    #[expect(clippy::cast_precision_loss, reason = "counts of connections are far below 2^52")]
    metrics::gauge!("kms_ratls_connections", "stage" => stage.name()).set(count as f64);
}

pub(crate) fn evicted(stage: Stage) {
    metrics::counter!("kms_ratls_evicted_total", "stage" => stage.name()).increment(1);
}

pub(crate) fn refused(reason: &'static str) {
    metrics::counter!("kms_ratls_refused_total", "reason" => reason).increment(1);
}

pub(crate) fn judged(role: PeerRole, error: Option<&JudgeError>) {
    let role = match role {
        PeerRole::Node => "node",
        PeerRole::Client => "client",
        PeerRole::Server => "server",
    };
    let outcome = error.map_or("ok", JudgeError::code);
    metrics::counter!("kms_ratls_judged_total", "role" => role, "outcome" => outcome).increment(1);
}

pub(crate) fn verdict(outcome: &'static str) {
    metrics::counter!("kms_ratls_verdicts_total", "outcome" => outcome).increment(1);
}

pub(crate) fn verdicts_kept(count: usize) {
    metrics::gauge!("kms_ratls_verdicts_kept").set(u32::try_from(count).map_or(f64::MAX, f64::from));
}

pub(crate) fn parser_panic() {
    metrics::counter!("kms_ratls_parser_panics_total").increment(1);
}

pub(crate) fn handshake(took: Duration) {
    metrics::histogram!("kms_ratls_handshake_seconds").record(took.as_secs_f64());
}

pub(crate) fn rotated() {
    metrics::counter!("kms_ratls_rotations_total").increment(1);
}

pub(crate) fn accept_error() {
    metrics::counter!("kms_ratls_accept_errors_total").increment(1);
}

pub(crate) fn peer_request(outcome: &'static str) {
    metrics::counter!("kms_ratls_peer_requests_total", "outcome" => outcome).increment(1);
}
