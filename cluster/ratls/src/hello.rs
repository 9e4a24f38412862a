//! HELLO: the first bytes of each side of a node connection. Owns: signing ours, checking theirs, bound to this one TLS
//! connection. Never: decides whether the log has admitted that key for that seat; who serves the connection does.
//! Source: architecture.md §2.

use std::time::Duration;

use dstack_protocol::hello::{EXPORTER_LABEL_CLIENT, EXPORTER_LABEL_SERVER, HELLO_BYTES, Hello, signed_bytes};
use dstack_protocol::{ClusterId, Seat, Wire};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use rustls::ConnectionCommon;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The node key, behind whatever keeps it.
pub trait HelloSigner: Send + Sync {
    /// Its public half.
    fn node_key(&self) -> [u8; 32];
    /// Ed25519 over `message`.
    fn sign(&self, message: &[u8]) -> [u8; 64];
}

impl HelloSigner for SigningKey {
    fn node_key(&self) -> [u8; 32] {
        self.verifying_key().to_bytes()
    }

    fn sign(&self, message: &[u8]) -> [u8; 64] {
        Signer::sign(self, message).to_bytes()
    }
}

/// Who we are on node connections.
#[derive(Clone)]
pub struct HelloIdentity {
    /// Our cluster.
    pub cluster_id: ClusterId,
    /// Our seat.
    pub seat: Seat,
    /// Our node key.
    pub signer: std::sync::Arc<dyn HelloSigner>,
}

impl std::fmt::Debug for HelloIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HelloIdentity").field("cluster_id", &self.cluster_id).field("seat", &self.seat).finish_non_exhaustive()
    }
}

/// What the peer's HELLO proved: it holds `node_key` and claims `seat`, on this connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerHello {
    /// Claimed seat, `≥ 1` and not ours.
    pub seat: Seat,
    /// Proven key. Whether the log admits it for that seat is the reader's question.
    pub node_key: [u8; 32],
}

/// Why a HELLO is refused. The peer's fault, or a wrong address in our configuration.
#[non_exhaustive]
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum HelloError {
    /// It did not come, or the connection broke.
    #[error("no hello: {reason}")]
    Missing {
        /// The connection's reason.
        reason: String,
    },
    /// It did not come in time.
    #[error("no hello within {waited:?}")]
    Timeout {
        /// How long we waited.
        waited: Duration,
    },
    /// It does not decode.
    #[error("malformed hello: {reason}")]
    Malformed {
        /// The decoder's reason.
        reason: String,
    },
    /// It names another cluster.
    #[error("hello of cluster {got}, expected {expected}")]
    Cluster {
        /// Ours.
        expected: ClusterId,
        /// Theirs.
        got: ClusterId,
    },
    /// It names a seat that cannot be its.
    #[error("hello of seat {got}, expected {expected}")]
    Seat {
        /// What we expected, in words or as a number.
        expected: String,
        /// Theirs.
        got: Seat,
    },
    /// It shows another key than the log has for that seat.
    #[error("hello of seat {seat} with an unexpected node key")]
    NodeKey {
        /// The seat.
        seat: Seat,
    },
    /// The signature does not verify for this connection.
    #[error("hello signature of seat {seat} does not verify on this connection")]
    Signature {
        /// The seat it claims.
        seat: Seat,
    },
    /// The TLS session gives no exporter. Ours.
    #[error("tls exporter not available")]
    Exporter,
}

impl HelloError {
    /// Stable short name.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing { .. } => "hello.missing",
            Self::Timeout { .. } => "hello.timeout",
            Self::Malformed { .. } => "hello.malformed",
            Self::Cluster { .. } => "hello.cluster",
            Self::Seat { .. } => "hello.seat",
            Self::NodeKey { .. } => "hello.node_key",
            Self::Signature { .. } => "hello.signature",
            Self::Exporter => "hello.exporter",
        }
    }
}

/// Whom we expect on the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExpectedPeer {
    /// Its seat, where we opened the connection to one.
    pub seat: Option<Seat>,
    /// Its key, where the log has one already.
    pub node_key: Option<[u8; 32]>,
}

/// Both exporters of one connection, one for each side's HELLO.
#[derive(Clone, Copy)]
pub(crate) struct Exporters {
    client: [u8; 32],
    server: [u8; 32],
}

impl Exporters {
    pub(crate) fn of<Side>(connection: &ConnectionCommon<Side>) -> Result<Self, HelloError> {
        // The context is empty (architecture.md §2).
        let export =
            |label: &str| connection.export_keying_material([0u8; 32], label.as_bytes(), Some(&[])).map_err(|_error| HelloError::Exporter);
        Ok(Self { client: export(EXPORTER_LABEL_CLIENT)?, server: export(EXPORTER_LABEL_SERVER)? })
    }
}

/// Which side of the TLS connection we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server,
}

/// Sends our HELLO and checks theirs, both at once.
pub(crate) async fn exchange<IO: AsyncRead + AsyncWrite + Unpin>(
    io: &mut IO,
    side: Side,
    exporters: &Exporters,
    ours: &HelloIdentity,
    expected: ExpectedPeer,
    timeout: Duration,
) -> Result<PeerHello, HelloError> {
    let (mine, theirs) = match side {
        Side::Client => (&exporters.client, &exporters.server),
        Side::Server => (&exporters.server, &exporters.client),
    };
    let hello = sign(ours, mine);
    let exchange = async {
        io.write_all(&hello).await?;
        io.flush().await?;
        let mut received = [0u8; HELLO_BYTES];
        io.read_exact(&mut received).await?;
        Ok::<_, std::io::Error>(received)
    };
    let received = tokio::time::timeout(timeout, exchange)
        .await
        .map_err(|_elapsed| HelloError::Timeout { waited: timeout })?
        .map_err(|error| HelloError::Missing { reason: error.to_string() })?;
    check(&received, ours, expected, theirs)
}

fn sign(ours: &HelloIdentity, exporter: &[u8; 32]) -> Vec<u8> {
    let sig = ours.signer.sign(&signed_bytes(&ours.cluster_id, ours.seat, exporter));
    Hello { cluster_id: ours.cluster_id, seat: ours.seat, node_key: ours.signer.node_key(), sig }.encode()
}

fn check(received: &[u8], ours: &HelloIdentity, expected: ExpectedPeer, exporter: &[u8; 32]) -> Result<PeerHello, HelloError> {
    let hello = Hello::decode(received).map_err(|error| HelloError::Malformed { reason: error.to_string() })?;
    if hello.cluster_id != ours.cluster_id {
        return Err(HelloError::Cluster { expected: ours.cluster_id, got: hello.cluster_id });
    }
    match expected.seat {
        Some(seat) if seat != hello.seat => return Err(HelloError::Seat { expected: seat.to_string(), got: hello.seat }),
        _ if hello.seat == ours.seat || hello.seat == Seat(0) => {
            return Err(HelloError::Seat { expected: format!("a seat from 1 other than ours ({})", ours.seat), got: hello.seat });
        }
        _ => {}
    }
    if expected.node_key.is_some_and(|key| key != hello.node_key) {
        return Err(HelloError::NodeKey { seat: hello.seat });
    }
    // Strict: canonical encodings, no key of small order (threshold.md §0, Sign).
    let bad_signature = HelloError::Signature { seat: hello.seat };
    let key = VerifyingKey::from_bytes(&hello.node_key).map_err(|_error| bad_signature.clone())?;
    let message = signed_bytes(&hello.cluster_id, hello.seat, exporter);
    key.verify_strict(&message, &Signature::from_bytes(&hello.sig)).map_err(|_error| bad_signature)?;
    Ok(PeerHello { seat: hello.seat, node_key: hello.node_key })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const EXPORTERS: Exporters = Exporters { client: [1; 32], server: [2; 32] };

    fn node(cluster: u8, seat: u16) -> HelloIdentity {
        HelloIdentity {
            cluster_id: ClusterId([cluster; 32]),
            seat: Seat(seat),
            signer: Arc::new(SigningKey::from_bytes(&[seat as u8 + 1; 32])),
        }
    }

    async fn meet(
        client: HelloIdentity,
        expected: ExpectedPeer,
        server: HelloIdentity,
        seen_by_client: Exporters,
    ) -> (Result<PeerHello, HelloError>, Result<PeerHello, HelloError>) {
        let (mut a, mut b) = tokio::io::duplex(1024);
        let wait = Duration::from_secs(1);
        tokio::join!(
            exchange(&mut a, Side::Client, &seen_by_client, &client, expected, wait),
            exchange(&mut b, Side::Server, &EXPORTERS, &server, ExpectedPeer::default(), wait),
        )
    }

    #[tokio::test]
    async fn both_sides_learn_seat_and_key() {
        let expected = ExpectedPeer { seat: Some(Seat(2)), node_key: Some(node(9, 2).signer.node_key()) };
        let (at_client, at_server) = meet(node(9, 1), expected, node(9, 2), EXPORTERS).await;
        assert_eq!(at_client, Ok(PeerHello { seat: Seat(2), node_key: node(9, 2).signer.node_key() }));
        assert_eq!(at_server, Ok(PeerHello { seat: Seat(1), node_key: node(9, 1).signer.node_key() }));
    }

    #[tokio::test]
    async fn another_cluster_is_refused_by_both() {
        let (at_client, at_server) = meet(node(8, 1), ExpectedPeer::default(), node(9, 2), EXPORTERS).await;
        assert_eq!(at_client.unwrap_err().code(), "hello.cluster");
        assert_eq!(at_server.unwrap_err().code(), "hello.cluster");
    }

    #[tokio::test]
    async fn wrong_seats_and_keys_are_refused() {
        let other_seat = ExpectedPeer { seat: Some(Seat(3)), node_key: None };
        assert_eq!(meet(node(9, 1), other_seat, node(9, 2), EXPORTERS).await.0.unwrap_err().code(), "hello.seat");
        let other_key = ExpectedPeer { seat: Some(Seat(2)), node_key: Some([0; 32]) };
        assert_eq!(meet(node(9, 1), other_key, node(9, 2), EXPORTERS).await.0.unwrap_err().code(), "hello.node_key");
        assert_eq!(meet(node(9, 2), ExpectedPeer::default(), node(9, 2), EXPORTERS).await.1.unwrap_err().code(), "hello.seat");
        assert_eq!(meet(node(9, 0), ExpectedPeer::default(), node(9, 2), EXPORTERS).await.1.unwrap_err().code(), "hello.seat");
    }

    #[tokio::test]
    async fn signatures_of_another_connection_or_direction_are_refused() {
        let other = Exporters { client: [7; 32], server: [8; 32] };
        let (at_client, at_server) = meet(node(9, 1), ExpectedPeer::default(), node(9, 2), other).await;
        assert_eq!(at_client.unwrap_err().code(), "hello.signature");
        assert_eq!(at_server.unwrap_err().code(), "hello.signature");
        // A HELLO reflected to its sender: right connection, wrong label.
        let reflected = sign(&node(9, 2), &EXPORTERS.client);
        assert_eq!(check(&reflected, &node(9, 1), ExpectedPeer::default(), &EXPORTERS.server).unwrap_err().code(), "hello.signature");
    }

    #[tokio::test]
    async fn every_flipped_bit_is_refused() {
        let hello = sign(&node(9, 2), &EXPORTERS.server);
        assert!(check(&hello, &node(9, 1), ExpectedPeer::default(), &EXPORTERS.server).is_ok());
        for bit in 0..hello.len() * 8 {
            let mut changed = hello.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(check(&changed, &node(9, 1), ExpectedPeer::default(), &EXPORTERS.server).is_err(), "bit {bit}");
        }
    }

    #[tokio::test]
    async fn silence_times_out() {
        let (mut a, _b) = tokio::io::duplex(1024);
        let wait = Duration::from_millis(50);
        let outcome = exchange(&mut a, Side::Client, &EXPORTERS, &node(9, 1), ExpectedPeer::default(), wait).await;
        assert_eq!(outcome, Err(HelloError::Timeout { waited: wait }));
    }
}
