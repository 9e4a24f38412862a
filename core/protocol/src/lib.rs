//! Every type and byte format on a wire, in the log or on disk, with its limits and versions.
//!
//! Owns: layouts, their strict decoders, identifiers, refusal codes. Never: verifies a signature, reads a clock,
//! opens a socket. Source: `threshold.md` §0–§3, §5 and `architecture.md` §2, §9; a layout's doc names its section.
#![forbid(unsafe_code)]

pub mod adopt;
pub mod binding;
pub mod ceremony;
pub mod codec;
pub mod collateral;
pub mod command;
pub mod coordinated;
pub mod env;
pub mod genesis;
pub mod governance;
pub mod hello;
pub mod ids;
pub mod limits;
pub mod log;
pub mod policy;
pub mod receipt;
pub mod refusal;
pub mod release;
pub mod rpc;
pub mod sign;
pub mod state;

pub use codec::{DecodeError, Wire};
pub use ids::{AppId, ClusterId, Epoch, Generation, NodeIndex, Platform, RootTag, Seat, TcbStatus, UnixMillis};
pub use refusal::{Refusal, RefusalCode};
