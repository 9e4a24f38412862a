//! Calls of the kernel's NSM driver through AWS's own client. Owns: the open file, what answers mean. Never: retries; the driver queues.

use super::PCR_BYTES;
use super::ask::Ask;
use crate::TeeError;
use aws_nitro_enclaves_nsm_api::api::{Digest, ErrorCode, Request, Response};
use aws_nitro_enclaves_nsm_api::driver::nsm_process_request;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::Path;

/// The module's description of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Major, minor and patch version.
    pub version: (u16, u16, u16),
    /// Parent instance's id, `-enc`, enclave's id.
    pub module_id: String,
    /// How many registers there are.
    pub max_pcrs: u16,
    /// Registers that no longer change.
    pub locked_pcrs: BTreeSet<u16>,
    /// Hash of the registers.
    pub digest: &'static str,
}

/// The open device.
#[derive(Debug)]
pub(super) struct Driver {
    file: File,
}

impl Driver {
    pub(super) fn open(path: &Path) -> Result<Self, TeeError> {
        let opened = File::options().read(true).write(true).open(path);
        let file = opened.map_err(|error| TeeError::DeviceFile { path: path.display().to_string(), kind: error.kind() })?;
        Ok(Self { file })
    }

    fn call(&self, request: Request) -> Response {
        nsm_process_request(self.file.as_raw_fd(), request)
    }

    pub(super) fn describe(&self) -> Result<Facts, TeeError> {
        match self.call(Request::DescribeNSM) {
            Response::DescribeNSM { version_major, version_minor, version_patch, module_id, max_pcrs, locked_pcrs, digest } => {
                let digest = match digest {
                    Digest::SHA256 => "SHA256",
                    Digest::SHA384 => "SHA384",
                    Digest::SHA512 => "SHA512",
                };
                Ok(Facts { version: (version_major, version_minor, version_patch), module_id, max_pcrs, locked_pcrs, digest })
            }
            other => Err(failed("DescribeNSM", &other)),
        }
    }

    pub(super) fn register(&self, index: u16) -> Result<[u8; PCR_BYTES], TeeError> {
        match self.call(Request::DescribePCR { index }) {
            Response::DescribePCR { data, .. } => {
                data.try_into().map_err(|_| TeeError::Nsm { call: "DescribePCR", why: "a register is not 48 bytes" })
            }
            other => Err(failed("DescribePCR", &other)),
        }
    }

    pub(super) fn attest(&self, ask: Ask) -> Result<Vec<u8>, TeeError> {
        let Ask { user_data, nonce, public_key } = ask;
        let request = Request::Attestation {
            user_data: user_data.map(Into::into),
            nonce: nonce.map(Into::into),
            public_key: public_key.map(Into::into),
        };
        match self.call(request) {
            Response::Attestation { document } if !document.is_empty() => Ok(document),
            Response::Attestation { .. } => Err(TeeError::Nsm { call: "Attestation", why: "an empty document" }),
            other => Err(failed("Attestation", &other)),
        }
    }

    pub(super) fn random(&self) -> Result<Vec<u8>, TeeError> {
        match self.call(Request::GetRandom) {
            Response::GetRandom { random } if !random.is_empty() => Ok(random),
            Response::GetRandom { .. } => Err(TeeError::Nsm { call: "GetRandom", why: "no bytes" }),
            other => Err(failed("GetRandom", &other)),
        }
    }
}

/// What an answer that is not the wished one means.
fn failed(call: &'static str, response: &Response) -> TeeError {
    let why = match response {
        Response::Error(code) => match code {
            ErrorCode::Success => "success as an error",
            ErrorCode::InvalidArgument => "invalid argument",
            ErrorCode::InvalidIndex => "no such register",
            ErrorCode::InvalidResponse => "invalid response",
            ErrorCode::ReadOnlyIndex => "the register is locked",
            ErrorCode::InvalidOperation => "not supported",
            ErrorCode::BufferTooSmall => "the answer is too large",
            ErrorCode::InputTooLarge => "the input is too large",
            // the client also says this when the file is no nsm, or the answer does not decode
            ErrorCode::InternalError => "internal error, or not an nsm",
        },
        _ => "an answer to another call",
    };
    TeeError::Nsm { call, why }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;

    #[test]
    fn what_is_no_nsm_is_refused() {
        let missing = Driver::open(Path::new("/nonexistent/nsm")).unwrap_err();
        assert_eq!(missing, TeeError::DeviceFile { path: "/nonexistent/nsm".into(), kind: ErrorKind::NotFound });
        let other = Driver::open(Path::new("/dev/null")).unwrap();
        assert_eq!(other.describe(), Err(TeeError::Nsm { call: "DescribeNSM", why: "internal error, or not an nsm" }));
        assert!(other.register(0).is_err() && other.attest(Ask::default()).is_err() && other.random().is_err());
    }

    #[test]
    fn errors_of_the_module_are_told_apart() {
        let why = |code| match failed("ExtendPCR", &Response::Error(code)) {
            TeeError::Nsm { why, .. } => why,
            _ => "another error",
        };
        assert_eq!(why(ErrorCode::ReadOnlyIndex), "the register is locked");
        assert_eq!(why(ErrorCode::InputTooLarge), "the input is too large");
        assert_eq!(failed("LockPCR", &Response::LockPCRs), TeeError::Nsm { call: "LockPCR", why: "an answer to another call" });
    }
}
