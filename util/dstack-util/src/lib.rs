//! The minimal in-enclave helper.
//!
//! Owns: `get-keys`: one release from this machine's evidence, written as dstack's `AppKeys` JSON; `show`: what this machine is;
//! `forward`: the parent's end of an enclave's way to the nodes. Never: keeps a key anywhere but in the file that was asked for.
//! Source: util and deploy reference §2, §10; issue 2 item 13.
//!
//! | module | what |
//! | --- | --- |
//! | [`cli`] | arguments |
//! | [`config`] | file, environment and flags, checked |
//! | [`dstack_kms`] | keys by dstack's protocol |
//! | [`system_proxy`] | the proxy that the environment names |
//! | [`get_keys`] | evidence → keys |
//! | [`app_keys`], [`published`] | the JSON document, and what of it a cluster publishes |
//! | [`show`] | device and measurement, for policies |
//! | [`commands`] | dstack's small subcommands |
//! | [`setup`] | the boot of a dstack guest, step by step |
//! | [`gateway`] | registration with a gateway, WireGuard's configuration |
//! | [`machine`] | this machine's device, and measuring into it |
//! | [`host_api`] | the host, as the guest calls it |
//! | [`files`], [`program`] | bounded reads, whole writes; programs of the system |
//! | [`forward`] | CONNECT proxy on vsock, allowed targets only |

#![forbid(unsafe_code)]

pub mod app_keys;
pub mod cli;
pub mod commands;
pub mod config;
pub mod dstack_kms;
pub mod files;
pub mod forward;
pub mod gateway;
pub mod get_keys;
pub mod host_api;
pub mod machine;
pub mod program;
pub mod published;
pub mod setup;
pub mod show;
pub mod system_proxy;
