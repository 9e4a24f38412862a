//! HTTP/2 as frames, for tests that send what no library would. Owns: the layout of frames, header blocks without compression, reading
//! frames. Never: keeps a rule of the protocol. Source: RFC 9113 §3.4, §4.1, §6; RFC 7541 §5, §6.

use std::io::{Error, ErrorKind, Read, Result};

/// What a client begins with.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Kinds of frames.
pub const DATA: u8 = 0;
/// Opens a stream, or ends its body.
pub const HEADERS: u8 = 1;
/// Deprecated, and still to be read.
pub const PRIORITY: u8 = 2;
/// Ends a stream.
pub const RST_STREAM: u8 = 3;
/// Parameters of the connection.
pub const SETTINGS: u8 = 4;
/// Only servers may send it.
pub const PUSH_PROMISE: u8 = 5;
/// Asks for an answer with the same eight bytes.
pub const PING: u8 = 6;
/// Ends the connection.
pub const GOAWAY: u8 = 7;
/// Allows more bytes of bodies.
pub const WINDOW_UPDATE: u8 = 8;
/// More of a header block.
pub const CONTINUATION: u8 = 9;

/// Flag of `DATA` and `HEADERS`: the last of its stream.
pub const END_STREAM: u8 = 0x1;
/// Flag of `SETTINGS` and `PING`: an answer.
pub const ACK: u8 = 0x1;
/// Flag of `HEADERS` and `CONTINUATION`: the block ends here.
pub const END_HEADERS: u8 = 0x4;
/// Flag of `DATA` and `HEADERS`: padding, behind its length.
pub const PADDED: u8 = 0x8;
/// Flag of `HEADERS`: five bytes of priority before the block.
pub const PRIORITIZED: u8 = 0x20;

/// Error code: the peer does too much.
pub const ENHANCE_YOUR_CALM: u32 = 11;
/// Error code: not even looked at.
pub const REFUSED_STREAM: u32 = 7;

/// Largest frame that is read.
const FRAME_BYTES_MAX: usize = 1 << 20;

/// A frame of this content.
#[must_use]
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    head(u32::try_from(payload.len()).unwrap_or(u32::MAX), kind, flags, stream).into_iter().chain(payload.iter().copied()).collect()
}

/// The head of a frame that says to be so long.
#[must_use]
pub fn head(length: u32, kind: u8, flags: u8, stream: u32) -> Vec<u8> {
    let [_, length @ ..] = length.to_be_bytes();
    [&length[..], &[kind, flags], &stream.to_be_bytes()].concat()
}

/// `SETTINGS` with these parameters.
#[must_use]
pub fn settings(parameters: &[(u16, u32)]) -> Vec<u8> {
    let payload: Vec<u8> = parameters.iter().flat_map(|(id, value)| id.to_be_bytes().into_iter().chain(value.to_be_bytes())).collect();
    frame(SETTINGS, 0, 0, &payload)
}

/// An integer behind a prefix of so many bits. `first`: what stands before the prefix.
#[must_use]
pub fn integer(first: u8, bits: u32, value: usize) -> Vec<u8> {
    let limit = (1_usize << bits) - 1;
    let low = |value: usize| value.to_le_bytes().first().copied().unwrap_or(0);
    if value < limit {
        return vec![first | low(value)];
    }
    let (mut out, mut rest) = (vec![first | low(limit)], value - limit);
    while rest >= 0x80 {
        out.push(low(rest) | 0x80);
        rest >>= 7;
    }
    out.push(low(rest));
    out
}

fn text(bytes: &[u8]) -> Vec<u8> {
    [integer(0, 7, bytes.len()), bytes.to_vec()].concat()
}

/// A field that is kept in no table.
#[must_use]
pub fn field(name: &[u8], value: &[u8]) -> Vec<u8> {
    [vec![0], text(name), text(value)].concat()
}

/// A field that is put into the dynamic table.
#[must_use]
pub fn kept_field(name: &[u8], value: &[u8]) -> Vec<u8> {
    [vec![0x40], text(name), text(value)].concat()
}

/// The pseudo-fields of a request.
#[must_use]
pub fn request_block(method: &str, path: &str) -> Vec<u8> {
    let fields = [(":method", method), (":scheme", "https"), (":authority", "kms.test"), (":path", path)];
    fields.iter().flat_map(|(name, value)| field(name.as_bytes(), value.as_bytes())).collect()
}

/// A whole request without a body.
#[must_use]
pub fn get(stream: u32, path: &str) -> Vec<u8> {
    frame(HEADERS, END_STREAM | END_HEADERS, stream, &request_block("GET", path))
}

/// A frame as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Kind.
    pub kind: u8,
    /// Flags.
    pub flags: u8,
    /// Stream; 0 is the connection.
    pub stream: u32,
    /// Content.
    pub payload: Vec<u8>,
}

impl Frame {
    /// Reads one; `None` where the peer ends the connection, also in the middle of one.
    ///
    /// # Errors
    /// The stream's, silence among them; a frame that is too large.
    pub fn read(stream: &mut impl Read) -> Result<Option<Self>> {
        let mut head = [0; 9];
        if !whole(stream, &mut head)? {
            return Ok(None);
        }
        let [a, b, c, kind, flags, id @ ..] = head;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        if length > FRAME_BYTES_MAX {
            return Err(Error::new(ErrorKind::InvalidData, format!("a frame of {length} bytes")));
        }
        let mut payload = vec![0; length];
        let arrived = whole(stream, &mut payload)?;
        Ok(arrived.then_some(Self { kind, flags, stream: u32::from_be_bytes(id) & (u32::MAX >> 1), payload }))
    }

    /// The error code of a `RST_STREAM` or `GOAWAY`.
    #[must_use]
    pub fn error_code(&self) -> Option<u32> {
        let at = match self.kind {
            RST_STREAM => 0,
            GOAWAY => 4,
            _ => return None,
        };
        self.payload.get(at..)?.first_chunk().map(|code| u32::from_be_bytes(*code))
    }

    /// Whether it is the head of an answer with status 200, which servers take from the static table.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        // A new size of the table may come first.
        self.kind == HEADERS && self.payload.iter().find(|byte| *byte & 0xe0 != 0x20) == Some(&0x88)
    }
}

/// Fills the buffer; false where the peer ends the connection.
fn whole(stream: &mut impl Read, buffer: &mut [u8]) -> Result<bool> {
    match stream.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_and_integers_are_those_of_the_standards() {
        // RFC 7541 §C.1.
        assert_eq!((integer(0, 5, 10), integer(0, 5, 1337), integer(0, 8, 42)), (vec![10], vec![31, 154, 10], vec![42]));
        // RFC 7541 §C.2.1, §C.2.2 with a literal name.
        assert_eq!(kept_field(b"custom-key", b"custom-header"), b"\x40\x0acustom-key\x0dcustom-header");
        assert_eq!(frame(PING, ACK, 0, b"12345678"), b"\0\0\x08\x06\x01\0\0\0\x0012345678");
        assert_eq!(settings(&[(4, 65_535)]), b"\0\0\x06\x04\0\0\0\0\0\0\x04\0\0\xff\xff");
        let bytes = [frame(RST_STREAM, 0, 3, &8_u32.to_be_bytes()), frame(HEADERS, 4, 1, &[0x3f, 0xe1, 0x1f, 0x88])].concat();
        let mut rest = bytes.as_slice();
        let reset = Frame::read(&mut rest).unwrap().unwrap();
        assert_eq!((reset.stream, reset.error_code(), reset.is_ok()), (3, Some(8), false));
        assert!(!Frame::read(&mut rest).unwrap().unwrap().is_ok(), "a size in several bytes is not looked through");
        assert_eq!(Frame::read(&mut rest).unwrap(), None);
        assert!(Frame { payload: vec![0x20, 0x88], ..reset.clone() }.kind == RST_STREAM);
        assert!(Frame { kind: HEADERS, payload: vec![0x20, 0x88], ..reset }.is_ok());
        assert!(Frame::read(&mut head(u32::MAX, DATA, 0, 1).as_slice()).is_err());
    }
}
