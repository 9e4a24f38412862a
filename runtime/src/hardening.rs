//! Process hardening. Owns: what the process asks of the kernel at start, and what a panic does.
//! Never: fails the start for a measure that only lessens harm; it reports instead.
//! Source: architecture.md §6 (panic policy), style.md §7 (an abort skips drops, so core dumps are off).

use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};

use crate::guard;

/// What to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hardening {
    /// Lock all memory, now and later, so that no secret reaches swap. Needs `RLIMIT_MEMLOCK` or a capability.
    pub lock_memory: bool,
    /// Leave `/proc/<pid>` readable to processes of the same user. The software device needs it to measure the
    /// executable of its client when neither runs as root; with a hardware device it stays false.
    pub inspectable: bool,
}

/// What the kernel granted. Every refusal was logged as a warning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hardened {
    /// Core dumps are impossible.
    pub core_dumps_off: bool,
    /// Other processes of this user can neither trace nor read this one.
    pub uninspectable: bool,
    /// Memory is locked.
    pub memory_locked: bool,
    /// How many descriptors may be open at once.
    pub descriptors_max: u64,
}

/// Applies the measures, and installs the panic hook. Call first in `main`, after logging is up.
pub fn harden(wish: Hardening) -> Hardened {
    install_panic_hook();
    let core_dumps_off = granted("core dump limit", setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }));
    let uninspectable = !wish.inspectable && granted("dumpable flag", set_dumpable_behavior(DumpableBehavior::NotDumpable));
    // ONFAULT: pages are locked as they are touched; locking whole reserved arenas would exhaust any limit.
    let flags = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    let memory_locked = wish.lock_memory && granted("memory lock", mlockall(flags));
    Hardened { core_dumps_off, uninspectable, memory_locked, descriptors_max: raise_descriptor_limit() }
}

/// Raises the soft limit of open descriptors to the hard one; returns what holds afterwards.
pub fn raise_descriptor_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        granted("descriptor limit", setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }));
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Makes every panic fatal but those of guarded threads (see [`crate::guard`]).
///
/// The log line has place and thread, not the message: that may quote foreign bytes or worse. Standard error gets the
/// message only in builds with debug assertions.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string).unwrap_or_default();
        let thread = std::thread::current();
        let guarded = guard::is_guarded();
        if cfg!(debug_assertions) {
            eprintln!("{panic}");
        }
        if guarded {
            metrics::counter!("kms_runtime_guarded_panics_total").increment(1);
            tracing::error!(location, thread = thread.name(), "parser panicked, request refused");
        } else {
            tracing::error!(location, thread = thread.name(), "panic, process ends");
            eprintln!("panic at {location}, process ends");
            std::process::abort();
        }
    }));
}

fn granted(measure: &'static str, outcome: Result<(), rustix::io::Errno>) -> bool {
    match outcome {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(measure, reason = %error, "hardening measure refused by the kernel");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    /// Runs one of the ignored tests below in a child, because they change or end the process.
    fn in_child(test: &str) -> std::process::Output {
        let me = std::env::current_exe().unwrap();
        Command::new(me).args(["--ignored", "--exact", "--nocapture", &format!("hardening::tests::{test}")]).output().unwrap()
    }

    #[test]
    fn an_ordinary_panic_aborts() {
        let output = in_child("child_panics_unguarded");
        assert_eq!(output.status.signal(), Some(6), "{output:?}");
    }

    #[test]
    fn a_guarded_panic_does_not_abort() {
        let output = in_child("child_panics_guarded");
        assert!(output.status.success(), "{output:?}");
    }

    #[test]
    fn the_kernel_took_the_measures() {
        let output = in_child("child_hardens");
        assert!(output.status.success(), "{output:?}");
    }

    #[test]
    #[ignore = "run by an_ordinary_panic_aborts in a child process"]
    fn child_panics_unguarded() {
        install_panic_hook();
        let _ = std::thread::spawn(|| panic!("bug")).join();
    }

    #[test]
    #[ignore = "run by a_guarded_panic_does_not_abort in a child process"]
    fn child_panics_guarded() {
        install_panic_hook();
        assert_eq!(guard::run(|| -> u8 { panic!("foreign bytes") }), Err(guard::Panicked));
    }

    #[test]
    #[ignore = "run by the_kernel_took_the_measures in a child process"]
    fn child_hardens() {
        let hardened = harden(Hardening { lock_memory: false, inspectable: false });
        assert!(hardened.core_dumps_off && hardened.uninspectable && !hardened.memory_locked);
        assert_eq!(getrlimit(Resource::Core), Rlimit { current: Some(0), maximum: Some(0) });
        assert_eq!(rustix::process::dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
        assert_eq!(getrlimit(Resource::Nofile).current, getrlimit(Resource::Nofile).maximum);
        assert_eq!(hardened.descriptors_max, getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX));
    }
}
