//! Metrics of this crate. Owns: their names and closed label sets.

use std::time::Duration;

/// `(name, kind, labels, meaning)` of every metric here.
pub const METRICS: &[(&str, &str, &str, &str)] = &[
    ("kms_agent_requests_total", "counter", "service method outcome", "Requests of each service; outcome is ok or error."),
    ("kms_agent_request_seconds", "histogram", "service method", "Time to answer a request."),
];

pub(crate) fn request(service: &'static str, method: &'static str, is_ok: bool, took: Duration) {
    let outcome = if is_ok { "ok" } else { "error" };
    metrics::counter!("kms_agent_requests_total", "service" => service, "method" => method, "outcome" => outcome).increment(1);
    metrics::histogram!("kms_agent_request_seconds", "service" => service, "method" => method).record(took.as_secs_f64());
}
