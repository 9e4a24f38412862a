//! Orderly end. Owns: SIGTERM and SIGINT, turned into a token that every task can await.
//! Never: ends the process itself, except when a second signal says that waiting takes too long.

use std::future::Future;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Tells that the process should end. Clones share one state.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    token: CancellationToken,
}

impl Shutdown {
    /// Never ends by a signal; for tests and for parts that end on their own.
    pub fn new() -> Self {
        Self::default()
    }

    /// Listens for SIGTERM and SIGINT. The first requests shutdown; the second ends the process with status 130.
    ///
    /// # Errors
    /// The operating system refused to install a handler, or there is no tokio runtime with I/O.
    pub fn on_signals() -> std::io::Result<Self> {
        let shutdown = Self::new();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let requested = shutdown.clone();
        tokio::spawn(async move {
            let name = either(&mut terminate, &mut interrupt).await;
            tracing::info!(signal = name, "shutdown requested");
            requested.request();
            let name = either(&mut terminate, &mut interrupt).await;
            tracing::warn!(signal = name, "second signal, ending at once");
            std::process::exit(130);
        });
        Ok(shutdown)
    }

    /// Requests shutdown, as a signal would.
    pub fn request(&self) {
        self.token.cancel();
    }

    /// True once requested.
    pub fn is_requested(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Ends when shutdown is requested. Safe to drop and call again.
    pub fn requested(&self) -> impl Future<Output = ()> + Send + '_ {
        self.token.cancelled()
    }

    /// The token itself, for parts that know `tokio_util` and not this crate.
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }
}

async fn either(terminate: &mut Signal, interrupt: &mut Signal) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn sigterm_requests_shutdown() {
        let shutdown = Shutdown::on_signals().unwrap();
        assert!(!shutdown.is_requested());
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM).unwrap();
        tokio::time::timeout(Duration::from_secs(5), shutdown.requested()).await.unwrap();
        assert!(shutdown.clone().is_requested());
    }
}
