//! The table at the end: estimate, measured, ratio. Owns: reading what criterion wrote, formatting. Never: judges a figure.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::estimates::{Clock, ESTIMATES, Estimate, OVER_ECDSA};

/// Median of a benchmark's newest run below `folder`, criterion's directory; `None` where it did not run.
#[must_use]
pub fn measured(folder: &Path, name: &str) -> Option<Duration> {
    let path: PathBuf = folder.join(name).join("new").join("estimates.json");
    let text = std::fs::read_to_string(path).ok()?;
    let value: Value = serde_json::from_str(&text).ok()?;
    let nanoseconds = value.get("median")?.get("point_estimate")?.as_f64()?;
    (nanoseconds.is_finite() && nanoseconds >= 0.0).then(|| Duration::from_secs_f64(nanoseconds / 1e9))
}

/// All benchmarks with a result, as a Markdown table.
#[must_use]
pub fn table(folder: &Path) -> String {
    let mut out = "| benchmark | clock | estimate | measured | measured / estimate |\n| --- | --- | ---: | ---: | ---: |\n".to_owned();
    for estimate in ESTIMATES {
        if let Some(measured) = measured(folder, estimate.name) {
            out.push_str(&row(estimate, measured));
        }
    }
    out
}

/// Verifications of evidence over those of their signatures alone, of the same run, as a Markdown table.
#[must_use]
pub fn over_ecdsa(folder: &Path) -> String {
    let mut out = "| benchmark | measured | its ECDSA alone | ratio |\n| --- | ---: | ---: | ---: |\n".to_owned();
    for (name, alone) in OVER_ECDSA {
        if let (Some(whole), Some(part)) = (measured(folder, name), measured(folder, alone)) {
            let ratio = whole.as_secs_f64() / part.as_secs_f64();
            writeln!(out, "| `{name}` | {} | {} | {ratio:.2} |", short(whole), short(part)).unwrap();
        }
    }
    out
}

fn row(estimate: &Estimate, measured: Duration) -> String {
    let clock = match estimate.clock {
        Clock::Cpu => "cpu",
        Clock::Wall => "wall",
    };
    let ratio = measured.as_secs_f64() / estimate.expected.as_secs_f64();
    let mut line = String::new();
    let (expected, measured) = (short(estimate.expected), short(measured));
    writeln!(line, "| `{}` | {clock} | {expected} | {measured} | {ratio:.2} |", estimate.name).unwrap();
    line
}

/// Three digits and a unit.
#[must_use]
pub fn short(duration: Duration) -> String {
    let nanoseconds = duration.as_nanos() as f64;
    let (value, unit) = match nanoseconds {
        n if n < 1e3 => (n, "ns"),
        n if n < 1e6 => (n / 1e3, "µs"),
        n if n < 1e9 => (n / 1e6, "ms"),
        n => (n / 1e9, "s"),
    };
    match value {
        v if v < 10.0 => format!("{v:.2} {unit}"),
        v if v < 100.0 => format!("{v:.1} {unit}"),
        v => format!("{v:.0} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_three_digits() {
        for (nanoseconds, text) in
            [(7, "7.00 ns"), (1_234, "1.23 µs"), (45_678, "45.7 µs"), (2_345_678, "2.35 ms"), (61_000_000_000, "61.0 s")]
        {
            assert_eq!(short(Duration::from_nanos(nanoseconds)), text);
        }
    }

    #[test]
    fn the_table_holds_what_ran() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("ratls/request/1k/new");
        std::fs::create_dir_all(&place).unwrap();
        std::fs::write(place.join("estimates.json"), r#"{"median":{"point_estimate":35000.0}}"#).unwrap();
        let table = table(folder.path());
        assert_eq!(table.lines().count(), 3);
        assert!(table.ends_with("| `ratls/request/1k` | cpu | 70.0 µs | 35.0 µs | 0.50 |\n"), "{table}");
    }
}
