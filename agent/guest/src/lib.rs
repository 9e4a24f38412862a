//! Guest agent behind the dstack socket.
//!
//! Owns: measuring the app's compose file into the guest, fetching its keys once at the start, keeping them in locked memory, the v0
//! guest API of dstack on a unix socket. Never: writes a key to disk, sends one anywhere but to that socket, talks to a cluster other
//! than the one pinned in the measured compose file.
//! Source: issue 2 item 13; guest API reference §1–§3, §9, §10; threshold.md §1.4, §2.2.
//!
//! | module | what |
//! | --- | --- |
//! | [`config`] | the TOML file, checked |
//! | [`boot`] | compose file → measured guest → keys |
//! | [`identity`] | what the guest's own evidence says |
//! | [`app_key`] | `GetKey`: derivation and signature |
//! | [`api`] | methods of the v0 API |
//! | [`http`] | their HTTP form |
//! | [`admin`] | health, status, metrics |

#![forbid(unsafe_code)]

pub mod admin;
pub mod api;
pub mod app_key;
pub mod boot;
pub mod config;
pub mod http;
pub mod identity;
pub mod metrics;
