//! Guarded execution of parsers of foreign bytes. Owns: which threads may survive a panic, and turning such a panic
//! into a refusal. Never: hides a panic; each is counted and logged by the hook of [`crate::hardening`].
//! Source: architecture.md §6: a panic aborts the process, except in the guarded parser pool.
//!
//! A thread is guarded while it is inside [`run`], or for its whole life when its name begins with
//! [`THREAD_NAME_PREFIX`]. The second way serves pools in crates that do not depend on this one: they must catch the
//! panic themselves and keep no state across it.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Threads whose name begins with this are guarded.
pub const THREAD_NAME_PREFIX: &str = "guarded-";

/// The closure panicked. The peer's bytes found a bug of ours: refuse with `INTERNAL_PARSER`, alarm, do not retry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("parser failed on these bytes")]
pub struct Panicked;

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Runs a pure function of foreign bytes; its panic becomes an error.
///
/// The closure must not touch state that outlives it: whatever it captured by reference is suspect afterwards.
///
/// # Errors
/// [`Panicked`], when it did.
pub fn run<T>(parse: impl FnOnce() -> T) -> Result<T, Panicked> {
    DEPTH.set(DEPTH.get().saturating_add(1));
    let outcome = catch_unwind(AssertUnwindSafe(parse));
    DEPTH.set(DEPTH.get().saturating_sub(1));
    outcome.map_err(|_payload| Panicked)
}

/// True where a panic of the current thread refuses one request and nothing else.
pub fn is_guarded() -> bool {
    DEPTH.get() > 0 || std::thread::current().name().is_some_and(|name| name.starts_with(THREAD_NAME_PREFIX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_inside_becomes_an_error_and_the_guard_ends() {
        assert!(!is_guarded());
        assert_eq!(run(is_guarded), Ok(true));
        assert_eq!(run(|| -> u8 { panic!("foreign bytes") }), Err(Panicked));
        assert!(!is_guarded());
    }

    #[test]
    fn thread_names_guard() {
        let guarded = std::thread::Builder::new().name(format!("{THREAD_NAME_PREFIX}x")).spawn(is_guarded).unwrap();
        assert!(guarded.join().unwrap());
        let plain = std::thread::Builder::new().name("x-guarded-".into()).spawn(is_guarded).unwrap();
        assert!(!plain.join().unwrap());
    }
}
