//! Tests of every layout: golden vectors, round trips, strictness, any bytes.
//!
//! - `make`: values of every type from a stream of bytes.
//! - `table`: every layout under its name.
//! - `golden`: the vectors of `tests/vectors/layouts`.
//! - `strict`: what must be refused. `property`: what holds for all values and all bytes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

mod golden;
mod make;
mod property;
mod strict;
mod table;
