//! Where evidence comes from. Owns: telling a file, hex, base64 and a server apart, and the forms of evidence from each other.
//! Never: judges; a form is a guess by the first bytes, which the parser then holds to.

use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use dstack_protocol::limits::EVIDENCE_BYTES_MAX;
use dstack_ratls::probe::server_certificates;

use crate::failure::Failure;
use crate::{files, nodes};

/// Largest file read: evidence or a certificate around it, in PEM, hex or base64.
const FILE_BYTES_MAX: usize = 4 * EVIDENCE_BYTES_MAX;
/// Shortest text that is taken for base64: no evidence is shorter, and a mistyped path seldom is as long.
const BASE64_CHARACTERS_MIN: usize = 64;
/// How long a server may take to show its certificate.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The forms of evidence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Versioned attestation, SCALE V0 or msgpack V1.
    Versioned,
    /// X.509 certificate that carries evidence.
    Certificate,
    /// Quote and event log of 0.5.x, as the log of this cluster keeps them.
    Legacy,
    /// Bare TDX quote.
    Quote,
    /// Bare NSM document.
    Document,
}

impl Form {
    fn of(bytes: &[u8]) -> Self {
        match bytes {
            [b'D', b'K', b'M', b'S', ..] => Self::Legacy,
            [0x30, ..] => Self::Certificate,
            // Version 4 or 5, attestation key type 2.
            [4 | 5, 0, 2, 0, ..] => Self::Quote,
            // COSE_Sign1: tag 18 around, or bare, an array of 4 whose first member is a short byte string.
            [0xd2, 0x84, ..] | [0x84, 0x40..=0x5b, ..] => Self::Document,
            _ => Self::Versioned,
        }
    }

    /// For people.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Versioned => "versioned attestation",
            Self::Certificate => "certificate",
            Self::Legacy => "legacy pair",
            Self::Quote => "bare TDX quote",
            Self::Document => "bare NSM document",
        }
    }
}

/// Evidence as it came.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Evidence {
    pub(super) bytes: Vec<u8>,
    pub(super) form: Form,
}

impl Evidence {
    fn new(bytes: Vec<u8>) -> Self {
        Self { form: Form::of(&bytes), bytes }
    }

    /// Reads it from wherever `text` says.
    pub(super) fn read(text: &str) -> Result<Self, Failure> {
        let path = Path::new(text);
        if path.exists() {
            let content = files::read(path, FILE_BYTES_MAX)?;
            return Ok(Self::new(pem(&content).or(digits(&content)?).or_else(|| base64(&content)).unwrap_or(content)));
        }
        if let Some(bytes) = digits(text.as_bytes())?.or_else(|| base64(text.as_bytes())) {
            return Ok(Self::new(bytes));
        }
        let address = text.strip_prefix("https://").unwrap_or(text).trim_end_matches('/');
        match address.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => nodes::block_on(live(address)),
            _ => Err(Failure::unable(format!("{text} is neither a file nor hex, base64 or host:port"), "check the path")),
        }
    }
}

/// The certificate that a server shows.
async fn live(address: &str) -> Result<Evidence, Failure> {
    let unable = |why: String| Failure::unable(why, "is it a TLS server, and reachable from here?");
    let mut resolved = tokio::net::lookup_host(address).await.map_err(|error| unable(format!("{address} cannot be resolved: {error}")))?;
    let socket = resolved.next().ok_or_else(|| unable(format!("{address} has no address")))?;
    let certificates = server_certificates(socket, CONNECT_TIMEOUT).await.map_err(|error| unable(error.to_string()))?;
    let first = certificates.into_iter().next().ok_or_else(|| unable(format!("{address} showed no certificate")))?;
    Ok(Evidence { bytes: first, form: Form::Certificate })
}

fn digits(content: &[u8]) -> Result<Option<Vec<u8>>, Failure> {
    let digits = content.trim_ascii();
    let digits = digits.strip_prefix(b"0x").unwrap_or(digits);
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_hexdigit) {
        return Ok(None);
    }
    hex::decode(digits).map(Some).map_err(|error| Failure::usage(format!("hex: {error}"), "give an even number of hex digits"))
}

fn base64(content: &[u8]) -> Option<Vec<u8>> {
    let text: Vec<u8> = content.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    if text.len() < BASE64_CHARACTERS_MIN {
        return None;
    }
    STANDARD.decode(&text).or_else(|_| URL_SAFE_NO_PAD.decode(&text)).ok()
}

/// The first PEM block.
fn pem(content: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(content).ok()?;
    let (_, rest) = text.split_once("-----BEGIN CERTIFICATE-----")?;
    let (body, _) = rest.split_once("-----END CERTIFICATE-----")?;
    let body: String = body.split_ascii_whitespace().collect();
    STANDARD.decode(body).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evidence_is_hex_base64_or_pem() {
        assert_eq!(Evidence::read("0x0aFF"), Ok(Evidence { bytes: vec![0x0a, 0xff], form: Form::Versioned }));
        assert!(Evidence::read("abc").is_err() && Evidence::read("no such file").is_err() && Evidence::read("nowhere").is_err());
        let bytes = [[4, 0, 2, 0].as_slice(), &[0x81; 60]].concat();
        let quote = Evidence { bytes: bytes.clone(), form: Form::Quote };
        assert_eq!(Evidence::read(&STANDARD.encode(&bytes)), Ok(Evidence { bytes: bytes.clone(), form: Form::Quote }));
        assert_eq!(Evidence::read(&URL_SAFE_NO_PAD.encode(&bytes)), Ok(quote));
        assert_eq!(pem(b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"), Some(vec![0x30, 0]));
        assert_eq!(pem(b"-----BEGIN CERTIFICATE-----\nMAA="), None);
    }

    #[test]
    fn forms_are_told_by_the_first_bytes() {
        for (bytes, form) in [
            (&[0x00, 0x02][..], Form::Versioned),
            (&[0x83, 0xa7], Form::Versioned),
            (&[0x84, 0x44, 0xa1], Form::Document),
            (&[0xd2, 0x84, 0x44], Form::Document),
            (&[5, 0, 2, 0], Form::Quote),
            (&[0x30, 0x82], Form::Certificate),
            (b"DKMS-V1-LEGACY", Form::Legacy),
            (&[], Form::Versioned),
        ] {
            assert_eq!(Form::of(bytes), form, "{bytes:02x?}");
        }
    }

    #[test]
    fn a_file_may_hold_any_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("e");
        for content in [b"0102".to_vec(), b"0x0102\n".to_vec(), vec![1, 2]] {
            std::fs::write(&path, content).unwrap();
            assert_eq!(Evidence::read(path.to_str().unwrap()).unwrap().bytes, [1, 2]);
        }
    }

    #[test]
    fn a_server_that_is_not_there_is_named() {
        let failure = Evidence::read("127.0.0.1:1").unwrap_err();
        let mut text = Vec::new();
        failure.report(&mut text).unwrap();
        assert!(String::from_utf8(text).unwrap().contains("127.0.0.1:1"));
    }
}
