//! Certificates that this node waits for: of its snapshot, and of sizes it has applied.
//!
//! Owns: asking again. Never: judges a certificate.

use std::sync::Arc;
use std::time::Duration;

use crate::node::Services;

pub(crate) async fn fetch_certificates(services: Arc<Services>) {
    loop {
        let snapshot = services.raft.with_state(|machine| machine.unconfirmed().copied()).ok().flatten();
        if let Some(head) = snapshot.filter(|_| !services.confirmed()) {
            services.heads.await_confirmation(head);
        }
        services.heads.fetch_missing().await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}
