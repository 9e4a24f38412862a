//! Small HTTP/1.1 questions to what is near: the container runtime, the host, the agent's own port. Owns: time and size limits.
//! Never: TLS, a key.

use std::path::Path;
use std::time::Duration;

use dstack_prpc::Codec;
use dstack_prpc::host::Notification;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_vsock::{VsockAddr, VsockStream};

/// For one answer's head.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no answer. Try later.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum OutgoingError {
    /// Nothing answers there.
    #[error("{place} not reachable: {reason}")]
    Unreachable {
        /// Where.
        place: String,
        /// The system's words.
        reason: String,
    },
    /// No answer in time.
    #[error("{place} did not answer within {ANSWER_TIMEOUT:?}")]
    Timeout {
        /// Where.
        place: String,
    },
    /// Another status than success.
    #[error("{place} answers {path} with status {status}")]
    Status {
        /// Where.
        place: String,
        /// What was asked.
        path: String,
        /// HTTP status.
        status: u16,
    },
    /// The address is none.
    #[error("no address of the host: expected vsock://CID:PORT/path or http://host:port/path, got {url:?}")]
    Address {
        /// The text.
        url: String,
    },
    /// The answer is none.
    #[error("answer of {place}: {reason}")]
    Answer {
        /// Where.
        place: String,
        /// What is wrong.
        reason: String,
    },
}

/// GET over a unix socket.
///
/// # Errors
/// [`OutgoingError`].
pub async fn get_unix(socket: &Path, path: &str) -> Result<Response<Incoming>, OutgoingError> {
    let place = socket.display().to_string();
    let stream = UnixStream::connect(socket).await.map_err(|error| unreachable(&place, &error))?;
    ask(stream, &place, Method::GET, "localhost", path, Bytes::new()).await
}

/// GET over TCP.
///
/// # Errors
/// [`OutgoingError`].
pub async fn get_tcp(address: std::net::SocketAddr, path: &str) -> Result<Response<Incoming>, OutgoingError> {
    let place = address.to_string();
    let stream = TcpStream::connect(address).await.map_err(|error| unreachable(&place, &error))?;
    ask(stream, &place, Method::GET, &place, path, Bytes::new()).await
}

/// The whole body, at most `bytes_max`.
///
/// # Errors
/// [`OutgoingError::Answer`].
pub async fn whole(response: Response<Incoming>, place: &str, bytes_max: usize) -> Result<Bytes, OutgoingError> {
    let collect = Limited::new(response.into_body(), bytes_max).collect();
    match tokio::time::timeout(ANSWER_TIMEOUT, collect).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) => Err(OutgoingError::Answer { place: place.to_owned(), reason: error.to_string() }),
        Err(_elapsed) => Err(OutgoingError::Timeout { place: place.to_owned() }),
    }
}

/// `HostApi.Notify`. Without an address nobody is told.
///
/// # Errors
/// [`OutgoingError`].
pub async fn notify(host_api_url: &str, notification: &Notification) -> Result<(), OutgoingError> {
    if host_api_url.is_empty() {
        return Ok(());
    }
    let address = || OutgoingError::Address { url: host_api_url.chars().take(200).collect() };
    let (scheme, rest) = host_api_url.split_once("://").ok_or_else(address)?;
    let (authority, base) = rest.split_once('/').unwrap_or((rest, ""));
    let (host, port) = authority.rsplit_once(':').ok_or_else(address)?;
    let path = format!("/{base}{}Notify?json", if base.is_empty() || base.ends_with('/') { "" } else { "/" });
    let body = Bytes::from(Codec::Json.encode(notification).body);
    match scheme {
        "vsock" => {
            let target = VsockAddr::new(host.parse().map_err(|_| address())?, port.parse().map_err(|_| address())?);
            let stream = within(host_api_url, VsockStream::connect(target)).await?;
            ask(stream, host_api_url, Method::POST, authority, &path, body).await?;
        }
        "http" => {
            let port: u16 = port.parse().map_err(|_| address())?;
            let stream = within(host_api_url, TcpStream::connect((host, port))).await?;
            ask(stream, host_api_url, Method::POST, authority, &path, body).await?;
        }
        _ => return Err(address()),
    }
    Ok(())
}

async fn within<T>(place: &str, connect: impl Future<Output = std::io::Result<T>>) -> Result<T, OutgoingError> {
    match tokio::time::timeout(ANSWER_TIMEOUT, connect).await {
        Ok(outcome) => outcome.map_err(|error| unreachable(place, &error)),
        Err(_elapsed) => Err(OutgoingError::Timeout { place: place.to_owned() }),
    }
}

async fn ask<S>(stream: S, place: &str, method: Method, host: &str, path: &str, body: Bytes) -> Result<Response<Incoming>, OutgoingError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let exchange = async {
        let (mut requests, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| unreachable(place, &error))?;
        tokio::spawn(connection);
        let request = Request::builder().method(method).uri(path).header("host", host).body(Full::new(body));
        let request = request.map_err(|error| unreachable(place, &error))?;
        requests.send_request(request).await.map_err(|error| unreachable(place, &error))
    };
    let response =
        tokio::time::timeout(ANSWER_TIMEOUT, exchange).await.map_err(|_| OutgoingError::Timeout { place: place.to_owned() })??;
    let status = response.status().as_u16();
    if (200..300).contains(&status) {
        Ok(response)
    } else {
        Err(OutgoingError::Status { place: place.to_owned(), path: path.to_owned(), status })
    }
}

fn unreachable(place: &str, error: &dyn std::error::Error) -> OutgoingError {
    OutgoingError::Unreachable { place: place.to_owned(), reason: error.to_string() }
}
