//! Plain HTTP to admin listeners. Owns: one GET on one connection. Never: TLS, redirects, a second try.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::error::ClusterError;

/// Longest wait for a whole answer's next bytes.
const PATIENCE: Duration = Duration::from_secs(5);
/// Largest answer.
const BYTES_MAX: u64 = 4 << 20;

/// Status and body of `GET path`.
///
/// # Errors
/// [`ClusterError::Unexpected`] when nobody answers or it is no HTTP.
pub fn get(address: SocketAddr, path: &str) -> Result<(u16, String), ClusterError> {
    let wrong = |reason: &dyn ToString| ClusterError::unexpected(format!("http://{address}{path}"), reason.to_string());
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).map_err(|error| wrong(&error))?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(|error| wrong(&error))?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(|error| wrong(&error))?;
    let request = format!("GET {path} HTTP/1.0\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(|error| wrong(&error))?;
    let mut answer = Vec::new();
    stream.take(BYTES_MAX).read_to_end(&mut answer).map_err(|error| wrong(&error))?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| wrong(&"no HTTP"))?;
    let status = head.split_whitespace().nth(1).and_then(|code| code.parse().ok()).ok_or_else(|| wrong(&"no status"))?;
    Ok((status, body.to_owned()))
}
