//! The way to the nodes: direct, or through a CONNECT proxy, over vsock out of an enclave. Owns: the tunnel.
//! Never: trusts a proxy. It carries RA-TLS, and sees which nodes are asked and when; it can break connections, nothing more.
//! Source: util and deploy reference §10; RFC 9110 §9.3.6.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::time::{Duration, Instant};

use dstack_ratls::client::{ClientConnection, ClientDialer};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_vsock::{VsockAddr, VsockStream};

use crate::error::NodeFault;
use crate::url::NodeUrl;

/// Largest answer of a proxy, bytes.
const ANSWER_BYTES_MAX: usize = 1024;

/// How nodes are reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Route {
    /// By their own addresses.
    #[default]
    Direct,
    /// Through the CONNECT proxy at a port of another virtual machine: of the parent, where an enclave asks. Names of nodes are
    /// resolved there.
    Vsock {
        /// The other machine. 3 is the parent of a Nitro enclave, 2 the host of a common virtual machine.
        cid: u32,
        /// The proxy's port.
        port: u32,
    },
    /// Through the CONNECT proxy at this address.
    Http {
        /// Name or address.
        host: String,
        /// Its port.
        port: u16,
    },
}

/// Why a text is no route. The configuration is at fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a way to the nodes: {text:?}; expected vsock:CID:PORT (vsock:3:3128 in an enclave), http://host:port, or direct")]
pub struct RouteError {
    /// The text.
    pub text: String,
}

impl FromStr for Route {
    type Err = RouteError;

    fn from_str(text: &str) -> Result<Self, RouteError> {
        let wrong = || RouteError { text: text.chars().take(200).collect() };
        if text == "direct" {
            return Ok(Self::Direct);
        }
        if let Some(rest) = text.strip_prefix("vsock:") {
            let (cid, port) = rest.split_once(':').ok_or_else(wrong)?;
            return Ok(Self::Vsock { cid: cid.parse().map_err(|_| wrong())?, port: port.parse().map_err(|_| wrong())? });
        }
        let authority = text.strip_prefix("http://").ok_or_else(wrong)?.trim_end_matches('/');
        // As strict on names as addresses of nodes are, and with a port: proxies have no common one.
        let proxy: NodeUrl = format!("https://{authority}").parse().map_err(|_| wrong())?;
        let (host, port) = (proxy.host().to_owned(), proxy.port());
        if authority.ends_with(&format!(":{port}")) { Ok(Self::Http { host, port }) } else { Err(wrong()) }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct => f.write_str("direct"),
            Self::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
            Self::Http { host, port } if host.contains(':') => write!(f, "http://[{host}]:{port}"),
            Self::Http { host, port } => write!(f, "http://{host}:{port}"),
        }
    }
}

impl Route {
    /// A verified connection to a node, all within `timeout` for each address tried.
    pub(crate) async fn connect(&self, dialer: &ClientDialer, url: &NodeUrl, timeout: Duration) -> Result<ClientConnection, NodeFault> {
        match self {
            Self::Direct => {
                let mut fault = NodeFault::Resolve { reason: "no address".to_owned() };
                for address in url.resolve().await.map_err(|error| NodeFault::Resolve { reason: error.to_string() })? {
                    match dialer.connect(address, timeout).await {
                        Ok(connection) => return Ok(connection),
                        Err(error) => fault = NodeFault::Connection(error),
                    }
                }
                Err(fault)
            }
            Self::Vsock { cid, port } => {
                let proxy = async { VsockStream::connect(VsockAddr::new(*cid, *port)).await };
                self.tunnelled(proxy, dialer, url, timeout).await
            }
            Self::Http { host, port } => {
                let proxy = async {
                    let stream = TcpStream::connect((host.as_str(), *port)).await?;
                    stream.set_nodelay(true)?;
                    Ok(stream)
                };
                self.tunnelled(proxy, dialer, url, timeout).await
            }
        }
    }

    async fn tunnelled<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
        &self,
        proxy: impl Future<Output = std::io::Result<S>>,
        dialer: &ClientDialer,
        url: &NodeUrl,
        timeout: Duration,
    ) -> Result<ClientConnection, NodeFault> {
        let failed = |reason: String| NodeFault::Proxy { route: self.to_string(), reason };
        let began = Instant::now();
        let open = async {
            let mut stream = proxy.await.map_err(|error| failed(format!("cannot connect: {error}")))?;
            tunnel(&mut stream, &url.authority()).await.map_err(failed)?;
            Ok::<S, NodeFault>(stream)
        };
        let stream = tokio::time::timeout(timeout, open).await.map_err(|_| failed(format!("no tunnel within {timeout:?}")))??;
        // Where the proxy resolves the name, nothing here knows the address.
        let address = SocketAddr::new(url.host().parse().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), url.port());
        Ok(dialer.connect_over(stream, address, timeout.saturating_sub(began.elapsed())).await?)
    }
}

/// Asks the proxy at the other end for a tunnel to `authority`. The text says why there is none.
pub(crate) async fn tunnel<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, authority: &str) -> Result<(), String> {
    let broke = |error: std::io::Error| format!("the connection broke: {error}");
    let ask = format!("CONNECT {authority} HTTP/1.1\r\nhost: {authority}\r\n\r\n");
    stream.write_all(ask.as_bytes()).await.map_err(broke)?;
    let mut answer = Vec::new();
    // Byte by byte at its end: what follows the head is the node's. Heads are short, and there is one for each connection.
    while !answer.ends_with(b"\r\n\r\n") {
        if answer.len() >= ANSWER_BYTES_MAX {
            return Err(format!("its answer has more than {ANSWER_BYTES_MAX} bytes"));
        }
        let byte = stream.read_u8().await.map_err(broke)?;
        answer.push(byte);
    }
    let head = String::from_utf8_lossy(&answer);
    let line = head.lines().next().unwrap_or_default();
    match line.strip_prefix("HTTP/1.").and_then(|rest| rest.split_whitespace().nth(1)) {
        Some("200") => Ok(()),
        Some(_) => Err(format!("it refuses {authority}: {line}")),
        None => Err(format!("it speaks no HTTP: {line:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_are_read_and_written() {
        for (text, route) in [
            ("direct", Route::Direct),
            ("vsock:3:3128", Route::Vsock { cid: 3, port: 3128 }),
            ("http://127.0.0.1:3128", Route::Http { host: "127.0.0.1".into(), port: 3128 }),
            ("http://[::1]:3128", Route::Http { host: "::1".into(), port: 3128 }),
        ] {
            assert_eq!(text.parse(), Ok(route.clone()));
            assert_eq!(route.to_string(), text);
        }
        assert_eq!("http://proxy:8080/".parse(), Ok(Route::Http { host: "proxy".into(), port: 8080 }));
        for text in ["", "vsock:3", "vsock:3:", "vsock:-1:3128", "vsock:3:3128:1", "http://proxy", "https://proxy:1", "http://a b:1"] {
            assert_eq!(text.parse::<Route>(), Err(RouteError { text: text.into() }), "{text}");
        }
    }

    async fn asked(answer: &[u8]) -> (Result<(), String>, Vec<u8>, Vec<u8>) {
        let (mut ours, mut theirs) = tokio::io::duplex(4096);
        theirs.write_all(answer).await.unwrap();
        theirs.shutdown().await.unwrap();
        let outcome = tunnel(&mut ours, "kms-1:12001").await;
        let mut rest = Vec::new();
        ours.read_to_end(&mut rest).await.unwrap();
        drop(ours);
        let mut question = Vec::new();
        theirs.read_to_end(&mut question).await.unwrap();
        (outcome, rest, question)
    }

    #[tokio::test]
    async fn a_tunnel_begins_right_after_the_head() {
        let (outcome, rest, question) = asked(b"HTTP/1.1 200 Connection established\r\nvia: x\r\n\r\n\x16\x03").await;
        assert_eq!(outcome, Ok(()));
        assert_eq!(rest, b"\x16\x03");
        assert_eq!(question, b"CONNECT kms-1:12001 HTTP/1.1\r\nhost: kms-1:12001\r\n\r\n");
    }

    #[tokio::test]
    async fn other_answers_are_refused() {
        let refused = asked(b"HTTP/1.1 403 Forbidden\r\n\r\n").await.0.unwrap_err();
        assert_eq!(refused, "it refuses kms-1:12001: HTTP/1.1 403 Forbidden");
        assert!(asked(b"SSH-2.0-x\r\n\r\n").await.0.unwrap_err().contains("no HTTP"));
        assert!(asked(b"HTTP/1.1 200").await.0.unwrap_err().contains("broke"));
        assert!(asked(&[b'x'; 3000]).await.0.unwrap_err().contains("more than 1024 bytes"));
    }
}
