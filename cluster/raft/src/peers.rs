//! Raft RPCs over attested node connections.
//! Owns: the way of an RPC through HTTP/2: `POST /raft/v1/<kind>`, 200 and the answer, or a refusal as `code`, newline, text.
//! Never: decides who may connect; [`dstack_ratls`] proves the peer's seat, [`crate::guard`] judges what it says.
//! Source: architecture.md §2 (HELLO, RPCs), dependencies.md §7 pitfall 7.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Extension, Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use dstack_protocol::{Seat, limits::FRAME_BYTES_MAX};
use dstack_ratls::{NodePeer, PeerError, peer_client::PeerClient};
use tracing::{info, warn};

use crate::{
    contract::{AppliedObserver, Machine},
    guard::Refused,
    handle::RaftHandle,
    transport::{RpcKind, Transport, TransportError},
};

/// Where the RPCs are served.
pub const PATH: &str = "/raft/v1";
/// Longest refusal text that is kept.
const REFUSAL_CHARS_MAX: usize = 512;

/// The other seats, reached over RA-TLS. Seats without a client are unreachable.
#[derive(Debug, Default)]
pub struct Peers {
    clients: RwLock<BTreeMap<Seat, PeerClient>>,
    silent: Mutex<BTreeMap<Seat, Silence>>,
}

/// A seat that does not answer, and what was last said of it in the log.
#[derive(Debug)]
struct Silence {
    /// The reason without its numbers.
    class: String,
    logged: Instant,
}

/// Between two lines about one seat.
const LINE_EVERY: Duration = Duration::from_secs(1);

impl Peers {
    /// No peers yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reaches `seat` through `client`, which must expect that seat in the peer's HELLO.
    pub fn set(&self, seat: Seat, client: PeerClient) {
        self.clients.write().unwrap_or_else(PoisonError::into_inner).insert(seat, client);
    }

    /// Forgets `seat`.
    pub fn remove(&self, seat: Seat) {
        self.clients.write().unwrap_or_else(PoisonError::into_inner).remove(&seat);
    }

    fn client(&self, seat: Seat) -> Option<PeerClient> {
        self.clients.read().unwrap_or_else(PoisonError::into_inner).get(&seat).cloned()
    }

    /// One line when a seat falls silent or does so for another reason, one when it answers again: not one for each heartbeat.
    fn note(&self, seat: Seat, outcome: &Result<Vec<u8>, TransportError>) {
        let mut silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        let error = match outcome {
            Ok(_) | Err(TransportError::Refused { .. }) => {
                if silent.remove(&seat).is_some() {
                    info!(peer_id = seat.0, "peer answers again");
                }
                return;
            }
            Err(error) => error,
        };
        let reason = error.to_string();
        let class: String = reason.chars().filter(|c| !c.is_ascii_digit()).collect();
        if silent.get(&seat).is_none_or(|said| said.class != class && said.logged.elapsed() >= LINE_EVERY) {
            warn!(peer_id = seat.0, reason, "peer does not answer");
            silent.insert(seat, Silence { class, logged: Instant::now() });
        }
    }

    async fn ask(&self, to: Seat, kind: RpcKind, body: Vec<u8>, timeout: Duration) -> Result<Vec<u8>, TransportError> {
        let started = Instant::now();
        let unreachable = |detail: String| TransportError::Unreachable { to: to.0, detail };
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let client = self.client(to).ok_or_else(|| unreachable("address unknown".to_owned()))?;
        // First the connection alone: until it stands, the peer has certainly seen nothing of the call.
        match tokio::time::timeout(timeout, client.peer()).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(unreachable(error.to_string())),
            Err(_) => return Err(unreachable(format!("not connected within {timeout_ms} ms"))),
        }
        let left = timeout.saturating_sub(started.elapsed());
        let (status, answer) = client.post(&format!("{PATH}/{kind}"), body, left).await.map_err(|error| match error {
            PeerError::Timeout { .. } => TransportError::Timeout { to: to.0, timeout_ms },
            error if error.surely_not_done() => unreachable(error.to_string()),
            error => TransportError::Broken { to: to.0, detail: error.to_string() },
        })?;
        if status == StatusCode::OK.as_u16() {
            if answer.len() > kind.response_bytes_max() {
                return Err(TransportError::Broken { to: to.0, detail: format!("answer of {} bytes to {kind}", answer.len()) });
            }
            return Ok(answer.to_vec());
        }
        let text: String = String::from_utf8_lossy(&answer).chars().take(REFUSAL_CHARS_MAX).collect();
        let (code, detail) = text.split_once('\n').unwrap_or((text.as_str(), ""));
        let code = if code.is_empty() { format!("http.{status}") } else { code.to_owned() };
        Err(TransportError::Refused { to: to.0, code, detail: detail.to_owned() })
    }
}

#[cfg(feature = "insecure-rogue")]
impl Peers {
    /// Says what a liar wants to say, to a muted seat too.
    ///
    /// # Errors
    /// As [`Transport::call`].
    pub async fn say(&self, to: Seat, kind: RpcKind, body: Vec<u8>, timeout: Duration) -> Result<Vec<u8>, TransportError> {
        self.ask(to, kind, body, timeout).await
    }
}

impl Transport for Peers {
    async fn call(&self, to: Seat, kind: RpcKind, body: Vec<u8>, timeout: Duration) -> Result<Vec<u8>, TransportError> {
        #[cfg(feature = "insecure-rogue")]
        if crate::rogue::is_muted(to) {
            return Err(TransportError::Unreachable { to: to.0, detail: "muted".to_owned() });
        }
        let outcome = self.ask(to, kind, body, timeout).await;
        self.note(to, &outcome);
        outcome
    }
}

/// Whether a peer's node key may speak for its seat. Its HELLO proves only that it holds the key and claims the seat.
///
/// architecture.md §2: a key that the log has not admitted for that seat may only send its Admit and receive the log. So this
/// answers false for a seat that the state gives to another key, and for keys it does not know, except while this node itself has
/// no state: then it knows nobody and takes the log from whom its configuration names.
pub type Speaks = Arc<dyn Fn(&NodePeer) -> bool + Send + Sync>;

/// The routes that answer the other seats; to be merged into the router of node connections. Peers that `speaks` refuses may only
/// propose: what they propose, the machine judges.
pub fn router<M: Machine, O: AppliedObserver<M>, T: Transport>(handle: RaftHandle<M, O, T>, speaks: Speaks) -> Router {
    Router::new()
        .route(&format!("{PATH}/{{kind}}"), post(answer::<M, O, T>))
        .layer(DefaultBodyLimit::max(FRAME_BYTES_MAX))
        .with_state(Served { handle, speaks })
}

struct Served<M: Machine, O: AppliedObserver<M>, T: Transport> {
    handle: RaftHandle<M, O, T>,
    speaks: Speaks,
}

impl<M: Machine, O: AppliedObserver<M>, T: Transport> Clone for Served<M, O, T> {
    fn clone(&self) -> Self {
        Self { handle: self.handle.clone(), speaks: Arc::clone(&self.speaks) }
    }
}

async fn answer<M: Machine, O: AppliedObserver<M>, T: Transport>(
    State(Served { handle, speaks }): State<Served<M, O, T>>,
    Extension(peer): Extension<NodePeer>,
    Path(kind): Path<String>,
    body: Bytes,
) -> Response {
    #[cfg(feature = "insecure-rogue")]
    if crate::rogue::is_muted(peer.hello.seat) {
        return (StatusCode::SERVICE_UNAVAILABLE, "raft.stopped\nmuted").into_response();
    }
    let Some(kind) = RpcKind::from_name(&kind) else {
        return (StatusCode::NOT_FOUND, "raft.unknown\nno such rpc").into_response();
    };
    if kind != RpcKind::Propose && !speaks(&peer) {
        return (StatusCode::FORBIDDEN, "raft.not-admitted\nthis node key is not admitted for its seat").into_response();
    }
    match handle.handle(kind, peer.hello.seat, &body).await {
        Ok(bytes) => bytes.into_response(),
        Err(refused) => (status(&refused), format!("{}\n{refused}", refused.code())).into_response(),
    }
}

fn status(refused: &Refused) -> StatusCode {
    match refused {
        Refused::NotThePeer { .. } => StatusCode::FORBIDDEN,
        Refused::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
        Refused::Malformed(_) | Refused::TermTooFar { .. } | Refused::Impossible { .. } => StatusCode::BAD_REQUEST,
        Refused::Fork(_) | Refused::Voters { .. } | Refused::Snapshot { .. } => StatusCode::CONFLICT,
        Refused::Abstaining { .. } | Refused::Stopped { .. } => StatusCode::SERVICE_UNAVAILABLE,
    }
}
