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
use tokio_util::task::TaskTracker;

use crate::error::RatlsError;
use crate::http::{self, End, Stamp, Version};
use crate::limits::HttpLimits;
use crate::{metrics, server};

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
}

impl PlainServer {
    /// Binds the address.
    ///
    /// # Errors
    /// [`RatlsError::Bind`].
    pub async fn bind(address: SocketAddr, limits: PlainLimits) -> Result<Self, RatlsError> {
        let listener = TcpListener::bind(address)
            .await
            .map_err(|error| RatlsError::Bind { address: address.to_string(), reason: error.to_string() })?;
        Ok(Self { listener, limits })
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
        let Self { listener, limits } = self;
        let places = Arc::new(Semaphore::new(limits.connections_max));
        let tasks = TaskTracker::new();
        while let Some(place) = place(&places, &shutdown).await {
            let Some((stream, address)) = server::accept(&listener, &shutdown).await else { break };
            let stamp: Stamp = Arc::new(move |extensions| {
                extensions.insert(PlainPeer(address));
            });
            let serve = http::serve(stream, Version::One, router.clone(), stamp, limits.http.clone(), end(&limits, &shutdown));
            tasks.spawn(async move {
                serve.await;
                drop(place);
            });
        }
        drop(listener);
        tasks.close();
        let _ = tokio::time::timeout(limits.drain_timeout.saturating_add(Duration::from_secs(1)), tasks.wait()).await;
    }
}

/// HTTP/1.1 on a Unix socket. The socket file goes with it.
#[derive(Debug)]
pub struct UnixServer {
    listener: UnixListener,
    /// Where this is its own socket.
    path: Option<PathBuf>,
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
        Ok(Self { listener, path: Some(path.to_owned()), limits })
    }

    /// A socket that somebody else opened: systemd. Its file stays.
    ///
    /// # Errors
    /// [`RatlsError::Bind`].
    pub fn from_listener(listener: std::os::unix::net::UnixListener, limits: PlainLimits) -> Result<Self, RatlsError> {
        let refused = |error: std::io::Error| RatlsError::Bind { address: "a socket handed over".to_owned(), reason: error.to_string() };
        listener.set_nonblocking(true).map_err(refused)?;
        Ok(Self { listener: UnixListener::from_std(listener).map_err(refused)?, path: None, limits })
    }

    /// Serves until `shutdown`, then removes the socket file.
    pub async fn run(self, router: Router, shutdown: CancellationToken) {
        let Self { listener, path, limits } = self;
        let places = Arc::new(Semaphore::new(limits.connections_max));
        let tasks = TaskTracker::new();
        while let Some(place) = place(&places, &shutdown).await {
            let Some((stream, peer)) = accept_unix(&listener, &shutdown).await else { break };
            let stamp: Stamp = Arc::new(move |extensions| {
                extensions.insert(peer);
            });
            let serve = http::serve(stream, Version::One, router.clone(), stamp, limits.http.clone(), end(&limits, &shutdown));
            tasks.spawn(async move {
                serve.await;
                drop(place);
            });
        }
        drop(listener);
        if let Some(path) = path
            && let Err(error) = std::fs::remove_file(&path)
        {
            tracing::debug!(path = %path.display(), reason = %error, "socket file not removed");
        }
        tasks.close();
        let _ = tokio::time::timeout(limits.drain_timeout.saturating_add(Duration::from_secs(1)), tasks.wait()).await;
    }
}

/// HTTP/1.1 on a connection that the caller accepted (vsock). Returns when it ends.
pub async fn serve_connection<IO>(io: IO, router: Router, limits: &PlainLimits, shutdown: &CancellationToken)
where
    IO: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    http::serve(io, Version::One, router, Arc::new(|_| {}), limits.http.clone(), end(limits, shutdown)).await;
}

fn end(limits: &PlainLimits, shutdown: &CancellationToken) -> End {
    End { drain: shutdown.clone(), drain_timeout: limits.drain_timeout, now: CancellationToken::new() }
}

async fn place(places: &Arc<Semaphore>, shutdown: &CancellationToken) -> Option<tokio::sync::OwnedSemaphorePermit> {
    tokio::select! {
        biased;
        () = shutdown.cancelled() => None,
        place = Arc::clone(places).acquire_owned() => place.ok(),
    }
}

async fn accept_unix(listener: &UnixListener, shutdown: &CancellationToken) -> Option<(UnixStream, UnixPeer)> {
    loop {
        let outcome = tokio::select! {
            biased;
            () = shutdown.cancelled() => return None,
            outcome = listener.accept() => outcome,
        };
        match outcome.and_then(|(stream, _)| stream.peer_cred().map(|credentials| (stream, credentials))) {
            Ok((stream, credentials)) => {
                let peer = UnixPeer { pid: credentials.pid(), uid: credentials.uid(), gid: credentials.gid() };
                return Some((stream, peer));
            }
            Err(error) => {
                metrics::accept_error();
                tracing::warn!(reason = %error, "cannot accept on the unix socket");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
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
