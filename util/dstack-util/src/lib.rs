//! The minimal in-enclave helper.
//!
//! Owns: `get-keys`: one release from this machine's evidence, written as dstack's `AppKeys` JSON; `show`: what this machine is;
//! `forward`: the parent's end of an enclave's way to the nodes. Never: keeps a key anywhere but in the file that was asked for.
//! Source: util and deploy reference §2, §10; issue 2 item 13.
//!
//! | module | what |
//! | --- | --- |
//! | [`config`] | file, environment and flags, checked |
//! | [`get_keys`] | evidence → keys |
//! | [`app_keys`] | the JSON document |
//! | [`show`] | device and measurement, for policies |
//! | [`forward`] | CONNECT proxy on vsock, allowed targets only |

#![forbid(unsafe_code)]

pub mod app_keys;
pub mod config;
pub mod forward;
pub mod get_keys;
pub mod show;
