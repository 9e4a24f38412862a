//! A TLS client that believes every server and shows any certificate, for tests that misbehave on top of it. Owns: its configuration, the
//! sockets. Never: verifies anything; waits longer than [`PATIENCE`].

use std::io::{Error, ErrorKind, Result};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::{CertifiedKey, SigningKey};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned, SupportedProtocolVersion};

/// A server that is silent for so long hangs: the timeouts of ours are 5 and 10 seconds.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A connection.
pub type Stream = StreamOwned<ClientConnection, TcpStream>;

/// What a client shows.
#[derive(Debug, Clone)]
pub struct Shown {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// What it signs with; need not be the leaf's.
    pub key: Arc<dyn SigningKey>,
}

impl Shown {
    /// With a key that the provider knows.
    ///
    /// # Errors
    /// It does not know the key.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: &PrivateKeyDer<'_>) -> Result<Self> {
        Ok(Self { chain, key: aws_lc_rs::sign::any_supported_type(key).map_err(Error::other)? })
    }
}

/// A TCP connection that does not wait for ever.
///
/// # Errors
/// The system's.
pub fn socket(address: SocketAddr) -> Result<TcpStream> {
    let socket = TcpStream::connect(address)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.set_nodelay(true)?;
    Ok(socket)
}

/// A configuration. `alpn`: in order of preference.
///
/// # Errors
/// The provider does not know these versions.
pub fn config(
    provider: CryptoProvider,
    versions: &[&'static SupportedProtocolVersion],
    shown: Option<Shown>,
    alpn: &[&[u8]],
) -> Result<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(Arc::new(provider)).with_protocol_versions(versions).map_err(Error::other)?;
    let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(Believes));
    let mut config = match shown {
        None => builder.with_no_client_auth(),
        Some(shown) => builder.with_client_cert_resolver(Arc::new(Always(Arc::new(CertifiedKey::new(shown.chain, shown.key))))),
    };
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// The client's side of a connection that has not begun. Its ClientHello is short, without the hybrid group: tests try every byte of it.
///
/// # Errors
/// As of [`config`].
pub fn client(versions: &[&'static SupportedProtocolVersion], shown: Option<Shown>, alpn: &[&[u8]]) -> Result<ClientConnection> {
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![aws_lc_rs::kx_group::X25519, aws_lc_rs::kx_group::SECP256R1];
    let name = ServerName::try_from("kms.test").map_err(Error::other)?;
    ClientConnection::new(Arc::new(config(provider, versions, shown, alpn)?), name).map_err(Error::other)
}

/// A connection after its handshake, as far as the client can tell.
///
/// # Errors
/// The system's; the server's alert.
pub fn connect(
    address: SocketAddr,
    versions: &[&'static SupportedProtocolVersion],
    shown: Option<Shown>,
    alpn: &[&[u8]],
) -> Result<Stream> {
    let mut stream = StreamOwned::new(client(versions, shown, alpn)?, socket(address)?);
    while stream.conn.is_handshaking() {
        if stream.conn.complete_io(&mut stream.sock)? == (0, 0) {
            return Err(Error::from(ErrorKind::UnexpectedEof));
        }
    }
    Ok(stream)
}

/// Whether an error says that the server was silent for [`PATIENCE`].
#[must_use]
pub fn is_silence(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// Shows its certificate whatever the server asked for.
#[derive(Debug)]
struct Always(Arc<CertifiedKey>);

impl ResolvesClientCert for Always {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Believes every certificate and every signature.
#[derive(Debug)]
struct Believes;

impl ServerCertVerifier for Believes {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::ED25519]
    }
}
