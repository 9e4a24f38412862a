//! The accept loop of every listener. Owns: taking connections in until the shutdown, waiting where the system is out of descriptors,
//! the drain afterwards; for TLS listeners the steps up to a session: greeting, handshake, alert. Never: a route; decides who may stay.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::ServerConfig;
use rustls::server::{Acceptor as RustlsAcceptor, ClientHello};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::{FallibleAccept, TlsStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::{Admission, Full, Slot};
use crate::error::RatlsError;
use crate::http::Version;
use crate::limits::Limits;
use crate::metrics;

/// Added to the drain, for what was under way before HTTP began: each connection bounds its own drain.
const DRAIN_MARGIN: Duration = Duration::from_secs(2);

/// Where connections come from.
pub(crate) trait Source: Send {
    /// A connection.
    type Stream: Send;
    /// What the system says of its other end.
    type Peer: Send;

    /// The next one.
    fn accept(&self) -> impl Future<Output = std::io::Result<(Self::Stream, Self::Peer)>> + Send;
}

impl Source for TcpListener {
    type Stream = TcpStream;
    type Peer = SocketAddr;

    async fn accept(&self) -> std::io::Result<(TcpStream, SocketAddr)> {
        Self::accept(self).await
    }
}

/// Binds a TCP address.
///
/// # Errors
/// [`RatlsError::Bind`].
pub(crate) async fn bind(address: SocketAddr) -> Result<TcpListener, RatlsError> {
    let refused = |error: std::io::Error| RatlsError::Bind { address: address.to_string(), reason: error.to_string() };
    TcpListener::bind(address).await.map_err(refused)
}

/// How many connections are held at once; more wait in the kernel's queue.
pub(crate) struct Places(Option<Arc<Semaphore>>);

impl Places {
    /// At most so many.
    pub(crate) fn of(count: usize) -> Self {
        Self::shared(Arc::new(Semaphore::new(count)))
    }

    /// As many as there are permits, which others may look at.
    pub(crate) fn shared(permits: Arc<Semaphore>) -> Self {
        Self(Some(permits))
    }

    /// As many as come: the listener's [`Admission`] decides which of them stay.
    fn unbounded() -> Self {
        Self(None)
    }

    /// Waits for a place; `None` on shutdown.
    async fn next(&self, shutdown: &CancellationToken) -> Option<Option<OwnedSemaphorePermit>> {
        let Some(places) = &self.0 else { return (!shutdown.is_cancelled()).then_some(None) };
        tokio::select! {
            biased;
            () = shutdown.cancelled() => None,
            place = Arc::clone(places).acquire_owned() => place.ok().map(Some),
        }
    }
}

/// Takes connections in until `shutdown`, then lets them end for `drain` and a margin. `begin`: what is done with one; `None` refuses it.
pub(crate) async fn run<S, C>(
    source: S,
    places: Places,
    drain: Duration,
    shutdown: CancellationToken,
    mut begin: impl FnMut(S::Stream, S::Peer) -> Option<C>,
) where
    S: Source,
    C: Future<Output = ()> + Send + 'static,
{
    let tasks = TaskTracker::new();
    while let Some(place) = places.next(&shutdown).await {
        let Some((stream, peer)) = next(&source, &shutdown).await else { break };
        if let Some(connection) = begin(stream, peer) {
            tasks.spawn(async move {
                connection.await;
                drop(place);
            });
        }
    }
    drop(source);
    tasks.close();
    let _ = tokio::time::timeout(drain.saturating_add(DRAIN_MARGIN), tasks.wait()).await;
}

/// The next connection, `None` on shutdown. Waits where the system is out of descriptors or memory.
async fn next<S: Source>(source: &S, shutdown: &CancellationToken) -> Option<(S::Stream, S::Peer)> {
    let mut pause = Duration::from_millis(5);
    loop {
        let outcome = tokio::select! {
            biased;
            () = shutdown.cancelled() => return None,
            outcome = source.accept() => outcome,
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
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted, NotConnected};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted | NotConnected)
}

/// As [`run`], where `admission` decides which connections stay. `begin`: how one that has a slot is served.
pub(crate) async fn run_admitted<C, F>(
    listener: TcpListener,
    admission: Arc<Admission>,
    drain: Duration,
    shutdown: CancellationToken,
    mut begin: impl FnMut(TcpStream, SocketAddr) -> F,
) where
    C: Future<Output = ()> + Send + 'static,
    F: FnOnce(Slot) -> C + Send + 'static,
{
    run(listener, Places::unbounded(), drain, shutdown, |stream, address| admitted(&admission, address, begin(stream, address))).await;
}

/// Serves a connection that `admission` has room for, until it ends or must give way to another.
fn admitted<C>(
    admission: &Arc<Admission>,
    address: SocketAddr,
    serve: impl FnOnce(Slot) -> C + Send + 'static,
) -> Option<impl Future<Output = ()> + Send + 'static>
where
    C: Future<Output = ()> + Send + 'static,
{
    let slot = admission.admit(address.ip()).inspect_err(|full| metrics::refused(full.name())).ok()?;
    Some(async move {
        let evicted = slot.evicted();
        tokio::select! {
            biased;
            () = evicted.cancelled() => {}
            () = serve(slot) => {}
        }
    })
}

/// A TLS session that began.
pub(crate) struct Session<T> {
    pub(crate) stream: TlsStream<TcpStream>,
    /// What the handshake left behind of the client's certificate.
    pub(crate) shown: T,
    pub(crate) is_node: bool,
}

/// Which HTTP was agreed upon.
pub(crate) fn version(stream: &TlsStream<TcpStream>) -> Version {
    match stream.get_ref().1.alpn_protocol() {
        Some(b"h2") => Version::Two,
        _ => Version::One,
    }
}

/// A session, or `None` where the handshake is refused, which is counted here, or the listener stops.
pub(crate) async fn greeted<T>(
    shutdown: &CancellationToken,
    address: SocketAddr,
    handshake: impl Future<Output = Result<Session<T>, Refused>>,
) -> Option<Session<T>> {
    let greeted = tokio::select! {
        biased;
        () = shutdown.cancelled() => return None,
        greeted = handshake => greeted,
    };
    let counted = |reason: &Refused| {
        metrics::refused(reason.code);
        tracing::debug!(%address, code = reason.code, detail = reason.detail, "connection refused");
    };
    greeted.inspect_err(counted).ok()
}

/// Greeting and handshake within their times. `choose`: the side of TLS for a ClientHello, and whether it is the nodes'. `watch`: drives
/// the handshake and keeps what the client's certificate showed.
pub(crate) async fn handshake<T, F>(
    limits: &Limits,
    stream: TcpStream,
    slot: &mut Slot,
    choose: impl FnOnce(&ClientHello<'_>) -> (Arc<ServerConfig>, bool),
    watch: impl FnOnce(FallibleAccept<TcpStream>) -> F,
) -> Result<Session<T>, Refused>
where
    F: Future<Output = (Result<TlsStream<TcpStream>, (std::io::Error, TcpStream)>, T)>,
{
    stream.set_nodelay(true).map_err(|error| Refused::of("socket", &error))?;
    let greeting = LazyConfigAcceptor::new(RustlsAcceptor::default(), stream);
    let start = within(limits.greeting_timeout, "greeting", greeting).await?;
    let began = Instant::now();
    let (config, is_node) = choose(&start.client_hello());
    slot.advance_handshake(is_node, began).map_err(Refused::full)?;
    let handshake = watch(start.into_stream(config).into_fallible());
    let session = within(limits.handshake_timeout, "handshake", async {
        match handshake.await {
            (Ok(stream), shown) => Ok(Session { stream, shown, is_node }),
            (Err((error, stream)), _) => {
                linger(stream).await;
                Err(error)
            }
        }
    })
    .await?;
    metrics::handshake(began.elapsed());
    Ok(session)
}

/// Lets the peer read our alert: closing with its bytes unread would reset the connection, and the alert with it.
async fn linger(mut stream: TcpStream) {
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
    code: &'static str,
    detail: String,
}

impl Refused {
    fn of(code: &'static str, error: &std::io::Error) -> Self {
        Self { code, detail: error.to_string() }
    }

    fn full(full: Full) -> Self {
        Self { code: full.name(), detail: "full".to_owned() }
    }
}

async fn within<T>(timeout: Duration, stage: &'static str, step: impl Future<Output = std::io::Result<T>>) -> Result<T, Refused> {
    match tokio::time::timeout(timeout, step).await {
        Ok(outcome) => outcome.map_err(|error| Refused::of(stage, &error)),
        Err(_elapsed) => Err(Refused { code: "timeout", detail: format!("{stage} took over {timeout:?}") }),
    }
}
