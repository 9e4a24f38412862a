//! Routes and dispatch of dstack's protocol. Owns: `/prpc/*`, `/health`, `/metrics`, the header with the version, the order: evidence
//! first, then the method. Never: a method. Source: KMS API reference §1, §2.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Extension, Path, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use dstack_protocol::Refusal;
use dstack_prpc::RpcError;
use dstack_prpc::kms::Kms;
use dstack_ratls::dstack_server::DstackPeer;
use dstack_ratls::prpc::{Call, form, refuse};

use super::caller::Caller;
use super::places::BODY_WITHIN;
use super::{BODY_BYTES_MAX, Dstack, public};

const VERSION_HEADER: HeaderName = HeaderName::from_static("x-app-version");
const VERSION: HeaderValue = HeaderValue::from_static(concat!("v", env!("CARGO_PKG_VERSION")));

/// Routes of the listener.
pub(super) fn router(dstack: Arc<Dstack>) -> Router {
    Router::new()
        .route("/prpc/{method}", any(call))
        .route("/health", get(async || "OK"))
        .route("/metrics", get(scrape))
        .layer(middleware::from_fn(versioned))
        .with_state(dstack)
}

async fn versioned(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    response.headers_mut().insert(VERSION_HEADER, VERSION);
    response
}

async fn scrape(State(dstack): State<Arc<Dstack>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], dstack.counters.render()).into_response()
}

async fn call(
    State(dstack): State<Arc<Dstack>>,
    Extension(peer): Extension<DstackPeer>,
    Path(segment): Path<String>,
    request: Request,
) -> Response {
    let method = Kms::method(&segment);
    let response = answer(&dstack, &peer, method.clone(), request).await;
    let is_attestation = matches!(method, Ok(Kms::GetAppKey | Kms::GetKmsKey | Kms::SignCert));
    if is_attestation {
        dstack.counters.attestation(response.status() >= StatusCode::BAD_REQUEST);
    }
    response
}

async fn answer(dstack: &Arc<Dstack>, peer: &DstackPeer, method: Result<Kms, RpcError>, request: Request) -> Response<Body> {
    let early = form(&request);
    // The client's certificate is judged before anything else is looked at, for every method.
    let caller = match Caller::of(dstack, peer).await {
        Ok(caller) => caller,
        Err(error) => return refuse(early, &error),
    };
    let method = match method {
        Ok(method) => method,
        Err(error) => return refuse(early, &error),
    };
    let turn = dstack.places.turn(peer.address.ip()).await;
    let _place = match dstack.places.enter(caller.attested.is_some()) {
        Ok(place) => place,
        Err(refusal) => return refuse(early, &error_of(&refusal)),
    };
    let call = match tokio::time::timeout(BODY_WITHIN, Call::read(request, BODY_BYTES_MAX)).await {
        Ok(Ok(call)) => call,
        Ok(Err(response)) => return response,
        Err(_elapsed) => return refuse(early, &late(BODY_WITHIN)),
    };
    // Guests that share an address have their answers made side by side.
    let _turn = turn.filter(|_| caller.attested.is_none());
    if let Err(refusal) = (dstack.parts.serving)() {
        return refuse(call.codec(), &error_of(&refusal));
    }
    match method {
        Kms::GetAppKey => call.serve(|request| dstack.app_key(&caller, request)).await,
        Kms::GetAppEnvEncryptPubKey => call.serve(|request| dstack.env_key(peer.address.ip(), request)).await,
        Kms::GetMeta => call.serve(|_: dstack_prpc::Empty| dstack.meta()).await,
        Kms::GetTempCaCert => call.serve(|_: dstack_prpc::Empty| dstack.temp_ca_cert()).await,
        Kms::SignCert => call.serve(|request| dstack.sign_cert(request)).await,
        Kms::GetKmsKey => call.serve(async |_: dstack_prpc::kms::GetKmsKeyRequest| public::no_root_key()).await,
        Kms::ClearImageCache => call.serve(async |_: dstack_prpc::kms::LegacyClearImageCacheRequest| public::no_image_cache()).await,
    }
}

fn late(within: Duration) -> RpcError {
    RpcError::Refused { status: 408, reason: format!("the body did not arrive within {} s", within.as_secs()) }
}

/// A refusal in dstack's terms: its own text; 400 as upstream answers every failure, but where the same request may succeed later or
/// elsewhere, or the fault is ours.
pub(super) fn error_of(refusal: &Refusal) -> RpcError {
    crate::status::refused(refusal.code);
    let status = match refusal.code.http_status() {
        status @ (429 | 500 | 503) => status,
        _ => 400,
    };
    RpcError::Refused { status, reason: refusal.to_string() }
}

/// The same behind a text of upstream's.
pub(super) fn prefixed(prefix: &str, error: RpcError) -> RpcError {
    match error {
        RpcError::Refused { status, reason } => RpcError::Refused { status, reason: format!("{prefix}: {reason}") },
        other => other,
    }
}
