//! The software TEE as a device: a unix socket served by a testkit process. Owns: the socket's protocol and its client.
//! Never: links the server or holds a root's key; a binary that trusts a software root was told so in its config.

mod client;
mod connection;
pub mod frame;
pub mod protocol;

pub use client::{ANSWER_LIMIT, SoftwareDevice};
