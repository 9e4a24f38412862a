//! Logs and metrics. Owns: the log subscriber, the Prometheus recorder, the list of all metrics of a binary.
//! Never: a listener (the admin listener of a binary serves [`Metrics::render`]).
//! Source: style.md §9.

mod catalogue;
mod logging;

use std::time::Duration;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

pub use catalogue::{Catalogue, CatalogueError, METRICS, MetricKind, MetricRow};
pub use logging::{LogFormat, init_logging};

/// Why telemetry did not start. The operator's or our own mistake; nothing a peer can cause.
#[non_exhaustive]
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TelemetryError {
    /// The log filter does not parse.
    #[error("log filter `{filter}`: {reason}; expected a list like `info,dstack_raft=debug`")]
    Filter {
        /// As given.
        filter: String,
        /// The parser's reason.
        reason: String,
    },
    /// Logging or metrics were already started in this process.
    #[error("{part} already started in this process")]
    AlreadyStarted {
        /// Which.
        part: &'static str,
    },
    /// The recorder could not be built or its thread not started.
    #[error("metrics cannot start: {reason}")]
    Metrics {
        /// What the recorder or the system said.
        reason: String,
    },
}

/// Upper bounds, in seconds, of every histogram whose name ends in `_seconds`: 50 µs to 10 s.
const SECONDS_BUCKETS: [f64; 17] = [5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// The running recorder.
#[derive(Clone)]
pub struct Metrics {
    handle: PrometheusHandle,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// Installs the process-wide recorder, describes every metric of the catalogue, and starts the thread that keeps
    /// histograms small when nobody scrapes.
    ///
    /// # Errors
    /// A recorder is already installed, or the thread cannot start.
    pub fn install(catalogue: &Catalogue) -> Result<Self, TelemetryError> {
        let handle = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS_BUCKETS)
            .map_err(|error| TelemetryError::Metrics { reason: error.to_string() })?
            .install_recorder()
            .map_err(|_already| TelemetryError::AlreadyStarted { part: "metrics" })?;
        catalogue.describe();
        let upkeep = handle.clone();
        std::thread::Builder::new()
            .name("metrics-upkeep".to_owned())
            .spawn(move || {
                loop {
                    std::thread::sleep(Duration::from_secs(5));
                    upkeep.run_upkeep();
                }
            })
            .map_err(|error| TelemetryError::Metrics { reason: error.to_string() })?;
        Ok(Self { handle })
    }

    /// All metrics in Prometheus' text form.
    pub fn render(&self) -> String {
        self.handle.render()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recorded_values_are_rendered_with_their_description() {
        const ROWS: &[MetricRow] =
            &[("kms_runtime_test_total", "counter", "", "Counts this test."), ("kms_runtime_test_seconds", "histogram", "", "Times it.")];
        let catalogue = Catalogue::new().with("test", ROWS).unwrap();
        let metrics = Metrics::install(&catalogue).unwrap();
        metrics::counter!("kms_runtime_test_total").increment(3);
        metrics::histogram!("kms_runtime_test_seconds").record(0.002);
        let text = metrics.render();
        assert!(text.contains("# HELP kms_runtime_test_total Counts this test."), "{text}");
        assert!(text.contains("kms_runtime_test_total 3"), "{text}");
        assert!(text.contains("kms_runtime_test_seconds_bucket{le=\"0.0025\"} 1"), "{text}");
        assert_eq!(Metrics::install(&catalogue).unwrap_err(), TelemetryError::AlreadyStarted { part: "metrics" });
    }
}
