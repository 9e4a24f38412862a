//! `forward`: the parent's end of an enclave's way out, a CONNECT proxy with a list of allowed targets. Owns: listening, how many
//! tunnels there are, their end. Never: reads what a tunnel carries; that is RA-TLS between enclave and node.
//! Source: util and deploy reference §10; the client's end is `dstack_client::route`.

pub(crate) mod listen;
mod target;
mod tunnel;

use std::sync::Arc;

use tokio::sync::Semaphore;

pub use listen::{Listen, ListenError, Listener};
pub use target::{Target, TargetError};

/// Tunnels at one time; more are refused, not queued.
pub const TUNNELS_MAX: usize = 256;

/// Serves until the listener fails.
///
/// # Errors
/// The listener's.
pub async fn serve(listener: Listener, allowed: Vec<Target>) -> std::io::Result<()> {
    let (allowed, places) = (Arc::new(allowed), Arc::new(Semaphore::new(TUNNELS_MAX)));
    loop {
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            // One peer that hung up too early is not the listener's end.
            Err(error) if listen::is_passing(&error) => {
                tracing::debug!(reason = %error, "a connection ended before it began");
                continue;
            }
            Err(error) => return Err(error),
        };
        let (allowed, place) = (Arc::clone(&allowed), Arc::clone(&places).try_acquire_owned());
        tokio::spawn(async move {
            match tunnel::run(stream, &allowed, place.is_ok()).await {
                Ok(done) => tracing::info!(target = %done.target, up_bytes = done.up_bytes, down_bytes = done.down_bytes, "tunnel ended"),
                Err(error) => tracing::warn!(reason = %error, "no tunnel"),
            }
            drop(place);
        });
    }
}
