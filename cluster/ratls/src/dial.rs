//! Opening a verified TLS connection. Owns: turning rustls' and the system's errors into whose fault it was.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{CertificateError, ClientConfig};
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
    let unreachable = |error: std::io::Error| PeerError::Unreachable { address, reason: error.to_string() };
    let dial = async {
        let stream = TcpStream::connect(address).await.map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        let name = ServerName::IpAddress(address.ip().into());
        let (stream, verdict) = with_verdict(TlsConnector::from(Arc::clone(config)).connect(name, stream)).await;
        let stream = stream.map_err(|error| classify(address, &error))?;
        // rustls ends no handshake as a client without asking the verifier.
        let verdict = verdict.ok_or(PeerError::Untrusted { address, error: JudgeError::NoEvidence })?;
        Ok((stream, verdict))
    };
    match tokio::time::timeout(timeout, dial).await {
        Ok(outcome) => outcome,
        Err(_elapsed) => Err(PeerError::Timeout { address, stage: "connecting", waited: timeout }),
    }
}

/// What an error of the TLS stream means.
pub(crate) fn classify(address: SocketAddr, error: &std::io::Error) -> PeerError {
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
        return PeerError::Unreachable { address, reason: error.to_string() };
    };
    match tls {
        rustls::Error::AlertReceived(alert) => PeerError::RefusedByPeer { address, reason: format!("tls alert {alert:?}") },
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

/// The same for an error of the HTTP layer, whose cause may be one of the TLS stream's.
pub(crate) fn classify_http(address: SocketAddr, error: &hyper::Error) -> PeerError {
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if let Some(io) = inner.downcast_ref::<std::io::Error>() {
            return classify(address, io);
        }
        cause = inner.source();
    }
    if error.is_parse() || error.is_user() {
        return PeerError::Protocol { address, reason: error.to_string() };
    }
    PeerError::Unreachable { address, reason: error.to_string() }
}
