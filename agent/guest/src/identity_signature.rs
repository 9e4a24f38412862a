//! The identity's signature over the app key, element 1 of signature chains. Owns: asking for it until it is there.
//! Never: keeps the agent from serving; takes one that is not by the pinned identity (`dstack_client::app_key`).
//! Source: threshold.md §5.1; guest API reference §3.2.

use std::sync::Arc;
use std::time::Duration;

use dstack_client::KmsClient;
use dstack_protocol::AppId;
use tokio_util::sync::CancellationToken;

use crate::guest::Guest;
use crate::keys::AppKeys;

/// First and longest pause between tries: the cluster signs within seconds where it can, and a cluster without identity may get one.
const PAUSE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(300));

/// For the try before the agent listens.
const FIRST: Duration = Duration::from_secs(5);

/// Asks once, not for long: an app that starts finds whole chains where the cluster signs at once.
pub async fn first(client: &KmsClient, app_id: &AppId, keys: &AppKeys) {
    let Some(app_key) = &keys.k256 else { return };
    match tokio::time::timeout(FIRST, client.app_key_signature(app_id, app_key)).await {
        Ok(Ok(signature)) => {
            let _ = keys.k256_signature.set(signature.to_vec());
        }
        Ok(Err(error)) => tracing::info!(code = error.code(), reason = %error, "no signature over the app key at once"),
        Err(_elapsed) => tracing::info!("no signature over the app key at once"),
    }
}

/// Asks until there is an answer or the agent ends. Nothing is asked where the boot left a signature, or there is no app key.
pub async fn fetch(guest: Arc<Guest>, shutdown: CancellationToken) {
    let (Some(client), Some(app_key)) = (&guest.client, &guest.keys.k256) else { return };
    if guest.keys.k256_signature.get().is_some() {
        return;
    }
    let (mut pause, longest) = PAUSE;
    loop {
        let asked = tokio::select! {
            () = shutdown.cancelled() => return,
            asked = client.app_key_signature(&guest.identity.app_id, app_key) => asked,
        };
        match asked {
            Ok(signature) => {
                let _ = guest.keys.k256_signature.set(signature.to_vec());
                tracing::info!("app key signed by the cluster's identity");
                return;
            }
            Err(error) => {
                tracing::warn!(code = error.code(), reason = %error, wait_ms = pause.as_millis(), "no signature over the app key yet")
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = pause.saturating_mul(2).min(longest);
    }
}
