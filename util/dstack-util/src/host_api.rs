//! The host's API as the guest calls it: HTTP over vsock, TCP or a Unix socket. Owns: addresses, one request a connection, its limits.
//! Never: trusts an answer; the host is the adversary.
//! Source: guest API reference §6 (`HostApi`), KMS API reference §1 (JSON rules).

use std::fmt;
use std::pin::Pin;
use std::str::FromStr;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_vsock::{VsockAddr, VsockStream};

use crate::forward::listen::Stream;

/// Largest answer.
const ANSWER_BYTES_MAX: u64 = 1 << 20;
/// For connecting, and for everything after it.
const PATIENCE: Duration = Duration::from_secs(10);
/// A key provider makes a quote first.
const PATIENCE_FOR_KEYS: Duration = Duration::from_secs(60);
/// Default address, as dstack's host has it.
pub const DEFAULT_URL: &str = "vsock://2:12000/api";

/// Why the host did not do it. The host's fault, or no host.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// The address is not understood.
    #[error("not a host address: {text:?}; expected vsock://CID:PORT/api, http://host:port/api or unix:/path/to/socket")]
    Address {
        /// The text.
        text: String,
    },
    /// Nobody there, or silent.
    #[error("the host at {url} {what}")]
    Unreachable {
        /// The address.
        url: String,
        /// What it did.
        what: String,
    },
    /// It refused.
    #[error("the host at {url} answers {status}: {words}")]
    Refused {
        /// The address.
        url: String,
        /// HTTP status.
        status: u16,
        /// Its words.
        words: String,
    },
    /// Its answer is not of the documented form.
    #[error("the host at {url}: {why}")]
    Answer {
        /// The address.
        url: String,
        /// What is wrong.
        why: &'static str,
    },
}

/// Where the host listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostUrl {
    place: Place,
    /// Before the method, without a slash at its end.
    path: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Vsock(u32, u32),
    Tcp(String),
    Unix(String),
}

impl FromStr for HostUrl {
    type Err = HostError;

    fn from_str(text: &str) -> Result<Self, HostError> {
        let wrong = || HostError::Address { text: text.chars().take(200).collect() };
        let split = |rest: &str| {
            let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
            (authority.to_owned(), path.trim_end_matches('/').to_owned())
        };
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self { place: Place::Unix(path.trim_start_matches("//").to_owned()), path: "/api".to_owned() });
        }
        let printable = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        if let Some(rest) = text.strip_prefix("vsock://") {
            let (authority, path) = split(rest);
            let (cid, port) = authority.split_once(':').ok_or_else(wrong)?;
            let (cid, port) = (cid.parse().map_err(|_| wrong())?, port.parse().map_err(|_| wrong())?);
            let path = if path.is_empty() { "/api".to_owned() } else { format!("/{path}") };
            return if printable(&path) { Ok(Self { place: Place::Vsock(cid, port), path }) } else { Err(wrong()) };
        }
        let (authority, path) = text.strip_prefix("http://").map(split).ok_or_else(wrong)?;
        if authority.is_empty() || authority.starts_with(':') {
            return Err(wrong());
        }
        let authority = if authority.contains(':') { authority } else { format!("{authority}:80") };
        let path = if path.is_empty() { "/api".to_owned() } else { format!("/{path}") };
        if printable(&authority) && printable(&path) { Ok(Self { place: Place::Tcp(authority), path }) } else { Err(wrong()) }
    }
}

impl fmt::Display for HostUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Vsock(cid, port) => write!(f, "vsock://{cid}:{port}{}", self.path),
            Place::Tcp(authority) => write!(f, "http://{authority}{}", self.path),
            Place::Unix(path) => write!(f, "unix:{path}"),
        }
    }
}

/// A sealed key of the host's key provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealingKey {
    /// A sealed box.
    pub encrypted_key: Vec<u8>,
    /// SGX quote of the provider over the box's hash.
    pub provider_quote: Vec<u8>,
}

impl HostUrl {
    /// Tells the host something: `boot.progress`, `boot.error`, `instance.info`, `shutdown.progress`.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn notify(&self, event: &str, payload: &str) -> Result<(), HostError> {
        self.call("Notify", json!({ "event": event, "payload": payload }), PATIENCE).await.map(drop)
    }

    /// Asks the host's key provider for the key of who made `quote`.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn sealing_key(&self, quote: &[u8]) -> Result<SealingKey, HostError> {
        let answer = self.call("GetSealingKey", json!({ "quote": hex::encode(quote) }), PATIENCE_FOR_KEYS).await?;
        let bytes = |name: &str| {
            let text = answer.get(name).and_then(Value::as_str).unwrap_or_default();
            hex::decode(text.trim_start_matches("0x")).ok().filter(|bytes| !bytes.is_empty())
        };
        match (bytes("encrypted_key"), bytes("provider_quote")) {
            (Some(encrypted_key), Some(provider_quote)) => Ok(SealingKey { encrypted_key, provider_quote }),
            _ => Err(HostError::Answer { url: self.to_string(), why: "no hex in encrypted_key or provider_quote" }),
        }
    }

    async fn call(&self, method: &str, body: Value, patience: Duration) -> Result<Value, HostError> {
        let unreachable = |what: String| HostError::Unreachable { url: self.to_string(), what };
        let work = async {
            let mut stream = self.connect().await.map_err(|error| unreachable(format!("cannot be reached: {error}")))?;
            let body = body.to_string();
            let head = format!(
                "POST {}/{method}?json HTTP/1.1\r\nhost: host\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                self.path,
                body.len()
            );
            let broke = |error: std::io::Error| unreachable(format!("broke the connection: {error}"));
            stream.write_all(head.as_bytes()).await.map_err(broke)?;
            stream.write_all(body.as_bytes()).await.map_err(broke)?;
            stream.flush().await.map_err(broke)?;
            let mut answer = Vec::new();
            stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer).await.map_err(broke)?;
            Ok(answer)
        };
        let answer = timeout(patience, work).await.unwrap_or_else(|_| Err(unreachable(format!("did not answer within {patience:?}"))))?;
        self.read(&answer)
    }

    fn read(&self, answer: &[u8]) -> Result<Value, HostError> {
        let wrong = |why| HostError::Answer { url: self.to_string(), why };
        let end = answer.windows(4).position(|window| window == b"\r\n\r\n").ok_or_else(|| wrong("no HTTP answer"))?;
        let (head, rest) = answer.split_at_checked(end).ok_or_else(|| wrong("no HTTP answer"))?;
        let body = rest.get(4..).unwrap_or_default();
        let head = std::str::from_utf8(head).map_err(|_| wrong("no HTTP answer"))?;
        let status = head.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)).and_then(|code| code.parse::<u16>().ok());
        let status = status.ok_or_else(|| wrong("no HTTP status"))?;
        let chunked = head.lines().any(|line| {
            let (name, value) = line.split_once(':').unwrap_or_default();
            name.eq_ignore_ascii_case("transfer-encoding") && value.trim().eq_ignore_ascii_case("chunked")
        });
        let joined = if chunked { dechunk(body).ok_or_else(|| wrong("a broken chunk"))? } else { body.to_vec() };
        if !(200..300).contains(&status) {
            let error = serde_json::from_slice::<Value>(&joined).ok();
            let words = error.as_ref().and_then(|error| error.get("error")?.as_str()).unwrap_or("no reason").chars().take(300).collect();
            return Err(HostError::Refused { url: self.to_string(), status, words });
        }
        if joined.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&joined).map_err(|_| wrong("an answer that is no JSON"))
    }

    async fn connect(&self) -> std::io::Result<Pin<Box<dyn Stream>>> {
        Ok(match &self.place {
            Place::Vsock(cid, port) => Box::pin(VsockStream::connect(VsockAddr::new(*cid, *port)).await?),
            Place::Tcp(authority) => Box::pin(TcpStream::connect(authority).await?),
            Place::Unix(path) => Box::pin(UnixStream::connect(path).await?),
        })
    }
}

fn dechunk(mut body: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    loop {
        let end = body.windows(2).position(|window| window == b"\r\n")?;
        let (size, rest) = body.split_at_checked(end)?;
        let size = std::str::from_utf8(size).ok()?.split(';').next()?.trim();
        let size = usize::from_str_radix(size, 16).ok()?;
        let rest = rest.get(2..)?;
        if size == 0 {
            return Some(out);
        }
        let (chunk, rest) = rest.split_at_checked(size)?;
        out.extend_from_slice(chunk);
        body = rest.strip_prefix(b"\r\n")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_answers() {
        for text in ["vsock://2:12000/api", "http://127.0.0.1:80/x/api", "unix:/run/host.sock"] {
            assert_eq!(text.parse::<HostUrl>().unwrap().to_string(), text);
        }
        assert_eq!("http://h".parse::<HostUrl>().unwrap().to_string(), "http://h:80/api");
        for text in ["", "vsock://2", "https://h", "http:///api", "http://h\r\nx: y/api", "unix:"] {
            assert!(matches!(text.parse::<HostUrl>(), Err(HostError::Address { .. })), "{text}");
        }
        let url: HostUrl = DEFAULT_URL.parse().unwrap();
        assert_eq!(url.read(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nnull").unwrap(), Value::Null);
        assert_eq!(url.read(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n[1\r\n1\r\n]\r\n0\r\n\r\n").unwrap(), json!([1]));
        let refused = url.read(b"HTTP/1.1 400 Bad Request\r\n\r\n{\"error\":\"no quote\"}").unwrap_err();
        assert!(refused.to_string().ends_with("400: no quote"), "{refused}");
        for bad in [
            &b""[..],
            b"HTTP/1.1 20",
            b"HTTP/1.1 200 OK\r\n\r\n{",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        ] {
            assert!(matches!(url.read(bad), Err(HostError::Answer { .. })));
        }
    }
}
