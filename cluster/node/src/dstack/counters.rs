//! The two counters of dstack's own `/metrics`. Owns: their names and text. Our own metrics are on the admin listener. Source: KMS API
//! reference §1: calls to `GetAppKey`, `GetKmsKey` and `SignCert`, and of those the ones answered with status 400 or more.

use std::sync::atomic::{AtomicU64, Ordering};

/// See the module text.
#[derive(Debug, Default)]
pub(super) struct Counters {
    requests: AtomicU64,
    failures: AtomicU64,
}

impl Counters {
    /// One call was answered.
    pub(super) fn attestation(&self, failed: bool) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.failures.fetch_add(u64::from(failed), Ordering::Relaxed);
    }

    /// Prometheus text.
    pub(super) fn render(&self) -> String {
        let counter = |name: &str, help: &str, value: &AtomicU64| {
            format!("# HELP {name} {help}\n# TYPE {name} counter\n{name} {}\n", value.load(Ordering::Relaxed))
        };
        counter("dstack_kms_attestation_requests_total", "Total number of KMS attestation requests.", &self.requests)
            + &counter("dstack_kms_attestation_failures_total", "Total number of failed KMS attestation requests.", &self.failures)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_calls_and_failures() {
        let counters = Counters::default();
        counters.attestation(false);
        counters.attestation(true);
        let text = counters.render();
        assert!(
            text.contains("\ndstack_kms_attestation_requests_total 2\n") && text.contains("\ndstack_kms_attestation_failures_total 1\n")
        );
    }
}
