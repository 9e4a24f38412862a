//! Benchmarks of the whole workspace: what they need, and what was expected before they ran.
//!
//! Owns: estimates, the processor clock, the table at the end, worlds to measure in. Never: a figure that nobody estimated first;
//! conditions and results stand in `docs/performance.md`. Source: style.md §12.
//!
//! - `micro` (criterion): the pure cores first, then TLS, storage and the replicated machine.
//! - `load`: releases on three local node processes.
//! - `dstack`: dstack's `GetAppKey` on such nodes, and the guest agent on its socket.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "whatever fails here ends the benchmark")]

pub mod clock;
pub mod cpu;
pub mod estimates;
pub mod holders;
pub mod log_world;
pub mod meter;
pub mod report;
pub mod series;
pub mod signers;
pub mod stages;
pub mod tls_world;
pub mod vectors;
