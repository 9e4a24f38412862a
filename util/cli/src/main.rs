//! Binary dstack: operators and app owners.

fn main() {}
