//! Why a node ends by itself, and with which exit status.
//!
//! Owns: the statuses that process managers act on (docs/operations.md). Never: decides that a node ends.
//! Source: style.md §4; the statuses are those of sysexits(3).

use dstack_protocol::RefusalCode;
use dstack_raft::Halt;
use dstack_raft::audit_log::AuditLogError;
use dstack_storage::{EngineError, StoreError};

/// A human must look before another start.
const FAILURE: u8 = 1;
/// The store failed: a new start reads the disk anew.
const STORE_FAILED: u8 = 74;
/// Space is missing: a start succeeds as soon as there is some.
const TRY_AGAIN: u8 = 75;

/// The node stopped by itself, in order.
#[derive(Debug, thiserror::Error)]
#[error("{code}: {halt}; {}", code.fix())]
pub(crate) struct Ending {
    code: RefusalCode,
    halt: Halt,
}

impl Ending {
    /// The end that a stopped Raft leads to.
    pub(crate) fn of(halt: Halt) -> Self {
        let code = match halt {
            Halt::DiskFull { .. } => RefusalCode::StorageFull,
            _ => RefusalCode::Internal,
        };
        Self { code, halt }
    }
}

/// Exit status of a process that ends with `error`.
pub(crate) fn status(error: &anyhow::Error) -> u8 {
    if error.chain().any(is_full) {
        return TRY_AGAIN;
    }
    if error.chain().any(|cause| cause.is::<Ending>()) { STORE_FAILED } else { FAILURE }
}

/// Whether an error says that space on the disk is what is missing.
fn is_full(cause: &(dyn std::error::Error + 'static)) -> bool {
    let io = |error: &std::io::Error| matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded);
    cause.downcast_ref::<Ending>().is_some_and(|ending| matches!(ending.halt, Halt::DiskFull { .. }))
        || cause.downcast_ref::<StoreError>().is_some_and(StoreError::is_full)
        || cause.downcast_ref::<EngineError>().is_some_and(EngineError::is_full)
        || cause.downcast_ref::<AuditLogError>().is_some_and(AuditLogError::is_full)
        || cause.downcast_ref::<std::io::Error>().is_some_and(io)
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn a_full_disk_means_try_again_however_it_was_noticed() {
        let full = || EngineError::Full { need_bytes: 2, free_bytes: 1 };
        let halt = |halt| anyhow::Error::from(Ending::of(halt));
        assert_eq!(status(&halt(Halt::DiskFull { detail: "append".to_owned() })), TRY_AGAIN);
        assert_eq!(status(&anyhow::Error::from(StoreError::from(full())).context("store")), TRY_AGAIN);
        let io = Err::<(), _>(std::io::Error::from(std::io::ErrorKind::StorageFull)).context("cannot write x").unwrap_err();
        assert_eq!(status(&io), TRY_AGAIN);
        assert_eq!(status(&halt(Halt::Store { detail: "fsync".to_owned() })), STORE_FAILED);
        assert_eq!(status(&anyhow::anyhow!("node.seat")), FAILURE);
    }

    #[test]
    fn the_last_line_names_the_code_and_what_to_do() {
        let line = Ending::of(Halt::DiskFull { detail: "append".to_owned() }).to_string();
        assert!(line.starts_with("STORAGE_FULL: no space") && line.contains("append") && line.contains("free space"), "{line}");
    }
}
