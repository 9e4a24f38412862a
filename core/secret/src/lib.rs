//! Secret containers: wiped on drop, redacted, compared in constant time.
//!
//! Owns: [`Secret`] (fixed size, on the heap, so that a move copies a pointer and never the bytes), [`SecretBytes`] (length known
//! at run time), [`Locked`] (a page of its own that is kept out of swap, core dumps and child processes) and [`Wiping`] (an allocator
//! that overwrites what is freed).
//! Never: clones, prints or serializes a secret; there is one way to the bytes, a closure.
//! Does not cover: an abort skips drops, so processes that hold secrets switch core dumps off; what a closure copies out of
//! a secret is the closure's to wipe; registers and stack slots of arithmetic on a secret.
//! Source: threshold.md §0 and §8, style.md §7.

mod bytes;
mod fixed;
mod locked;
mod wiping;

pub use bytes::SecretBytes;
pub use fixed::{Secret, WrongLength};
pub use locked::{LockWarning, Locked};
pub use wiping::Wiping;
