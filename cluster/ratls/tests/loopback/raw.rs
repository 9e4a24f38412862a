//! A TLS client and server without any of this crate's care, to misbehave with.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use dstack_testkit::raw_tls::{Shown, config};
use rcgen::{CertificateParams, CustomExtension, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ServerConfig, SupportedProtocolVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

pub struct RawCertificate {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

impl RawCertificate {
    /// Self-signed, valid always, with the evidence that `evidence_of(SPKI)` gives.
    pub fn with_evidence(evidence_of: impl FnOnce(&[u8]) -> Option<Vec<u8>>) -> Self {
        Self::with_extensions(|spki| evidence_of(spki).map(|evidence| (8, evidence)).into_iter().collect())
    }

    /// The same with any of dstack's extensions, by the last number of their identifiers.
    pub fn with_extensions(extensions_of: impl FnOnce(&[u8]) -> Vec<(u64, Vec<u8>)>) -> Self {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::default();
        for (last, content) in extensions_of(&rcgen::PublicKeyData::subject_public_key_info(&key)) {
            let oid = [1, 3, 6, 1, 4, 1, 62397, 1, last];
            params.custom_extensions.push(CustomExtension::from_oid_content(&oid, octet_string(&content)));
        }
        let certificate = params.self_signed(&key).unwrap();
        Self { chain: vec![certificate.der().clone()], key: PrivateKeyDer::try_from(key.serialize_der()).unwrap() }
    }
}

fn octet_string(content: &[u8]) -> Vec<u8> {
    let mut der = vec![0x04, 0x83];
    der.extend_from_slice(&(content.len() as u32).to_be_bytes()[1..]);
    match content.len() {
        0..0x80 => der = vec![0x04, content.len() as u8],
        0x80..0x100 => der = vec![0x04, 0x81, content.len() as u8],
        0x100..0x1_0000 => der = [&[0x04, 0x82][..], &(content.len() as u16).to_be_bytes()].concat(),
        _ => {}
    }
    der.extend_from_slice(content);
    der
}

pub async fn connect(
    address: SocketAddr,
    version: &'static SupportedProtocolVersion,
    certificate: Option<RawCertificate>,
    alpn: &[u8],
) -> std::io::Result<TlsStream<TcpStream>> {
    let shown = certificate.map(|RawCertificate { chain, key }| Shown::new(chain, &key).unwrap());
    let config = config(aws_lc_rs::default_provider(), &[version], shown, &[alpn])?;
    let stream = TcpStream::connect(address).await?;
    TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("node").unwrap(), stream).await
}

/// Connects and asks something: the server's first bytes, or `Err` with its alert or reset.
pub async fn verdict_on(address: SocketAddr, certificate: Option<RawCertificate>, alpn: &[u8]) -> Result<String, String> {
    let mut stream = connect(address, &rustls::version::TLS13, certificate, alpn).await.map_err(|error| error.to_string())?;
    // The server may have hung up already; what it said first is still to be read.
    let _ = stream.write_all(b"GET /whoami HTTP/1.1\r\nhost: n\r\n\r\n").await;
    let mut buffer = [0u8; 12];
    match tokio::time::timeout(Duration::from_secs(20), stream.read(&mut buffer)).await {
        Ok(Ok(bytes)) => Ok(String::from_utf8_lossy(&buffer[..bytes]).into_owned()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_elapsed) => panic!("the server neither answers nor refuses"),
    }
}

/// Accepts one connection as a TLS server with this certificate; the outcome of the handshake.
pub async fn serve_once(
    version: &'static SupportedProtocolVersion,
    certificate: RawCertificate,
    alpn: &[u8],
) -> (SocketAddr, tokio::task::JoinHandle<std::io::Result<()>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let key = provider.key_provider.load_private_key(certificate.key).unwrap();
    // Unchecked: a liar's key need not be the certificate's.
    let shown = rustls::sign::SingleCertAndKey::from(rustls::sign::CertifiedKey::new(certificate.chain, key));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(shown));
    config.alpn_protocols = vec![alpn.to_vec()];
    let task = tokio::spawn(async move {
        let (stream, _) = listener.accept().await?;
        tokio_rustls::TlsAcceptor::from(Arc::new(config)).accept(stream).await.map(|_| ())
    });
    (address, task)
}

/// The first flight of a real client.
pub fn client_hello(alpn: &[u8]) -> Vec<u8> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    let mut client = rustls::ClientConnection::new(Arc::new(config), ServerName::try_from("node").unwrap()).unwrap();
    let mut hello = Vec::new();
    client.write_tls(&mut hello).unwrap();
    hello
}
