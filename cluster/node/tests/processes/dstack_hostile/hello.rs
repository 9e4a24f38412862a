//! A ClientHello in parts, to be put together wrongly. Owns: reading one that a library made, its bytes and records. Source: RFC 8446 §4.1.2, §5.1.

use dstack_testkit::raw_tls::client;
use rustls::SupportedProtocolVersion;

/// Handshake record.
pub(super) const HANDSHAKE: u8 = 22;
/// ChangeCipherSpec.
pub(super) const CCS: &[u8] = &[20, 3, 3, 0, 1, 1];
/// A warning: close_notify is 0, user_canceled 90.
pub(super) const WARNING: &[u8] = &[21, 3, 3, 0, 2, 1, 90];

/// Its parts.
#[derive(Debug, Clone)]
pub(super) struct Hello {
    pub(super) version: [u8; 2],
    pub(super) session: Vec<u8>,
    pub(super) suites: Vec<u8>,
    pub(super) compression: Vec<u8>,
    pub(super) extensions: Vec<(u16, Vec<u8>)>,
}

impl Hello {
    /// The library's own.
    pub(super) fn right(versions: &[&'static SupportedProtocolVersion]) -> Self {
        let mut record = Vec::new();
        client(versions, None, &[b"http/1.1"]).unwrap().write_tls(&mut record).unwrap();
        // record 5, handshake 4, then the message
        let mut rest = &record[9..];
        let mut take = |count: usize| {
            let (head, tail) = rest.split_at(count);
            rest = tail;
            head.to_vec()
        };
        let length = |bytes: Vec<u8>| bytes.iter().fold(0, |sum, byte| (sum << 8) | usize::from(*byte));
        let version = take(2).try_into().unwrap();
        take(32);
        let count = length(take(1));
        let session = take(count);
        let count = length(take(2));
        let suites = take(count);
        let count = length(take(1));
        let compression = take(count);
        let mut left = length(take(2));
        let mut extensions = Vec::new();
        while left > 0 {
            let kind = length(take(2));
            let count = length(take(2));
            extensions.push((u16::try_from(kind).unwrap(), take(count)));
            left -= count + 4;
        }
        Self { version, session, suites, compression, extensions }
    }

    /// With one extension's content changed; added where it is not there.
    pub(super) fn with(mut self, kind: u16, content: Vec<u8>) -> Self {
        match self.extensions.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, old)) => *old = content,
            None => self.extensions.insert(0, (kind, content)),
        }
        self
    }

    pub(super) fn without(mut self, kind: u16) -> Self {
        self.extensions.retain(|(known, _)| *known != kind);
        self
    }

    /// The handshake message.
    pub(super) fn message(&self) -> Vec<u8> {
        let extensions: Vec<u8> = self
            .extensions
            .iter()
            .flat_map(|(kind, content)| {
                [kind.to_be_bytes().as_slice(), &u16::try_from(content.len()).unwrap().to_be_bytes(), content.as_slice()].concat()
            })
            .collect();
        let body = [
            self.version.as_slice(),
            &[0x5a; 32],
            &sized(1, &self.session),
            &sized(2, &self.suites),
            &sized(1, &self.compression),
            &sized(2, &extensions),
        ]
        .concat();
        [&[1][..], &sized(3, &body)].concat()
    }

    /// In one record.
    pub(super) fn record(&self) -> Vec<u8> {
        record(HANDSHAKE, &self.message())
    }
}

/// A vector behind its length of so many bytes.
pub(super) fn sized(bytes: usize, content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    [&length[length.len() - bytes..], content].concat()
}

pub(super) fn record(kind: u8, content: &[u8]) -> Vec<u8> {
    [&[kind, 3, 1][..], &sized(2, content)].concat()
}
