//! A guest's side of dstack's listener: RPCs on a TLS connection, one or several. Owns: how the server is checked (chain under a given
//! root, host name, usage `kms:rpc`), the JSON form of requests as dstack's own clients send it. Never: picks a server, retries.
//! Source: KMS API reference §1 (Rust clients), §2, §8 ("Guest requirements on the server").

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use dstack_attest::x509ext::CertificateClaims;
use dstack_prpc::{Codec, Rpc};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use rustls::client::danger::ServerCertVerifier;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::CertifiedKey;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

use crate::certificate::CertifiedIdentity;
use crate::probe::Seen;
use crate::tls::{GivenTime, provider};
use crate::{Now, RatlsError};

/// Largest answer, bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Longest part of a server's answer that an error repeats, characters.
const ECHO_CHARS_MAX: usize = 300;
/// Usage of a KMS server's certificate.
const USAGE: &str = "kms:rpc";

/// How the server is checked.
#[derive(Debug, Clone, Copy)]
pub enum ServerTrust<'a> {
    /// Not at all: for the question which root it claims.
    Nobody,
    /// Its chain ends at this root (PEM), names the host, and its usage is `kms:rpc`.
    Root(&'a str),
    /// Its chain ends at this root and names the host, and its certificate is of one of these apps: a gateway.
    App {
        /// PEM.
        root: &'a str,
        /// Text that contains the app's id in hex, as a KMS names gateways; `any` is every app.
        app_ids: &'a str,
    },
}

/// What the server's certificate has to say beside its name.
#[derive(Debug, Clone)]
enum Check {
    Nothing,
    Usage,
    App { app_ids: String },
}

/// Why an RPC has no answer.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RpcCallError {
    /// Our own side: a root or name that is none.
    #[error("cannot ask {host}: {reason}")]
    Setup {
        /// The server.
        host: String,
        /// What is wrong.
        reason: String,
    },
    /// No connection, no TLS session, no HTTP answer. Try another server, or later.
    #[error("{host} unreachable: {reason}")]
    Connection {
        /// The server.
        host: String,
        /// What failed.
        reason: String,
    },
    /// It did not answer in time.
    #[error("{host} did not answer {method} within {waited:?}")]
    Timeout {
        /// The server.
        host: String,
        /// The method.
        method: &'static str,
        /// How long it was given.
        waited: Duration,
    },
    /// The server's certificate is not that of a KMS.
    #[error("{host}: Invalid server cert usage: expected {USAGE}, got {got:?}")]
    Usage {
        /// The server.
        host: String,
        /// The usage found.
        got: Option<String>,
    },
    /// The server's certificate is of another app than those that may be the gateway.
    #[error("{host}: Invalid dstack-gateway app id: expected one in {expected:?}, got {got:?}")]
    App {
        /// The server.
        host: String,
        /// Those that may.
        expected: String,
        /// The id found, hex.
        got: Option<String>,
    },
    /// The server refuses; its own words.
    #[error("{host} refuses {method} with status {status}: {answer}")]
    Refused {
        /// The server.
        host: String,
        /// The method.
        method: &'static str,
        /// HTTP status.
        status: u16,
        /// Start of its answer.
        answer: String,
    },
    /// The answer is none.
    #[error("answer of {host} to {method}: {reason}")]
    Answer {
        /// The server.
        host: String,
        /// The method.
        method: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

/// Where an RPC goes.
#[derive(Debug, Clone, Copy)]
pub struct RpcTarget<'a> {
    /// Name or address in the server's certificate.
    pub host: &'a str,
    /// For the `Host` field.
    pub port: u16,
    /// Ends in `/prpc`.
    pub path: &'a str,
    /// Name of the method.
    pub method: &'static str,
    /// For everything.
    pub timeout: Duration,
}

/// A client with or without a certificate.
#[derive(Clone)]
pub struct RpcClient {
    tls: Arc<ClientConfig>,
    check: Check,
}

impl RpcClient {
    /// `identity`: see [`CertifiedIdentity::for_dstack_client`].
    ///
    /// # Errors
    /// [`RatlsError::Tls`].
    pub fn new(trust: ServerTrust<'_>, identity: Option<&CertifiedIdentity>, now: &Now) -> Result<Self, RatlsError> {
        Self::build(trust, identity.map(CertifiedIdentity::certified_key), now)
    }

    /// With a certificate that a KMS signed. `chain`: PEM, the leaf first; `key`: PKCS#8, DER.
    ///
    /// # Errors
    /// [`RatlsError::Tls`], also of a chain or key that is none.
    pub fn with_chain(trust: ServerTrust<'_>, chain: &[String], key: &[u8], now: &Now) -> Result<Self, RatlsError> {
        let refused = |reason: String| RatlsError::Tls { reason };
        let chain = chain.iter().map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).map(CertificateDer::into_owned));
        let chain = chain.collect::<Result<Vec<_>, _>>().map_err(|error| refused(format!("client certificate: {error:?}")))?;
        let key = PrivateKeyDer::Pkcs8(key.into());
        let certified = CertifiedKey::from_der(chain, key.clone_key(), &provider()).map_err(|error| refused(error.to_string()))?;
        Self::build(trust, Some(Arc::new(certified)), now)
    }

    fn build(trust: ServerTrust<'_>, identity: Option<Arc<CertifiedKey>>, now: &Now) -> Result<Self, RatlsError> {
        let refused = |reason: String| RatlsError::Tls { reason };
        let provider = provider();
        let verifier: Arc<dyn ServerCertVerifier> = match trust {
            ServerTrust::Nobody => Seen::new(provider.signature_verification_algorithms),
            ServerTrust::Root(pem) | ServerTrust::App { root: pem, .. } => {
                let mut roots = RootCertStore::empty();
                let der =
                    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| refused(format!("root certificate: {error:?}")))?;
                roots.add(der).map_err(|error| refused(format!("root certificate: {error}")))?;
                WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
                    .build()
                    .map_err(|error| refused(error.to_string()))?
            }
        };
        let builder = ClientConfig::builder_with_details(provider, Arc::new(GivenTime(Arc::clone(now))))
            .with_protocol_versions(&[&TLS13, &TLS12])
            .map_err(|error| refused(error.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut tls = match identity {
            Some(identity) => builder.with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(identity))),
            None => builder.with_no_client_auth(),
        };
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        tls.resumption = Resumption::disabled();
        let check = match trust {
            ServerTrust::Nobody => Check::Nothing,
            ServerTrust::Root(_) => Check::Usage,
            ServerTrust::App { app_ids, .. } => Check::App { app_ids: app_ids.to_ascii_lowercase() },
        };
        Ok(Self { tls: Arc::new(tls), check })
    }

    /// Connects by TCP and asks, once.
    ///
    /// # Errors
    /// [`RpcCallError`].
    pub async fn call<Q: Rpc, A: Rpc>(&self, address: SocketAddr, target: RpcTarget<'_>, request: &Q) -> Result<A, RpcCallError> {
        within(target, async { self.open(tcp(address, target).await?, target).await?.ask(target, request).await }).await
    }

    /// Asks once over a stream that leads to the server already: a tunnel.
    ///
    /// # Errors
    /// [`RpcCallError`].
    pub async fn call_over<S, Q, A>(&self, stream: S, target: RpcTarget<'_>, request: &Q) -> Result<A, RpcCallError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
        Q: Rpc,
        A: Rpc,
    {
        within(target, async { self.open(stream, target).await?.ask(target, request).await }).await
    }

    /// Connects by TCP, for one question after the other.
    ///
    /// # Errors
    /// [`RpcCallError`].
    pub async fn connect(&self, address: SocketAddr, target: RpcTarget<'_>) -> Result<RpcConnection, RpcCallError> {
        within(target, async { self.open(tcp(address, target).await?, target).await }).await
    }

    async fn open<S>(&self, stream: S, target: RpcTarget<'_>) -> Result<RpcConnection, RpcCallError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let host = target.host;
        let name = ServerName::try_from(host.to_owned())
            .map_err(|error| RpcCallError::Setup { host: host.to_owned(), reason: error.to_string() })?;
        let stream = TlsConnector::from(Arc::clone(&self.tls)).connect(name, stream).await.map_err(|error| unreachable(target, &error))?;
        let leaf = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        self.require(leaf.map(AsRef::as_ref), target)?;
        let (requests, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| unreachable(target, &error))?;
        Ok(RpcConnection { requests, driver: tokio::spawn(async { drop(connection.await) }) })
    }
}

/// A connection whose server was checked. Closed when dropped.
pub struct RpcConnection {
    requests: http1::SendRequest<Full<Bytes>>,
    driver: JoinHandle<()>,
}

impl RpcConnection {
    /// Asks; the next question may follow the answer.
    ///
    /// # Errors
    /// [`RpcCallError`].
    pub async fn call<Q: Rpc, A: Rpc>(&mut self, target: RpcTarget<'_>, request: &Q) -> Result<A, RpcCallError> {
        within(target, self.ask(target, request)).await
    }

    async fn ask<Q: Rpc, A: Rpc>(&mut self, target: RpcTarget<'_>, request: &Q) -> Result<A, RpcCallError> {
        let RpcTarget { host, port, path, method, .. } = target;
        let setup = |reason: String| RpcCallError::Setup { host: host.to_owned(), reason };
        let body = Full::new(Bytes::from(Codec::Json.encode(request).body));
        let authority = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let request = Request::builder().method(Method::POST).uri(format!("{path}/{method}?json")).header(HOST, authority).body(body);
        let request = request.map_err(|error| setup(error.to_string()))?;
        // The answer before this one was read to its end; the connection may take a moment to notice.
        self.requests.ready().await.map_err(|error| unreachable(target, &error))?;
        let response = self.requests.send_request(request).await.map_err(|error| unreachable(target, &error))?;
        let status = response.status().as_u16();
        let answer = |reason: String| RpcCallError::Answer { host: host.to_owned(), method, reason };
        let body =
            Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await.map_err(|error| answer(error.to_string()))?.to_bytes();
        if status != 200 {
            let answer = String::from_utf8_lossy(&body).chars().filter(|shown| !shown.is_control()).take(ECHO_CHARS_MAX).collect();
            return Err(RpcCallError::Refused { host: host.to_owned(), method, status, answer });
        }
        Codec::Json.decode("", &body).map_err(|error| answer(error.to_string()))
    }
}

impl RpcClient {
    /// The chain names the host, and so might any app's certificate under the same root.
    fn require(&self, leaf: Option<&[u8]>, target: RpcTarget<'_>) -> Result<(), RpcCallError> {
        let claims = || leaf.map(CertificateClaims::read).transpose().map_err(|error| unreachable(target, &error));
        let host = || target.host.to_owned();
        match &self.check {
            Check::Nothing => Ok(()),
            Check::Usage => match claims()?.and_then(|claims| claims.usage) {
                Some(usage) if usage == USAGE => Ok(()),
                got => Err(RpcCallError::Usage { host: host(), got }),
            },
            // util and deploy reference §9: the id is contained in the text; `any` disables the check, not that of the chain
            Check::App { app_ids } => match claims()?.and_then(|claims| claims.app_id).map(hex::encode) {
                _ if app_ids == "any" => Ok(()),
                Some(id) if app_ids.contains(&id) => Ok(()),
                got => Err(RpcCallError::App { host: host(), expected: app_ids.chars().take(ECHO_CHARS_MAX).collect(), got }),
            },
        }
    }
}

impl Drop for RpcConnection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl std::fmt::Debug for RpcConnection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RpcConnection")
    }
}

async fn tcp(address: SocketAddr, target: RpcTarget<'_>) -> Result<TcpStream, RpcCallError> {
    let stream = TcpStream::connect(address).await.map_err(|error| unreachable(target, &error))?;
    stream.set_nodelay(true).map_err(|error| unreachable(target, &error))?;
    Ok(stream)
}

async fn within<T>(target: RpcTarget<'_>, work: impl Future<Output = Result<T, RpcCallError>>) -> Result<T, RpcCallError> {
    let RpcTarget { method, timeout: waited, .. } = target;
    let late = |_| RpcCallError::Timeout { host: target.host.to_owned(), method, waited };
    tokio::time::timeout(waited, work).await.map_err(late)?
}

impl std::fmt::Debug for RpcClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RpcClient")
    }
}

fn unreachable(target: RpcTarget<'_>, error: &dyn std::error::Error) -> RpcCallError {
    RpcCallError::Connection { host: target.host.to_owned(), reason: error.to_string() }
}
