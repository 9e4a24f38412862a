//! A client's connection to a node. Owns: HTTP over RA-TLS with or without a certificate of its own, the server's
//! evidence verified. Never: picks a node or retries; the client crate does.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use dstack_attest::VerifiedIdentity;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::client::conn::{http1, http2};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ClientConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Mutex;
use tokio_rustls::client::TlsStream;

use crate::dial::{Fault, Watched};
use crate::error::{PeerError, RatlsError};
use crate::judge::EvidenceJudge;
use crate::peer::PeerRole;
use crate::peer_client::collect;
use crate::pool::GuardedPool;
use crate::source::CertificateSource;
use crate::verifier::{Verdict, Verifier};
use crate::{Now, dial, tls};

/// What all connections of a client share.
#[derive(Clone)]
pub struct ClientDialer {
    tls: Arc<ClientConfig>,
}

impl ClientDialer {
    /// `source`: the session's certificate, `None` for an anonymous client. `judge` sees every node we connect to, in
    /// the role [`PeerRole::Server`]. HTTP/2 is preferred.
    ///
    /// # Errors
    /// [`RatlsError::Tls`], [`RatlsError::Threads`].
    pub fn new(source: Option<Arc<CertificateSource>>, judge: Arc<dyn EvidenceJudge>, now: Now) -> Result<Self, RatlsError> {
        Self::speaking(source, judge, now, &[b"h2", b"http/1.1"])
    }

    /// As [`ClientDialer::new`], HTTP/1.1 only.
    ///
    /// # Errors
    /// As there.
    pub fn http1(source: Option<Arc<CertificateSource>>, judge: Arc<dyn EvidenceJudge>, now: Now) -> Result<Self, RatlsError> {
        Self::speaking(source, judge, now, &[b"http/1.1"])
    }

    fn speaking(
        source: Option<Arc<CertificateSource>>,
        judge: Arc<dyn EvidenceJudge>,
        now: Now,
        alpn: &[&[u8]],
    ) -> Result<Self, RatlsError> {
        let provider = tls::provider();
        let verifier = Verifier::new(PeerRole::Server, judge, GuardedPool::start(1)?, provider.signature_verification_algorithms);
        Ok(Self { tls: tls::client_config(&provider, &now, source, verifier, alpn)? })
    }

    /// Connects to a node and verifies its evidence.
    ///
    /// # Errors
    /// [`PeerError`]. The node's refusal of our certificate shows at the first request.
    pub async fn connect(&self, address: SocketAddr, timeout: Duration) -> Result<ClientConnection, PeerError> {
        let (stream, verdict) = dial::connect(address, &self.tls, timeout).await?;
        Self::speak(stream, verdict, address).await
    }

    /// As [`ClientDialer::connect`], over a stream that leads to the node already: a tunnel. `address` is for messages, and for the
    /// name that requests carry; nothing is decided by it.
    ///
    /// # Errors
    /// As there.
    pub async fn connect_over<S>(&self, stream: S, address: SocketAddr, timeout: Duration) -> Result<ClientConnection, PeerError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (stream, verdict) = dial::connect_over(stream, address, &self.tls, timeout).await?;
        Self::speak(stream, verdict, address).await
    }

    async fn speak<S>(stream: TlsStream<S>, verdict: Verdict, address: SocketAddr) -> Result<ClientConnection, PeerError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let (stream, fault) = Watched::new(stream, address);
        let io = TokioIo::new(stream);
        let refused = |error: hyper::Error| fault.classify(&error);
        let requests = if is_http2 {
            let (requests, connection) = http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .keep_alive_interval(Duration::from_secs(10))
                .keep_alive_timeout(Duration::from_secs(10))
                .handshake(io)
                .await
                .map_err(refused)?;
            tokio::spawn(run(address, connection));
            Requests::Two(requests)
        } else {
            let (requests, connection) = http1::Builder::new().handshake(io).await.map_err(refused)?;
            tokio::spawn(run(address, connection));
            Requests::One(Arc::new(Mutex::new(requests)))
        };
        Ok(ClientConnection { fault, identity: verdict.identity, requests })
    }
}

async fn run(address: SocketAddr, connection: impl Future<Output = hyper::Result<()>>) {
    if let Err(error) = connection.await {
        tracing::debug!(%address, reason = %error, "connection ended");
    }
}

impl std::fmt::Debug for ClientDialer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClientDialer")
    }
}

/// An open connection to a verified node. Clones share it.
#[derive(Clone)]
pub struct ClientConnection {
    fault: Fault,
    identity: Arc<VerifiedIdentity>,
    requests: Requests,
}

#[derive(Clone)]
enum Requests {
    /// One request at a time.
    One(Arc<Mutex<http1::SendRequest<Full<Bytes>>>>),
    Two(http2::SendRequest<Full<Bytes>>),
}

/// A request, of HTTP what our protocols need.
#[derive(Debug, Clone)]
pub struct ClientRequest<'a> {
    /// Method.
    pub method: Method,
    /// Path and query.
    pub path: &'a str,
    /// Media type of the body; empty for none.
    pub content_type: &'a str,
    /// Body.
    pub body: Bytes,
    /// Further header fields, names in lower case.
    pub headers: &'a [(&'a str, &'a str)],
    /// Largest answer, bytes.
    pub answer_bytes_max: usize,
    /// For everything up to the answer's last byte.
    pub timeout: Duration,
}

impl ClientConnection {
    /// Where the node is.
    pub fn address(&self) -> SocketAddr {
        self.fault.address()
    }

    /// What its evidence proved.
    pub fn identity(&self) -> &Arc<VerifiedIdentity> {
        &self.identity
    }

    /// True when a new connection is needed.
    pub fn is_closed(&self) -> bool {
        match &self.requests {
            // Locked means in use.
            Requests::One(requests) => requests.try_lock().is_ok_and(|requests| requests.is_closed()),
            Requests::Two(requests) => requests.is_closed(),
        }
    }

    /// Sends a request and waits for the whole answer: status and body.
    ///
    /// # Errors
    /// [`PeerError`].
    pub async fn request(&self, request: ClientRequest<'_>) -> Result<(u16, Bytes), PeerError> {
        let waited = request.timeout;
        match tokio::time::timeout(waited, self.send(request)).await {
            Ok(outcome) => outcome,
            Err(_elapsed) => Err(PeerError::Timeout { address: self.address(), stage: "request", waited }),
        }
    }

    async fn send(&self, request: ClientRequest<'_>) -> Result<(u16, Bytes), PeerError> {
        let limit_bytes = request.answer_bytes_max;
        let response = match &self.requests {
            Requests::One(requests) => {
                let request = self.build(request, false)?;
                let mut requests = requests.lock().await;
                let response = answered(requests.ready().await, || requests.send_request(request), &self.fault).await?;
                // The body is read under the lock: HTTP/1.1 has one answer at a time.
                let status = response.status().as_u16();
                return Ok((status, collect(response.into_body(), &self.fault, limit_bytes).await?));
            }
            Requests::Two(requests) => {
                let request = self.build(request, true)?;
                let mut requests = requests.clone();
                answered(requests.ready().await, || requests.send_request(request), &self.fault).await?
            }
        };
        let status = response.status().as_u16();
        Ok((status, collect(response.into_body(), &self.fault, limit_bytes).await?))
    }

    fn build(&self, request: ClientRequest<'_>, is_http2: bool) -> Result<Request<Full<Bytes>>, PeerError> {
        let ClientRequest { method, path, content_type, body, headers, .. } = request;
        let mut builder = Request::builder().method(method);
        builder = if is_http2 {
            builder.uri(format!("https://{}{path}", self.address()))
        } else {
            builder.uri(path).header(HOST, self.address().to_string())
        };
        if !content_type.is_empty() {
            builder = builder.header(CONTENT_TYPE, content_type);
        }
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(Full::new(body)).map_err(|error| PeerError::Protocol { address: self.address(), reason: error.to_string() })
    }
}

async fn answered<B, F>(ready: hyper::Result<()>, send: impl FnOnce() -> F, fault: &Fault) -> Result<Response<B>, PeerError>
where
    F: Future<Output = hyper::Result<Response<B>>>,
{
    let answer = match ready {
        Ok(()) => send().await,
        Err(error) => Err(error),
    };
    answer.map_err(|error| fault.classify(&error))
}

impl std::fmt::Debug for ClientConnection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientConnection").field("address", &self.address()).finish_non_exhaustive()
    }
}
