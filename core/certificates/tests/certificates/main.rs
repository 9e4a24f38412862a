//! Tests of the certificates: golden bytes, chains before three judges (ours, openssl, webpki), hostile bytes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

mod chains;
mod hostile;
mod objects;
mod support;
mod temp;
