//! Whole clusters of real processes over loopback sockets, with emulated TEEs. Each test has its own cluster and ends it.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod authority;
mod bad_input;
mod by_hand;
mod client;
mod collateral;
mod dstack;
mod dstack_hostile;
mod faults;
mod flood;
mod full_disk;
mod genesis;
mod keyless;
mod memory;
mod onboard;
mod onboard_waits;
mod releases;
mod rogue;
mod signing;
mod story;
mod tdx;
mod workload;
