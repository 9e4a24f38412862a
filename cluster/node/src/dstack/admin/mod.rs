//! dstack's service `Admin`, for upstream's operators and their scripts: a listener of its own, plain HTTP, off unless configured.
//!
//! Owns: its routes and methods. Never: changes anything of the cluster: that takes the operators' quorum (`dstack policy`). Our own
//! admin listener (`crate::admin`: metrics, health, status) is another one.
//! Source: KMS API reference §3.2, §12; ADR 0026.

pub(crate) mod credentials;
mod guard;
mod shown;

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use axum::Router;
use axum::extract::{Extension, Path, Request};
use axum::response::Response;
use axum::routing::any;
use dstack_actors::ports::Now;
use dstack_prpc::kms::{Admin, ClearImageCacheRequest};
use dstack_prpc::{Empty, RpcError};
use dstack_ratls::plain::{PlainLimits, PlainPeer, PlainServer};
use dstack_ratls::prpc::{Call, form, refuse};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::AdminConfig;
use guard::Guard;

/// Body of a request, bytes.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// Binds and serves until `stop`.
///
/// # Errors
/// The address cannot be bound.
pub(super) async fn start(config: &AdminConfig, now: Now, runtime: &Handle, stop: CancellationToken) -> anyhow::Result<JoinHandle<()>> {
    let server = PlainServer::bind(config.listen, PlainLimits::default()).await.context("dstack admin listener")?;
    let address = server.local_address().context("dstack admin listener")?;
    if config.credentials.is_none() {
        warn!(listen = %address, "dstack's admin service asks nobody who they are: insecure_no_auth");
    }
    info!(listen = %address, "listening for dstack's admin service");
    Ok(runtime.spawn(server.run(router(config, now)?, stop)))
}

fn router(config: &AdminConfig, now: Now) -> anyhow::Result<Router> {
    let routes = Router::new().route("/prpc/{method}", any(call));
    Ok(match &config.credentials {
        None => routes,
        Some(credentials) => {
            let guard = Arc::new(Guard::new(Arc::clone(credentials), now)?);
            // Around what is no route as well: who shows nothing learns nothing.
            routes.fallback(async || axum::http::StatusCode::NOT_FOUND).layer(axum::middleware::from_fn_with_state(guard, Guard::pass))
        }
    })
}

async fn call(Extension(PlainPeer(address)): Extension<PlainPeer>, Path(segment): Path<String>, request: Request) -> Response {
    let method = match Admin::method(&segment) {
        Ok(method) => method,
        Err(error) => return refuse(form(&request), &error),
    };
    let call = match Call::read(request, BODY_BYTES_MAX).await {
        Ok(call) => call,
        Err(response) => return response,
    };
    match method {
        Admin::ClearImageCache => call.serve(async |request| clear_image_cache(address, &request)).await,
    }
}

/// There is no cache of images here: policies list measurements. So whatever is named is not cached when this has answered, which is all
/// that upstream promises; and what upstream refuses is refused.
fn clear_image_cache(address: SocketAddr, request: &ClearImageCacheRequest) -> Result<Empty, RpcError> {
    for key in [&request.image_hash, &request.config_hash] {
        if key != "all" && !key.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(RpcError::refused("invalid cache key"));
        }
    }
    info!(%address, "asked to clear the image cache: there is none");
    Ok(Empty {})
}

#[cfg(test)]
mod tests;
