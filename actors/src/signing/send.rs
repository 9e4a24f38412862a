//! Messages between two participants of a setup or a run: sent until they arrive, or until their time is over.
//!
//! Owns: repeating. Never: a third node in between (they may hold secrets of the pair; RA-TLS authenticates both ends).

use std::sync::Arc;
use std::time::Duration;

use dstack_protocol::{RefusalCode, Seat};
use dstack_secret::SecretBytes;
use tracing::debug;

use crate::ports::Peers;

const TIMEOUT: Duration = Duration::from_secs(10);
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// A message and where it goes.
pub(super) struct Letter {
    pub(super) seat: Seat,
    pub(super) path: &'static str,
    pub(super) body: SecretBytes,
}

/// Sends until it arrived, was refused for good, or `patience` is over. What does not arrive ends the run by its own timeout.
pub(super) async fn deliver(peers: Arc<dyn Peers>, letter: Letter, patience: Duration) {
    let trying = async {
        let mut pause = PAUSE_MIN;
        loop {
            match peers.post(letter.seat, letter.path, letter.body.expose(<[u8]>::to_vec), TIMEOUT).await {
                Ok(_) => return,
                // The recipient has it from an earlier try.
                Err(refusal) if refusal.code == RefusalCode::Duplicate => return,
                Err(refusal) if !refusal.code.retryable() => {
                    debug!(seat = letter.seat.0, path = letter.path, code = %refusal.code, got = refusal.got, "message refused");
                    return;
                }
                Err(_) => tokio::time::sleep(pause).await,
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    };
    if tokio::time::timeout(patience, trying).await.is_err() {
        debug!(seat = letter.seat.0, path = letter.path, "message not delivered");
    }
}
