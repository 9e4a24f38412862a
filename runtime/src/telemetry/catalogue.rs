//! The list of all metrics. Owns: the form of a crate's `metrics.rs`, its check, the generated page `docs/metrics.md`.
//! Never: records a value.
//!
//! Crates that do not depend on this one list their metrics as plain rows, so that the list lives beside the code that
//! records them.

/// `(name, kind, labels separated by spaces, what it means)`; kind is `counter`, `gauge` or `histogram`.
pub type MetricRow = (&'static str, &'static str, &'static str, &'static str);

/// This crate's own metrics.
pub const METRICS: &[MetricRow] =
    &[("kms_runtime_guarded_panics_total", "counter", "", "Panics of guarded parser threads; each refused one request. Alarm on any.")];

/// Kind of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricKind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Distribution.
    Histogram,
}

/// A row breaks the rules of style.md §9. Our own mistake; found by each binary's start and tests.
#[non_exhaustive]
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CatalogueError {
    /// The name is not `kms_<crate>_<thing>_<unit>` in lower case.
    #[error("metric name `{0}` does not follow kms_<crate>_<thing>")]
    Name(&'static str),
    /// The kind is none of the three, or does not fit the name's unit.
    #[error("metric `{name}` cannot be a {kind}: a counter ends in _total, nothing else does")]
    Kind {
        /// The metric.
        name: &'static str,
        /// As written in the row.
        kind: &'static str,
    },
    /// Two rows with one name.
    #[error("metric `{0}` is listed twice")]
    Twice(&'static str),
}

/// Checked rows of several crates.
#[derive(Debug, Default)]
pub struct Catalogue {
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    crate_name: &'static str,
    kind: MetricKind,
    row: MetricRow,
}

impl Catalogue {
    /// Begins with this crate's own.
    pub fn new() -> Self {
        let entries = METRICS.iter().map(|row| Entry { crate_name: "runtime", kind: MetricKind::Counter, row: *row }).collect();
        Self { entries }
    }

    /// Adds the rows of one crate.
    ///
    /// # Errors
    /// [`CatalogueError`], when a row breaks the naming rules.
    pub fn with(mut self, crate_name: &'static str, rows: &[MetricRow]) -> Result<Self, CatalogueError> {
        for row in rows {
            let kind = check(row)?;
            if self.entries.iter().any(|entry| entry.row.0 == row.0) {
                return Err(CatalogueError::Twice(row.0));
            }
            self.entries.push(Entry { crate_name, kind, row: *row });
        }
        Ok(self)
    }

    /// Gives every description to the installed recorder.
    pub fn describe(&self) {
        for Entry { kind, row: (name, _, _, help), .. } in &self.entries {
            match kind {
                MetricKind::Counter => metrics::describe_counter!(*name, *help),
                MetricKind::Gauge => metrics::describe_gauge!(*name, *help),
                MetricKind::Histogram => metrics::describe_histogram!(*name, *help),
            }
        }
    }

    /// The page `docs/metrics.md`.
    pub fn markdown(&self) -> String {
        let mut page = String::from(
            "# Metrics\n\nGenerated from the crates' lists; do not edit.\n\n| name | kind | labels | meaning | crate |\n| --- | --- | --- | --- | --- |\n",
        );
        for Entry { crate_name, row: (name, kind, labels, help), .. } in &self.entries {
            let labels = labels.split_whitespace().collect::<Vec<_>>().join(", ");
            page.push_str(&format!("| `{name}` | {kind} | {labels} | {help} | {crate_name} |\n"));
        }
        page
    }
}

fn check(row: &MetricRow) -> Result<MetricKind, CatalogueError> {
    let (name, kind_name, _, _) = *row;
    let well_formed = name.starts_with("kms_")
        && name.split('_').count() >= 3
        && name.split('_').all(|part| !part.is_empty())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if !well_formed {
        return Err(CatalogueError::Name(name));
    }
    match (kind_name, name.ends_with("_total")) {
        ("counter", true) => Ok(MetricKind::Counter),
        ("gauge", false) => Ok(MetricKind::Gauge),
        ("histogram", false) => Ok(MetricKind::Histogram),
        _ => Err(CatalogueError::Kind { name, kind: kind_name }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_enforced() {
        let add = |row: MetricRow| Catalogue::new().with("x", &[row]).map(|_| ());
        assert_eq!(add(("kms_x_connections", "gauge", "", "")), Ok(()));
        assert_eq!(add(("x_connections", "gauge", "", "")), Err(CatalogueError::Name("x_connections")));
        assert_eq!(add(("kms_X_y", "gauge", "", "")), Err(CatalogueError::Name("kms_X_y")));
        assert_eq!(add(("kms_x_y", "counter", "", "")), Err(CatalogueError::Kind { name: "kms_x_y", kind: "counter" }));
        assert_eq!(add(("kms_x_y_total", "gauge", "", "")), Err(CatalogueError::Kind { name: "kms_x_y_total", kind: "gauge" }));
        assert_eq!(add(METRICS[0]), Err(CatalogueError::Twice(METRICS[0].0)));
    }

    #[test]
    fn own_rows_are_right_and_on_the_page() {
        for row in METRICS {
            assert!(check(row).is_ok());
        }
        assert!(Catalogue::new().markdown().contains("| `kms_runtime_guarded_panics_total` | counter |"));
    }
}
