//! The production TDX producer against the kernel's files, emulated by FUSE over a software TD: what it hands out is what production
//! verification accepts, and every fault of kernel and host is told by its own error. Needs root and /dev/fuse.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod faults;
mod guest;
mod measuring;
