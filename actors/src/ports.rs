//! What the actors need of the rest of a node.
//!
//! Owns: the traits. Never: an implementation; the node has those over Raft, RA-TLS and the device.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use dstack_attest::VerifiedIdentity;
use dstack_protocol::command::{Command, CommandAnswer};
use dstack_protocol::state::State;
use dstack_protocol::{Refusal, RefusalCode, Seat, UnixMillis};
use tokio::sync::watch;

/// A boxed future that may move between threads.
pub type Later<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// The replicated log and the state applied here.
pub trait Log: Send + Sync {
    /// Proposes through whoever leads; waits at most `patience`.
    fn propose(&self, command: Command, patience: Duration) -> Later<Result<CommandAnswer, Refusal>>;
    /// Shows the state applied here; `None` before genesis. Short: applying waits.
    ///
    /// # Errors
    /// [`RefusalCode::Fork`] or [`RefusalCode::Internal`] once nothing may be decided from the state any more.
    fn show(&self, read: &mut dyn FnMut(Option<&State>)) -> Result<(), Refusal>;
    /// Changes with each applied command.
    fn applied(&self) -> watch::Receiver<u64>;
    /// Whether this node leads, as far as it knows.
    fn leads(&self) -> bool;
}

/// Reads something from the state; before genesis that is a refusal.
///
/// # Errors
/// [`RefusalCode::NoGenesis`], or why the state cannot be read.
pub fn read<T>(log: &dyn Log, read: impl FnOnce(&State) -> T) -> Result<T, Refusal> {
    let mut read = Some(read);
    let mut out = None;
    log.show(&mut |state| {
        if let (Some(state), Some(read)) = (state, read.take()) {
            out = Some(read(state));
        }
    })?;
    out.ok_or_else(|| Refusal::new(RefusalCode::NoGenesis, "an applied genesis", "an empty log").retry_after(500))
}

/// Other nodes.
pub trait Peers: Send + Sync {
    /// Sends `body` to `path` of the node at `seat`; its refusals come back as such.
    fn post(&self, seat: Seat, path: &'static str, body: Vec<u8>, timeout: Duration) -> Later<Result<Vec<u8>, Refusal>>;
    /// Smoothed time of an answer from that node; `None` when it was not reached lately.
    fn latency(&self, seat: Seat) -> Option<Duration>;
}

/// Head certificates at hand.
pub trait Certificates: Send + Sync {
    /// Whether a certificate covers the beacon at leaf `pos`.
    fn certifies_beacon(&self, pos: u64) -> bool;
}

/// Evidence from this node's own device. Blocking: called on a blocking thread.
pub trait Evidence: Send + Sync {
    /// Evidence over `report_data`.
    ///
    /// # Errors
    /// Says what the device said.
    fn evidence(&self, report_data: [u8; 64]) -> Result<Vec<u8>, String>;
}

/// Judges foreign evidence with the collateral bundle of that id; guarded against the parser's panics by whoever implements it.
pub type Judge = Arc<dyn Fn(&[u8], &[u8; 32], UnixMillis) -> Result<Arc<VerifiedIdentity>, Refusal> + Send + Sync>;

/// The node's clock.
pub type Now = Arc<dyn Fn() -> UnixMillis + Send + Sync>;

/// Fills a buffer from the operating system.
///
/// # Errors
/// [`RefusalCode::Internal`]: without randomness nothing secret is made.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], Refusal> {
    let mut out = [0u8; N];
    getrandom::fill(&mut out)
        .map_err(|error| Refusal::new(RefusalCode::Internal, "randomness of the operating system", error.to_string()))?;
    Ok(out)
}

/// A secret filled from the operating system.
///
/// # Errors
/// [`RefusalCode::Internal`].
pub(crate) fn random_secret<const N: usize>() -> Result<dstack_secret::Secret<N>, Refusal> {
    dstack_secret::Secret::try_from_fn(|bytes: &mut [u8; N]| getrandom::fill(bytes))
        .map_err(|error| Refusal::new(RefusalCode::Internal, "randomness of the operating system", error.to_string()))
}
