//! Opening a verified TLS connection. Owns: turning rustls' and the system's errors into whose fault it was.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{AlertDescription, CertificateError, ClientConfig};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::error::PeerError;
use crate::judge::JudgeError;
use crate::verifier::{Verdict, with_verdict};

/// Connects and verifies the server's evidence.
pub(crate) async fn connect(
    address: SocketAddr,
    config: &Arc<ClientConfig>,
    timeout: Duration,
) -> Result<(TlsStream<TcpStream>, Verdict), PeerError> {
    let unreachable = |error: io::Error| PeerError::Unreachable { address, reason: error.to_string() };
    let dial = async {
        let stream = TcpStream::connect(address).await.map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        handshake(stream, address, config).await
    };
    within(timeout, address, dial).await
}

/// As [`connect`], over a stream that leads to the server already.
pub(crate) async fn connect_over<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    address: SocketAddr,
    config: &Arc<ClientConfig>,
    timeout: Duration,
) -> Result<(TlsStream<S>, Verdict), PeerError> {
    within(timeout, address, handshake(stream, address, config)).await
}

async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    address: SocketAddr,
    config: &Arc<ClientConfig>,
) -> Result<(TlsStream<S>, Verdict), PeerError> {
    let name = ServerName::IpAddress(address.ip().into());
    let (stream, verdict) = with_verdict(TlsConnector::from(Arc::clone(config)).connect(name, stream)).await;
    let stream = stream.map_err(|error| classify(address, &error))?;
    // rustls ends no handshake as a client without asking the verifier.
    let verdict = verdict.ok_or(PeerError::Untrusted { address, error: JudgeError::NoEvidence })?;
    Ok((stream, verdict))
}

async fn within<T>(timeout: Duration, address: SocketAddr, dial: impl Future<Output = Result<T, PeerError>>) -> Result<T, PeerError> {
    match tokio::time::timeout(timeout, dial).await {
        Ok(outcome) => outcome,
        Err(_elapsed) => Err(PeerError::Timeout { address, stage: "connecting", waited: timeout }),
    }
}

/// What an error of the TLS stream means.
pub(crate) fn classify(address: SocketAddr, error: &io::Error) -> PeerError {
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
        return PeerError::Unreachable { address, reason: error.to_string() };
    };
    match tls {
        rustls::Error::AlertReceived(alert) => PeerError::RefusedByPeer { address, reason: meaning(*alert) },
        rustls::Error::InvalidCertificate(CertificateError::Other(other)) => match other.0.downcast_ref::<JudgeError>() {
            Some(error) => PeerError::Untrusted { address, error: error.clone() },
            None => PeerError::Protocol { address, reason: tls.to_string() },
        },
        rustls::Error::InvalidCertificate(_) => {
            PeerError::Untrusted { address, error: JudgeError::Certificate { reason: "handshake signature or encoding" } }
        }
        other => PeerError::Protocol { address, reason: other.to_string() },
    }
}

/// An alert has room for no reason: where it is about our certificate, this is what to look at.
fn meaning(alert: AlertDescription) -> String {
    use AlertDescription::{BadCertificate, CertificateExpired, CertificateRevoked, CertificateUnknown, UnknownCA, UnsupportedCertificate};
    let of_ours = [BadCertificate, CertificateExpired, CertificateRevoked, CertificateUnknown, UnknownCA, UnsupportedCertificate];
    match of_ours.contains(&alert) {
        true => format!(
            "tls alert {alert:?}: it does not accept our certificate, for its evidence does not hold there, or its beacon is not known there; \
             that node's log says which, `dstack evidence verify` what does not hold"
        ),
        false => format!("tls alert {alert:?}"),
    }
}

/// What first went wrong on a connection. The HTTP/2 layer keeps only the text of such an error, so the stream below
/// it remembers the meaning.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    address: SocketAddr,
    first: Arc<Mutex<Option<PeerError>>>,
}

impl Fault {
    /// What an error of the HTTP layer means.
    pub(crate) fn classify(&self, error: &hyper::Error) -> PeerError {
        if let Some(first) = self.first.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            return first;
        }
        let (address, reason) = (self.address, error.to_string());
        if error.is_parse() || error.is_user() {
            PeerError::Protocol { address, reason }
        } else {
            PeerError::Unreachable { address, reason }
        }
    }

    /// True where the peer said no, as far as is known yet.
    pub(crate) fn is_refusal(&self) -> bool {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        matches!(*first, Some(PeerError::RefusedByPeer { .. } | PeerError::Untrusted { .. }))
    }

    /// Where the peer is.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    fn remember(&self, error: &io::Error) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() {
            *first = Some(classify(self.address, error));
        }
    }
}

/// A stream that remembers its first error in a [`Fault`].
pub(crate) struct Watched<IO> {
    io: IO,
    fault: Fault,
}

impl<IO> Watched<IO> {
    pub(crate) fn new(io: IO, address: SocketAddr) -> (Self, Fault) {
        let fault = Fault { address, first: Arc::new(Mutex::new(None)) };
        (Self { io, fault: fault.clone() }, fault)
    }

    fn seen<T>(&self, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if let Poll::Ready(Err(error)) = &outcome {
            self.fault.remember(error);
        }
        outcome
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Watched<IO> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.io).poll_read(context, buffer);
        self.seen(outcome)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Watched<IO> {
    // A failing write says less than the alert that the peer sent before it hung up, so only reads are remembered.
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}
