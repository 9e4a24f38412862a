//! The admin listener: metrics, health, status. Plain HTTP, on an address of its own, unaffected by floods of clients.
//!
//! Owns: its routes. Never: changes anything.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use dstack_runtime::telemetry::Metrics;
use serde_json::Value;

use crate::node::Services;
use crate::status;

/// Routes of the admin listener.
pub(crate) fn router(services: Arc<Services>, metrics: Metrics) -> Router {
    Router::new()
        .route("/metrics", get(scrape))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/status", get(status_json))
        .with_state((services, metrics))
}

type Shared = State<(Arc<Services>, Metrics)>;

async fn scrape(State((services, metrics)): Shared) -> Response {
    status::gauges(&services);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics.render()).into_response()
}

/// Alive: the process answers, and its log has not stopped.
async fn healthz(State((services, _)): Shared) -> Response {
    match services.raft.status().running {
        Ok(()) => (StatusCode::OK, "ok\n").into_response(),
        Err(reason) => (StatusCode::INTERNAL_SERVER_ERROR, format!("raft stopped: {reason}\n")).into_response(),
    }
}

/// Ready: this node serves releases, and a majority answers now.
async fn readyz(State((services, _)): Shared) -> Response {
    let reason = match status::not_ready(&services) {
        None => status::without_quorum(&services).await,
        reason => reason,
    };
    match reason {
        None => (StatusCode::OK, "ready\n").into_response(),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

async fn status_json(State((services, _)): Shared) -> Json<Value> {
    Json(status::json(&services))
}
