//! Listeners without TLS: administration on TCP, the agent's Unix socket. Owns: their caps and timeouts, peer
//! credentials of Unix sockets. Never: shares a limit with the TLS listener, so a flood there leaves these alone.

use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::accepting::{self, Places, Source};
use crate::error::RatlsError;
use crate::http::{self, End, Stamp, Version};
use crate::limits::HttpLimits;

/// Limits of a plain listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlainLimits {
    /// Open connections; more wait in the kernel's queue.
    pub connections_max: usize,
    /// HTTP.
    pub http: HttpLimits,
    /// How long requests may still run after the shutdown began.
    pub drain_timeout: Duration,
}

impl Default for PlainLimits {
    fn default() -> Self {
        Self { connections_max: 64, http: HttpLimits::client(), drain_timeout: Duration::from_secs(5) }
    }
}

/// The process at the other end of a Unix socket; an extension of each of its requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnixPeer {
    /// Its process, where the kernel says.
    pub pid: Option<i32>,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// The address of a plain TCP client; an extension of each of its requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlainPeer(pub SocketAddr);

/// HTTP/1.1 on TCP. Bind it to loopback or a management network: there is no authentication here.
#[derive(Debug)]
pub struct PlainServer {
    listener: TcpListener,
    limits: PlainLimits,
    places: Arc<Semaphore>,
}

/// How full a listener is, while it serves.
#[derive(Debug, Clone)]
pub struct Fullness(Arc<Semaphore>);

impl Fullness {
    /// Whether it holds as many connections as it may, so that the next one waits.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.0.available_permits() == 0
    }
}

impl PlainServer {
    /// Binds the address.
    ///
    /// # Errors
    /// [`RatlsError::Bind`].
    pub async fn bind(address: SocketAddr, limits: PlainLimits) -> Result<Self, RatlsError> {
        let listener = accepting::bind(address).await?;
        let places = Arc::new(Semaphore::new(limits.connections_max));
        Ok(Self { listener, limits, places })
    }

    /// How full it is from now on.
    #[must_use]
    pub fn fullness(&self) -> Fullness {
        Fullness(Arc::clone(&self.places))
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The operating system's.
    pub fn local_address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown`.
    pub async fn run(self, router: Router, shutdown: CancellationToken) {
        let Self { listener, limits, places } = self;
        let stamp = |peer: PlainPeer| -> Stamp {
            Arc::new(move |extensions| {
                extensions.insert(peer);
            })
        };
        accepting::run(listener, Places::shared(places), limits.drain_timeout, shutdown.clone(), |stream, address| {
            Some(serve(stream, router.clone(), stamp(PlainPeer(address)), &limits, &shutdown))
        })
        .await;
    }
}

/// HTTP/1.1 on a Unix socket. The socket file goes with it.
#[derive(Debug)]
pub struct UnixServer {
    socket: Socket,
    limits: PlainLimits,
}

impl UnixServer {
    /// Binds the path, replacing a socket that nobody serves any more. `mode`: permissions of the socket file.
    ///
    /// # Errors
    /// [`RatlsError::Bind`], also where another process serves that path or it is no socket.
    pub fn bind(path: &Path, mode: u32, limits: PlainLimits) -> Result<Self, RatlsError> {
        let refused = |reason: String| RatlsError::Bind { address: path.display().to_string(), reason };
        remove_stale(path).map_err(refused)?;
        let listener = UnixListener::bind(path).map_err(|error| refused(error.to_string()))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(|error| refused(error.to_string()))?;
        Ok(Self { socket: Socket { listener, path: Some(path.to_owned()) }, limits })
    }

    /// A socket that somebody else opened: systemd. Its file stays.
    ///
    /// # Errors
    /// [`RatlsError::Bind`].
    pub fn from_listener(listener: std::os::unix::net::UnixListener, limits: PlainLimits) -> Result<Self, RatlsError> {
        let refused = |error: std::io::Error| RatlsError::Bind { address: "a socket handed over".to_owned(), reason: error.to_string() };
        listener.set_nonblocking(true).map_err(refused)?;
        let listener = UnixListener::from_std(listener).map_err(refused)?;
        Ok(Self { socket: Socket { listener, path: None }, limits })
    }

    /// Serves until `shutdown`, then removes the socket file.
    pub async fn run(self, router: Router, shutdown: CancellationToken) {
        let Self { socket, limits } = self;
        let stamp = |peer: UnixPeer| -> Stamp {
            Arc::new(move |extensions| {
                extensions.insert(peer);
            })
        };
        accepting::run(socket, Places::of(limits.connections_max), limits.drain_timeout, shutdown.clone(), |stream, peer| {
            Some(serve(stream, router.clone(), stamp(peer), &limits, &shutdown))
        })
        .await;
    }
}

/// A Unix listener; its file goes with it.
#[derive(Debug)]
struct Socket {
    listener: UnixListener,
    /// Where this is its own socket.
    path: Option<PathBuf>,
}

impl Source for Socket {
    type Stream = UnixStream;
    type Peer = UnixPeer;

    async fn accept(&self) -> std::io::Result<(UnixStream, UnixPeer)> {
        let (stream, _) = self.listener.accept().await?;
        let credentials = stream.peer_cred()?;
        Ok((stream, UnixPeer { pid: credentials.pid(), uid: credentials.uid(), gid: credentials.gid() }))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Some(path) = &self.path
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::debug!(path = %path.display(), reason = %error, "socket file not removed");
        }
    }
}

/// HTTP/1.1 on a connection that the caller accepted (vsock). Returns when it ends.
pub async fn serve_connection<IO>(io: IO, router: Router, limits: &PlainLimits, shutdown: &CancellationToken)
where
    IO: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    serve(io, router, Arc::new(|_| {}), limits, shutdown).await;
}

/// Until the connection ends.
fn serve<IO>(
    io: IO,
    router: Router,
    stamp: Stamp,
    limits: &PlainLimits,
    shutdown: &CancellationToken,
) -> impl Future<Output = ()> + Send + use<IO>
where
    IO: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let end = End { drain: shutdown.clone(), drain_timeout: limits.drain_timeout, now: CancellationToken::new() };
    http::serve(io, Version::One, router, stamp, limits.http.clone(), end)
}

fn remove_stale(path: &Path) -> Result<(), String> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err("the path exists and is no socket".to_owned());
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err("another process serves this socket".to_owned());
    }
    std::fs::remove_file(path).map_err(|error| error.to_string())
}
