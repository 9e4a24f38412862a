//! Every limit of the listeners. Owns: the numbers and their relations. Never: reads configuration; binaries fill this.

use std::time::Duration;

use dstack_protocol::limits::{CLIENT_BODY_BYTES_MAX, FRAME_BYTES_MAX, SESSION_MS_MAX};

/// Limits of one [`crate::Server`]. The defaults suit a node with 20,000 descriptors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Connections that have sent nothing useful yet. The oldest gives way to the newest.
    pub greetings_max: usize,
    /// The same, set aside for addresses of known peers.
    pub greetings_known_max: usize,
    /// Node handshakes under way, HELLO included. The oldest gives way.
    pub node_handshakes_max: usize,
    /// The same, set aside for addresses of known peers.
    pub node_handshakes_known_max: usize,
    /// Client handshakes under way. The oldest gives way.
    pub client_handshakes_max: usize,
    /// Open node connections. More are refused.
    pub nodes_max: usize,
    /// Open connections of one node key. The oldest gives way.
    pub connections_per_node_max: usize,
    /// Open connections of clients with evidence. More are refused.
    pub attested_max: usize,
    /// Open connections of clients without. The oldest gives way.
    pub anonymous_max: usize,
    /// Connections of one source address in all stages but the node's. More are refused. Known peers are exempt.
    pub per_source_max: usize,
    /// Handshakes begun in a second by all but known peers. More are refused.
    pub handshakes_per_second_max: u32,
    /// From accept to the end of the TLS ClientHello.
    pub greeting_timeout: Duration,
    /// From there to the end of the handshake.
    pub handshake_timeout: Duration,
    /// For the HELLO of both sides.
    pub hello_timeout: Duration,
    /// HTTP, as below.
    pub node_http: HttpLimits,
    /// HTTP, as below.
    pub client_http: HttpLimits,
    /// How long requests may still run after the shutdown began.
    pub drain_timeout: Duration,
}

/// Limits of HTTP on one connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpLimits {
    /// For the head of an HTTP/1.1 request.
    pub header_timeout: Duration,
    /// From a request's head to the head of its response; the body is read within.
    pub request_timeout: Duration,
    /// Without any request under way.
    pub idle_timeout: Duration,
    /// After this the connection finishes its requests and ends, so that the peer's evidence is verified anew.
    pub age_max: Duration,
    /// Body of a request, bytes.
    pub body_bytes_max: usize,
    /// Requests at once on one HTTP/2 connection.
    pub streams_max: u32,
    /// Bytes of one request's body that may be under way unread, HTTP/2.
    pub stream_window_bytes: u32,
    /// The same of all requests of a connection: what a peer may make this side hold before a handler takes it.
    pub connection_window_bytes: u32,
}

/// Head of a request, bytes, both HTTP versions.
pub(crate) const HEADER_BYTES_MAX: u32 = 16 * 1024;
/// Fields of a head.
pub(crate) const HEADERS_MAX: usize = 64;
/// Streams that the peer opened and reset before a handler saw them, at once; one more ends the connection (CVE-2023-44487). Ours cancel
/// requests that run.
pub(crate) const RESETS_UNSEEN_MAX: usize = 20;
/// Streams that this side refused or ended for the peer's faults, in a connection's life; one more ends it (CVE-2025-8671). A client that
/// has not read our settings may open a hundred at once, and those above [`HttpLimits::streams_max`] are refused: that is no attack.
pub(crate) const RESETS_BY_US_MAX: usize = 128;
/// Dynamic table of a head's compression, bytes: the protocol's own default.
pub(crate) const HEADER_TABLE_BYTES: u32 = 4096;

impl Default for Limits {
    fn default() -> Self {
        Self {
            greetings_max: 1024,
            greetings_known_max: 256,
            node_handshakes_max: 64,
            node_handshakes_known_max: 256,
            client_handshakes_max: 512,
            nodes_max: 256,
            connections_per_node_max: 4,
            attested_max: 4096,
            anonymous_max: 512,
            per_source_max: 256,
            handshakes_per_second_max: 1000,
            greeting_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(10),
            hello_timeout: Duration::from_secs(5),
            node_http: HttpLimits {
                header_timeout: Duration::from_secs(5),
                request_timeout: Duration::from_secs(60),
                idle_timeout: Duration::from_secs(300),
                // Twice what the connecting side keeps one for: normally that side renews, without a failed request.
                age_max: Duration::from_secs(7200),
                body_bytes_max: FRAME_BYTES_MAX,
                streams_max: 256,
                stream_window_bytes: 256 * 1024,
                connection_window_bytes: 1024 * 1024,
            },
            client_http: HttpLimits::client(),
            drain_timeout: Duration::from_secs(10),
        }
    }
}

impl HttpLimits {
    /// For clients and administration.
    pub fn client() -> Self {
        Self {
            header_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(60),
            // A session's length (threshold.md §2.2).
            age_max: Duration::from_millis(SESSION_MS_MAX),
            body_bytes_max: CLIENT_BODY_BYTES_MAX,
            streams_max: 32,
            stream_window_bytes: 64 * 1024,
            connection_window_bytes: 256 * 1024,
        }
    }
}

impl Limits {
    /// Descriptors that this listener may hold at once, itself included. A binary compares it with what the process
    /// may open, and leaves room for its disks, its admin listener and its own connections.
    pub fn descriptors_max(&self) -> usize {
        [
            self.greetings_max,
            self.greetings_known_max,
            self.node_handshakes_max,
            self.node_handshakes_known_max,
            self.client_handshakes_max,
            self.nodes_max,
            self.attested_max,
            self.anonymous_max,
        ]
        .iter()
        // One for the listener, one for the connection being admitted.
        .fold(2, |sum, part| sum.saturating_add(*part))
    }
}
