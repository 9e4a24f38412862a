//! Setup, demo, check, test, fix, ci, bench: one entry to everything.

fn main() {}
