//! Real sockets on loopback, real evidence of software TEEs, production code on both sides.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, unreachable_pub, reason = "tests")]

mod flood;
mod handshake;
mod nodes;
mod plain;
mod probe;
mod raw;
mod rotation;
mod sessions;
mod timeouts;
mod world;
