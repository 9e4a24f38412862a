//! Thin supervised actix shells around the cores.
//!
//! Owns: the actors of a node and the ports they reach the rest through. Never: a rule (the cores hold those), a socket, a file.
//! Every mailbox is bounded and a full one refuses early with a retry hint. Source: architecture.md §6, style.md §6.
//!
//! | actor | core | runs on |
//! | --- | --- | --- |
//! | [`verifier`] | attest | its own threads |
//! | [`policy`] | release, policy | an arbiter |
//! | [`share_holder`] | threshold | its own threads; the only one that touches a share |
//! | [`recorder`] | audit | an arbiter; batches intents |
//! | [`release`] | release | an arbiter, one actor per request |
//! | [`combine`] | threshold, audit | modes L and E: this node is its own client |
//! | [`ceremony`] | threshold | an arbiter |
//! | [`signing`] | threshold, certificates | the node's runtime; shares stay with the share holder |
//! | [`authority`], [`adoption`] | | threads that may wait: this node's webhook authority, and apps that only it knows |
//! | [`holder`] | | joins verifier, policy and share holder for a peer's ask and go |
#![forbid(unsafe_code)]

pub mod adoption;
pub mod authority;
pub mod board;
pub mod ceremony;
pub mod combine;
mod guarded;
pub mod holder;
pub mod mailbox;
pub mod metrics;
pub mod policy;
pub mod ports;
pub mod recorder;
pub mod release;
#[cfg(feature = "insecure-rogue")]
pub mod rogue;
pub mod share_holder;
pub mod signing;
pub mod standings;
pub mod verifier;
