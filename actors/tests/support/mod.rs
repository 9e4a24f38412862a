//! Shared by the tests of the actors and of the node: a whole cluster's state machine, machines, clients and holders in one process.
//!
//! Owns: the in-process ports. The state machine, the evidence, the shares and the sealed partials are the real ones.
//! Never: a verdict of its own; faults are put between the parts, not into them.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "shared by test binaries that each use a part of it"
)]

pub mod client;
pub mod cluster;
pub mod holders;
pub mod log;
pub mod members;
pub mod peers;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dstack_actors::ports::Now;
use dstack_protocol::UnixMillis;
use dstack_runtime::clock::{Clock as _, SystemClock};

/// Longest run of one test.
const TEST_MAX: Duration = Duration::from_secs(400);

/// Runs a test inside an actix system, with a timeout.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    actix::System::new().block_on(async { tokio::time::timeout(TEST_MAX, test).await.expect("the test hangs") })
}

/// Waits until `there` gives something.
pub async fn until<T>(what: &str, mut there: impl FnMut() -> Option<T>) -> T {
    for _ in 0..4_000 {
        if let Some(found) = there() {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("waited in vain for {what}");
}

/// Time of the machine that runs the test.
pub fn system_now() -> UnixMillis {
    SystemClock::new().now()
}

/// A clock that a test sets.
#[derive(Debug, Clone)]
pub struct TestNow(Arc<AtomicU64>);

impl TestNow {
    pub fn at(now: UnixMillis) -> Self {
        Self(Arc::new(AtomicU64::new(now.0)))
    }
    pub fn set(&self, now: UnixMillis) {
        self.0.store(now.0, Ordering::SeqCst);
    }
    pub fn get(&self) -> UnixMillis {
        UnixMillis(self.0.load(Ordering::SeqCst))
    }
    pub fn port(&self) -> Now {
        let this = self.clone();
        Arc::new(move || this.get())
    }
}
