//! One connection to a software device: request out, response in, within a time. Owns: the stream and its limits.
//! Never: retries; after an error the connection is of no use, since an answer may still be under way.

use super::frame::{read_frame, write_frame};
use super::protocol::{FRAME_BYTES_MAX, Request, Response};
use crate::TeeError;
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// A connection, and the boot state that the device keeps for it.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    limit: Duration,
}

impl Connection {
    /// Connects. Each later read or write of the socket may take up to `limit`.
    pub(super) fn open(path: &Path, limit: Duration) -> Result<Self, TeeError> {
        let failed = |error: std::io::Error| TeeError::Connect { path: path.display().to_string(), kind: error.kind() };
        let stream = UnixStream::connect(path).map_err(failed)?;
        stream.set_read_timeout(Some(limit)).and_then(|()| stream.set_write_timeout(Some(limit))).map_err(failed)?;
        Ok(Self { stream, limit })
    }

    /// One request, one response. A refusal is an error of its own; the connection stays usable after it.
    pub(super) fn call(&mut self, request: &Request) -> Result<Response, TeeError> {
        let json = serde_json::to_vec(request).map_err(|_| TeeError::Protocol { why: "a request has no JSON form" })?;
        if json.len() > FRAME_BYTES_MAX {
            return Err(TeeError::TooLarge { what: "the request", have_bytes: json.len(), limit_bytes: FRAME_BYTES_MAX });
        }
        write_frame(&mut self.stream, &json).map_err(|error| self.broken(error.kind()))?;
        let frame = read_frame(&mut self.stream).map_err(|error| self.broken(error.kind()))?;
        let frame = frame.ok_or_else(|| self.broken(ErrorKind::UnexpectedEof))?;
        // the frame may hold a key: it is wiped when dropped, and the decoder borrows from it
        match serde_json::from_slice(&frame).map_err(|_| TeeError::Protocol { why: "a response is not of this protocol" })? {
            Response::Refused(refused) => Err(TeeError::Refused { code: refused.code, message: refused.message }),
            response => Ok(response),
        }
    }

    fn broken(&self, kind: ErrorKind) -> TeeError {
        match kind {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                TeeError::Timeout { limit_ms: u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX) }
            }
            ErrorKind::InvalidData => TeeError::Protocol { why: "a frame's length is out of bounds" },
            kind => TeeError::Broken { kind },
        }
    }
}
