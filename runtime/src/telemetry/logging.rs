//! The log subscriber. Owns: format, filter and destination (standard error). Never: a file or a network sink; the
//! process manager takes standard error where it should go.

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt};

use super::TelemetryError;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One JSON object a line, for machines.
    Json,
    /// For people; coloured on a terminal.
    Pretty,
}

/// Starts logging. `filter`: a default level and levels by target prefix, as in `info,dstack_raft=debug,openraft=warn`.
///
/// # Errors
/// [`TelemetryError::Filter`] or [`TelemetryError::AlreadyStarted`].
pub fn init_logging(format: LogFormat, filter: &str) -> Result<(), TelemetryError> {
    let targets = parse_filter(filter)?;
    let layer: Box<dyn Layer<Registry> + Send + Sync> = match format {
        LogFormat::Json => {
            fmt::layer().json().flatten_event(true).with_current_span(true).with_span_list(false).with_writer(std::io::stderr).boxed()
        }
        LogFormat::Pretty => {
            let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
            fmt::layer().with_ansi(colours).with_writer(std::io::stderr).boxed()
        }
    };
    Registry::default().with(layer.with_filter(targets)).try_init().map_err(|_already| TelemetryError::AlreadyStarted { part: "logging" })
}

fn parse_filter(filter: &str) -> Result<Targets, TelemetryError> {
    let wrong = |reason: String| TelemetryError::Filter { filter: filter.to_owned(), reason };
    let mut targets = Targets::new();
    for part in filter.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let level = |name: &str| name.parse::<LevelFilter>().map_err(|_unknown| wrong(format!("`{name}` is no level")));
        targets = match part.split_once('=') {
            None => targets.with_default(level(part)?),
            Some((target, name)) => targets.with_target(target, level(name)?),
        };
    }
    Ok(targets)
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn filters_by_target_and_default() {
        let targets = parse_filter("info, dstack_raft=debug,openraft=off").unwrap();
        assert!(targets.would_enable("dstack_raft::network", &Level::DEBUG));
        assert!(targets.would_enable("anything", &Level::INFO));
        assert!(!targets.would_enable("anything", &Level::DEBUG));
        assert!(!targets.would_enable("openraft", &Level::ERROR));
    }

    #[test]
    fn a_word_that_is_no_level_is_refused() {
        assert!(matches!(parse_filter("loud"), Err(TelemetryError::Filter { .. })));
        assert!(matches!(parse_filter("info,x=loud"), Err(TelemetryError::Filter { .. })));
    }
}
