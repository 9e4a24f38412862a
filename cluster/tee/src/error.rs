//! What a device answers when it cannot. Owns: [`TeeError`]. Never: carries a key.

use crate::attribute::Fault;
use crate::software::protocol::RefusedCode;
use crate::tdx::TsmError;
use dstack_attest::AttestError;
use std::io::ErrorKind;
use std::path::Path;

/// Why a device did not do what it was asked. None of it is a remote peer's fault.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TeeError {
    /// The config names no device of this build. Operator's to fix.
    #[error(
        "unknown device {config:?}: \"tdx\", \"tdx:ROOT\", \"gcp\", \"nsm\", \"nsm:/dev/nsm\" and \"software:/path/to/socket\" are known"
    )]
    UnknownDevice {
        /// What the config says.
        config: String,
    },
    /// The config names a device that this build leaves out. Operator's to fix: another build, or another device.
    #[error("device {config:?} needs a build with feature `{feature}`; this one has it not")]
    NotBuilt {
        /// What the config says.
        config: String,
        /// Feature of this crate.
        feature: &'static str,
    },
    /// What follows the device's name is not understood. Operator's to fix.
    #[error("device {config:?}: {why}")]
    BadOption {
        /// What the config says.
        config: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The device's file cannot be opened. Operator's to fix: is this the right machine, is its driver loaded?
    #[error("cannot open {path}: {kind}")]
    DeviceFile {
        /// The file.
        path: String,
        /// What the system says.
        kind: ErrorKind,
    },
    /// The enclave's NSM refused or failed. By `why`: retry, or the device is not what the config says.
    #[error("nsm call {call} failed: {why}")]
    Nsm {
        /// Name of the call in AWS's API.
        call: &'static str,
        /// Its reason.
        why: &'static str,
    },
    /// The NSM's registers are of another hash than every verifier expects. Use another machine.
    #[error("the nsm's registers are {got}, not SHA384")]
    NsmDigest {
        /// Its hash.
        got: &'static str,
    },
    /// A measured register is zero: the enclave was started in debug mode. Operator's to fix: start it without.
    #[error("this enclave runs in debug mode (zero PCRs), so every verifier refuses its evidence; start it without `--debug-mode`")]
    DebugEnclave,
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
    /// Nothing can be measured at run time here: an enclave, or a node on an emulated machine. Nobody's fault.
    #[error("this device measures nothing at run time")]
    NoEvents,
    /// This device cannot boot guests: it is the one the program runs in.
    #[error("this device boots no guests")]
    NoGuests,
    /// The kernel gives no quote. By variant: whose to fix.
    #[error("{0}")]
    Tsm(#[from] TsmError),
    /// The TPM cannot. By variant: whose to fix.
    #[cfg(feature = "tpm")]
    #[error("{0}")]
    Tpm(#[from] crate::tpm::TpmError),
    /// A file of the system cannot be read or written. Operator's to fix.
    #[error("{path}: {}", std::io::Error::from_raw_os_error(*errno))]
    File {
        /// The file.
        path: String,
        /// The system's code.
        errno: i32,
    },
    /// A measurement register has another size than it must. The kernel's fault.
    #[error("{path} has {have_bytes} bytes, a register has {want_bytes}")]
    BadRegister {
        /// The file.
        path: String,
        /// Its size.
        have_bytes: usize,
        /// What it must be.
        want_bytes: usize,
    },
    /// This kernel cannot extend the register. Operator's to fix: Linux 6.16 or later for RTMR3; or measure nothing at run time.
    #[error("{path} is not there: this kernel cannot measure at run time (Linux 6.16 can)")]
    NoRegister {
        /// The file.
        path: String,
    },
    /// What was measured at run time and what the log says differ: no verifier accepts this guest. Operator's to fix: boot it anew.
    #[error("{register} is not what the runtime event log leads to: no verifier accepts this guest, boot it anew")]
    LogDiverged {
        /// The register.
        register: &'static str,
    },
    /// An event that verifiers would refuse. Caller's to fix.
    #[error("the event {why}")]
    BadEvent {
        /// What is wrong with it.
        why: &'static str,
    },
    /// The runtime event log is damaged. Operator's to fix: boot the guest anew.
    #[error("{path}, line {line}: {why}; without it the guest's measurements cannot be explained, boot it anew")]
    BadEvents {
        /// The file.
        path: String,
        /// Which line; 0 for the file as a whole.
        line: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The firmware's event log is damaged. Operator's to fix: another firmware, or the option that leaves this log out.
    #[error("{path} is no event log ({error}): leave it out with the option \"{option}=none\" if the firmware cannot be mended")]
    BadFirmwareLog {
        /// The file.
        path: String,
        /// Where it fails.
        error: AttestError,
        /// The option of the device's text that leaves it out.
        option: &'static str,
    },
}

impl TeeError {
    /// What the system said of `path`.
    pub(crate) fn file(path: &Path, fault: Fault) -> Self {
        match fault {
            Fault::Errno(errno) => Self::File { path: path.display().to_string(), errno: errno.raw_os_error() },
            Fault::TooLarge => Self::File { path: path.display().to_string(), errno: rustix::io::Errno::FBIG.raw_os_error() },
        }
    }
}
