//! What systemd and the agent tell each other: sockets it opened, readiness, the watchdog. Owns: which socket is which, the ping that
//! earns a watchdog message. Never: says it is well without having been asked over its own port, but where callers hold all of that port's
//! connections: otherwise any stranger could have the agent ended.
//! Source: guest API reference §1; sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use dstack_ratls::plain::Fullness;
use listenfd::ListenFd;
use sd_notify::NotifyState;
use tokio_util::sync::CancellationToken;

use crate::outgoing::{get_tcp, whole};

/// What is asked of the own port.
const PING: &str = "/prpc/Worker.Version";
/// Shortest pause between pings.
const PAUSE_MIN: Duration = Duration::from_secs(1);

/// Sockets that systemd opened: index 0 is dstack.sock, 1 is tappd.sock.
#[derive(Debug, Default)]
pub struct Sockets {
    /// For the guest API.
    pub dstack: Option<UnixListener>,
    /// For the legacy API.
    pub tappd: Option<UnixListener>,
}

impl Sockets {
    /// Takes what was handed over to this process.
    ///
    /// # Errors
    /// A descriptor that is no unix socket which listens.
    pub fn take() -> std::io::Result<Self> {
        let mut handed = ListenFd::from_env();
        let mut take = |index| if handed.len() > index { handed.take_unix_listener(index) } else { Ok(None) };
        Ok(Self { dstack: take(0)?, tappd: take(1)? })
    }
}

/// Says that the agent listens.
pub fn ready() {
    told(&[NotifyState::Ready]);
}

/// Says that the agent ends.
pub fn stopping() {
    told(&[NotifyState::Stopping]);
}

fn told(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(reason = %error, "systemd was not told");
    }
}

/// Earns watchdog messages until `shutdown`: half as long as systemd waits, the agent asks its own external port.
///
/// Does nothing where systemd watches nobody. A ping without an answer is no message: after some of them systemd restarts the agent. It is
/// one where the port is full: those connections are served, or end by their own limits.
pub async fn watchdog(external: SocketAddr, fullness: Fullness, shutdown: CancellationToken) {
    let Some(limit) = sd_notify::watchdog_enabled() else {
        tracing::info!("no watchdog: systemd does not watch this process");
        return;
    };
    let address = own_address(external);
    let mut pings = tokio::time::interval((limit / 2).max(PAUSE_MIN));
    tracing::info!(limit_ms = limit.as_millis(), "watchdog");
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = pings.tick() => {}
        }
        let ping = async {
            let response = get_tcp(address, PING).await?;
            whole(response, "own port", 4096).await
        };
        // Half the pause: a message after a ping in vain still comes in time.
        match tokio::time::timeout(limit / 4, ping).await {
            Ok(Ok(_)) => told(&[NotifyState::Watchdog]),
            _ if fullness.is_full() => {
                tracing::warn!("watchdog: callers hold all connections of the external port");
                told(&[NotifyState::Watchdog]);
            }
            Ok(Err(error)) => tracing::warn!(reason = %error, "watchdog: the own port does not answer"),
            Err(_elapsed) => tracing::warn!("watchdog: the own port answers too late"),
        }
    }
}

/// Where the own port is reached from here.
fn own_address(external: SocketAddr) -> SocketAddr {
    let ip = match external.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, external.port())
}
