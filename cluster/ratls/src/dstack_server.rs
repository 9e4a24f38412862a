//! The TLS listener of dstack's KMS protocol. Owns: its handshakes, the server chain in use, what a client's certificate shows. Never: a
//! route; decides what evidence opens (its verdict is asked of whoever made the listener).
//! Source: KMS API reference §2 ("later"): client certificates are optional and of any issuer; one that is shown must parse, be valid now
//! and carry evidence that decodes, or the handshake is refused. What the evidence proves is judged afterwards, for each request.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use axum::Router;
use dstack_attest::VerifiedIdentity;
use dstack_protocol::binding;
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use rustls::server::{Acceptor as RustlsAcceptor, ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::{Admission, Slot, Stage};
use crate::any_issuer::{AnyIssuer, ShownEvidence, with_shown};
use crate::error::RatlsError;
use crate::http::{self, End, Stamp, Version};
use crate::key::CertificateKey;
use crate::limits::Limits;
use crate::pool::GuardedPool;
use crate::server::{Refused, accept, linger, within};
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
        let listener = TcpListener::bind(address)
            .await
            .map_err(|error| RatlsError::Bind { address: address.to_string(), reason: error.to_string() })?;
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
        let margin = std::time::Duration::from_secs(2);
        // Each connection bounds its own drain.
        let _ = tokio::time::timeout(drain_timeout.saturating_add(margin), tasks.wait()).await;
    }
}

impl Shared {
    async fn connection(&self, stream: TcpStream, address: SocketAddr, mut slot: Slot, shutdown: CancellationToken) {
        let greeted = tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            greeted = self.handshake(stream, &mut slot) => greeted,
        };
        let (stream, shown) = match greeted {
            Ok(greeted) => greeted,
            Err(reason) => {
                metrics::refused(reason.code);
                tracing::debug!(%address, code = reason.code, detail = reason.detail, "dstack connection refused");
                return;
            }
        };
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
        let version = match stream.get_ref().1.alpn_protocol() {
            Some(b"h2") => Version::Two,
            _ => Version::One,
        };
        let end = End { drain: shutdown, drain_timeout: self.limits.drain_timeout, now: slot.evicted() };
        let peer = DstackPeer { shown, identity, address };
        let stamp: Stamp = Arc::new(move |extensions| {
            extensions.insert(peer.clone());
        });
        http::serve(stream, version, self.router.clone(), stamp, self.limits.client_http.clone(), end).await;
    }

    async fn handshake(&self, stream: TcpStream, slot: &mut Slot) -> Result<(TlsStream<TcpStream>, Option<ShownEvidence>), Refused> {
        stream.set_nodelay(true).map_err(|error| Refused::of("socket", &error))?;
        let greeting = LazyConfigAcceptor::new(RustlsAcceptor::default(), stream);
        let start = within(self.limits.greeting_timeout, "greeting", greeting).await?;
        let began = Instant::now();
        slot.advance_handshake(false, began).map_err(Refused::full)?;
        let handshake = with_shown(start.into_stream(Arc::clone(&self.tls)).into_fallible());
        let greeted = within(self.limits.handshake_timeout, "handshake", async {
            match handshake.await {
                (Ok(stream), shown) => Ok((stream, shown)),
                (Err((error, stream)), _) => {
                    linger(stream).await;
                    Err(error)
                }
            }
        })
        .await?;
        metrics::handshake(began.elapsed());
        Ok(greeted)
    }
}
