//! Waiting for conditions. Owns: the pause between two looks. Never: waits without an end.

use std::time::{Duration, Instant};

use super::error::ClusterError;

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(25);

/// Looks until `look` gives a value; `what` is the condition in words. `look` says what it saw instead.
///
/// # Errors
/// [`ClusterError::TimedOut`] with what was seen last; [`ClusterError::Ended`] of `look` at once: that does not pass by waiting.
pub fn until<T>(what: &str, patience: Duration, mut look: impl FnMut() -> Result<T, ClusterError>) -> Result<T, ClusterError> {
    let begun = Instant::now();
    loop {
        match look() {
            Ok(value) => return Ok(value),
            Err(ended @ ClusterError::Ended { .. }) => return Err(ended),
            Err(not_yet) if begun.elapsed() >= patience => {
                return Err(ClusterError::TimedOut { what: what.to_owned(), waited_s: patience.as_secs(), seen: not_yet.to_string() });
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}
