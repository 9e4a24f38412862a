//! The agent's listeners. Owns: binding or taking over each of them, running them until the end. Never: a method.
//! Source: guest API reference §1.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use dstack_ratls::limits::HttpLimits;
use dstack_ratls::plain::{Fullness, PlainLimits, PlainServer, UnixServer, serve_connection};
use dstack_ratls::prpc::BODY_READ_FACTOR;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_LOCAL, VsockAddr, VsockListener};

use crate::config::{Config, HostListener};
use crate::guest::Guest;
use crate::http;
use crate::systemd::Sockets;

/// A log that is followed may be silent this long (reference §11).
const EXTERNAL_IDLE: Duration = Duration::from_secs(600);
/// And be followed this long: no evidence of the reader grows old.
const EXTERNAL_AGE_MAX: Duration = Duration::from_secs(24 * 3600);

/// All listeners, bound; nobody is served yet.
#[derive(Debug)]
pub struct Listeners {
    dstack: UnixServer,
    tappd: Option<UnixServer>,
    external: Option<(PlainServer, SocketAddr)>,
    host: Option<Host>,
    limits: PlainLimits,
}

#[derive(Debug)]
enum Host {
    Unix(UnixServer),
    Vsock(VsockListener),
}

impl Listeners {
    /// Binds what is configured; sockets of systemd come first.
    ///
    /// # Errors
    /// The address that cannot be bound.
    pub async fn bind(config: &Config, sockets: Sockets) -> anyhow::Result<Self> {
        let http =
            HttpLimits { body_bytes_max: http::BODY_BYTES_MAX.saturating_mul(BODY_READ_FACTOR).saturating_add(1), ..HttpLimits::client() };
        let limits = PlainLimits { connections_max: config.connections_max, http, ..PlainLimits::default() };
        let unix = |handed: Option<std::os::unix::net::UnixListener>, path: &std::path::Path| match handed {
            Some(listener) => UnixServer::from_listener(listener, limits.clone()),
            None => UnixServer::bind(path, config.socket_mode, limits.clone()),
        };
        let dstack = unix(sockets.dstack, &config.socket)?;
        let tappd = match (sockets.tappd, &config.tappd_socket) {
            (None, None) => None,
            (handed, path) => Some(unix(handed, path.as_deref().unwrap_or(std::path::Path::new("")))?),
        };
        let external = match config.external {
            None => None,
            Some(address) => {
                let http = HttpLimits {
                    body_bytes_max: http::EXTERNAL_BODY_BYTES_MAX.saturating_mul(BODY_READ_FACTOR).saturating_add(1),
                    idle_timeout: EXTERNAL_IDLE,
                    age_max: EXTERNAL_AGE_MAX,
                    ..HttpLimits::client()
                };
                let server = PlainServer::bind(address, PlainLimits { http, ..limits.clone() }).await?;
                let address = server.local_address()?;
                Some((server, address))
            }
        };
        let host = match &config.host {
            None => None,
            Some(HostListener::Unix(path)) => Some(Host::Unix(UnixServer::bind(path, 0o600, limits.clone())?)),
            Some(HostListener::Vsock(port)) => {
                let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, *port))
                    .with_context(|| format!("cannot listen on vsock port {port}"))?;
                Some(Host::Vsock(listener))
            }
        };
        Ok(Self { dstack, tappd, external, host, limits })
    }

    /// Where the external listener is.
    #[must_use]
    pub fn external_address(&self) -> Option<SocketAddr> {
        self.external.as_ref().map(|(_, address)| *address)
    }

    /// How full the external listener is.
    #[must_use]
    pub fn external_fullness(&self) -> Option<Fullness> {
        self.external.as_ref().map(|(server, _)| server.fullness())
    }

    /// Serves all until `shutdown`.
    pub async fn run(self, guest: &Arc<Guest>, shutdown: &CancellationToken) {
        let mut servers = JoinSet::new();
        servers.spawn(self.dstack.run(http::internal(Arc::clone(guest)), shutdown.clone()));
        if let Some(server) = self.tappd {
            servers.spawn(server.run(http::legacy(Arc::clone(guest)), shutdown.clone()));
        }
        if let Some((server, _)) = self.external {
            servers.spawn(server.run(http::external(Arc::clone(guest)), shutdown.clone()));
        }
        match self.host {
            None => {}
            Some(Host::Unix(server)) => {
                servers.spawn(server.run(http::host(Arc::clone(guest)), shutdown.clone()));
            }
            Some(Host::Vsock(listener)) => {
                servers.spawn(vsock(listener, http::host(Arc::clone(guest)), self.limits, shutdown.clone()));
            }
        }
        while servers.join_next().await.is_some() {}
    }
}

async fn vsock(listener: VsockListener, router: Router, limits: PlainLimits, shutdown: CancellationToken) {
    let places = Arc::new(Semaphore::new(limits.connections_max));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = async { (Arc::clone(&places).acquire_owned().await, listener.accept().await) } => accepted,
            // Ended connections are forgotten as they end.
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            (Ok(_), Ok((stream, peer))) if is_own(peer.cid(), stream.local_addr().ok().map(|own| own.cid())) => {
                tracing::warn!(cid = peer.cid(), "somebody of this machine called the host's methods on vsock: not served");
            }
            (Ok(place), Ok((stream, _))) => {
                let (router, limits, shutdown) = (router.clone(), limits.clone(), shutdown.clone());
                connections.spawn(async move {
                    serve_connection(stream, router, &limits, &shutdown).await;
                    drop(place);
                });
            }
            (_, outcome) => {
                if let Err(error) = outcome {
                    tracing::warn!(reason = %error, "cannot accept on vsock");
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    while connections.join_next().await.is_some() {}
}

/// Whether a caller is of this machine and not its host: a container may open vsock sockets too, and these methods power off.
fn is_own(peer_cid: u32, own_cid: Option<u32>) -> bool {
    peer_cid == VMADDR_CID_LOCAL || own_cid.is_none_or(|own| own == peer_cid)
}

#[cfg(test)]
mod tests {
    use tokio_vsock::VMADDR_CID_HOST;

    use super::*;

    #[test]
    fn only_the_machine_itself_is_no_host() {
        // A VM's host, an enclave's parent, and this machine by its loopback and by its number.
        for (peer, own, refused) in
            [(VMADDR_CID_HOST, Some(16), false), (3, Some(16), false), (VMADDR_CID_LOCAL, Some(VMADDR_CID_LOCAL), true)]
        {
            assert_eq!(is_own(peer, own), refused, "{peer}");
        }
        assert!(is_own(VMADDR_CID_LOCAL, Some(16)) && is_own(16, Some(16)) && is_own(VMADDR_CID_HOST, None));
    }
}
