//! A step of an engine over a peer's bytes, on a thread where a panic refuses that step. Owns: the thread's name, by which the process's
//! panic hook knows it (architecture.md §6). Never: shares state with its caller; the step's own catch destroys what panicked.

use dstack_protocol::{Refusal, RefusalCode};
use tokio::sync::oneshot;

/// Guarded, by the prefix that the panic hook of the node looks for.
const THREAD_NAME: &str = "guarded-sign";

/// Runs `step` to its end, whether or not the caller waits for it.
///
/// # Errors
/// [`RefusalCode::Internal`] when there is no thread, or the step panicked outside of the engine.
pub(crate) async fn guarded<T: Send + 'static>(step: impl FnOnce() -> T + Send + 'static) -> Result<T, Refusal> {
    let failed = |what: String| Refusal::new(RefusalCode::Internal, "a step of an engine", what);
    let (reply, answer) = oneshot::channel();
    let thread = std::thread::Builder::new().name(THREAD_NAME.to_owned());
    thread
        .spawn(move || {
            // The caller may have gone; the step counts all the same.
            let _ = reply.send(step());
        })
        .map_err(|error| failed(error.to_string()))?;
    answer.await.map_err(|_| failed("it broke off".to_owned()))
}
