//! The minimal in-enclave helper.

fn main() {}
