//! The TLS listener of a node. Owns: accept loop, handshakes, which router a connection gets. Never: a route.
//! Source: architecture.md §2 (HELLO); issue 2, "Bad input" (floods, slow-loris, half-open connections).
//!
//! ALPN `dkms-node/1`: certificate and HELLO mandatory, then HTTP/2 with [`NodePeer`] in each request's extensions.
//! ALPN `h2`, `http/1.1` or none: certificate optional, HTTP with [`ClientPeer`] in each request's extensions.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use dstack_attest::VerifiedIdentity;
use rustls::ServerConfig;
use rustls::server::Acceptor as RustlsAcceptor;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::{Admission, Full, Slot, Stage};
use crate::error::RatlsError;
use crate::hello::{ExpectedPeer, Exporters, HelloIdentity, PeerHello, Side, exchange};
use crate::http::{self, End, Stamp, Version};
use crate::judge::EvidenceJudge;
use crate::limits::Limits;
use crate::peer::{Binding, PeerRole};
use crate::pool::GuardedPool;
use crate::source::CertificateSource;
use crate::verifier::{Verdict, Verifier, with_verdict};
use crate::{ALPN_NODE, Now, metrics, tls};

/// The other node of a node connection; an extension of each of its requests.
#[derive(Debug, Clone)]
pub struct NodePeer {
    /// Seat and key that its HELLO proved.
    pub hello: PeerHello,
    /// What its evidence proved.
    pub identity: Arc<VerifiedIdentity>,
    /// Where it connected from.
    pub address: SocketAddr,
}

/// A client; an extension of each of its requests.
#[derive(Debug, Clone)]
pub struct ClientPeer {
    /// What its certificate proved; `None` for an anonymous client.
    pub attested: Option<AttestedClient>,
    /// Where it connected from.
    pub address: SocketAddr,
}

/// What a client's certificate proved.
#[derive(Debug, Clone)]
pub struct AttestedClient {
    /// Its identity.
    pub identity: Arc<VerifiedIdentity>,
    /// Content of the evidence extension, to pass on to holders.
    pub evidence: Arc<[u8]>,
    /// The certificate's key, DER: it signs release requests.
    pub spki: Arc<[u8]>,
    /// `beacon_pos` of the session; `None` in dstack's own binding, which cannot ask in mode C.
    pub session: Option<u64>,
}

/// What a node's listener is made of.
pub struct Setup {
    /// Our certificate.
    pub source: Arc<CertificateSource>,
    /// Judges nodes.
    pub node_judge: Arc<dyn EvidenceJudge>,
    /// Judges clients.
    pub client_judge: Arc<dyn EvidenceJudge>,
    /// Time.
    pub now: Now,
    /// Limits.
    pub limits: Limits,
    /// Threads that parse and judge certificates.
    pub judge_threads: usize,
    /// Who we are to nodes.
    pub hello: HelloIdentity,
    /// Requests of nodes.
    pub node_router: Router,
    /// Requests of clients.
    pub client_router: Router,
}

/// A bound listener. [`Server::run`] serves it.
pub struct Server {
    listener: TcpListener,
    shared: Arc<Shared>,
}

struct Shared {
    admission: Arc<Admission>,
    limits: Limits,
    hello: HelloIdentity,
    node_tls: Arc<ServerConfig>,
    client_tls: Arc<ServerConfig>,
    node_router: Router,
    client_router: Router,
}

/// Changes a running server.
#[derive(Clone)]
pub struct ServerHandle {
    admission: Arc<Admission>,
}

impl ServerHandle {
    /// Sets the addresses for which places are kept free in a flood.
    pub fn set_known_peers(&self, addresses: HashSet<IpAddr>) {
        self.admission.set_known(addresses);
    }

    /// Connections held now, in all stages. Never more than [`Limits::descriptors_max`].
    pub fn connections(&self) -> usize {
        self.admission.total()
    }
}

impl std::fmt::Debug for ServerHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServerHandle")
    }
}

impl Server {
    /// Binds the address. Connections wait in the kernel until [`Server::run`].
    ///
    /// # Errors
    /// [`RatlsError::Bind`], [`RatlsError::Tls`], [`RatlsError::Threads`].
    pub async fn bind(address: SocketAddr, setup: Setup) -> Result<Self, RatlsError> {
        let listener = TcpListener::bind(address)
            .await
            .map_err(|error| RatlsError::Bind { address: address.to_string(), reason: error.to_string() })?;
        Self::from_listener(listener, setup)
    }

    /// As [`Server::bind`], on a listener that exists.
    ///
    /// # Errors
    /// [`RatlsError::Tls`], [`RatlsError::Threads`].
    pub fn from_listener(listener: TcpListener, setup: Setup) -> Result<Self, RatlsError> {
        let Setup { source, node_judge, client_judge, now, limits, judge_threads, hello, node_router, client_router } = setup;
        let provider = tls::provider();
        let pool = GuardedPool::start(judge_threads)?;
        let algorithms = provider.signature_verification_algorithms;
        let node_verifier = Verifier::new(PeerRole::Node, node_judge, Arc::clone(&pool), algorithms);
        let client_verifier = Verifier::new(PeerRole::Client, client_judge, pool, algorithms);
        let node_tls = tls::server_config(&provider, &now, Arc::clone(&source), node_verifier, &[ALPN_NODE])?;
        let client_tls = tls::server_config(&provider, &now, source, client_verifier, &[b"h2", b"http/1.1"])?;
        let admission = Admission::new(limits.clone());
        Ok(Self { listener, shared: Arc::new(Shared { admission, limits, hello, node_tls, client_tls, node_router, client_router }) })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The operating system's.
    pub fn local_address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// A handle to keep while it runs.
    pub fn handle(&self) -> ServerHandle {
        ServerHandle { admission: Arc::clone(&self.shared.admission) }
    }

    /// Serves until `shutdown`, then lets running requests finish within [`Limits::drain_timeout`].
    pub async fn run(self, shutdown: CancellationToken) {
        let Self { listener, shared } = self;
        let tasks = TaskTracker::new();
        let drain_timeout = shared.limits.drain_timeout;
        while let Some((stream, address)) = accept(&listener, &shutdown).await {
            match shared.admission.admit(address.ip()) {
                Ok(slot) => {
                    let (shared, shutdown) = (Arc::clone(&shared), shutdown.clone());
                    tasks.spawn(async move {
                        let evicted = slot.evicted();
                        tokio::select! {
                            biased;
                            () = evicted.cancelled() => {}
                            () = shared.connection(stream, address, slot, shutdown) => {}
                        }
                    });
                }
                Err(full) => metrics::refused(full.name()),
            }
        }
        drop(listener);
        tasks.close();
        // Each connection bounds its own drain; the margin covers handshakes that were under way.
        let _ = tokio::time::timeout(drain_timeout.saturating_add(Duration::from_secs(2)), tasks.wait()).await;
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("listener", &self.listener).finish_non_exhaustive()
    }
}

/// The next connection, `None` on shutdown. Waits where the system is out of descriptors or memory.
pub(crate) async fn accept(listener: &TcpListener, shutdown: &CancellationToken) -> Option<(TcpStream, SocketAddr)> {
    let mut pause = Duration::from_millis(5);
    loop {
        let outcome = tokio::select! {
            biased;
            () = shutdown.cancelled() => return None,
            outcome = listener.accept() => outcome,
        };
        match outcome {
            Ok(accepted) => return Some(accepted),
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                metrics::accept_error();
                tracing::warn!(reason = %error, pause_ms = pause.as_millis(), "cannot accept connections");
                tokio::time::sleep(pause).await;
                pause = pause.saturating_mul(2).min(Duration::from_secs(1));
            }
        }
    }
}

fn is_of_one_connection(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

/// A connection that came through its handshake.
struct Greeted {
    stream: TlsStream<TcpStream>,
    verdict: Option<Verdict>,
    is_node: bool,
}

impl Shared {
    async fn connection(&self, stream: TcpStream, address: SocketAddr, mut slot: Slot, shutdown: CancellationToken) {
        let greeted = tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            greeted = self.handshake(stream, &mut slot) => greeted,
        };
        let Greeted { stream, verdict, is_node } = match greeted {
            Ok(greeted) => greeted,
            Err(reason) => {
                metrics::refused(reason.code);
                tracing::debug!(%address, code = reason.code, detail = reason.detail, "connection refused");
                return;
            }
        };
        let end = End { drain: shutdown, drain_timeout: self.limits.drain_timeout, now: slot.evicted() };
        match (is_node, verdict) {
            (true, Some(verdict)) => self.serve_node(stream, address, verdict, slot, end).await,
            // Unreachable while the node verifier demands a certificate; refused should it ever not.
            (true, None) => metrics::refused("no_certificate"),
            (false, verdict) => self.serve_client(stream, address, verdict, slot, end).await,
        }
    }

    async fn handshake(&self, stream: TcpStream, slot: &mut Slot) -> Result<Greeted, Refused> {
        stream.set_nodelay(true).map_err(|error| Refused::of("socket", &error))?;
        let greeting = LazyConfigAcceptor::new(RustlsAcceptor::default(), stream);
        let start = within(self.limits.greeting_timeout, "greeting", greeting).await?;
        let began = Instant::now();
        let is_node = start.client_hello().alpn().is_some_and(|mut names| names.any(|name| name == ALPN_NODE));
        let config = if is_node { &self.node_tls } else { &self.client_tls };
        slot.advance_handshake(is_node, began).map_err(Refused::full)?;
        let handshake = with_verdict(start.into_stream(Arc::clone(config)).into_fallible());
        let (stream, verdict) = within(self.limits.handshake_timeout, "handshake", async {
            match handshake.await {
                (Ok(stream), verdict) => Ok((stream, verdict)),
                (Err((error, stream)), _) => {
                    linger(stream).await;
                    Err(error)
                }
            }
        })
        .await?;
        metrics::handshake(began.elapsed());
        Ok(Greeted { stream, verdict, is_node })
    }

    async fn serve_node(&self, mut stream: TlsStream<TcpStream>, address: SocketAddr, verdict: Verdict, mut slot: Slot, end: End) {
        let hello = match Exporters::of(stream.get_ref().1) {
            Ok(exporters) => {
                exchange(&mut stream, Side::Server, &exporters, &self.hello, ExpectedPeer::default(), self.limits.hello_timeout).await
            }
            Err(error) => Err(error),
        };
        let hello = match hello {
            Ok(hello) => hello,
            Err(error) => {
                metrics::refused(error.code());
                tracing::warn!(%address, code = error.code(), reason = %error, "node refused");
                return;
            }
        };
        if let Err(full) = slot.advance_node((hello.seat.0, hello.node_key)) {
            return metrics::refused(full.name());
        }
        let peer = NodePeer { hello, identity: verdict.identity, address };
        let stamp: Stamp = Arc::new(move |extensions| {
            extensions.insert(peer.clone());
        });
        http::serve(stream, Version::Two, self.node_router.clone(), stamp, self.limits.node_http.clone(), end).await;
    }

    async fn serve_client(&self, stream: TlsStream<TcpStream>, address: SocketAddr, verdict: Option<Verdict>, mut slot: Slot, end: End) {
        let stage = if verdict.is_some() { Stage::Attested } else { Stage::Anonymous };
        if let Err(full) = slot.advance(stage) {
            return metrics::refused(full.name());
        }
        let version = match stream.get_ref().1.alpn_protocol() {
            Some(b"h2") => Version::Two,
            _ => Version::One,
        };
        let attested = verdict.map(|Verdict { identity, evidence, spki, binding }| AttestedClient {
            identity,
            evidence,
            spki,
            session: match binding {
                Binding::Dstack => None,
                Binding::Session { beacon_pos } => Some(beacon_pos),
            },
        });
        let peer = ClientPeer { attested, address };
        let stamp: Stamp = Arc::new(move |extensions| {
            extensions.insert(peer.clone());
        });
        http::serve(stream, version, self.client_router.clone(), stamp, self.limits.client_http.clone(), end).await;
    }
}

/// Lets the peer read our alert: closing with its bytes unread would reset the connection, and the alert with it.
pub(crate) async fn linger(mut stream: TcpStream) {
    let mut discarded = [0u8; 4096];
    let drain = async {
        stream.shutdown().await?;
        for _ in 0..LINGER_READS_MAX {
            if stream.read(&mut discarded).await? == 0 {
                break;
            }
        }
        std::io::Result::Ok(())
    };
    // Whatever ends it, the connection is over.
    let _ = tokio::time::timeout(LINGER_TIMEOUT, drain).await;
}

/// How long a refused connection is kept for its alert.
const LINGER_TIMEOUT: Duration = Duration::from_millis(500);
/// Reads of up to 4 KiB while it is.
const LINGER_READS_MAX: u32 = 32;

/// Why a connection ended before it was served.
pub(crate) struct Refused {
    pub(crate) code: &'static str,
    pub(crate) detail: String,
}

impl Refused {
    pub(crate) fn of(code: &'static str, error: &std::io::Error) -> Self {
        Self { code, detail: error.to_string() }
    }

    pub(crate) fn full(full: Full) -> Self {
        Self { code: full.name(), detail: "full".to_owned() }
    }
}

pub(crate) async fn within<T>(
    timeout: Duration,
    stage: &'static str,
    step: impl Future<Output = std::io::Result<T>>,
) -> Result<T, Refused> {
    match tokio::time::timeout(timeout, step).await {
        Ok(outcome) => outcome.map_err(|error| Refused::of(stage, &error)),
        Err(_elapsed) => Err(Refused { code: "timeout", detail: format!("{stage} took over {timeout:?}") }),
    }
}
