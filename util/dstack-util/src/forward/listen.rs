//! Where the forwarder listens: vsock on a parent, a unix socket under an emulated one, TCP. Owns: binding and accepting.
//! Never: takes a socket file that is there over: another forwarder may live at it.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::str::FromStr;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

/// As written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// A vsock port, for every machine below this one.
    Vsock(u32),
    /// A unix socket; the vsock device of an emulated machine connects to `<its socket>_<port>`.
    Unix(PathBuf),
    /// A TCP address.
    Tcp(SocketAddr),
}

/// Why a text is no place to listen at. The settings are at fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a place to listen at: {text:?}; expected vsock:PORT, unix:/path/to/socket or tcp:ADDRESS:PORT")]
pub struct ListenError {
    /// The text.
    pub text: String,
}

impl FromStr for Listen {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, ListenError> {
        let wrong = || ListenError { text: text.chars().take(200).collect() };
        match text.split_once(':') {
            Some(("vsock", port)) => port.parse().map(Self::Vsock).map_err(|_| wrong()),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("tcp", address)) => address.parse().map(Self::Tcp).map_err(|_| wrong()),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock(port) => write!(f, "vsock:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

/// A bound socket.
#[derive(Debug)]
pub enum Listener {
    /// Of [`Listen::Vsock`].
    Vsock(VsockListener),
    /// Of [`Listen::Unix`].
    Unix(UnixListener),
    /// Of [`Listen::Tcp`].
    Tcp(TcpListener),
}

/// A connection of any kind.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Stream for T {}

impl Listen {
    /// Binds.
    ///
    /// # Errors
    /// The system's.
    pub async fn bind(&self) -> io::Result<Listener> {
        Ok(match self {
            Self::Vsock(port) => Listener::Vsock(VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, *port))?),
            Self::Unix(path) => Listener::Unix(UnixListener::bind(path)?),
            Self::Tcp(address) => Listener::Tcp(TcpListener::bind(address).await?),
        })
    }
}

impl Listener {
    /// Where it listens; of TCP port 0 the port that it got.
    #[must_use]
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok(),
            Self::Vsock(_) | Self::Unix(_) => None,
        }
    }

    pub(crate) async fn accept(&self) -> io::Result<Pin<Box<dyn Stream>>> {
        Ok(match self {
            Self::Vsock(listener) => Box::pin(listener.accept().await?.0),
            Self::Unix(listener) => Box::pin(listener.accept().await?.0),
            Self::Tcp(listener) => Box::pin(listener.accept().await?.0),
        })
    }
}

/// Whether an error of accepting is about one connection alone.
pub(crate) fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(error.kind(), Kind::ConnectionAborted | Kind::ConnectionReset | Kind::Interrupted | Kind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_and_written() {
        for text in ["vsock:3128", "unix:/run/vm4.vsock_3128", "tcp:127.0.0.1:3128"] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
        for text in ["", "3128", "vsock:", "vsock:x", "unix:", "tcp:3128", "udp:127.0.0.1:1"] {
            assert_eq!(text.parse::<Listen>(), Err(ListenError { text: text.into() }));
        }
    }
}
