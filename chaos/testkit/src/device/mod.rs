//! The device process: one unix socket per emulated machine. Owns: sockets, connections, the measurement of who asks.
//! Never: lets a client choose its measurement, or its machine's identity.

mod connection;
mod peer;
mod server;
mod spec;

pub use peer::Executables;
pub use server::{Serving, serve};
pub use spec::{MachineKind, MachineSpec, Tcb};
