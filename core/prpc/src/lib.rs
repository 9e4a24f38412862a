//! dstack's RPC, as data: messages in their JSON and protobuf forms, method names, error shapes. Never: a socket, a handler.
//! Source: KMS API reference §1, §3; guest API reference §2–§7.
//!
//! | module | what |
//! | --- | --- |
//! | [`kms`] | services `KMS`, `Admin`, `Onboard` |
//! | [`guest`] | `DstackGuest` v0, `Tappd`, `Worker` |
//! | [`guest_v1`] | `dstack.guest.v1` |
//! | [`host`] | `GuestApi`, `ProxiedGuestApi`, `HostApi` |
//! | [`gateway`] | `Gateway`, as a guest calls it |
//! | [`codec`] | which form a request is in; decoding, encoding |
//! | [`json`], [`query`] | the JSON form and its GET variant |
//! | [`error`] | errors in both forms |
//! | [`schema`] | all of them as data |
//!
//! Every message has public fields in the order of its proto file and reads both forms. A message that carries a key wipes it when it
//! is dropped, shows no field in `Debug` and is not `Clone`; the encoded bytes of an answer are the caller's to guard.

#![forbid(unsafe_code)]

#[macro_use]
pub mod schema;
#[macro_use]
mod message;
#[macro_use]
mod service;

pub mod codec;
pub mod error;
pub mod gateway;
pub mod guest;
pub mod guest_v1;
pub mod host;
pub mod json;
pub mod kms;
pub mod query;

pub use codec::{Codec, Encoded};
pub use error::{ProtoError, RpcError};
pub use message::{Empty, Rpc};
