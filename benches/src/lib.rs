//! Criterion and load benches.
