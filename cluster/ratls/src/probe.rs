//! Looking at a server's certificate without trusting it. Owns: one handshake that keeps what was shown. Never: sends or reads a byte
//! of application data, judges evidence; what is returned is a claim, of which only possession of its key was proven.
//! Source: issue "attestation complete", live evidence of `host:port`.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::error::PeerError;
use crate::{dial, tls};

/// Connects, takes the server's certificates (its own first) and hangs up. The server proved that it holds the key of the first.
///
/// A server that refuses anonymous clients has shown its certificates by then, so its refusal is no error.
/// # Errors
/// [`PeerError`] where no certificate was seen.
pub async fn server_certificates(address: SocketAddr, timeout: Duration) -> Result<Vec<Vec<u8>>, PeerError> {
    let provider = tls::provider();
    let seen = Seen::new(provider.signature_verification_algorithms);
    let protocol = |error: Error| PeerError::Protocol { address, reason: error.to_string() };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(protocol)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(&seen) as Arc<dyn ServerCertVerifier>)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    let handshake = async {
        let unreachable = |error: std::io::Error| PeerError::Unreachable { address, reason: error.to_string() };
        let stream = TcpStream::connect(address).await.map_err(unreachable)?;
        let name = ServerName::IpAddress(address.ip().into());
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(|error| dial::classify(address, &error))
    };
    let outcome = tokio::time::timeout(timeout, handshake).await;
    let Shown { certificates, is_proven } = std::mem::take(&mut *seen.shown());
    match outcome {
        _ if is_proven => Ok(certificates),
        Ok(Err(error)) => Err(error),
        Ok(Ok(_)) => Err(PeerError::Protocol { address, reason: "no certificate in the handshake".to_owned() }),
        Err(_elapsed) => Err(PeerError::Timeout { address, stage: "connecting", waited: timeout }),
    }
}

/// Certificates, and whether the key of the first has signed the handshake.
#[derive(Debug, Default)]
struct Shown {
    certificates: Vec<Vec<u8>>,
    is_proven: bool,
}

/// A verifier that takes every certificate and notes it.
#[derive(Debug)]
pub(crate) struct Seen {
    algorithms: WebPkiSupportedAlgorithms,
    shown: Mutex<Shown>,
}

impl ServerCertVerifier for Seen {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificates = std::iter::once(end_entity).chain(intermediates).map(|certificate| certificate.as_ref().to_vec()).collect();
        *self.shown() = Shown { certificates, is_proven: false };
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.proven(verify_tls12_signature(message, certificate, signed, &self.algorithms))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.proven(verify_tls13_signature(message, certificate, signed, &self.algorithms))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl Seen {
    /// Takes any server, of which only possession of the key is proven.
    pub(crate) fn new(algorithms: WebPkiSupportedAlgorithms) -> Arc<Self> {
        Arc::new(Self { algorithms, shown: Mutex::default() })
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn proven(&self, outcome: Result<HandshakeSignatureValid, Error>) -> Result<HandshakeSignatureValid, Error> {
        self.shown().is_proven = outcome.is_ok();
        outcome
    }
}
