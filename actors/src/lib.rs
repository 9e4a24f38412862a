//! Thin shells around the cores: actix actors where something computes for long or must not leave its threads, tasks elsewhere (ADR 0031).
//!
//! Owns: the actors of a node and the ports they reach the rest through. Never: a rule (the cores hold those), a socket, a file.
//! Every mailbox and queue is bounded and a full one refuses early with a retry hint. Source: architecture.md §6, style.md §6.
//!
//! | part | core | runs on |
//! | --- | --- | --- |
//! | [`verifier`] | attest | its own threads |
//! | [`policy`] | release, policy | the caller's thread: it has no state |
//! | [`share_holder`] | threshold | its own threads; the only one that touches a share |
//! | [`recorder`] | audit | the node's runtime; one task proposes batch after batch |
//! | [`release`] | release | the node's runtime, one task per request with its own inputs |
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
