//! What other nodes may ask of this one.
//!
//! Owns: routes under `/peer` and the rule who may use them. Never: believes a coordinator (the holder checks everything itself).
//! Source: architecture.md §2: a key that the log has not admitted for its seat may only send its Admit and receive the log.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Extension, Request, State};
use axum::http::Uri;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use dstack_actors::ports::read;
use dstack_protocol::collateral::Wants;
use dstack_protocol::limits::FRAME_BYTES_MAX;
use dstack_protocol::log::SignedHead;
use dstack_protocol::release::{Ask, Go};
use dstack_protocol::rpc::{
    ClockAsk, PATH_PEER_ASK, PATH_PEER_CERTIFICATE, PATH_PEER_CLOCK, PATH_PEER_GO, PATH_PEER_HEAD, PATH_PEER_MONO, PATH_PEER_SIGN_COMMIT,
    PATH_PEER_SIGN_PAIR, PATH_PEER_SIGN_PAIR_DONE, PATH_PEER_SIGN_ROUND, PATH_PEER_SIGN_RUN, PATH_PEER_SIGN_SETUP, PATH_PEER_SIGN_SHARE,
    PATH_PEER_WANTS,
};
use dstack_protocol::{Refusal, RefusalCode, Wire};
use dstack_raft::peers;
use dstack_ratls::NodePeer;

use crate::node::Services;
use crate::responses::{Answer, Encoded, Refused};
use crate::timelocks::encode_mono;

/// Routes of node connections, Raft's among them.
pub(crate) fn router(services: Arc<Services>) -> Router {
    let speaking = Arc::clone(&services);
    let raft = peers::router(services.raft.clone(), Arc::new(move |peer| speaks(&speaking, peer)));
    Router::new()
        .route(PATH_PEER_ASK, post(ask))
        .route(PATH_PEER_GO, post(go))
        .route(PATH_PEER_HEAD, post(head))
        .route(PATH_PEER_CERTIFICATE, post(certificate))
        .route(PATH_PEER_CLOCK, post(clock))
        .route(PATH_PEER_MONO, post(mono))
        .route(PATH_PEER_WANTS, post(wants))
        .route(PATH_PEER_SIGN_SETUP, post(signing))
        .route(PATH_PEER_SIGN_PAIR, post(signing))
        .route(PATH_PEER_SIGN_PAIR_DONE, post(signing))
        .route(PATH_PEER_SIGN_COMMIT, post(signing))
        .route(PATH_PEER_SIGN_SHARE, post(signing))
        .route(PATH_PEER_SIGN_RUN, post(signing))
        .route(PATH_PEER_SIGN_ROUND, post(signing))
        .layer(DefaultBodyLimit::max(FRAME_BYTES_MAX))
        .layer(middleware::from_fn_with_state(Arc::clone(&services), admitted))
        .with_state(Arc::clone(&services))
        .merge(raft)
        .layer(middleware::from_fn_with_state(services, seated))
}

/// Whether the log has admitted the peer's key for its seat. Before the first members version everybody takes part in forming the
/// cluster; before genesis this node knows nobody and takes the log from whom the genesis document names.
fn speaks(services: &Services, peer: &NodePeer) -> bool {
    let known = read(&*services.log, |state| {
        state.members.is_empty() || state.seats.get(&peer.hello.seat).is_some_and(|row| row.node_key == peer.hello.node_key)
    });
    known.unwrap_or(true)
}

/// Refuses peers whose platform is not that of their seat.
async fn seated(State(services): State<Arc<Services>>, Extension(peer): Extension<NodePeer>, request: Request, next: Next) -> Response {
    match services.trust.of_seat(peer.hello.seat, &peer.identity) {
        Ok(()) => next.run(request).await,
        Err(refusal) => Refused(refusal).into_response(),
    }
}

/// Refuses keys that the log has not admitted for their seat: they may only propose their Admit and receive the log, which are Raft's
/// routes.
async fn admitted(State(services): State<Arc<Services>>, Extension(peer): Extension<NodePeer>, request: Request, next: Next) -> Response {
    if speaks(&services, &peer) {
        return next.run(request).await;
    }
    let got = format!("seat {} with an unknown node key", peer.hello.seat);
    Refused(Refusal::new(RefusalCode::NotAdmitted, "a key that the log admitted for its seat", got)).into_response()
}

async fn ask(State(services): State<Arc<Services>>, Extension(peer): Extension<NodePeer>, body: Bytes) -> Answer {
    services.serving()?;
    services.holding()?;
    // In modes L and E the asking node is the coordinator that the intent names (threshold.md §2.4).
    let seat = peer.hello.seat;
    let index = read(&*services.log, |state| state.seats.get(&seat).map(|row| row.index))?;
    let unknown = || Refusal::new(RefusalCode::NotAdmitted, "a seat that the log has filled", format!("seat {seat}"));
    services.holder.ask(Ask::decode(&body)?, index.ok_or_else(unknown)?).await?;
    Ok(Encoded(Vec::new()))
}

async fn go(State(services): State<Arc<Services>>, body: Bytes) -> Answer {
    services.serving()?;
    services.holding()?;
    Ok(Encoded(services.holder.go(Go::decode(&body)?).await?.encode()))
}

async fn head(State(services): State<Arc<Services>>, body: Bytes) -> Answer {
    services.heads.pushed(SignedHead::decode(&body)?)?;
    Ok(Encoded(Vec::new()))
}

async fn certificate(State(services): State<Arc<Services>>, body: Bytes) -> Answer {
    let size: [u8; 8] =
        body.as_ref().try_into().map_err(|_| Refusal::new(RefusalCode::Malformed, "8 bytes of size", body.len().to_string()))?;
    let size = u64::from_be_bytes(size);
    let certificate = services.heads.certificate_of(size);
    let certificate = certificate.ok_or_else(|| Refusal::new(RefusalCode::NoCert, format!("a certificate of size {size}"), "none here"))?;
    Ok(Encoded(certificate.encode()))
}

async fn clock(State(services): State<Arc<Services>>, body: Bytes) -> Answer {
    let reading = services.beacons.reading(ClockAsk::decode(&body)?)?;
    Ok(Encoded(reading.encode(services.birth.cluster_id())))
}

/// A message of a signature or of a pairwise setup. Its author is the node that the connection is attested to, whatever it says inside.
async fn signing(State(services): State<Arc<Services>>, Extension(peer): Extension<NodePeer>, uri: Uri, body: Bytes) -> Answer {
    services.serving()?;
    let (seat, key) = (peer.hello.seat, peer.hello.node_key);
    let index = read(&*services.log, |state| state.seats.get(&seat).filter(|row| row.node_key == key).map(|row| row.index))?;
    let not_admitted = || Refusal::new(RefusalCode::NotAdmitted, "a key that the log admitted for its seat", format!("seat {seat}"));
    Ok(Encoded(services.signing.answer(index.ok_or_else(not_admitted)?, uri.path(), &body).await?))
}

async fn mono(State(services): State<Arc<Services>>, body: Bytes) -> Answer {
    let id: [u8; 16] =
        body.as_ref().try_into().map_err(|_| Refusal::new(RefusalCode::Malformed, "16 bytes of action id", body.len().to_string()))?;
    Ok(Encoded(encode_mono(&services.timelocks.mono(&id)?)))
}

/// What evidence at another node lacked: asked for where this node leads.
async fn wants(State(services): State<Arc<Services>>, body: Bytes) -> Answer {
    services.noted.add(Wants::decode(&body)?);
    Ok(Encoded(Vec::new()))
}
