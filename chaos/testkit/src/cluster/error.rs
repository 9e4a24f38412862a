//! What can go wrong with a cluster of processes. Every variant says what to look at.

use std::path::PathBuf;

/// Failure of the harness or of a process that it runs.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// A program is not built. Caller's fault: build it.
    #[error(
        "{name} is not in {folder}; run `cargo build --workspace --bins` (`cargo xtask test` and `demo` do), or name its folder in DSTACK_BIN_DIR",
        folder = folder.display()
    )]
    NotBuilt {
        /// The program.
        name: String,
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// A file or directory of the harness cannot be used.
    #[error("{path}: {reason}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The system does not start a process or takes no signal.
    #[error("process {name}: {reason}")]
    Process {
        /// Its name.
        name: String,
        /// What the system said.
        reason: String,
    },
    /// A process ended by itself. Its log says why.
    #[error("{name} ended by itself ({status}); its last lines:\n{log}")]
    Ended {
        /// Its name.
        name: String,
        /// How it ended.
        status: String,
        /// End of its log.
        log: String,
    },
    /// A command that should succeed failed.
    #[error("`{command}` failed ({status}):\n{output}")]
    Command {
        /// Program and arguments.
        command: String,
        /// How it ended.
        status: String,
        /// What it printed.
        output: String,
    },
    /// A condition did not come true in time.
    #[error("waited {waited_s} s for {what}; last seen: {seen}")]
    TimedOut {
        /// The condition.
        what: String,
        /// Seconds waited.
        waited_s: u64,
        /// The last reason why it was not true yet.
        seen: String,
    },
    /// A process answers something that the harness does not understand.
    #[error("{from} answers what was not expected: {got}")]
    Unexpected {
        /// Who.
        from: String,
        /// What.
        got: String,
    },
}

impl ClusterError {
    pub(crate) fn file(path: impl Into<PathBuf>, reason: impl ToString) -> Self {
        Self::File { path: path.into(), reason: reason.to_string() }
    }

    pub(crate) fn unexpected(from: impl ToString, got: impl ToString) -> Self {
        Self::Unexpected { from: from.to_string(), got: got.to_string() }
    }
}
