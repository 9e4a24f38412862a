//! What a device answers when it cannot. Owns: [`TeeError`]. Never: carries a key.

use crate::software::protocol::RefusedCode;
use dstack_attest::AttestError;
use std::io::ErrorKind;

/// Why a device did not do what it was asked. None of it is a remote peer's fault.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TeeError {
    /// The config names no device of this build. Operator's to fix.
    #[error("unknown device {config:?}: this build opens \"software:/path/to/socket\" only; hardware devices come with a later version")]
    UnknownDevice {
        /// What the config says.
        config: String,
    },
    /// The socket cannot be connected to. Operator's to fix: is the device process running?
    #[error("cannot connect to the software device at {path}: {kind}")]
    Connect {
        /// Path of the socket.
        path: String,
        /// What the system says.
        kind: ErrorKind,
    },
    /// The device did not answer in time. Retry; the connection was given up.
    #[error("the device did not answer within {limit_ms} ms")]
    Timeout {
        /// How long it had.
        limit_ms: u64,
    },
    /// The connection broke, and again after it was made anew. Retry later.
    #[error("the connection to the device broke: {kind}")]
    Broken {
        /// What the system says.
        kind: ErrorKind,
    },
    /// The device speaks another protocol. Operator's to fix: program and device of different versions.
    #[error("the device does not speak this protocol: {why}")]
    Protocol {
        /// What was not understood.
        why: &'static str,
    },
    /// The device speaks another version of the protocol. Operator's to fix.
    #[error("the device speaks protocol version {got}, this program {want}")]
    Version {
        /// The device's.
        got: u32,
        /// Ours.
        want: u32,
    },
    /// The device refused. By `code`: ours to fix, or retry.
    #[error("the device refused: {message}")]
    Refused {
        /// Its reason.
        code: RefusedCode,
        /// Its words.
        message: String,
    },
    /// A request is larger than the device takes. Caller's to fix.
    #[error("{what} has {have_bytes} bytes, the device takes {limit_bytes}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Its size.
        have_bytes: usize,
        /// The most there may be.
        limit_bytes: usize,
    },
    /// The device's evidence is not what was asked for. The device is broken: do not use it.
    #[error("the device's evidence {why}")]
    BadEvidence {
        /// How it differs.
        why: &'static str,
    },
    /// The device's evidence does not decode. The device is broken: do not use it.
    #[error("the device's evidence does not decode: {0}")]
    UndecodableEvidence(AttestError),
    /// After a lost connection the guest booted into another identity than before. The device is broken: do not use it.
    #[error("the guest booted into another identity than before")]
    OtherIdentity,
    /// This device cannot boot guests: it is the one the program runs in.
    #[error("this device boots no guests")]
    NoGuests,
}
