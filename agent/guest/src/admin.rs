//! The admin listener: health, status, metrics. Owns: what is shown there. Never: a key; authentication (bind it to loopback).

use std::sync::Arc;

use axum::Router;
use axum::routing::get;
use dstack_runtime::telemetry::Metrics;
use serde_json::{Value, json};

use crate::guest::Guest;

/// Routes `/healthz`, `/readyz`, `/status`, `/metrics`. The agent listens only once it holds its keys, so it is ready when it answers.
pub fn router(guest: &Arc<Guest>, metrics: Metrics) -> Router {
    let status = format!("{:#}\n", status(guest));
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(async || "ok\n"))
        .route("/status", get(async move || status))
        .route("/metrics", get(async move || metrics.render()))
}

fn status(guest: &Guest) -> Value {
    json!({
        "app_id": guest.identity.app_id.to_string(),
        "app_name": guest.facts.name,
        "instance_id": hex::encode(&guest.identity.instance_id),
        "compose_hash": hex::encode(&guest.identity.compose_hash),
        "platform": guest.identity.platform.name(),
        "key_provider": guest.provider.0,
        "cluster_id": guest.cluster.map(|(cluster_id, _)| cluster_id.to_string()),
        "generation": guest.cluster.map(|(_, generation)| generation.0),
        "keys": guest.keys.names(),
        "software_root": guest.is_software,
    })
}
