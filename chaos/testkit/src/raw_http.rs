//! HTTP/1.1 as bytes, for tests that send what no library would. Owns: one connection at a time over any stream, reading whole answers.
//! Never: writes a byte of its own; waits without the stream's own limit.

use std::io::{Error, ErrorKind, Read, Result, Write};

/// Largest head and body that are read.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// A whole answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Status.
    pub status: u16,
    /// Status line and fields.
    pub head: String,
    /// Body.
    pub body: Vec<u8>,
}

impl Answer {
    /// A field of the head; `name` in lower case.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&str> {
        let mut fields = self.head.lines().skip(1).filter_map(|line| line.split_once(':'));
        fields.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    }

    /// Reads one; `None` where the peer closes instead.
    ///
    /// # Errors
    /// The stream's; an answer that is cut short, is no HTTP, or has a body of unknown length.
    pub fn read(stream: &mut impl Read) -> Result<Option<Self>> {
        let wrong = |why: &str| Error::new(ErrorKind::InvalidData, why.to_owned());
        let mut bytes = Vec::new();
        let end = loop {
            if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
                break at;
            }
            if read_some(stream, &mut bytes)? == 0 {
                return if bytes.is_empty() { Ok(None) } else { Err(wrong("the head is cut short")) };
            }
        };
        let mut body = bytes.split_off(end.saturating_add(4));
        let head = String::from_utf8(bytes).map_err(|_| wrong("the head is no text"))?;
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or_else(|| wrong("no status"))?;
        let mut answer = Self { status, head, body: Vec::new() };
        let length = match answer.field("content-length") {
            Some(length) => length.parse().map_err(|_| wrong("content-length"))?,
            None if status == 100 => 0,
            None => return Err(wrong("an answer without a length")),
        };
        while body.len() < length {
            if read_some(stream, &mut body)? == 0 {
                return Err(wrong("the body is cut short"));
            }
        }
        // What is pipelined behind it would be lost: callers that pipeline read to the end.
        body.truncate(length);
        answer.body = body;
        Ok(Some(answer))
    }
}

fn read_some(stream: &mut impl Read, bytes: &mut Vec<u8>) -> Result<usize> {
    if bytes.len() > ANSWER_BYTES_MAX {
        return Err(Error::new(ErrorKind::InvalidData, "an answer without an end"));
    }
    let mut buffer = [0; 16 * 1024];
    let count = stream.read(&mut buffer)?;
    bytes.extend_from_slice(buffer.get(..count).unwrap_or_default());
    Ok(count)
}

/// Asks over a kept connection, and over a new one when the peer has ended that.
#[derive(Debug)]
pub struct Asking<C, S> {
    connect: C,
    stream: Option<S>,
}

impl<C: FnMut() -> Result<S>, S: Read + Write> Asking<C, S> {
    /// `connect` makes the streams; their read timeout bounds every wait.
    pub const fn new(connect: C) -> Self {
        Self { connect, stream: None }
    }

    /// The answer to a whole request.
    ///
    /// # Errors
    /// The stream's; none where a fresh connection is closed without an answer.
    pub fn ask(&mut self, request: &[u8]) -> Result<Answer> {
        if let Some(stream) = &mut self.stream {
            // A kept connection may have ended since: only silence is tried again.
            let _ = stream.write_all(request).and_then(|()| stream.flush());
            match Answer::read(stream) {
                Ok(Some(answer)) => return Ok(self.kept(answer)),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::InvalidData) => {
                    return Err(error);
                }
                Ok(None) | Err(_) => self.stream = None,
            }
        }
        let stream = self.stream.insert((self.connect)()?);
        // It may refuse before it has read all.
        let _ = stream.write_all(request).and_then(|()| stream.flush());
        let answer = Answer::read(stream)?.ok_or_else(|| Error::new(ErrorKind::UnexpectedEof, "closed without an answer"))?;
        Ok(self.kept(answer))
    }

    fn kept(&mut self, answer: Answer) -> Answer {
        if answer.field("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
            self.stream = None;
        }
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_one_answer_and_no_more() {
        let mut stream = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\nX: y\r\n\r\nabcHTTP".as_slice();
        let answer = Answer::read(&mut stream).unwrap().unwrap();
        assert_eq!((answer.status, answer.field("x"), answer.body.as_slice()), (400, Some("y"), b"abc".as_slice()));
        assert_eq!(Answer::read(&mut b"".as_slice()).unwrap(), None);
        for bad in [b"HTTP/1.1".as_slice(), b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", b"HTTP/1.1 200 OK\r\n\r\n"] {
            assert!(Answer::read(&mut &*bad).is_err());
        }
    }
}
