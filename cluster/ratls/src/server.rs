//! The TLS listener of a node. Owns: which side of TLS and which router a connection gets, HELLO. Never: a route.
//! Source: architecture.md §2 (HELLO); issue 2, "Bad input" (floods, slow-loris, half-open connections).
//!
//! ALPN `dkms-node/1`: certificate and HELLO mandatory, then HTTP/2 with [`NodePeer`] in each request's extensions.
//! ALPN `h2`, `http/1.1` or none: certificate optional, HTTP with [`ClientPeer`] in each request's extensions.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::Router;
use dstack_attest::VerifiedIdentity;
use rustls::ServerConfig;
use rustls::server::ClientHello;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use crate::accepting::{self, Refused, Session};
use crate::admission::{Admission, Slot, Stage};
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
        Self::from_listener(accepting::bind(address).await?, setup)
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
        let drain_timeout = shared.limits.drain_timeout;
        let admission = Arc::clone(&shared.admission);
        accepting::run_admitted(listener, admission, drain_timeout, shutdown.clone(), |stream, address| {
            let (own, shutdown) = (Arc::clone(&shared), shutdown.clone());
            move |slot| async move { own.connection(stream, address, slot, shutdown).await }
        })
        .await;
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("listener", &self.listener).finish_non_exhaustive()
    }
}

impl Shared {
    async fn connection(&self, stream: TcpStream, address: SocketAddr, mut slot: Slot, shutdown: CancellationToken) {
        // On the heap for as long as it takes: its state is the largest of a connection, and floods are held in this stage.
        let handshake = Box::pin(self.handshake(stream, &mut slot));
        let Some(session) = accepting::greeted(&shutdown, address, handshake).await else { return };
        let Session { stream, shown: verdict, is_node } = session;
        let end = End { drain: shutdown, drain_timeout: self.limits.drain_timeout, now: slot.evicted() };
        match (is_node, verdict) {
            (true, Some(verdict)) => self.serve_node(stream, address, verdict, slot, end).await,
            // Unreachable while the node verifier demands a certificate; refused should it ever not.
            (true, None) => metrics::refused("no_certificate"),
            (false, verdict) => self.serve_client(stream, address, verdict, slot, end).await,
        }
    }

    async fn handshake(&self, stream: TcpStream, slot: &mut Slot) -> Result<Session<Option<Verdict>>, Refused> {
        let choose = |hello: &ClientHello<'_>| {
            let is_node = hello.alpn().is_some_and(|mut names| names.any(|name| name == ALPN_NODE));
            (Arc::clone(if is_node { &self.node_tls } else { &self.client_tls }), is_node)
        };
        accepting::handshake(&self.limits, stream, slot, choose, with_verdict).await
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
        let version = accepting::version(&stream);
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
