//! A node's connection to another node. Owns: one multiplexed HTTP/2 connection, kept and remade. Never: retries a
//! request; the caller knows whether it may.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use dstack_attest::VerifiedIdentity;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http2::{self, SendRequest};
use hyper::{Method, Request};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ClientConfig;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::dial::{Fault, Watched};
use crate::error::{PeerError, RatlsError};
use crate::hello::{ExpectedPeer, Exporters, HelloError, HelloIdentity, PeerHello, Side, exchange};
use crate::judge::EvidenceJudge;
use crate::peer::PeerRole;
use crate::pool::GuardedPool;
use crate::source::CertificateSource;
use crate::verifier::Verifier;
use crate::{ALPN_NODE, Now, dial, metrics, tls};

/// What all connections to nodes share.
#[derive(Clone)]
pub struct PeerDialer {
    tls: Arc<ClientConfig>,
    hello: HelloIdentity,
    limits: PeerLimits,
}

/// Limits of connections to nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerLimits {
    /// From the first packet to the peer's HELLO.
    pub connect_timeout: Duration,
    /// After a failure the first pause; doubles to the last.
    pub backoff_min: Duration,
    /// Longest pause.
    pub backoff_max: Duration,
    /// A connection older than this is replaced, so that evidence is verified anew; its requests finish.
    pub age_max: Duration,
    /// Largest answer, bytes.
    pub answer_bytes_max: usize,
}

impl Default for PeerLimits {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(2),
            age_max: Duration::from_secs(3600),
            answer_bytes_max: dstack_protocol::limits::FRAME_BYTES_MAX,
        }
    }
}

impl PeerDialer {
    /// `judge` sees every node we connect to, in the role [`PeerRole::Node`].
    ///
    /// # Errors
    /// [`RatlsError::Tls`], [`RatlsError::Threads`].
    pub fn new(
        source: Arc<CertificateSource>,
        judge: Arc<dyn EvidenceJudge>,
        now: Now,
        hello: HelloIdentity,
        limits: PeerLimits,
    ) -> Result<Self, RatlsError> {
        let provider = tls::provider();
        let verifier = Verifier::new(PeerRole::Node, judge, GuardedPool::start(1)?, provider.signature_verification_algorithms);
        let tls = tls::client_config(&provider, &now, Some(source), verifier, &[ALPN_NODE])?;
        Ok(Self { tls, hello, limits })
    }

    /// A client of one node. Connects when first used.
    pub fn peer(&self, address: SocketAddr, expected: ExpectedPeer) -> PeerClient {
        PeerClient { dialer: self.clone(), address, expected, state: Arc::new(Mutex::new(State::Down { since: None })) }
    }
}

impl std::fmt::Debug for PeerDialer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerDialer").field("hello", &self.hello).finish_non_exhaustive()
    }
}

/// One node. Clones share the connection.
#[derive(Clone)]
pub struct PeerClient {
    dialer: PeerDialer,
    address: SocketAddr,
    expected: ExpectedPeer,
    state: Arc<Mutex<State>>,
}

enum State {
    Up(Connection),
    Down { since: Option<Failure> },
}

struct Failure {
    at: Instant,
    pause: Duration,
    error: PeerError,
}

#[derive(Clone)]
struct Connection {
    requests: SendRequest<Full<Bytes>>,
    fault: Fault,
    hello: PeerHello,
    identity: Arc<VerifiedIdentity>,
    since: Instant,
}

impl PeerClient {
    /// Where the peer is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sends `body` to `path` and waits for the whole answer, all within `timeout`.
    ///
    /// # Errors
    /// [`PeerError`]. After [`PeerError::Timeout`] and [`PeerError::Unreachable`] it is unknown whether the request took
    /// effect.
    pub async fn post(&self, path: &str, body: impl Into<Bytes>, timeout: Duration) -> Result<(u16, Bytes), PeerError> {
        let body = body.into();
        let outcome = match tokio::time::timeout(timeout, self.send(path, body)).await {
            Ok(outcome) => outcome,
            Err(_elapsed) => Err(PeerError::Timeout { address: self.address, stage: "request", waited: timeout }),
        };
        metrics::peer_request(outcome.as_ref().err().map_or("ok", PeerError::code));
        outcome
    }

    /// Connects if need be; who the peer is.
    ///
    /// # Errors
    /// [`PeerError`].
    pub async fn peer(&self) -> Result<(PeerHello, Arc<VerifiedIdentity>), PeerError> {
        let connection = self.connection().await?;
        Ok((connection.hello, connection.identity))
    }

    async fn send(&self, path: &str, body: Bytes) -> Result<(u16, Bytes), PeerError> {
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(format!("https://{}{path}", self.address))
            .body(Full::new(body))
            .map_err(|error| PeerError::Protocol { address: self.address, reason: error.to_string() })?;
        let mut may_reopen = true;
        loop {
            let mut connection = self.connection().await?;
            let failed = match connection.requests.ready().await {
                Ok(()) => match connection.requests.try_send_request(request).await {
                    Ok(response) => {
                        let status = response.status().as_u16();
                        let body = collect(response.into_body(), &connection.fault, self.dialer.limits.answer_bytes_max).await?;
                        return Ok((status, body));
                    }
                    Err(mut failure) => match failure.take_message() {
                        Some(unsent) => {
                            request = unsent;
                            failure.into_error()
                        }
                        None => return Err(connection.fault.classify(failure.error())),
                    },
                },
                Err(error) => error,
            };
            // The connection ended before the request was sent, as when the peer drains: one new one may take it. A peer
            // that refuses us ends each at once, and is not asked again.
            if !may_reopen || connection.fault.is_refusal() {
                return Err(connection.fault.classify(&failed));
            }
            may_reopen = false;
            self.forget(&connection).await;
        }
    }

    /// Drops a connection that ended, unless another caller has replaced it already.
    async fn forget(&self, ended: &Connection) {
        let mut state = self.state.lock().await;
        if matches!(&*state, State::Up(connection) if connection.since == ended.since) {
            *state = State::Down { since: None };
        }
    }

    /// The open connection, or a new one. Callers wait for the one that is being opened; while the peer is known to be
    /// down they get its error at once.
    async fn connection(&self) -> Result<Connection, PeerError> {
        let mut state = self.state.lock().await;
        if let State::Up(connection) = &*state
            && !connection.requests.is_closed()
            && connection.since.elapsed() < self.dialer.limits.age_max
        {
            return Ok(connection.clone());
        }
        let mut pause = self.dialer.limits.backoff_min;
        if let State::Down { since: Some(failure) } = &*state {
            if failure.at.elapsed() < failure.pause {
                return Err(failure.error.clone());
            }
            pause = failure.pause.saturating_mul(2).min(self.dialer.limits.backoff_max);
        }
        match self.open().await {
            Ok(connection) => {
                *state = State::Up(connection.clone());
                Ok(connection)
            }
            Err(error) => {
                tracing::debug!(address = %self.address, code = error.code(), reason = %error, "cannot connect to node");
                *state = State::Down { since: Some(Failure { at: Instant::now(), pause, error: error.clone() }) };
                Err(error)
            }
        }
    }

    async fn open(&self) -> Result<Connection, PeerError> {
        let (address, limits) = (self.address, &self.dialer.limits);
        let (mut stream, verdict) = dial::connect(address, &self.dialer.tls, limits.connect_timeout).await?;
        if stream.get_ref().1.alpn_protocol() != Some(ALPN_NODE) {
            return Err(PeerError::Protocol { address, reason: "does not speak the node protocol".to_owned() });
        }
        let hello = match Exporters::of(stream.get_ref().1) {
            Ok(exporters) => {
                exchange(&mut stream, Side::Client, &exporters, &self.dialer.hello, self.expected, limits.connect_timeout).await
            }
            Err(error) => Err(error),
        };
        let hello = hello.map_err(|error| match error {
            // In TLS 1.3 the server judges our certificate after our handshake is over, and says so in place of HELLO.
            HelloError::Missing { reason } => PeerError::RefusedByPeer { address, reason },
            error => PeerError::Hello { address, error },
        })?;
        let (stream, fault) = Watched::new(stream, address);
        let (requests, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(1024 * 1024)
            .initial_connection_window_size(4 * 1024 * 1024)
            .keep_alive_interval(Duration::from_secs(5))
            .keep_alive_timeout(Duration::from_secs(5))
            .keep_alive_while_idle(true)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| fault.classify(&error))?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%address, reason = %error, "connection to node ended");
            }
        });
        Ok(Connection { requests, fault, hello, identity: verdict.identity, since: Instant::now() })
    }
}

impl std::fmt::Debug for PeerClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerClient").field("address", &self.address).field("expected", &self.expected).finish_non_exhaustive()
    }
}

/// The whole body of an answer, or an error beyond the limit.
pub(crate) async fn collect(body: hyper::body::Incoming, fault: &Fault, limit_bytes: usize) -> Result<Bytes, PeerError> {
    match Limited::new(body, limit_bytes).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(PeerError::TooLarge { address: fault.address(), limit_bytes }),
        Err(error) => match error.downcast_ref::<hyper::Error>() {
            Some(error) => Err(fault.classify(error)),
            None => Err(PeerError::Unreachable { address: fault.address(), reason: error.to_string() }),
        },
    }
}
