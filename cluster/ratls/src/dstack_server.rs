//! The TLS listener of dstack's KMS protocol. Owns: its handshakes, the server chain in use, what a client's certificate shows. Never: a
//! route; decides what evidence opens (its verdict is asked of whoever made the listener).
//! Source: KMS API reference §2 ("later"): client certificates are optional and of any issuer; one that is shown must parse, be valid now
//! and carry evidence that decodes, or the handshake is refused. What the evidence proves is judged afterwards, for each request.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};

use axum::Router;
use dstack_attest::VerifiedIdentity;
use dstack_protocol::binding;
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::accepting::{self, Refused, Session};
use crate::admission::{Admission, Slot, Stage};
use crate::any_issuer::{AnyIssuer, ShownEvidence, with_shown};
use crate::error::RatlsError;
use crate::http::{self, End, Stamp};
use crate::key::CertificateKey;
use crate::limits::Limits;
use crate::pool::GuardedPool;
use crate::{Now, metrics, tls};

/// A client of dstack's protocol; an extension of each of its requests.
#[derive(Debug, Clone)]
pub struct DstackPeer {
    /// What its certificate carries; `None` for an anonymous client.
    pub shown: Option<ShownEvidence>,
    /// What that proved when the connection began, where it did; bound to the certificate's key.
    pub identity: Option<Arc<VerifiedIdentity>>,
    /// Where it connected from.
    pub address: SocketAddr,
}

/// Judges evidence in dstack's encoding; `None` where it does not hold, or there is no room to judge it now.
pub type Verify = Arc<dyn Fn(Arc<[u8]>) -> Pin<Box<dyn Future<Output = Option<Arc<VerifiedIdentity>>> + Send>> + Send + Sync>;

/// The chain that new handshakes show: leaf and issuing CA. Without one, handshakes fail.
#[derive(Debug, Default)]
pub struct ServerChain(RwLock<Option<Arc<CertifiedKey>>>);

impl ServerChain {
    /// Shows this chain from now on; connections under way keep theirs. `chain`: DER, leaf first; `key`: the leaf's.
    pub fn install(&self, chain: Vec<Vec<u8>>, key: &CertificateKey) {
        let chain = chain.into_iter().map(CertificateDer::from).collect();
        let certified = Arc::new(CertifiedKey::new(chain, key.for_tls()));
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(certified);
    }

    /// Whether there is one.
    #[must_use]
    pub fn is_installed(&self) -> bool {
        self.current().is_some()
    }

    fn current(&self) -> Option<Arc<CertifiedKey>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl ResolvesServerCert for ServerChain {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current()
    }
}

/// What the listener is made of.
pub struct DstackSetup {
    /// The chain it shows.
    pub chain: Arc<ServerChain>,
    /// Judges what clients show.
    pub verify: Verify,
    /// Time.
    pub now: Now,
    /// Limits; those of nodes do not apply.
    pub limits: Limits,
    /// Threads that parse certificates.
    pub parser_threads: usize,
    /// Requests.
    pub router: Router,
}

/// A bound listener. [`DstackServer::run`] serves it.
pub struct DstackServer {
    listener: TcpListener,
    shared: Arc<Shared>,
}

struct Shared {
    admission: Arc<Admission>,
    limits: Limits,
    tls: Arc<ServerConfig>,
    verify: Verify,
    router: Router,
}

impl std::fmt::Debug for DstackServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DstackServer").field("listener", &self.listener).finish_non_exhaustive()
    }
}

impl DstackServer {
    /// Binds the address. Connections wait in the kernel until [`DstackServer::run`].
    ///
    /// # Errors
    /// [`RatlsError::Bind`], [`RatlsError::Tls`], [`RatlsError::Threads`].
    pub async fn bind(address: SocketAddr, setup: DstackSetup) -> Result<Self, RatlsError> {
        let listener = accepting::bind(address).await?;
        let DstackSetup { chain, verify, now, limits, parser_threads, router } = setup;
        let provider = tls::provider();
        let verifier = AnyIssuer::new(GuardedPool::start(parser_threads)?, provider.signature_verification_algorithms);
        let tls = tls::dstack_server_config(&provider, &now, chain, verifier)?;
        let admission = Admission::new(limits.clone());
        Ok(Self { listener, shared: Arc::new(Shared { admission, limits, tls, verify, router }) })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The operating system's.
    pub fn local_address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
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

impl Shared {
    async fn connection(&self, stream: TcpStream, address: SocketAddr, mut slot: Slot, shutdown: CancellationToken) {
        // On the heap for as long as it takes: its state is the largest of a connection, and floods are held in this stage.
        let handshake = Box::pin(self.handshake(stream, &mut slot));
        let Some(Session { stream, shown, .. }) = accepting::greeted(&shutdown, address, handshake).await else { return };
        let identity = match &shown {
            None => None,
            Some(shown) => {
                let verdict = (self.verify)(Arc::clone(&shown.evidence)).await;
                // Attestation reference §3: report_data == SHA-512("ratls-cert:" ‖ SPKI).
                verdict.filter(|identity| *identity.report_data() == binding::ratls_certificate(&shown.spki))
            }
        };
        // Only evidence that holds keeps a place against a flood.
        let stage = if identity.is_some() { Stage::Attested } else { Stage::Anonymous };
        if let Err(full) = slot.advance(stage) {
            return metrics::refused(full.name());
        }
        let version = accepting::version(&stream);
        let end = End { drain: shutdown, drain_timeout: self.limits.drain_timeout, now: slot.evicted() };
        let peer = DstackPeer { shown, identity, address };
        let stamp: Stamp = Arc::new(move |extensions| {
            extensions.insert(peer.clone());
        });
        http::serve(stream, version, self.router.clone(), stamp, self.limits.client_http.clone(), end).await;
    }

    async fn handshake(&self, stream: TcpStream, slot: &mut Slot) -> Result<Session<Option<ShownEvidence>>, Refused> {
        accepting::handshake(&self.limits, stream, slot, |_| (Arc::clone(&self.tls), false), with_shown).await
    }
}
