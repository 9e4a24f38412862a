//! Guest agent behind the dstack socket.
//!
//! Owns: a guest with its keys, fetched from the cluster once at the start or left by the boot, in locked memory; dstack's guest APIs
//! on their sockets. Never: writes a key to disk, sends one anywhere but to those sockets, talks to a cluster other than the one pinned
//! in the measured compose file.
//! Source: issue 4 items 5 and 9; guest API reference; threshold.md §1.4, §2.2.
//!
//! | module | what |
//! | --- | --- |
//! | [`config`], [`upstream`] | the configuration, checked; files of dstack's own agent |
//! | [`boot`], [`keys`], [`keys_file`] | compose file → measured guest → keys |
//! | [`guest`], [`identity`], [`info`] | what is known of the guest, and what is told |
//! | [`app_key`], [`app_key_v1`], [`signing`], [`report_data`], [`identity_signature`] | derivations, signatures, what quotes bind |
//! | [`certify`] | certificates by the cluster or a local CA |
//! | [`api`], [`api_v1`], `tappd`, `host_api`, `pages` | what each method and page does |
//! | [`http`], [`listen`], [`systemd`] | paths, sockets, readiness |
//! | [`docker`], [`machine`], [`network`], [`outgoing`] | the machine around the guest |
//! | [`admin`] | health, status, metrics |

#![forbid(unsafe_code)]

pub mod admin;
pub mod api;
pub mod api_v1;
pub mod app_key;
pub mod app_key_v1;
pub mod boot;
pub mod certify;
pub mod config;
pub mod docker;
pub mod guest;
mod host_api;
pub mod http;
pub mod identity;
pub mod identity_signature;
pub mod info;
pub mod keys;
pub mod keys_file;
pub mod listen;
pub mod machine;
pub mod metrics;
pub mod network;
pub mod outgoing;
mod pages;
pub mod report_data;
pub mod signing;
pub mod systemd;
mod tappd;
pub mod upstream;
