//! The minimal in-enclave helper.
