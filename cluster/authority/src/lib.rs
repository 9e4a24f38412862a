//! Client of dstack's webhook authority, so that an existing `auth-simple` or `auth-eth` deployment decides which apps may boot.
//!
//! Owns: what is told of a guest ([`BootInfo`]), asking, how long a yes is believed. Never: a yes without an answer of the authority in
//! its lease; a redirect, a proxy, a retry that hides an outage. Each holder asks for itself, so no node's word stands for another's.
//! Source: KMS API reference §9. Stricter than upstream: timeouts, an answer's size is bounded, the caller can authenticate, and a yes
//! is kept for a lease instead of being asked for twice a request.

#![forbid(unsafe_code)]

mod authority;
mod boot_info;
mod error;
mod http;
mod leases;

pub use authority::{About, Allowed, Authority, LEASE_MAX, Settings, Subject};
pub use boot_info::BootInfo;
pub use error::AuthorityError;
