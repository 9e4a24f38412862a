//! Methods behind their paths, for every listener. Owns: the table of paths, dispatch, metrics of requests.
//! Never: a method's rules; the forms of requests and answers (`dstack_ratls::prpc`).
//! Source: guest API reference §1, §2, §15.1.

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderName, HeaderValue, Response};
use axum::middleware::map_response;
use axum::routing::{any, get};
use dstack_prpc::guest::{DstackGuest, Tappd, Worker};
use dstack_prpc::guest_v1::{DstackGuestV1, WorkerV1};
use dstack_prpc::host::GuestApi;
use dstack_prpc::{Codec, Empty, RpcError};
use dstack_ratls::prpc::{Call, form, refuse};

use crate::api::ApiError;
use crate::guest::Guest;
use crate::info::{Reader, app_info, info_v1, version};
use crate::{api, api_v1, host_api, metrics, pages, report_data, tappd};

/// Largest body of the app's own requests, bytes: data to sign is the longest argument.
pub const BODY_BYTES_MAX: usize = 1 << 20;
/// Largest body of a stranger's request, bytes.
pub const EXTERNAL_BODY_BYTES_MAX: usize = 64 * 1024;

type Shared = State<Arc<Guest>>;

/// dstack.sock: v0 at `/` and `/v0`, v1 at `/v1`.
pub fn internal(guest: Arc<Guest>) -> Router {
    Router::new()
        .route("/{method}", any(v0))
        .route("/v0/{method}", any(v0))
        .route("/v1/{method}", any(v1))
        .fallback(unknown)
        .with_state(guest)
}

/// tappd.sock.
pub fn legacy(guest: Arc<Guest>) -> Router {
    Router::new().route("/prpc/{method}", any(legacy_method)).fallback(unknown).with_state(guest)
}

/// The external port: `Worker` and the pages.
pub fn external(guest: Arc<Guest>) -> Router {
    let version = HeaderValue::from_static(env!("CARGO_PKG_VERSION"));
    let stamp = move |mut response: Response<Body>| {
        response.headers_mut().insert(HeaderName::from_static("x-app-version"), version.clone());
        std::future::ready(response)
    };
    Router::new()
        .route("/prpc/{method}", any(worker))
        .route("/prpc/v0/{method}", any(worker))
        .route("/prpc/v1/{method}", any(worker_v1))
        .route("/", get(pages::dashboard))
        .route("/logs/{container}", get(pages::logs))
        .route("/metrics", get(pages::gauges))
        .fallback(unknown)
        .with_state(guest)
        .layer(map_response(stamp))
}

/// The host's listener.
pub fn host(guest: Arc<Guest>) -> Router {
    Router::new().route("/api/{method}", any(host_method)).fallback(unknown).with_state(guest)
}

async fn unknown(request: Request) -> Response<Body> {
    let name = request.uri().path().trim_start_matches('/').to_owned();
    // None of the names is one with a slash in it.
    let error = DstackGuest::method(&format!("{name}/")).map_or_else(|error| error, |_| RpcError::HttpMethod);
    let codec = form(&request);
    // Whoever asks for a page reads text.
    refuse(if codec == Codec::Protobuf { Codec::Json } else { codec }, &shorn(error))
}

/// Without the slash that `unknown` put behind the name.
fn shorn(error: RpcError) -> RpcError {
    match error {
        RpcError::UnknownMethod { name } => RpcError::UnknownMethod { name: name.trim_end_matches('/').to_owned() },
        other => other,
    }
}

/// Reads the call, has it answered, counts it.
async fn served<M: Copy>(
    service: &'static str,
    method: Result<M, RpcError>,
    name: fn(M) -> &'static str,
    request: Request,
    body_bytes_max: usize,
    answer: impl AsyncFnOnce(M, &Call) -> Response<Body>,
) -> Response<Body> {
    let began = Instant::now();
    let method = match method {
        Ok(method) => method,
        Err(error) => return refuse(form(&request), &error),
    };
    let response = match Call::read(request, body_bytes_max).await {
        Ok(call) => answer(method, &call).await,
        Err(refused) => refused,
    };
    metrics::request(service, name(method), response.status().is_success(), began.elapsed());
    if !response.status().is_success() {
        tracing::debug!(service, method = name(method), status = response.status().as_u16(), "request refused");
    }
    response
}

fn refused<T>(outcome: Result<T, ApiError>) -> Result<T, RpcError> {
    outcome.map_err(RpcError::from)
}

async fn v0(State(guest): Shared, Path(segment): Path<String>, request: Request) -> Response<Body> {
    use DstackGuest as M;
    let guest = &guest;
    served("guest", M::method(&segment), M::name, request, BODY_BYTES_MAX, async |method, call: &Call| match method {
        M::GetTlsKey => call.serve(async |args| refused(api::tls_key(guest, args).await)).await,
        M::GetKey => call.serve(async |args| refused(api::key(guest, &args))).await,
        M::GetQuote => {
            let quote = async |args: dstack_prpc::guest::RawQuoteArgs| match report_data::padded(&args.report_data) {
                Ok(report_data) => refused(api::quote(guest, report_data).await),
                Err(error) => Err(RpcError::refused(error)),
            };
            call.serve(quote).await
        }
        M::Attest => call.serve(async |args| refused(api::attest(guest, &args).await)).await,
        M::Info => call.serve(async |_: Empty| app_info(guest, Reader::App).await.map_err(RpcError::refused)).await,
        M::Sign => call.serve(async |args| refused(api::sign(guest, &args))).await,
        M::Verify => call.serve(async |args| refused(api::verify(&args))).await,
        M::Version => call.serve(async |_: Empty| Ok(version())).await,
        M::EmitEvent => call.serve(async |args| refused(api::emit_event(&args))).await,
        M::GpuInfo => call.serve(async |_: Empty| refused(api::gpu_info().await)).await,
    })
    .await
}

async fn v1(State(guest): Shared, Path(segment): Path<String>, request: Request) -> Response<Body> {
    use DstackGuestV1 as M;
    let guest = &guest;
    served("guest_v1", M::method(&segment), M::name, request, BODY_BYTES_MAX, async |method, call: &Call| match method {
        M::IssueCert => call.serve(async |args| refused(api::tls_key(guest, args).await)).await,
        M::GetKey => call.serve(async |args| refused(api_v1::key(guest, &args))).await,
        M::Attest => call.serve(async |args| refused(api_v1::attest(guest, &args).await)).await,
        M::AttestGpu => call.serve(async |args| refused(api_v1::attest_gpu(&args))).await,
        M::Info => call.serve(async |_: Empty| Ok(info_v1(guest, Reader::App).await)).await,
        M::Version => call.serve(async |_: Empty| Ok(version())).await,
    })
    .await
}

async fn legacy_method(State(guest): Shared, Path(segment): Path<String>, request: Request) -> Response<Body> {
    use Tappd as M;
    let guest = &guest;
    served("tappd", M::method(&segment), M::name, request, BODY_BYTES_MAX, async |method, call: &Call| match method {
        M::DeriveKey => call.serve(async |args| refused(tappd::derive_key(guest, args).await)).await,
        M::DeriveK256Key => call.serve(async |args| refused(tappd::derive_k256_key(guest, &args))).await,
        M::TdxQuote => call.serve(async |args| refused(tappd::tdx_quote(guest, &args).await)).await,
        M::RawQuote => call.serve(async |args| refused(tappd::raw_quote(guest, &args).await)).await,
        M::Info => call.serve(async |_: Empty| app_info(guest, Reader::App).await.map_err(RpcError::refused)).await,
        M::Version => call.serve(async |_: Empty| Ok(version())).await,
    })
    .await
}

async fn worker(State(guest): Shared, Path(segment): Path<String>, request: Request) -> Response<Body> {
    use Worker as M;
    let guest = &guest;
    served("worker", M::method(&segment), M::name, request, EXTERNAL_BODY_BYTES_MAX, async |method, call: &Call| match method {
        M::Info => call.serve(async |_: Empty| app_info(guest, Reader::Stranger).await.map_err(RpcError::refused)).await,
        M::Version => call.serve(async |_: Empty| Ok(version())).await,
        M::GetAttestationForAppKey => call.serve(async |args| refused(tappd::attestation_for_app_key(guest, &args).await)).await,
    })
    .await
}

async fn worker_v1(State(guest): Shared, Path(segment): Path<String>, request: Request) -> Response<Body> {
    use WorkerV1 as M;
    let guest = &guest;
    served("worker_v1", M::method(&segment), M::name, request, EXTERNAL_BODY_BYTES_MAX, async |method, call: &Call| match method {
        M::Info => call.serve(async |_: Empty| Ok(info_v1(guest, Reader::Stranger).await)).await,
        M::Version => call.serve(async |_: Empty| Ok(version())).await,
        M::Health => call.serve(async |_: Empty| Ok(api_v1::health(guest).await)).await,
    })
    .await
}

async fn host_method(State(guest): Shared, Path(segment): Path<String>, request: Request) -> Response<Body> {
    use GuestApi as M;
    let guest = &guest;
    served("host", M::method(&segment), M::name, request, EXTERNAL_BODY_BYTES_MAX, async |method, call: &Call| match method {
        M::Info => call.serve(async |_: Empty| refused(host_api::info(guest).await)).await,
        M::SysInfo => call.serve(async |_: Empty| Ok(host_api::sys_info(guest))).await,
        M::NetworkInfo => call.serve(async |_: Empty| Ok(host_api::network_info())).await,
        M::ListContainers => call.serve(async |_: Empty| refused(host_api::list_containers(guest).await)).await,
        M::Shutdown => call.serve(async |_: Empty| refused(host_api::shutdown(guest).await)).await,
    })
    .await
}
