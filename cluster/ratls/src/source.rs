//! The certificate in use. Owns: the swap to a fresh one before the evidence expires, without touching open
//! connections. Never: makes evidence itself.
//! Source: issue "ratls": rotation before evidence expiry without dropping connections.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use dstack_protocol::UnixMillis;
use rustls::SignatureScheme;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio_util::sync::CancellationToken;

use crate::certificate::CertifiedIdentity;
use crate::error::RatlsError;
use crate::key::SCHEME;
use crate::{Now, metrics};

/// Makes the next certificate; blocks for as long as the device takes.
pub type Issue = Arc<dyn Fn(UnixMillis) -> Result<CertifiedIdentity, RatlsError> + Send + Sync>;

/// Gives every new handshake the newest certificate; handshakes and connections under way keep theirs.
#[derive(Debug)]
pub struct CertificateSource {
    current: RwLock<Arc<CertifiedIdentity>>,
}

impl CertificateSource {
    /// Begins with this one.
    pub fn new(identity: CertifiedIdentity) -> Arc<Self> {
        Arc::new(Self { current: RwLock::new(Arc::new(identity)) })
    }

    /// The one that new handshakes use.
    pub fn current(&self) -> Arc<CertifiedIdentity> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Uses this one from now on.
    pub fn rotate(&self, identity: CertifiedIdentity) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(identity);
        metrics::rotated();
    }

    /// Rotates `ahead` of each certificate's end until `stop`. A failure is logged and tried again soon: the old
    /// certificate serves until it ends.
    pub async fn keep_fresh(self: Arc<Self>, issue: Issue, now: Now, ahead: Duration, stop: CancellationToken) {
        loop {
            let wait = until(self.current().not_after(), ahead, now()).min(LOOK_EVERY);
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
            if until(self.current().not_after(), ahead, now()) > Duration::ZERO {
                continue;
            }
            let (issue, at) = (Arc::clone(&issue), now());
            match tokio::task::spawn_blocking(move || issue(at)).await {
                Ok(Ok(identity)) => {
                    tracing::info!(not_after_ms = identity.not_after().0, "certificate rotated");
                    self.rotate(identity);
                }
                Ok(Err(error)) => {
                    tracing::warn!(code = error.code(), reason = %error, "certificate rotation failed, will retry");
                    tokio::time::sleep(RETRY_AFTER).await;
                }
                Err(error) => {
                    tracing::error!(reason = %error, "certificate rotation task failed, will retry");
                    tokio::time::sleep(RETRY_AFTER).await;
                }
            }
        }
    }

    fn certified_for(&self, offered: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        offered.contains(&SCHEME).then(|| self.current().certified_key())
    }
}

/// The wall clock is looked at this often, because it may jump while the task sleeps.
const LOOK_EVERY: Duration = Duration::from_secs(30);
const RETRY_AFTER: Duration = Duration::from_secs(5);

fn until(not_after: UnixMillis, ahead: Duration, now: UnixMillis) -> Duration {
    Duration::from_millis(not_after.since(now)).saturating_sub(ahead)
}

impl ResolvesServerCert for CertificateSource {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.certified_for(hello.signature_schemes())
    }
}

impl rustls::client::ResolvesClientCert for CertificateSource {
    fn resolve(&self, _root_hints: &[&[u8]], offered: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.certified_for(offered)
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

    use super::*;

    #[tokio::test]
    async fn rotates_before_the_end_and_survives_a_failing_device() {
        let time = Arc::new(AtomicU64::new(1_790_000_000_000));
        let clock = Arc::clone(&time);
        let now: Now = Arc::new(move || UnixMillis(clock.load(Ordering::SeqCst)));
        let make = |at| CertifiedIdentity::for_node(at, Duration::from_secs(60), |_| Ok(vec![1; 10]));
        let source = CertificateSource::new(make(now()).unwrap());
        let first = source.current();
        let calls = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&calls);
        let issue: Issue = Arc::new(move |at| {
            counted.fetch_add(1, Ordering::SeqCst);
            make(at)
        });
        let stop = CancellationToken::new();
        // 59.9 s ahead of 60 s: due after 100 ms of wall time.
        let task = tokio::spawn(Arc::clone(&source).keep_fresh(issue, Arc::clone(&now), Duration::from_millis(59_900), stop.clone()));
        tokio::time::sleep(Duration::from_millis(250)).await;
        assert_eq!(calls.load(Ordering::SeqCst), 0, "the wall clock stands still, nothing is due");
        time.fetch_add(150, Ordering::SeqCst);
        tokio::time::timeout(Duration::from_secs(5), async {
            while Arc::ptr_eq(&first, &source.current()) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
        .unwrap();
        assert!(source.current().not_after() > first.not_after());
        assert_ne!(source.current().spki(), first.spki());
        stop.cancel();
        task.await.unwrap();
    }
}
