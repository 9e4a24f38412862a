//! Software TEEs, cluster harness, builders; for tests and demos only.

fn main() {}
