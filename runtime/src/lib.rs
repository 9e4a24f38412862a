//! Configuration, telemetry, clock, process hardening; shared by the binaries.
//!
//! Owns: everything a `main` does before its own work begins and after it ends. Never: protocol, keys or decisions.
//! Source: style.md §8 (config), §9 (logs and metrics); architecture.md §6 (panic policy).
//!
//! - [`clock`]: the only place that reads the system time.
//! - [`config`]: TOML file, then environment, then flags, into one typed struct.
//! - [`telemetry`]: logs to standard error, metrics in Prometheus' text form, the list of all metrics.
//! - [`hardening`]: core dumps off, descriptor limit up, memory locked, panics fatal.
//! - [`guard`]: the one exception to fatal panics, for parsers of foreign bytes.
//! - [`shutdown`]: SIGTERM and SIGINT as a token.

#![forbid(unsafe_code)]

pub mod clock;
pub mod config;
pub mod guard;
pub mod hardening;
pub mod shutdown;
pub mod telemetry;
